import math
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

import zoobot_hf
from zoobot_hf.evaluation.intervals import SMALLEST_CLASS
from zoobot_hf.evaluation.vote_metrics import CONFIDENT_MAJORITY, CONFIDENT_VOTES
from zoobot_hf.publishing.model_card import (
    ModelCardFacts,
    OutOfFoldFacts,
    StageFacts,
    address_model_card,
    render_model_card,
)

LEAST = {
    "model_name": "ring-finder",
    "encoder": "microsoft/resnet-18",
    "labels": ("no ring", "ring"),
    "problem_type": "single_label_classification",
    "image_size": 224,
    "stages": (),
}
STAGES = (
    StageFacts(
        name="frozen",
        hyperparameters={"epochs": 20},
        metrics={"accuracy": 0.65, "completeness": 0.6, "confusion": [[3, 1], [1, 1]]},
    ),
    StageFacts(
        name="unfrozen",
        metrics={"accuracy": np.float64(0.76), "completeness": np.float32(0.5), "roc_auc": float("nan")},
    ),
)
EVERYTHING = LEAST | {
    "stages": STAGES,
    "kept_stage": "unfrozen",
    "base_model": "microsoft/resnet-18",
    "license": "apache-2.0",
    "dataset_name": "galaxies/rings",
    "dataset_ids": ("galaxies/rings",),
    "counts": {"train": {"no ring": 100, "ring": 120}, "test": {"no ring": 20, "ring": 24}},
    "cuts": {"edge-on": 12},
    "training_prevalence": {"no ring": 0.5, "ring": 0.5},
    "sky_prevalence": {"no ring": 0.97, "ring": 0.03},
    "seeds": {"split": 1},
    "versions": {"torch": "2.15.0"},
    "device": "CPU, 2 threads",
    "training_seconds": 4000.0,
    "figures": {"figures/training_curves.png": "Losses by epoch."},
    "limits": ("Labels are noisy.",),
    "simulated": True,
}


def render(**changes):
    return render_model_card(ModelCardFacts(**LEAST | changes))


def headings(text):
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def test_the_hub_reads_the_metadata():
    data = ModelCard(render(**EVERYTHING)).data
    assert data.library_name == "zoobot_hf"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert data.base_model == "microsoft/resnet-18"
    assert data.datasets == ["galaxies/rings"]
    assert data.model_name == "ring-finder"
    assert "astronomy" in data.tags


def test_the_metadata_hold_the_numbers_of_the_kept_stage():
    results = ModelCard(render(**EVERYTHING)).data.eval_results
    assert [(result.metric_type, result.metric_name, result.metric_value) for result in results] == [
        ("accuracy", "accuracy", 0.76),
        ("recall", "completeness", 0.5),
    ]
    assert {(result.dataset_type, result.dataset_split) for result in results} == {("galaxies/rings", "test")}


def test_a_single_stage_needs_no_choice_to_be_published():
    text = render(stages=STAGES[:1], dataset_name="simulated")
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [0.65, 0.6]
    assert "did better" not in text


def test_a_card_with_every_fact_has_every_section():
    text = render(**EVERYTHING)
    assert headings(text) == [
        "How to use it",
        "How well it does",
        "Figures",
        "What it was trained on",
        "Prevalence",
        "How it was trained",
        "Limits",
    ]
    for line in (
        "The unfrozen stage did better on the validation split",
        "drawn by a simulation",
        'classify = pipeline("image-classification", model="path/to/ring-finder")',
        "The pipeline is for 8-bit images without an alpha channel. For 16-bit, transparent or FITS images use",
        "On the test split, 44 galaxies:",
        "| | frozen stage | unfrozen stage |",
        "| accuracy | 0.650 | 0.760 |",
        "| train | 100 | 120 | 220 |",
        "- edge-on: 12",
        "| taken for the sky's | 0.970 | 0.030 |",
        "- epochs: 20",
        "- training time: 1 h 7 min",
        "- device: CPU, 2 threads",
        "![Losses by epoch.](figures/training_curves.png)",
        "- Labels are noisy.",
    ):
        assert line in text, line
    assert "confusion" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"temperature": 1.5}, "a temperature of 1.500, fitted"),
        ({"temperature": 1.5, "shift": [0.25, -0.25]}, "a temperature of 1.500 and adds 0.250, -0.250, fitted"),
        ({"temperature": [1.5, 2.0]}, "a temperature of 1.500, 2.000, fitted"),
    ],
)
def test_a_card_says_how_the_logits_are_calibrated(calibration, said):
    assert f"The model divides its logits by {said} on the validation split." in render(**calibration)


def test_scores_out_of_fold_are_not_called_those_of_a_test_split():
    facts = OutOfFoldFacts(
        folds=5, galaxies=470, metrics={"accuracy": 0.8}, scores={"labelled": {"accuracy": (0.8, 0.7, 0.9)}}
    )
    text = render(out_of_fold=facts, stages=[StageFacts(name="frozen")], dataset_name="simulated")
    assert "Out of fold: 470 galaxies" in text
    assert "the models of the 5 folds" in text
    assert "| | 5 folds |\n|---|---|\n| accuracy | 0.800 (0.700 to 0.900) |" in text
    assert "test split" not in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_split, result.metric_value) == ("out of fold", 0.8)


