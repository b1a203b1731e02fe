"""A whole run on volunteers' votes: both stages, and the folder that is made of them."""

import copy
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import DatasetDict
from tiny_models import ENCODERS

from zoobot_hf import (
    DecisionTree,
    FrozenStageArguments,
    UnfrozenStageArguments,
    ZoobotConfig,
    ZoobotForGalaxyZoo,
    ZoobotImageProcessor,
    advanced_table,
    finetune,
    friendly_table,
    load_survey,
    read_votes,
    split_dataset,
)
from zoobot_hf.evaluation.vote_metrics import vote_metrics_for
from zoobot_hf.publishing.hub import push_folder
from zoobot_hf.training.trainer import FrozenStageTrainer

DECALS, EUCLID = load_survey("decals_dr5"), load_survey("euclid")
SETTINGS = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
VOTE_METRICS = {
    "vote_accuracy",
    "vote_mean_absolute_error",
    "vote_root_mean_squared_error",
    "vote_log_likelihood",
    "vote_interval_coverage",
}


def model_of(tree, encoder="layer_norm"):
    torch.manual_seed(0)
    return ZoobotForGalaxyZoo(ZoobotConfig(copy.deepcopy(ENCODERS[encoder]), decision_tree=tree.to_dict())).eval()


@pytest.fixture(scope="module")
def euclid_galaxies(galaxies_with_votes):
    return split_dataset(galaxies_with_votes(EUCLID), seed=0, validation_fraction=0.2)


@pytest.fixture
def run(euclid_galaxies, tmp_path):
    """A finetuning of a new model, or of the one given, to Euclid's questions, into tmp_path / name."""
    return runner(euclid_galaxies, tmp_path)


@pytest.fixture(scope="module")
def finished(euclid_galaxies, tmp_path_factory):
    """A run in a folder `out`, which is not to be changed."""
    return runner(euclid_galaxies, tmp_path_factory.mktemp("run"))("out", dataset_name="drawn galaxies")


@pytest.fixture
def finished_copy(finished, tmp_path):
    """The same run as `out` below tmp_path, with its checkpoints."""
    shutil.copytree(finished.output_dir.parent, tmp_path, dirs_exist_ok=True)
    return finished


def runner(galaxies, folder):
    def start(name, model=None, **options):
        settings = {
            "frozen": FrozenStageArguments(**SETTINGS, learning_rate=0.1),
            "unfrozen": UnfrozenStageArguments(**SETTINGS, learning_rate=1e-2),
            "dataset": galaxies,
        } | options
        model = model_of(EUCLID) if model is None else model
        return finetune(model, ZoobotImageProcessor(32), settings.pop("dataset"), folder / name, **settings)

    return start


def test_the_output_folder_is_ready_for_the_hub(finished):
    finetuned, folder = finished, finished.output_dir
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "metrics.json",
        "predictions.parquet",
        "predictions-friendly.parquet",
        "predictions-advanced.parquet",
        "figures/training_curves.png",
        "figures/vote_fractions.png",
    }
    losses = {stage.name: stage.validation_loss for stage in finetuned.stages}
    assert list(losses) == ["frozen", "unfrozen"]
    assert finetuned.kept_stage == min(losses, key=losses.get)
    assert finetuned.judgements == {}
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, loss in losses.items():
        assert set(metrics[name]) == VOTE_METRICS | {"questions", "validation_loss"}
        assert metrics[name]["validation_loss"] == loss
        assert list(metrics[name]["questions"]) == [question.name for question in EUCLID.questions]
    assert metrics[finetuned.kept_stage]["questions"]["bar-euclid"]["asked"] == 8


