import json
import math
import os

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from zoobot_hf import FrozenStageArguments, FrozenStageTrainer, measure_selection
from zoobot_hf.publishing import run_folder
from zoobot_hf.publishing.hub import FIGURE_OF_RUN
from zoobot_hf.publishing.run_folder import JudgedLabel, JudgedVotes, draw_figures, write_json


def test_a_single_stage_is_pushed_in_one_commit(
    hub, hub_token, repo_id, batch_norm_model, processor, galaxy_images, galaxy_labels, tmp_path
):
    features = Features({"image": Image(), "label": ClassLabel(names=["not ring", "ring"])})
    galaxies = Dataset.from_dict({"image": galaxy_images[:8], "label": list(galaxy_labels[:8])}, features=features)
    arguments = FrozenStageArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=1,
        use_cpu=True,
        disable_tqdm=True,
        hub_model_id=repo_id,
        hub_token=hub_token,
    )
    trainer = FrozenStageTrainer(
        batch_norm_model, arguments, processing_class=processor, train_dataset=galaxies, eval_dataset=galaxies
    )
    trainer.train()
    assert trainer.push_to_hub() == f"{hub.url}/{repo_id}"
    assert set(hub.files(repo_id)) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert len(hub.commits(repo_id)) == 2
    assert b"- seed: 42" in hub.files(repo_id)["README.md"]
    (evaluation,) = json.loads(hub.files(repo_id)["metrics.json"])["frozen"]["evaluations"]
    assert "eval_loss" in evaluation
    assert hub_token.encode() not in b"".join(hub.files(repo_id).values())
    trainer.push_to_hub()
    assert len(hub.commits(repo_id)) == 2


def test_a_stage_is_pushed_at_its_end_alone(tmp_path):
    with pytest.raises(ValueError, match=r"hub_strategy is .*; a stage is pushed in one commit: choose .end.\."):
        FrozenStageArguments(output_dir=str(tmp_path), use_cpu=True, hub_strategy="every_save")


@pytest.fixture
def drawn(monkeypatch):
    """The options of each figure, of which none is really drawn."""
    drawn = []
    for name in [name for name in vars(run_folder) if name.startswith("plot_")]:
        monkeypatch.setattr(run_folder, name, lambda *_, **options: drawn.append(options))
    return drawn


def draw(folder, stage, **given):
    """The captions of a run's figures."""
    settings = {"histories": {stage: []}, "kept_stage": stage, "kept_epoch": 1, "metrics": {"confusion": []}}
    return draw_figures(folder, images=[], **settings, **given)


@pytest.mark.parametrize(("predicted", "has_wrong"), [("ring", True), ("bar", False)])
def test_a_run_without_a_wrong_galaxy_has_no_figure_of_the_most_wrong(tmp_path, drawn, predicted, has_wrong):
    judged = pd.DataFrame({"label": ["bar", "bar"], "predicted_label": [predicted, "bar"]})
    captions = draw(tmp_path, "unfrozen", label_names=["bar", "ring"], judged=judged)
    assert ("figures/most_wrong.png" in captions) == has_wrong
    assert len(drawn) == len(captions) == 2 + has_wrong
    assert captions["figures/training_curves.png"] == "Loss by epoch; the kept epoch is marked."


def test_figures_have_names_that_a_push_knows_and_captions_with_small_shares(tmp_path, drawn):
    probability, has_label = np.array([0.1, 0.9]), np.array([False, True])
    selection = measure_selection(probability, has_label, threshold=0.5, prevalence=0.00032)
    sky = {"prevalence": [0.99968, 0.00032], "classes": [0, 1]}
    labels = ["z < 1", "???", "z > 1"]
    captions = draw(
        tmp_path,
        "frozen",
        label_names=labels,
        judged=pd.DataFrame({"label": ["???"], "predicted_label": ["z < 1"]}),
        judged_labels=[JudgedLabel(name, probability, probability, has_label, selection, sky) for name in labels],
        judged_votes=JudgedVotes(probability, probability, {}, 10),
    )
    assert len(captions) == 13
    # Curves of thresholds are for the same sky as the selections: two for each label.
    assert [{name: own[name] for name in sky} for own in drawn if "prevalence" in own] == [sky] * 6
    assert all(FIGURE_OF_RUN.fullmatch(path) for path in captions)
    assert "In the frozen stage the training loss is the mean over all heads" in captions["figures/training_curves.png"]
    assert captions["figures/completeness_and_purity_z_1_0.png"].endswith("selected as 'z < 1', where 0.032% are.")
    assert captions["figures/roc_.png"] == "ROC, and purity against completeness where 0.032% are '???'."


def test_what_is_not_finite_is_null_in_a_file(tmp_path):
    write_json(tmp_path / "metrics.json", {"losses": (math.nan, math.inf, 1.0)})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"losses": [None, None, 1.0]}


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    path, replace = tmp_path / "run.json", os.replace

    def let_the_other_be_first(*names):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        write_json(path, "of the other")
        replace(*names)

    monkeypatch.setattr(os, "replace", let_the_other_be_first)
    write_json(path, "own")
    assert json.loads(path.read_text()) == "own"
    assert list(tmp_path.iterdir()) == [path]