def test_a_card_says_nothing_that_is_not_known():
    text = render()
    assert headings(text) == ["How to use it"]
    assert "None" not in text
    assert "simulation" not in text
    assert "path/to/ring-finder" in text
    assert set(ModelCard(text).data.to_dict()) == {"library_name", "pipeline_tag", "tags", "model_name"}


@pytest.mark.parametrize(
    "fact", [name for name in EVERYTHING if name not in LEAST and name not in ("kept_stage", "base_model")]
)
def test_no_heading_is_empty_for_any_single_fact(fact):
    text = render(**{fact: EVERYTHING[fact]})
    assert re.search(r"^#.*\n+(#|\Z)", re.sub(r"(?s)```.*?```", "code", text), flags=re.MULTILINE) is None
    assert "\n\n\n" not in text


def test_the_lines_on_how_to_load_it_are_python():
    blocks = re.findall(r"```python\n(.*?)```", render(**EVERYTHING), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
    (line,) = re.findall(r"^from zoobot_hf import (.*)$", blocks[1], flags=re.MULTILINE)
    assert all(hasattr(zoobot_hf, name) for name in line.split(", "))


@pytest.mark.parametrize("path", ["/home/someone/rings", "../shared/rings", "rings/"])
def test_of_a_local_path_only_the_folder_is_shown(path):
    text = render(encoder=path, dataset_name=path, stages=STAGES, kept_stage="frozen")
    assert "on the encoder rings." in text
    assert "The dataset is rings." in text
    assert path not in text


def test_the_folder_one_stands_in_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "rings").mkdir()
    monkeypatch.chdir(tmp_path / "rings")
    assert "The dataset is rings." in render(dataset_name=".", stages=STAGES, kept_stage="frozen")


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_card_says_what_kind_of_model_it_is(problem_type):
    expected = {
        "multi_label_classification": "may have several: no ring, ring",
        "regression": "Its outputs: no ring, ring",
    }
    assert expected[problem_type] in render(problem_type=problem_type)


def test_a_card_of_a_decision_tree_says_what_is_asked_and_how_well_it_is_answered():
    scores = {"asked": 44, "confident": 0, "vote_accuracy": math.nan, "vote_mean_absolute_error": 0.1234}
    scores |= {"vote_root_mean_squared_error": 0.2, "vote_log_likelihood": -3.5, "vote_interval_coverage": 0.9}
    bar = {
        "name": "bar",
        "asked_after": ["smooth_no", "odd_yes"],
        "answers": [{"name": "strong", "vote_column": "bar_strong"}, {"name": "none", "vote_column": "bar_none"}],
    }
    text = render(
        problem_type="votes",
        labels=("bar_strong", "bar_none"),
        decision_tree={"name": "mine", "questions": [bar]},
        questions={"bar": scores},
        stages=(StageFacts(name="frozen", metrics={"vote_accuracy": 0.5, "questions": {"bar": scores}}),),
        counts={"train": {"galaxies": 100}, "test": {"galaxies": 44}},
        dataset_name="votes",
    )
    for line in (
        "A model of volunteers' answers for images of galaxies",
        "how volunteers would answer the question of the decision tree mine, and",
        "| bar | strong, none | smooth_no, odd_yes |",
        "| vote accuracy | 0.500 |",
        "| bar | 44 | 0 | - | 0.123 | 0.200 | -3.500 | 0.900 |",
        f"({CONFIDENT_VOTES} votes or more, more than {CONFIDENT_MAJORITY:.0%} of them for one answer)",
        "| train | 100 |\n",
    ):
        assert line in text, line
    assert headings(text)[:3] == ["How to use it", "What it answers", "How well it does"]
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    compile(block, "card", "exec")
    assert [result.metric_name for result in ModelCard(text).data.eval_results] == ["vote_accuracy"]


@pytest.mark.parametrize("facts", [{"problem_type": "votes"}, {"decision_tree": {"name": "mine", "questions": []}}])
def test_votes_and_a_decision_tree_go_together(facts):
    with pytest.raises(ValueError, match="decision_tree goes with the problem type 'votes'; give both or neither"):
        render(**facts)


def test_text_is_not_escaped_as_html():
    assert "smooth & round" in render(labels=("smooth & round", "<other>"))


def test_small_shares_and_scores_are_not_shown_as_zero():
    text = render(**EVERYTHING | {"sky_prevalence": {"no ring": 0.99968, "ring": 0.00032}, "predictions_for": "sky"})
    assert "| taken for the sky's | 1.000 | 0.00032 |" in text
    assert "99.968% are no ring, 0.032% are ring" in text


@pytest.mark.parametrize(
    ("threshold", "shown"),
    [(0.9996890912188662, "0.999689091"), (0.00037349999, "0.000373499"), (0.4271238, "0.427123"), (0.3, "0.300000")],
)
def test_the_threshold_on_a_card_selects_the_same_galaxies(threshold, shown):
    estimates = dict.fromkeys(("completeness", "purity", "f1"), (0.8, 0.7, 0.9))
    text = render(selections={"ring": {"threshold": threshold, "prevalence": 0.1, "aim": "best F1", **estimates}})
    assert f"its probability is at least {shown}. This threshold" in text