def test_the_tables_and_the_metrics_are_those_of_the_saved_model(finished, euclid_galaxies, processor):
    model = ZoobotForGalaxyZoo.from_pretrained(finished.output_dir).eval()
    test = euclid_galaxies["test"]
    with torch.inference_mode():
        expected = model(**processor(test["image"][:])).concentrations.numpy()
    tables = {
        name: pd.read_parquet(finished.output_dir / f"predictions{name}.parquet")
        for name in ("", "-friendly", "-advanced")
    }
    concentrations = tables[""][[f"{column}_concentration" for column in EUCLID.vote_columns]].to_numpy()
    np.testing.assert_allclose(concentrations, expected, rtol=1e-4)
    assert tables[""]["id_str"].tolist() == test["id_str"][:]
    assert np.array_equal(tables[""][EUCLID.vote_columns], read_votes(test, EUCLID))
    pd.testing.assert_frame_equal(tables["-friendly"], friendly_table(tables[""], model.config))
    pd.testing.assert_frame_equal(tables["-advanced"], advanced_table(tables[""], model.config))
    again = vote_metrics_for(EUCLID.to_dict()).compute(predictions=expected, references=read_votes(test, EUCLID))
    metrics = finished.test_metrics[finished.kept_stage]
    assert metrics["vote_accuracy"] == pytest.approx(again["vote_accuracy"])
    error = again["vote_mean_absolute_error_bar-euclid"]
    assert metrics["questions"]["bar-euclid"]["vote_mean_absolute_error"] == pytest.approx(error, rel=1e-4)


def test_the_card_speaks_of_votes_alone(finished):
    card = (finished.output_dir / "README.md").read_text()
    headings = re.findall(r"^## (.*)$", card, flags=re.MULTILINE)
    assert headings == [
        "How to use it",
        "What it answers",
        "How well it does",
        "Figures",
        "What it was trained on",
        "How it was trained",
        "Limits",
    ]
    for word in ("temperature", "threshold", "onfusion", "revalence", "logits", "pipeline(", "ImageClassification"):
        assert word not in card, word
    metrics = finished.test_metrics[finished.kept_stage]
    assert f"{metrics['vote_mean_absolute_error']:.3f}" in card
    bar = metrics["questions"]["bar-euclid"]
    assert f"| bar-euclid | 8 | {bar['confident']} | {bar['vote_accuracy']:.3f} |" in card
    assert "| train | 24 |\n" in card
    assert str(finished.output_dir.parent) not in card


def test_a_finished_run_is_not_trained_again(run, finished_copy, monkeypatch):
    monkeypatch.setattr(FrozenStageTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = run("out", resume=True)
    assert [stage.test_outputs for stage in again.stages] == [stage.test_outputs for stage in finished_copy.stages]


@pytest.mark.slow
def test_a_decals_tree_finetuned_to_euclids_questions_starts_better_in_both_stages(run, galaxies_with_votes, tmp_path):
    decals = split_dataset(galaxies_with_votes(DECALS), seed=0, validation_fraction=0.2)
    longer = {
        "frozen": FrozenStageArguments(**{**SETTINGS, "num_train_epochs": 5}, learning_rate=0.1),
        "unfrozen": UnfrozenStageArguments(**{**SETTINGS, "num_train_epochs": 8}, learning_rate=1e-2),
    }
    run("decals", model_of(DECALS, "batch_norm"), dataset=decals, **longer)
    once = {**SETTINGS, "num_train_epochs": 1}
    losses = {}
    for start in ("old answers", "fresh head"):
        torch.manual_seed(1)
        model = ZoobotForGalaxyZoo.from_pretrained(tmp_path / "decals", decision_tree=EUCLID.to_dict())
        if start == "fresh head":
            model.head[-1].reset_parameters()
        finetuned = run(
            start,
            model,
            frozen=FrozenStageArguments(**once, learning_rate=1e-3),
            unfrozen=UnfrozenStageArguments(**once, learning_rate=1e-3),
        )
        losses[start] = [stage.validation_loss for stage in finetuned.stages]
        assert finetuned.model.config.decision_tree["name"] == EUCLID.name
    assert losses["old answers"][0] < 0.97 * losses["fresh head"][0]
    assert losses["old answers"][1] < 0.97 * losses["fresh head"][1]


def test_questions_without_votes_are_named_on_the_card(run, galaxies_with_votes, tmp_path, caplog):
    caplog.set_level("WARNING")
    bar = next(question for question in EUCLID.questions if question.name == "bar-euclid")

    def forget(galaxy):
        was_shown = int(galaxy["id_str"][-1]) > 0
        forgotten = [answer.vote_column for answer in bar.answers] if was_shown else EUCLID.vote_columns
        return {"label": galaxy["label"] | dict.fromkeys(forgotten, 0.0)}

    dataset = split_dataset(galaxies_with_votes(EUCLID).map(forget), seed=0, validation_fraction=0.2)
    finetuned = run("out", dataset=dataset, skip_unfrozen=True)
    said = "No training galaxy has votes on bar-euclid: what the model says about it was not learned here."
    assert said in caplog.text
    assert f"- {said}\n- No test galaxy has votes on bar-euclid:" in (tmp_path / "out" / "README.md").read_text()
    assert finetuned.test_metrics["frozen"]["questions"]["bar-euclid"]["asked"] == 0
    assert not np.isnan(finetuned.test_metrics["frozen"]["vote_log_likelihood"])


def test_too_few_votes_leave_the_figure_out(run, galaxies_with_votes, tmp_path):
    def thin(galaxy):
        return {"label": {column: min(count, 2.0) for column, count in galaxy["label"].items()}}

    dataset = split_dataset(galaxies_with_votes(EUCLID).map(thin), seed=0, validation_fraction=0.2)
    run("out", dataset=dataset, skip_unfrozen=True)
    assert not (tmp_path / "out" / "figures" / "vote_fractions.png").exists()
    assert "No test galaxy has 10 votes on a question" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sky_prevalence": {"ring": 0.1}}, "sky_prevalence is .*'ring'.* is for classes.*; leave out sky_prevalence"),
        ({"decision_aim": "f1"}, "decision_aim is 'f1', which is for classes.*answers to a decision tree"),
        ({"decision_at_least": 0.9}, "decision_at_least is 0.9, which is for classes"),
        ({"balance": "oversample"}, "balance is 'oversample', which is for classes"),
    ],
)
def test_what_is_for_classes_is_refused_before_anything_is_written(options, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("out", **options)
    assert list(tmp_path.glob("out*")) == []


def test_votes_that_are_no_counts_are_named_before_training(run, euclid_galaxies, tmp_path):
    def spoil(galaxy, row):
        return {"label": galaxy["label"] | ({"bar-euclid_weak": -1.0} if row == 3 else {})}

    spoiled = DatasetDict({**euclid_galaxies, "test": euclid_galaxies["test"].map(spoil, with_indices=True)})
    with pytest.raises(ValueError, match=r"votes hold -1 in row 3; no counts are in the columns bar-euclid_weak: give"):
        run("out", dataset=spoiled)
    assert not (tmp_path / "out").exists()


def test_votes_for_another_tree_are_named(run, galaxies_with_votes):
    decals = split_dataset(galaxies_with_votes(DECALS), seed=0, validation_fraction=0.2)
    with pytest.raises(ValueError, match=r"misses the vote columns smooth-or-featured-euclid_smooth.*-dr5"):
        run("out", dataset=decals)


def test_another_tree_is_not_resumed(run, finished_copy):
    values = EUCLID.to_dict()
    values["questions"][-1]["asked_after"] = []
    with pytest.raises(ValueError, match=r"had another model\.decision_tree"):
        run("out", model_of(DecisionTree.from_dict(values)), resume=True)


def test_a_run_is_pushed_with_its_tables(finished, hub, hub_token, repo_id):
    with pytest.raises(ValueError, match=r"include_code is for classifiers, and .*config.json has a decision tree"):
        push_folder(finished.output_dir, repo_id, token=hub_token, include_code=True)
    push_folder(finished.output_dir, repo_id, token=hub_token)
    assert {"predictions-friendly.parquet", "figures/vote_fractions.png"} < set(hub.files(repo_id))
    model = ZoobotForGalaxyZoo.from_pretrained(repo_id)
    assert model.config.decision_tree == EUCLID.to_dict()