@pytest.mark.parametrize(
    ("labels", "problem_type", "words"),
    [
        (("no ring", "ring"), "single_label_classification", "that share, it reaches"),
        (("bar", "ring", "edge on"), "multi_label_classification", "that share, it reaches"),
        (
            ("smooth", "ring", "edge on"),
            "single_label_classification",
            "that share and to those of the other labels, it",
        ),
    ],
)
def test_a_selection_says_whose_shares_its_galaxies_have(labels, problem_type, words):
    estimates = dict.fromkeys(("completeness", "purity", "f1"), (0.8, 0.7, 0.9))
    selection = {"threshold": 0.5, "prevalence": 0.1, "aim": "best F1", **estimates}
    facts = {"labels": labels, "problem_type": problem_type, "predictions_for": "sky", "sky_prevalence": {"ring": 0.1}}
    assert f"On the test split, weighted to {words}" in render(selections={"ring": selection}, **facts)


@pytest.mark.parametrize(
    ("problem_type", "said"),
    [("single_label_classification", "accuracy and of what a"), ("multi_label_classification", "what a")],
)
def test_a_card_says_where_its_intervals_are_from(problem_type, said):
    scores = {"roc_auc": (0.8, 0.7, 0.9), "average_precision": (0.6, math.nan, math.nan)}
    stage = StageFacts(name="frozen", scores={"labelled": scores})
    text = render(problem_type=problem_type, stages=[stage])
    assert "90% intervals, from drawing the galaxies again. Those of ROC AUC, average precision, and comp" in text
    assert f"; those of {said} threshold selects are from such posteriors alone." in text
    assert f"Of the others there is none where a class has fewer than {SMALLEST_CLASS} galaxies" in text
    assert "| roc auc | 0.800 (0.700 to 0.900) |\n| average precision | 0.600 |" in text


def test_a_stage_without_a_score_keeps_its_column():
    stages = [StageFacts(name="frozen"), StageFacts(name="unfrozen", scores={"labelled": {"roc_auc": (0.8, 0.7, 0.9)}})]
    assert "| roc auc | - | 0.800 (0.700 to 0.900) |" in render(stages=stages, kept_stage="unfrozen")


def test_a_bar_in_a_name_adds_no_column_to_a_table():
    labels = ("no ring", "S0|Sa")
    counts = {"train": {"no ring": 3, "S0|Sa": 4}}
    text = render(labels=labels, counts=counts, sky_prevalence={"no ring": 0.9, "S0|Sa": 0.1})
    assert "| galaxies | no ring | S0\\|Sa | all |\n" in text
    assert "| share of galaxies | no ring | S0\\|Sa |\n" in text
    question = {"name": "disk|bulge", "asked_after": ["S0|Sa"], "answers": [{"name": "a|b"}, {"name": "c"}]}
    tree = {"name": "mine", "questions": [question]}
    text = render(problem_type="votes", labels=labels, decision_tree=tree)
    assert "| disk\\|bulge | a\\|b, c | S0\\|Sa |\n" in text


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (205, "3 min"), (3600, "1 h 0 min")])
def test_times_are_easy_to_read(seconds, text):
    assert f"- training time: {text}\n" in render(training_seconds=seconds)


def test_an_unknown_problem_type_is_named():
    with pytest.raises(ValueError, match="'ranking'; choose one of single_label_classification"):
        render(problem_type="ranking")


def test_a_kept_stage_that_was_not_run_is_named():
    with pytest.raises(ValueError, match="'third'; choose one of the stages: frozen, unfrozen"):
        render(stages=STAGES, kept_stage="third")


def test_an_addressed_card_has_the_name_and_address_of_its_repository():
    text = render(**EVERYTHING | {"model_name": "out"})
    expected = render(**EVERYTHING).replace("path/to/ring-finder", "astronomer/ring-finder")
    assert address_model_card(text, "astronomer/ring-finder") == expected


def test_an_addressed_card_keeps_what_was_written_into_it():
    text = render(model_name="out").replace("# out", "# out\n\nBy me, in a path/to/elsewhere.")
    addressed = address_model_card(text, "astronomer/rings")
    assert "\n# rings\n\nBy me, in a path/to/elsewhere.\n" in addressed
    assert address_model_card(addressed, "astronomer/rings") == addressed


def test_a_card_says_how_to_load_the_model_with_its_code():
    addressed = address_model_card(render(**EVERYTHING), "astronomer/ring-finder", with_code=True)
    assert headings(addressed) == headings(render(**EVERYTHING))
    block = re.findall(r"```python\n(.*?)```", addressed, flags=re.DOTALL)[2]
    assert '.from_pretrained("astronomer/ring-finder", trust_remote_code=True)' in block
    compile(block, "card", "exec")
    assert addressed.index(block) < addressed.index("## How well it does")
