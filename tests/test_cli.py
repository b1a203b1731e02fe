import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.io import fits
from PIL import Image
from safetensors import SafetensorError
from scipy import stats
from small_trees import BAR, SMOOTH, make_question
from tiny_models import with_decided_head
from transformers import AutoModel, ConvNextConfig, pipeline

from zoobot_hf import (
    ZoobotConfig,
    ZoobotForGalaxyZoo,
    ZoobotForImageClassification,
    ZoobotImageProcessor,
    load_survey,
    read_catalog,
)
from zoobot_hf.cli import COMMANDS, main
from zoobot_hf.commands.finetune import _score_line
from zoobot_hf.data.catalog import find_catalog
from zoobot_hf.data.dataset import catalog_to_dataset
from zoobot_hf.evaluation.intervals import Estimate
from zoobot_hf.training import cross_validation

COMMAND = Path(sys.executable).with_name("zoobot-hf")
ENCODER = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
DECALS, EUCLID = load_survey("decals_dr5"), load_survey("euclid")
NORMALIZATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
METRICS = {
    "accuracy",
    "balanced_accuracy",
    "completeness",
    "purity",
    "f1",
    "roc_auc",
    "average_precision",
    "log_loss",
    "confusion",
}
ANOTHER_PROCESS = SimpleNamespace(is_main_process=False, num_processes=2)
PROBABILITIES = ["probability_not_ring", "probability_ring"]


# The command line, and what it is given ----------------------------------------------------------------------------


class Outcome:
    """How a command ended: `status`, `output`, and the lines of `complaints` on stderr without progress bars."""

    def __init__(self, status, output, errors):
        self.status = status
        self.output = output
        self.errors = errors
        self.complaints = re.findall(r"zoobot-hf.*", errors)


@pytest.fixture
def zoobot_hf(capfd):
    """Runs a command line in this process."""

    def run(*arguments):
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's, for a command line that can't be read
            status = end.code
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def refused(zoobot_hf):
    """Runs a command line that must end with one line on stderr, and gives that line."""

    def run(*arguments):
        outcome = zoobot_hf(*arguments)
        assert outcome.status not in (0, None)
        assert "Traceback" not in outcome.errors
        assert len(outcome.complaints) == 1, outcome.errors
        return outcome.complaints[0]

    return run


def run_process(*arguments, **environment):
    """Runs a command line as a user does, in a process of its own."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def finetune_options(dataset, encoder, output_dir, **changes):
    options = {
        "encoder": encoder,
        "dataset": dataset,
        "label_column": "ring",
        "output_dir": output_dir,
        "frozen_epochs": 1,
        "unfrozen_epochs": 1,
        "device": "cpu",
        **changes,
    }
    return ["finetune", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """An encoder of 10k parameters as transformers saves it, with new weights."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny-encoder"
    torch.manual_seed(0)
    AutoModel.from_config(ENCODER).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, **NORMALIZATION}))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model with a head for "not ring" and "ring", as a finetuning leaves it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-model"
    torch.manual_seed(0)
    labels = {"id2label": {0: "not ring", 1: "ring"}, "label2id": {"not ring": 0, "ring": 1}}
    model = ZoobotForImageClassification(ZoobotConfig(ENCODER, encoder_name="tiny", **labels))
    with_decided_head(model).save_pretrained(folder)
    ZoobotImageProcessor(32, **NORMALIZATION, do_normalize=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory, shared_galaxy_folder, encoder_folder):
    """A folder with a finished run `out` and its checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    assert main(finetune_options(shared_galaxy_folder, encoder_folder, folder / "out")) == 0
    return folder


@pytest.fixture
def run_folder(shared_run, tmp_path):
    """`out` of a finished run of one and one epoch on the drawn galaxies."""
    return shutil.copytree(shared_run, tmp_path / "run") / "out"


def edit_catalog(folder, change):
    """Rewrites a folder's catalog, and gives the folder."""
    path = find_catalog(folder)
    change(pd.read_csv(path)).to_csv(path, index=False)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# finetune ----------------------------------------------------------------------------------------------------------


def test_finetune_leaves_a_folder_that_is_ready_for_the_hub(shared_run, shared_galaxy_folder):
    table = pd.read_parquet(shared_run / "out" / "predictions.parquet")
    is_wrong = (table["label"] != table["predicted_label"]).any()
    most_wrong = {"figures/most_wrong.png"} if is_wrong else set()
    assert set(contents(shared_run / "out")) == most_wrong | {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "metrics.json",
        "predictions.parquet",
        "figures/training_curves.png",
        "figures/confusion.png",
        *(
            f"figures/{name}.{end}"
            for name in ("reliability", "completeness_and_purity", "roc")
            for end in ("png", "pdf")
        ),
    }
    assert (shared_run / "out-checkpoints" / "frozen" / "best" / "model.safetensors").is_file()
    card = (shared_run / "out" / "README.md").read_text()
    assert f"The dataset is {shared_galaxy_folder.name}." in card
    assert str(shared_galaxy_folder) not in card


def test_finetune_measures_both_stages_on_the_test_split(shared_run):
    metrics = json.loads((shared_run / "out" / "metrics.json").read_text())
    table = pd.read_parquet(shared_run / "out" / "predictions.parquet")
    for stage in ("frozen", "unfrozen"):
        assert set(metrics[stage]) >= METRICS
        assert np.sum(metrics[stage]["confusion"]) == len(table) == 8
    assert sorted(table["label"]) == ["not ring"] * 4 + ["ring"] * 4
    right = (table["label"] == table["predicted_label"]).mean()
    assert metrics[metrics["kept_stage"]]["accuracy"] == pytest.approx(right)


def test_finetune_ends_by_printing_metrics_and_paths(run_folder, encoder_folder, shared_galaxy_folder, zoobot_hf):
    outcome = zoobot_hf(*finetune_options(shared_galaxy_folder, encoder_folder, run_folder), "--resume")
    assert outcome.status == 0
    assert re.search(r"on the test split +accuracy +roc auc +completeness +purity +log loss\n", outcome.output)
    assert re.search(r"\nfrozen( \(kept\))?( +\d\.\d{3}){5}\nunfrozen", outcome.output)
    for name in ("README.md", "predictions.parquet", "figures/confusion.png"):
        assert str(run_folder / name) in outcome.output


def test_the_unfrozen_stage_is_left_out_at_no_epochs(galaxy_folder, encoder_folder, tmp_path, zoobot_hf):
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out", unfrozen_epochs=0)
    assert zoobot_hf(*options).status == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) == {"frozen", "kept_stage"}


def test_folds_judge_every_galaxy_before_the_finetuning(
    galaxy_folder, encoder_folder, tmp_path, zoobot_hf, refused, monkeypatch
):
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out", unfrozen_epochs=0, folds=2)
    outcome = zoobot_hf(*options)
    assert outcome.status == 0
    assert re.search(
        r"out of fold, 40 galaxies: value and 90% interval\naccuracy +\d\.\d{3}  \d\.\d{3} to", outcome.output
    )
    table = pd.read_parquet(tmp_path / "out-folds" / "out_of_fold.parquet")
    assert sorted(table["id_str"]) == sorted(read_catalog(galaxy_folder / "catalog.csv")["id_str"])
    assert (tmp_path / "out-folds" / "label_audit.png").is_file()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["out_of_fold"]["galaxies"] == 40
    assert "models of folds" in outcome.output
    assert pd.read_parquet(tmp_path / "out" / "predictions.parquet").equals(table)
    # As after a kill before the final model.
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-checkpoints")
    assert "out-folds already holds a run; go on with it (resume=True, --resume)" in refused(*options)
    monkeypatch.setattr(cross_validation, "run_stages", lambda *args, **kwargs: pytest.fail("trained again"))
    assert zoobot_hf(*options, "--resume").status == 0
    assert pd.read_parquet(tmp_path / "out" / "predictions.parquet").equals(table)


def test_what_a_run_with_folds_can_not_do_is_refused_before_them(galaxy_folder, encoder_folder, tmp_path, refused):
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out", folds=2)
    assert "test_fraction is for a model that is tested" in refused(*options, "--test_fraction", 0.3)
    assert "give the purity to be reached" in refused(*options, "--decision_aim", "purity")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert "holds files that are not a run's" in refused(*options)


def test_more_folds_than_galaxies_of_a_class_are_refused(galaxy_folder, encoder_folder, tmp_path, refused):
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out", folds=21)
    assert "has 20 galaxies, fewer than the 21 folds; choose fewer folds" in refused(*options)
    assert not (tmp_path / "out").exists()


def test_a_label_curve_is_printed_and_written_by_the_main_process(
    galaxy_folder, encoder_folder, tmp_path, zoobot_hf, monkeypatch
):
    options = {"encoder": encoder_folder, "dataset": galaxy_folder, "label_column": "ring", "device": "cpu"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += ["--numbers", 2, 4, 8, 16, "--seeds", 3, "--skip_untrained", "--output_dir", tmp_path / "curve"]
    with monkeypatch.context() as another_process:
        another_process.setattr("zoobot_hf.commands.curve.PartialState", lambda: ANOTHER_PROCESS)
        outcome = zoobot_hf("curve", *arguments)
    assert outcome.status == 0
    assert "labels" not in outcome.output
    assert list((tmp_path / "curve").iterdir()) == []
    outcome = zoobot_hf("curve", *arguments)
    assert outcome.status == 0
    assert re.search(r"mean over 3 seeds, by labelled galaxies of each class\nlabels +2 +4 +8 +16\n", outcome.output)
    assert "of accuracy" in outcome.output
    assert {path.name for path in (tmp_path / "curve").iterdir()} == {
        f"label_curve{end}" for end in (".csv", "_runs.csv", ".json", ".png", ".pdf")
    }


def test_more_labels_than_there_are_refused(galaxy_folder, encoder_folder, tmp_path, refused):
    options = ["--encoder", encoder_folder, "--dataset", galaxy_folder, "--label_column", "ring"]
    line = refused("curve", *options, "--output_dir", tmp_path / "curve", "--numbers", 50)
    assert "numbers start at 50, and outside the test set there are 16 galaxies" in line


def test_classes_give_a_model_for_another_problem_a_new_head(galaxy_folder, model_folder, tmp_path, zoobot_hf, caplog):
    several = "multi_label_classification"
    model = ZoobotForImageClassification.from_pretrained(model_folder, problem_type=several)
    shutil.copytree(model_folder, tmp_path / "encoder")
    model.bfloat16().save_pretrained(tmp_path / "encoder")
    assert zoobot_hf(*finetune_options(galaxy_folder, tmp_path / "encoder", tmp_path / "out")).status == 0
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert (loaded.config.problem_type, loaded.dtype) == ("single_label_classification", torch.float32)
    options = ["--encoder", tmp_path / "encoder", "--dataset", galaxy_folder, "--label_column", "ring"]
    options += ["--numbers", 2, 4, "--seeds", 2, "--skip_untrained", "--output_dir", tmp_path / "curve"]
    caplog.set_level("INFO")
    caplog.clear()
    assert zoobot_hf("curve", *options).status == 0
    assert "head is new, to be trained: not ring, ring" in caplog.text


def test_other_labels_give_a_finetuned_model_a_new_head(galaxy_folder, model_folder, tmp_path, zoobot_hf, caplog):
    caplog.set_level("INFO")
    edit_catalog(galaxy_folder, lambda table: table.assign(shape=["arc", "bar", "clump", "disk"] * 10))
    options = finetune_options(galaxy_folder, model_folder, tmp_path / "out", label_column="shape", unfrozen_epochs=0)
    outcome = zoobot_hf(*options)
    assert outcome.status == 0
    assert "its old head was left out" in caplog.text
    assert "head is new, to be trained: arc, bar, clump, disk" in caplog.text
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert {"probability_arc", "probability_disk"} < set(table.columns)


def test_finetune_takes_the_classes_from_subfolders(galaxy_folder, model_folder, tmp_path, zoobot_hf):
    table = read_catalog(galaxy_folder / "catalog.csv")
    for row in table.to_dict("records"):
        target = tmp_path / "folder" / ("ring" if row["ring"] else "no ring") / Path(row["file_loc"]).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row["file_loc"], target)
    options = finetune_options(
        tmp_path / "folder", model_folder, tmp_path / "out", label_column=None, unfrozen_epochs=0
    )
    assert zoobot_hf(*options).status == 0
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert set(predictions["label"]) == {"no ring", "ring"}
    assert set(predictions["id_str"]) < set(table["id_str"])


def test_a_run_is_pushed_and_predicts_from_the_hub(
    run_folder, encoder_folder, shared_galaxy_folder, tmp_path, zoobot_hf, hub, hub_token, repo_id, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub_token)
    options = finetune_options(shared_galaxy_folder, encoder_folder, run_folder, push_to_hub=repo_id)
    outcome = zoobot_hf(*options, "--resume")
    assert f"pushed to {hub.url}/{repo_id}" in outcome.output
    tables = []
    for model in (repo_id, run_folder):
        output = tmp_path / "table.csv"
        assert zoobot_hf("predict", "--model", model, "--images", shared_galaxy_folder, "--output", output).status == 0
        tables.append(pd.read_csv(output))
    pd.testing.assert_frame_equal(*tables)


def test_a_split_without_a_class_is_reported_after_resume(model_folder, galaxy_folder, tmp_path, zoobot_hf):
    for index in range(40):
        split = "test" if index < 4 else "validation" if index < 12 else "train"
        label = "ring" if index % 2 and split != "test" else "none"
        target = tmp_path / "folder" / split / label / f"galaxy_{index:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(galaxy_folder / "images" / target.name, target)
    options = finetune_options(tmp_path / "folder", model_folder, tmp_path / "out", unfrozen_epochs=0)
    for more in ([], ["--resume"]):
        outcome = zoobot_hf(*options, *more)
        assert outcome.status == 0
        assert re.search(r"\nfrozen \(kept\) +\d\.\d{3} +nan", outcome.output)


# votes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def votes_folder(galaxy_folder, galaxies_with_votes):
    """The drawn galaxies with votes on Euclid's questions in their catalog."""
    votes = pd.DataFrame(galaxies_with_votes(EUCLID)["label"][:])
    return edit_catalog(galaxy_folder, lambda table: table.join(votes))


@pytest.fixture
def tree_folder(tmp_path):
    """A model of the DECaLS decision tree, as a finetuning leaves it."""
    folder = tmp_path / "decals-model"
    torch.manual_seed(0)
    with_decided_head(ZoobotForGalaxyZoo(ZoobotConfig(ENCODER, decision_tree=DECALS.to_dict()))).save_pretrained(folder)
    ZoobotImageProcessor(32).save_pretrained(folder)
    return folder


def votes_options(dataset, encoder, output_dir, **changes):
    return finetune_options(dataset, encoder, output_dir, **{"label_column": None, "survey": "euclid", **changes})


def test_a_decals_model_is_finetuned_to_euclids_votes(votes_folder, tree_folder, tmp_path, zoobot_hf, caplog):
    caplog.set_level("INFO")
    outcome = zoobot_hf(*votes_options(votes_folder, tree_folder, tmp_path / "out"))
    assert outcome.status == 0
    assert "answers are taken over: smooth-or-featured-euclid_smooth, " in caplog.text
    assert re.search(r"on the test split +accuracy +mean error +RMS error +log likelihood +coverage\n", outcome.output)
    assert re.search(r"\nfrozen( \(kept\))?( +-?\d+\.\d{3}){5}\nunfrozen", outcome.output)
    for name in ("predictions.parquet", "predictions-friendly.parquet", "figures/vote_fractions.png"):
        assert str(tmp_path / "out" / name) in outcome.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["frozen"]["questions"]) == {question.name for question in EUCLID.questions}
    assert ZoobotConfig.from_pretrained(tmp_path / "out").decision_tree == EUCLID.to_dict()


def test_an_encoder_is_finetuned_to_a_tree_of_ones_own(votes_folder, encoder_folder, tmp_path, zoobot_hf, caplog):
    caplog.set_level("INFO")
    values = EUCLID.to_dict()
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "questions": values["questions"][:1]}))
    smooth = [answer.vote_column for answer in EUCLID.questions[0].answers]
    edit_catalog(votes_folder, lambda table: table[["id_str", "file_loc", *smooth]])
    options = votes_options(votes_folder, encoder_folder, tmp_path / "out", survey=tmp_path / "mine.json")
    assert zoobot_hf(*options, "--unfrozen_epochs=0").status == 0
    assert "The linear head for the decision tree 'mine' is new, to be trained." in caplog.text
    config = ZoobotConfig.from_pretrained(tmp_path / "out")
    assert config.label_names == smooth


def test_simulated_volunteers_train_a_tree(tree_folder, tmp_path, zoobot_hf, monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.inputs.SIMULATED_GALAXIES", 24)
    options = votes_options("simulated", tree_folder, tmp_path / "out", survey="decals_dr5", unfrozen_epochs=0)
    assert zoobot_hf(*options).status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| train | 14 |" in card
    assert "**The galaxies that it was finetuned on were drawn by a simulation.**" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"survey": "eucild"}, "survey is 'eucild'; known are .*euclid"),
        ({"survey": "mine.json"}, "decision tree mine.json does not exist"),
        ({"label_column": "ring"}, "label_column is for labels, and with a survey the model is trained on votes"),
        ({"folds": 3}, "folds is for labels"),
        ({"sky_prevalence": "ring=0.1"}, "sky_prevalence is .* is for classes"),
        ({"decision_aim": "f1"}, "decision_aim is 'f1', which is for classes"),
        ({"balance": "oversample"}, "balance is 'oversample', which is for classes"),
        ({"survey": "decals_dr5"}, "no vote column 'smooth-or-featured-dr5_smooth', .*, 34 in all"),
    ],
)
def test_what_does_not_go_with_votes_is_refused(options, message, votes_folder, tree_folder, tmp_path, refused):
    assert re.search(message, refused(*votes_options(votes_folder, tree_folder, tmp_path / "out", **options)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [-1, 0.5])
def test_votes_that_are_no_counts_are_named(count, votes_folder, tree_folder, tmp_path, refused):
    def spoil(table):
        table["bar-euclid_weak"] = table["bar-euclid_weak"].astype(float)
        table.loc[3, "bar-euclid_weak"] = count
        return table

    line = refused(*votes_options(edit_catalog(votes_folder, spoil), tree_folder, tmp_path / "out"))
    assert f"votes hold {float(count)} in the column" in line
    assert "'bar-euclid_weak' for 1 galaxy: 'galaxy_03'" in line


def test_a_model_of_votes_is_not_exported(tree_folder, refused):
    line = refused("export", tree_folder, "--format", "onnx")
    assert "decals-model', which answers a decision tree, and only models of labels are exported; share it as" in line


def test_predict_gives_the_friendly_and_the_advanced_table_of_three_galaxies(galaxy_folder, tmp_path, zoobot_hf):
    """A tree whose concentrations are known: 1 + 100 sigmoid of a head with nothing but biases."""
    tree = {"name": "two", "questions": [SMOOTH, BAR]}
    model = ZoobotForGalaxyZoo(ZoobotConfig(ENCODER, decision_tree=tree))
    concentrations = torch.tensor([6.0, 2.0, 9.0, 3.0])
    with torch.no_grad():
        model.head[-1].weight.zero_()
        model.head[-1].bias.copy_(((concentrations - 1) / 100).logit())
    model.save_pretrained(tmp_path / "model")
    ZoobotImageProcessor(32).save_pretrained(tmp_path / "model")
    edit_catalog(galaxy_folder, lambda table: table.head(3))
    arguments = ["--model", tmp_path / "model", "--images", galaxy_folder, "--output", tmp_path / "table.csv"]
    outcome = zoobot_hf("predict", *arguments)
    assert outcome.status == 0
    friendly, advanced = (pd.read_csv(tmp_path / f"table-{name}.csv") for name in ("friendly", "advanced"))
    assert friendly["id_str"].tolist() == advanced["id_str"].tolist() == ["galaxy_00", "galaxy_01", "galaxy_02"]
    # By hand: 6 / 8 are expected to say yes; the 2 / 8 who say no are asked about the bar, too few for its fractions.
    np.testing.assert_allclose(friendly[["smooth_yes_fraction", "smooth_no_fraction"]], [[0.75, 0.25]] * 3, rtol=1e-4)
    assert friendly[["bar_yes_fraction", "bar_no_fraction"]].isna().all(axis=None)
    np.testing.assert_allclose(advanced["bar_yes_fraction"], 0.75, rtol=1e-4)
    np.testing.assert_allclose(advanced["bar_yes_proportion-asked"], 0.25, rtol=1e-4)
    ends = stats.beta(9, 3).ppf([0.05, 0.95])
    np.testing.assert_allclose(advanced[["bar_yes_90pc-lower", "bar_yes_90pc-upper"]], [ends] * 3, rtol=1e-4)
    table = pd.read_csv(tmp_path / "table.csv")
    np.testing.assert_allclose(table["smooth_no_concentration"], 2, rtol=1e-4)


def test_a_tables_companion_does_not_overwrite_the_catalog(votes_folder, tree_folder, refused):
    catalog = find_catalog(votes_folder).rename(votes_folder / "table-advanced.csv")
    line = refused("predict", "--model", tree_folder, "--images", catalog, "--output", votes_folder / "table.csv")
    assert "table-advanced.csv, the catalog itself, which would be lost" in line


def test_a_companion_that_fits_has_no_room_for_is_refused_before_predicting(
    shared_galaxy_folder, tmp_path, refused, monkeypatch
):
    bar = make_question("bar", "y" * 48, "no")  # _concentration still fits, _proportion-asked doesn't
    model = ZoobotForGalaxyZoo(ZoobotConfig(ENCODER, decision_tree={"name": "one", "questions": [bar]}))
    model.save_pretrained(tmp_path / "model")
    ZoobotImageProcessor(32).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("zoobot_hf.commands.predict.predict_galaxies", lambda *_, **__: pytest.fail("predicted"))
    arguments = ["--model", tmp_path / "model", "--images", shared_galaxy_folder, "--output", tmp_path / "table.fits"]
    line = refused("predict", *arguments)
    assert "table-advanced.fits has a column 'bar_yyy" in line
    assert "in FITS a name has at most 68 characters" in line
    assert not list(tmp_path.glob("*.fits"))


# predict -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def expected_table(tmp_path_factory, shared_galaxy_folder, model_folder):
    """The predictions of the model for the drawn galaxies, straight from model and processor."""
    catalog = read_catalog(shared_galaxy_folder / "catalog.csv")
    model = ZoobotForImageClassification.from_pretrained(model_folder)
    processor = ZoobotImageProcessor.from_pretrained(model_folder)
    with torch.inference_mode():
        logits = model(**processor([Image.open(path) for path in catalog["file_loc"]])).logits
    probabilities = logits.softmax(-1).numpy()
    names = np.array(["not ring", "ring"])[probabilities.argmax(-1)]
    table = pd.DataFrame({"id_str": catalog["id_str"], "predicted_label": names})
    return table.assign(**dict(zip(PROBABILITIES, probabilities.T, strict=True)))


def read_table(path):
    if path.suffix == ".csv":
        return pd.read_csv(path)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    from astropy.table import Table

    table = Table.read(path)
    table.convert_bytestring_to_unicode()
    return table.to_pandas()


def assert_same_predictions(table, expected):
    assert table.columns.tolist() == expected.columns.tolist()
    assert table["id_str"].tolist() == expected["id_str"].tolist()
    assert table["predicted_label"].tolist() == expected["predicted_label"].tolist()
    np.testing.assert_allclose(table[PROBABILITIES], expected[PROBABILITIES], atol=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits", ".vot", ".ecsv"])
def test_a_table_of_any_format_holds_the_predictions(
    suffix, shared_galaxy_folder, model_folder, tmp_path, zoobot_hf, expected_table
):
    output = tmp_path / f"table{suffix}"
    # 40 galaxies are no multiple of 7.
    outcome = zoobot_hf(
        "predict", "--model", model_folder, "--images", shared_galaxy_folder, "--output", output, "--batch_size", 7
    )
    assert outcome.status == 0
    assert f"40 galaxies: {output}" in outcome.output
    assert_same_predictions(read_table(output), expected_table)


def test_the_precision_is_what_was_asked_for(shared_galaxy_folder, model_folder, tmp_path, zoobot_hf, expected_table):
    tables = []
    for option in ("--bf16", "--no-bf16"):
        output = tmp_path / f"{option}.csv"
        predict = ("predict", "--model", model_folder, "--images", shared_galaxy_folder, "--output", output)
        assert zoobot_hf(*predict, option).status == 0
        tables.append(pd.read_csv(output))
    rounded, exact = tables
    assert_same_predictions(exact, expected_table)
    assert 0 < (rounded["probability_ring"] - exact["probability_ring"]).abs().max() < 0.02


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits"])
def test_a_catalog_of_any_format_is_predicted(suffix, galaxy_folder, model_folder, tmp_path, zoobot_hf, expected_table):
    from astropy.table import Table

    catalog = pd.read_csv(galaxy_folder / "catalog.csv")
    path = galaxy_folder / f"survey{suffix}"
    writers = {".csv": catalog.to_csv, ".parquet": catalog.to_parquet, ".fits": Table.from_pandas(catalog).write}
    writers[suffix](path)
    output = tmp_path / "table.parquet"
    assert zoobot_hf("predict", "--model", model_folder, "--images", path, "--output", output).status == 0
    assert_same_predictions(pd.read_parquet(output), expected_table)


def test_a_plain_folder_names_galaxies_after_their_files(
    galaxy_folder, model_folder, tmp_path, zoobot_hf, expected_table
):
    images = galaxy_folder / "images"
    (images / "ring").mkdir()
    shutil.move(images / "galaxy_07.png", images / "ring" / "galaxy_07.png")
    output = tmp_path / "table.parquet"
    assert zoobot_hf("predict", "--model", model_folder, "--images", images, "--output", output).status == 0
    table = pd.read_parquet(output).sort_values("id_str")
    assert_same_predictions(table, expected_table)


def test_a_catalog_keeps_its_own_names(galaxy_folder, model_folder, tmp_path, zoobot_hf):
    names = [f"{number:03d}" for number in range(40)]
    edit_catalog(galaxy_folder, lambda table: table.assign(id_str=names))
    output = tmp_path / "table.parquet"
    assert zoobot_hf("predict", "--model", model_folder, "--images", galaxy_folder, "--output", output).status == 0
    assert pd.read_parquet(output)["id_str"].tolist() == names


def test_the_pipeline_agrees_with_the_table(run_folder, shared_galaxy_folder, tmp_path, zoobot_hf):
    output = tmp_path / "table.parquet"
    zoobot_hf("predict", "--model", run_folder, "--images", shared_galaxy_folder, "--output", output)
    table = pd.read_parquet(output)
    classify = pipeline("image-classification", model=str(run_folder), device="cpu")
    paths = [str(shared_galaxy_folder / "images" / f"{name}.png") for name in table["id_str"]]
    for row, answers in zip(table.to_dict("records"), classify(paths), strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert scores == pytest.approx(
            {"not ring": row["probability_not_ring"], "ring": row["probability_ring"]}, abs=1e-5
        )
        assert max(scores, key=scores.get) == row["predicted_label"]


def test_the_pipeline_agrees_with_the_table_of_the_test_split(run_folder, shared_galaxy_folder):
    table = pd.read_parquet(run_folder / "predictions.parquet")
    classify = pipeline("image-classification", model=str(run_folder), device="cpu")
    for row in table.to_dict("records"):
        answers = classify(str(shared_galaxy_folder / "images" / f"{row['id_str']}.png"))
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert scores["ring"] == pytest.approx(row["probability_ring"], abs=1e-5)


# Bad images --------------------------------------------------------------------------------------------------------

BAD_IMAGES = {
    "no image": (lambda path: path.write_text("not an image"), "it is not an image in a format that PIL knows"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:800]), "it is damaged: image file is truncated"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "bomb": (lambda path: Image.new("1", (20_000, 20_000)).save(path), "may be a decompression bomb"),
}


@pytest.fixture(params=BAD_IMAGES)
def bad_folder(request, galaxy_folder):
    """The drawn galaxies, with galaxy_03 spoiled, and the reason that has to be given."""
    spoil, reason = BAD_IMAGES[request.param]
    spoil(galaxy_folder / "images" / "galaxy_03.png")
    return galaxy_folder, reason


def test_a_bad_image_stops_finetune_before_training(bad_folder, encoder_folder, tmp_path, refused):
    folder, reason = bad_folder
    line = refused(*finetune_options(folder, encoder_folder, tmp_path / "out"))
    assert re.match(r"zoobot-hf: 1 of \d+ images can't be read: ", line)
    assert f"{folder / 'images' / 'galaxy_03.png'}: {reason}" in line.replace("it has over 89 million pixels and ", "")
    assert not (tmp_path / "out").exists()


def test_a_bad_image_is_a_failure_and_the_others_are_predicted(
    bad_folder, model_folder, tmp_path, zoobot_hf, expected_table
):
    folder, reason = bad_folder
    output = tmp_path / "table.csv"
    outcome = zoobot_hf("predict", "--model", model_folder, "--images", folder, "--output", output)
    failures_path = tmp_path / "table-failures.csv"
    assert outcome.status == 1
    assert outcome.complaints == [f"zoobot-hf: 1 of 40 images can't be read; their reasons: {failures_path}"]
    assert_same_predictions(pd.read_csv(output), expected_table[expected_table["id_str"] != "galaxy_03"])
    failures = pd.read_csv(failures_path)
    assert failures["id_str"].tolist() == ["galaxy_03"]
    assert reason in failures["reason"][0]


def test_the_failures_are_written_even_where_the_table_can_not_be(
    galaxy_folder, model_folder, tmp_path, refused, monkeypatch
):
    def fail(*_, **__):
        raise OSError("the disk is full")

    (galaxy_folder / "images" / "galaxy_03.png").unlink()
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    output = tmp_path / "table.parquet"
    assert "the disk is full" in refused(
        "predict", "--model", model_folder, "--images", galaxy_folder, "--output", output
    )
    assert pd.read_csv(tmp_path / "table-failures.csv")["id_str"].tolist() == ["galaxy_03"]


def test_the_failures_of_an_earlier_run_are_removed(galaxy_folder, model_folder, tmp_path, zoobot_hf):
    image = galaxy_folder / "images" / "galaxy_03.png"
    arguments = ("predict", "--model", model_folder, "--images", galaxy_folder, "--output", tmp_path / "table.csv")
    whole = image.read_bytes()
    image.unlink()
    assert zoobot_hf(*arguments).status == 1
    assert pd.read_csv(tmp_path / "table-failures.csv")["reason"].tolist() == ["there is no such file"]
    image.write_bytes(whole)
    assert zoobot_hf(*arguments).status == 0
    assert not (tmp_path / "table-failures.csv").exists()


def test_a_catalog_without_a_readable_image_gives_an_empty_table(galaxy_folder, model_folder, tmp_path, zoobot_hf):
    shutil.rmtree(galaxy_folder / "images")
    output = tmp_path / "table.fits"
    outcome = zoobot_hf("predict", "--model", model_folder, "--images", galaxy_folder, "--output", output)
    assert outcome.status == 1
    assert outcome.complaints[0].startswith("zoobot-hf: 40 of 40 images can't be read")
    assert len(read_table(output)) == 0
    assert len(pd.read_csv(tmp_path / "table-failures.csv")) == 40


# Other bad input ---------------------------------------------------------------------------------------------------


def test_one_class_is_refused(galaxy_folder, encoder_folder, tmp_path, refused):
    edit_catalog(galaxy_folder, lambda table: table.assign(ring=1))
    line = refused(*finetune_options(galaxy_folder, encoder_folder, tmp_path / "out"))
    assert line == "zoobot-hf: all 40 galaxies have the label 'ring'; add galaxies of another class."


def test_a_class_of_one_galaxy_is_refused(galaxy_folder, encoder_folder, tmp_path, refused):
    edit_catalog(galaxy_folder, lambda table: table[(table["ring"] == 0) | (table["id_str"] == "galaxy_05")])
    line = refused(*finetune_options(galaxy_folder, encoder_folder, tmp_path / "out"))
    assert "class 'ring' has 1 galaxy, fewer than the 3 splits" in line


def test_a_galaxy_without_a_label_is_named(galaxy_folder, encoder_folder, tmp_path, refused):
    edit_catalog(galaxy_folder, lambda table: table.assign(ring=table["ring"].where(table.index != 4)))
    line = refused(*finetune_options(galaxy_folder, encoder_folder, tmp_path / "out"))
    assert "column 'ring' has no label for 1 galaxy: 'galaxy_04'" in line


def test_a_catalog_without_rows_is_refused(galaxy_folder, encoder_folder, model_folder, tmp_path, refused):
    edit_catalog(galaxy_folder, lambda table: table.head(0))
    predict = ("predict", "--model", model_folder, "--images", galaxy_folder, "--output", tmp_path / "table.csv")
    for arguments in (finetune_options(galaxy_folder, encoder_folder, tmp_path / "out"), predict):
        assert "catalog.csv has no rows; it needs one for each galaxy" in refused(*arguments)


def test_a_catalog_without_its_images_is_refused_by_finetune(galaxy_folder, encoder_folder, tmp_path, refused):
    shutil.rmtree(galaxy_folder / "images")
    line = refused(*finetune_options(galaxy_folder, encoder_folder, tmp_path / "out"))
    assert "names images that are not there, for 40 galaxies: " in line
    assert "galaxy_04.png', ..." in line
    assert "galaxy_05.png" not in line


def test_a_folder_without_images_is_refused(encoder_folder, model_folder, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    predict = ("predict", "--model", model_folder, "--images", tmp_path / "empty", "--output", tmp_path / "table.csv")
    for arguments in (finetune_options(tmp_path / "empty", encoder_folder, tmp_path / "out"), predict):
        assert f"folder {tmp_path / 'empty'} holds no images" in refused(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "rings"}, r"has no column 'rings'; its columns are .* that of the labels is label_column\."),
        ({"label_column": None}, r"has no column 'label'; its columns are 'id_str', 'file_loc', 'ring'\."),
        ({"validation_fraction": 1.5}, r"validation_fraction is 1\.5; it must be between 0 and 1"),
        ({"test_fraction": 0}, r"test_fraction is 0\.0; it must be between 0 and 1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.6}, r"validation_fraction and test_fraction add up to 1\.1"),
        ({"last_blocks": 99}, r"last_blocks is 99; this encoder has 5 blocks"),
        ({"dataset": "/nowhere/at/all"}, r"'/nowhere/at/all' is neither a file or folder that is there nor the id"),
        ({"encoder": "not an id!"}, r"'not an id!' is neither a folder here nor a Hub id of the form user/name"),
        ({"encoder": "astronomer/nothing"}, r"'astronomer/nothing' is neither a folder here nor a repository on the"),
        ({"dataset": "astronomer/nothing"}, r"'astronomer/nothing': nothing is at this path, and as a Hub dataset"),
        ({"configuration": "gz2"}, r"configuration is for a Hub dataset, and dataset is .*galaxies\d+; leave it out\."),
        ({"dataset": "simulated", "revision": "main"}, r"revision is for a Hub dataset, and dataset is simulated"),
        ({"dataset": "simulated"}, r"label_column is 'ring', and drawn galaxies have none; leave it out\."),
        ({"survey": "euclid", "label_column": None, "revision": "main"}, r"revision is for a Hub dataset"),
        ({"push_to_hub": "astronomer/rings"}, r"No token for the Hub to push with: log in with `hf auth login`"),
    ],
)
def test_a_value_that_finetune_can_not_use_is_named(
    changes, message, hub, shared_galaxy_folder, encoder_folder, tmp_path, refused
):
    options = {"dataset": shared_galaxy_folder, "encoder": encoder_folder, "output_dir": tmp_path / "out", **changes}
    assert re.search(message, refused(*finetune_options(**options)))
    assert not (tmp_path / "out").exists()


def test_a_plain_folder_of_images_has_no_revision(shared_galaxy_folder, encoder_folder, tmp_path, refused):
    images = shared_galaxy_folder / "images"
    line = refused(*finetune_options(images, encoder_folder, tmp_path / "out", revision="main"))
    assert line == f"zoobot-hf: revision is for a Hub dataset, and dataset is {images}; leave it out."


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--last_blocks=0", "it is '0'; give a whole number at least 1"),
        ("--last_blocks=two", "it is 'two'; give a whole number at least 1"),
        ("--frozen_epochs=0", "it is '0'; give a number above 0"),
        ("--frozen_epochs=inf", "it is 'inf'; give a number above 0"),
        ("--unfrozen_epochs=-1", "it is '-1'; give a number at least 0"),
        ("--zoom=0.5", "it is '0.5'; give a number at least 1"),
        ("--zoom=nan", "it is 'nan'; give a number at least 1"),
        ("--sky_prevalence=0.05", "it is '0.05'; give a label and its share, as in ring=0.05"),
        ("--sky_prevalence=ring=rare", "it is 'ring=rare'; give a label and its share, as in ring=0.05"),
        ("--sky_prevalence=ring=1.5", "it is 'ring=1.5'; a share lies between 0 and 1, both excluded"),
        ("--sky_prevalence=ring=0", "it is 'ring=0'; a share lies between 0 and 1, both excluded"),
        ("--seed=-1", "it is '-1'; give a whole number at least 0 and at most 4294967295"),
        ("--seed=4294967296", "it is '4294967296'; give a whole number at least 0 and at most 4294967295"),
        ("--balance=twice", "invalid choice: 'twice' (choose from 'oversample', 'undersample')"),
    ],
)
def test_an_option_out_of_range_is_refused(option, message, refused):
    line = refused("finetune", "--encoder=E", "--dataset=D", "--output_dir=O", option)
    name = option.partition("=")[0]
    assert line.startswith(f"zoobot-hf finetune: argument {name}: {message}".removesuffix("'undersample')"))
    assert line.endswith("; see zoobot-hf finetune --help")


def test_each_label_has_one_share_of_the_sky(galaxy_folder, encoder_folder, tmp_path, refused):
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out")
    line = refused(*options, "--sky_prevalence", "ring=0.05", "--sky_prevalence", "ring=0.1")
    assert "sky_prevalence has a label twice" in line
    line = refused(*options, "--sky_prevalence", "ring=0.05", "--sky_prevalence", "not ring=0.9")
    assert "add up to" in line


def test_the_planes_of_fits_cubes_are_chosen_on_the_command_line(galaxy_folder, encoder_folder, tmp_path, zoobot_hf):
    catalog = read_catalog(galaxy_folder / "catalog.csv")
    for number, path in enumerate(catalog["file_loc"]):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        fits.writeto(galaxy_folder / f"{number}.fits", pixels)
    names = [f"{number}.fits" for number in range(len(catalog))]
    catalog.assign(file_loc=names).to_csv(galaxy_folder / "catalog.csv", index=False)
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out", unfrozen_epochs=0)
    assert zoobot_hf(*options, "--fits_bands", "0:2", "0:1", "0:0").status == 0
    assert ZoobotImageProcessor.from_pretrained(tmp_path / "out").fits_bands == ["0:2", "0:1", "0:0"]
    images = ("--images", galaxy_folder, "--output", tmp_path / "table.csv")
    assert zoobot_hf("predict", "--model", tmp_path / "out", *images).status == 0
    assert len(pd.read_csv(tmp_path / "table.csv")) == len(catalog)


@pytest.mark.parametrize("batch_size", ["0", "-3", "many"])
def test_a_batch_has_at_least_one_galaxy(batch_size, refused):
    line = refused("predict", "--model=M", "--images=I", "--output=O.csv", f"--batch_size={batch_size}")
    assert f"argument --batch_size: it is '{batch_size}'; give a whole number at least 1" in line


def test_a_missing_option_is_one_line(refused):
    assert refused("finetune") == (
        "zoobot-hf finetune: the following arguments are required: --dataset, --output_dir; "
        "see zoobot-hf finetune --help"
    )
    assert refused() == "zoobot-hf: the following arguments are required: COMMAND; see zoobot-hf --help"


def test_an_unknown_or_abbreviated_option_is_refused_by_its_command(refused):
    for option in ("--over", "--rings"):
        line = refused("finetune", "--dataset=D", "--output_dir=O", option)
        assert line == f"zoobot-hf finetune: unrecognized arguments: {option}; see zoobot-hf finetune --help"
    line = refused("--rings", "finetune", "--dataset=D", "--output_dir=O")
    assert line == "zoobot-hf: unrecognized arguments: --rings; see zoobot-hf --help"


def test_cuda_is_refused_where_there_is_none(shared_galaxy_folder, encoder_folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = finetune_options(shared_galaxy_folder, encoder_folder, tmp_path / "out", device="cuda")
    assert "device is 'cuda', and this machine has no CUDA device that torch can use" in refused(*options)


def test_an_output_folder_with_a_run_is_refused_and_untouched(
    run_folder, shared_galaxy_folder, encoder_folder, refused
):
    before = contents(run_folder.parent)
    line = refused(*finetune_options(shared_galaxy_folder, encoder_folder, run_folder, seed=7))
    assert re.search(r"out already holds a run; .*--resume.*--overwrite", line)
    assert contents(run_folder.parent) == before


def test_overwrite_starts_anew(run_folder, shared_galaxy_folder, encoder_folder, zoobot_hf):
    options = finetune_options(shared_galaxy_folder, encoder_folder, run_folder, seed=7, unfrozen_epochs=0)
    assert zoobot_hf(*options, "--overwrite").status == 0
    assert set(json.loads((run_folder / "metrics.json").read_text())) == {"frozen", "kept_stage"}


def test_resume_refuses_other_arguments(run_folder, shared_galaxy_folder, encoder_folder, refused):
    before = contents(run_folder)
    options = finetune_options(shared_galaxy_folder, encoder_folder, run_folder, frozen_epochs=2)
    assert "had another FrozenStageArguments.num_train_epochs;" in refused(*options, "--resume")
    same = finetune_options(shared_galaxy_folder, encoder_folder, run_folder)
    assert "had another FrozenStageArguments.bf16, UnfrozenStageArguments.bf16" in refused(*same, "--resume", "--bf16")
    assert contents(run_folder) == before


def test_resume_and_overwrite_exclude_each_other(refused):
    line = refused("finetune", "--encoder=E", "--dataset=D", "--output_dir=O", "--resume", "--overwrite")
    assert "argument --overwrite: not allowed with argument --resume" in line


def test_an_output_folder_that_can_not_be_made_is_named(shared_galaxy_folder, encoder_folder, tmp_path, refused):
    (tmp_path / "file").touch()
    options = finetune_options(shared_galaxy_folder, encoder_folder, tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in refused(*options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table.xyz", "has the suffix '.xyz'; known are .csv, .parquet, .fits"),
        ("table.pdf", "has the suffix '.pdf'; known are .csv, .parquet, .fits"),
        ("table.csv.gz", "ends in .gz; catalogs are written uncompressed"),
        ("missing/table.csv", "missing: No such file or directory; make the folder"),
        ("file/table.csv", "file: Not a directory; make the folder, or choose one that you may write to"),
        ("folder.csv", "folder.csv is a folder; give the name of a file"),
    ],
)
def test_a_table_that_can_not_be_written_is_refused_before_predicting(
    name, message, shared_galaxy_folder, model_folder, tmp_path, refused, monkeypatch
):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        "zoobot_hf.commands.predict.predict_galaxies", lambda *args, **options: pytest.fail("predicted")
    )
    before = sorted(tmp_path.iterdir())
    line = refused("predict", "--model", model_folder, "--images", shared_galaxy_folder, "--output", tmp_path / name)
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_of_shards_is_predicted_and_merged(galaxy_folder, model_folder, tmp_path, zoobot_hf, expected_table):
    predict = ("predict", "--model", model_folder, "--images", galaxy_folder, "--output", tmp_path / "survey")
    outcome = zoobot_hf(*predict)
    assert outcome.status == 0
    assert f"40 galaxies: {tmp_path / 'survey/predictions'}" in outcome.output
    assert zoobot_hf(*predict).status == 0
    merged = tmp_path / "merged.parquet"
    assert zoobot_hf("merge", tmp_path / "survey", "--output", merged).output == f"40 galaxies: {merged}\n"
    assert_same_predictions(pd.read_parquet(merged), expected_table)


def test_archives_and_hub_datasets_are_predicted_into_a_folder(
    galaxy_folder, model_folder, tmp_path, zoobot_hf, refused, expected_table, hub_token, repo_id
):
    with tarfile.open(tmp_path / "galaxies.tar", "w") as archive:
        for path in sorted((galaxy_folder / "images").iterdir()):
            archive.add(path, arcname=path.name)
    dataset = catalog_to_dataset(read_catalog(galaxy_folder / "catalog.csv"), label_column=None)
    dataset.rename_column("id_str", "name").push_to_hub(repo_id, token=hub_token, split="test")
    predict = ("predict", "--model", model_folder, "--images")
    hub_options = ("--split", "test", "--id_column", "name")
    assert zoobot_hf(*predict, tmp_path / "*.tar", "--output", tmp_path / "from_tar").status == 0
    assert zoobot_hf(*predict, repo_id, *hub_options, "--output", tmp_path / "from_hub").status == 0
    for name in ("from_tar", "from_hub"):
        assert_same_predictions(pd.read_parquet(tmp_path / name / "predictions"), expected_table)
    line = refused(*predict, tmp_path / "galaxies.tar", *hub_options, "--output", tmp_path / "other")
    assert "split is for a Hub dataset, and images is" in line
    assert "choose a folder, from which" in refused(*predict, repo_id, "--output", tmp_path / "table.csv")
    assert "split is for an output folder" in refused(
        *predict, galaxy_folder, "--split", "test", "--output", tmp_path / "table.csv"
    )


def test_images_are_embedded_once_and_predicted_from_their_embeddings(
    galaxy_folder, model_folder, tmp_path, zoobot_hf, refused, expected_table
):
    embed = ("embed", "--model", model_folder, "--images", galaxy_folder, "--dtype", "float32", "--output")
    outcome = zoobot_hf(*embed, tmp_path / "embedded")
    assert outcome.status == 0
    assert f"40 galaxies: {tmp_path / 'embedded/embeddings'}" in outcome.output
    predict = ("predict", "--model", model_folder, "--embeddings", tmp_path / "embedded", "--output")
    assert zoobot_hf(*predict, tmp_path / "survey").status == 0
    assert_same_predictions(pd.read_parquet(tmp_path / "survey/predictions"), expected_table)
    assert "embeddings are predicted into a folder" in refused(*predict, tmp_path / "table.csv")
    assert "batch_size is for images" in refused(*predict, tmp_path / "other", "--batch_size", "4")
    assert zoobot_hf(*embed, tmp_path / "reduced", "--pca", "3").status == 0
    assert zoobot_hf(*embed, tmp_path / "as_before", "--pca", tmp_path / "reduced").status == 0
    assert "were reduced by a PCA" in refused(
        "predict", "--model", model_folder, "--embeddings", tmp_path / "reduced", "--output", tmp_path / "other"
    )


def test_embeddings_are_not_written_to_one_table(galaxy_folder, model_folder, tmp_path, refused):
    line = refused("embed", "--model", model_folder, "--images", galaxy_folder, "--output", tmp_path / "table.PARQUET")
    assert "table.PARQUET, one table, and embeddings go to a folder; choose a folder" in line


def test_a_survey_is_not_written_into_the_folder_of_a_model(galaxy_folder, model_folder, tmp_path, zoobot_hf, refused):
    model = shutil.copytree(model_folder, tmp_path / "model")
    images = ("--model", model, "--images", galaxy_folder, "--output")
    assert zoobot_hf("embed", *images, tmp_path / "embedded").status == 0
    stored = ("--model", model, "--embeddings", tmp_path / "embedded", "--output")
    for arguments in (("predict", *images, model), ("embed", *images, model), ("predict", *stored, model)):
        assert "model is a folder that holds a model; choose another output" in refused(*arguments)
    assert contents(model) == contents(model_folder)
    (tmp_path / "embedded/config.json").write_text("{}")  # the user's own
    assert zoobot_hf("embed", *images, tmp_path / "embedded").status == 0


@pytest.mark.parametrize("name", ["predictions.parquet", "predictions-advanced.parquet"])
def test_the_table_of_a_finished_run_is_not_overwritten(name, galaxy_folder, model_folder, tmp_path, refused):
    model = shutil.copytree(model_folder, tmp_path / "model")
    link = tmp_path / "latest.parquet"
    link.symlink_to(model / name)
    for output in (model / name, link):
        predict = ("predict", "--model", model, "--images", galaxy_folder, "--output", output)
        for arguments in (predict, ("merge", tmp_path / "survey", "--output", output)):
            line = refused(*arguments)
            assert f"{output}, where a finished run has its own predictions; choose another" in line
    assert contents(model) == contents(model_folder)


def test_several_processes_do_not_write_one_table(galaxy_folder, model_folder, tmp_path, refused, monkeypatch):
    # How many processes there are is known only once they are prepared.
    state = "zoobot_hf.commands.predict.PartialState"
    monkeypatch.setattr(
        "zoobot_hf.commands.predict.prepare_processes", lambda: monkeypatch.setattr(state, lambda: ANOTHER_PROCESS)
    )
    line = refused("predict", "--model", model_folder, "--images", galaxy_folder, "--output", tmp_path / "table.csv")
    assert "table.csv, one table, and several processes share a folder; choose one, from which zoobot-hf merge" in line


def test_failures_of_a_survey_are_told(galaxy_folder, model_folder, tmp_path, zoobot_hf, refused, monkeypatch):
    (galaxy_folder / "images/galaxy_03.png").unlink()
    predict = ("predict", "--model", model_folder, "--images", galaxy_folder, "--output")
    outcome = zoobot_hf(*predict, tmp_path / "survey")
    assert outcome.status == 1
    assert "1 of 40 galaxies can't be predicted; their reasons:" in outcome.errors
    assert pd.read_parquet(tmp_path / "survey/failures.parquet")["id_str"].tolist() == ["galaxy_03"]
    outcome = zoobot_hf("merge", tmp_path / "survey", "--output", tmp_path / "merged.csv")
    assert f"39 of 40 galaxies: {tmp_path / 'merged.csv'}" in outcome.output
    outcome = zoobot_hf("embed", "--model", model_folder, "--images", galaxy_folder, "--output", tmp_path / "embedded")
    assert outcome.status == 1
    assert "1 of 40 galaxies can't be embedded; their reasons:" in outcome.errors
    line = refused(*predict, tmp_path / "table.csv", "--max_failures", "3")
    assert "max_failures is for an output folder" in line
    monkeypatch.setattr("zoobot_hf.commands.predict.PartialState", lambda: ANOTHER_PROCESS)
    outcome = zoobot_hf(*predict, tmp_path / "survey")
    assert (outcome.status, outcome.complaints) == (0, [])
    assert "galaxies" not in outcome.output


def test_predict_does_not_write_over_its_catalog(galaxy_folder, model_folder, refused):
    catalog_path = galaxy_folder / "catalog.csv"
    before = catalog_path.read_bytes()
    for images in (galaxy_folder, catalog_path):
        line = refused("predict", "--model", model_folder, "--images", images, "--output", catalog_path)
        assert "catalog.csv, the catalog itself, which would be lost" in line
    assert catalog_path.read_bytes() == before


def test_predict_refuses_an_encoder_without_a_trained_head(shared_galaxy_folder, encoder_folder, tmp_path, refused):
    arguments = ("--images", shared_galaxy_folder, "--output", tmp_path / "table.csv")
    line = refused("predict", "--model", encoder_folder, *arguments)
    assert "which zoobot-hf has not finetuned; run zoobot-hf finetune --encoder" in line
    (tmp_path / "rings.ckpt").touch()
    line = refused("predict", "--model", tmp_path / "rings.ckpt", *arguments)
    assert "rings.ckpt', a checkpoint of Zoobot's, which doesn't name its outputs; load it with" in line


def test_predict_refuses_images_that_are_not_there(model_folder, tmp_path, refused):
    line = refused("predict", "--model", model_folder, "--images", tmp_path / "no", "--output", tmp_path / "table.csv")
    assert f"{tmp_path / 'no'} does not exist; give a catalog file or a folder of images" in line
    for images in (tmp_path / "*.csv", "user/survey", "galaxies.tar"):
        line = refused("predict", "--model", model_folder, "--images", images, "--output", tmp_path / "table.csv")
        assert "the images are in an archive, a Hub dataset or several catalogs; choose a folder" in line


def test_damaged_weights_are_refused(shared_galaxy_folder, model_folder, tmp_path, refused):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refused("predict", "--model", folder, "--images", shared_galaxy_folder, "--output", tmp_path / "table.csv")
    assert re.search(r"the model's weights, model\.safetensors, are damaged \(.+\); copy or download them again", line)


# How errors look ---------------------------------------------------------------------------------------------------


def fail_with(error):
    def fail(*arguments, **options):
        raise error

    return fail


PREDICT = ("predict", "--model=M", "--images=I", "--output=table.csv")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("spread over\n  two lines"), "zoobot-hf: spread over two lines"),
        (RuntimeError(), "zoobot-hf: RuntimeError"),
        (PermissionError(13, "Permission denied", "file"), "zoobot-hf: [Errno 13] Permission denied: 'file'"),
        (SafetensorError("Error while serializing: I/O error"), "zoobot-hf: Error while serializing: I/O error"),
    ],
)
def test_an_error_is_one_line(error, line, refused, monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.predict.read_galaxies", fail_with(error))
    assert refused(*PREDICT) == line


def test_debug_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.predict.read_galaxies", fail_with(ValueError("no galaxies")))
    with pytest.raises(ValueError, match="no galaxies"):
        main([*PREDICT, "--debug"])


def test_an_interrupt_is_one_line_and_status_130(zoobot_hf, monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.predict.read_galaxies", fail_with(KeyboardInterrupt()))
    outcome = zoobot_hf(*PREDICT)
    assert (outcome.status, outcome.complaints) == (130, ["zoobot-hf: interrupted"])


def test_an_interrupt_while_pytorch_is_imported_is_one_line_and_status_130(zoobot_hf, monkeypatch):
    monkeypatch.setattr("zoobot_hf.cli.import_module", fail_with(KeyboardInterrupt()))
    outcome = zoobot_hf(*PREDICT)
    assert (outcome.status, outcome.complaints) == (130, ["zoobot-hf: interrupted"])


def test_of_several_processes_the_main_one_alone_logs(zoobot_hf, monkeypatch):
    def warn_and_fail(*_, **__):
        logging.getLogger("zoobot_hf.data").warning("40 galaxies")
        raise ValueError("stopped")

    monkeypatch.setattr("zoobot_hf.commands.predict.prepare_processes", warn_and_fail)
    for rank, processes, logged in (("0", "2", "40 galaxies\n"), ("1", "2", ""), ("7", "1", "40 galaxies\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", processes)
        outcome = zoobot_hf(*PREDICT)
        # Another process may have an error that the main one hasn't.
        assert (outcome.output, outcome.complaints) == (logged, ["zoobot-hf: stopped"])


def test_an_interrupted_finetuning_says_how_to_go_on(zoobot_hf, monkeypatch, shared_galaxy_folder):
    monkeypatch.setattr("zoobot_hf.commands.inputs.load_galaxy_dataset", fail_with(KeyboardInterrupt()))
    outcome = zoobot_hf(*finetune_options(shared_galaxy_folder, "E", "O"))
    assert (outcome.status, outcome.complaints) == (130, ["zoobot-hf: interrupted; go on with --resume"])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from zoobot_hf.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'datasets', 'pandas', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_every_command_has_help(command, zoobot_hf):
    outcome = zoobot_hf(*command, "--help")
    assert outcome.status == 0
    assert outcome.output.startswith(" ".join(("usage: zoobot-hf", *command)))
    assert max(map(len, outcome.output.splitlines())) <= 80


# The installed command ---------------------------------------------------------------------------------------------


def test_the_installed_command_predicts(shared_galaxy_folder, model_folder, tmp_path, expected_table):
    output = tmp_path / "table.parquet"
    outcome = run_process("predict", "--model", model_folder, "--images", shared_galaxy_folder, "--output", output)
    assert outcome.status == 0, outcome.errors
    assert_same_predictions(pd.read_parquet(output), expected_table)


def test_no_network_is_one_line_and_status_1(shared_galaxy_folder, tmp_path):
    options = finetune_options(shared_galaxy_folder, "astronomer/encoder", tmp_path / "out")
    outcome = run_process(*options, HF_HUB_OFFLINE="1")
    assert outcome.status == 1
    assert outcome.errors.splitlines()[-1] == outcome.complaints[0]
    assert "'astronomer/encoder' is no folder here, is not in the cache, and the Hub could not be" in outcome.errors
    assert "Traceback" not in outcome.errors


def test_a_run_stopped_by_a_bad_image_starts_when_it_is_mended(galaxy_folder, encoder_folder, tmp_path, zoobot_hf):
    image = galaxy_folder / "images" / "galaxy_03.png"
    whole = image.read_bytes()
    image.write_bytes(b"")
    options = finetune_options(galaxy_folder, encoder_folder, tmp_path / "out", unfrozen_epochs=0)
    assert zoobot_hf(*options).status == 1
    image.write_bytes(whole)
    assert zoobot_hf(*options).status == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_other_files_in_the_output_folder_are_never_lost(
    overwrite, shared_galaxy_folder, encoder_folder, tmp_path, refused
):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "README.md").write_text("My thesis")
    line = refused(*finetune_options(shared_galaxy_folder, encoder_folder, folder), *overwrite)
    assert "holds files that are not a run's, and would lose them" in line
    assert contents(folder) == {"README.md": b"My thesis"}


def test_demo_does_not_delete_what_it_did_not_make(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.demo.DEMO_GALAXIES", 12)
    (tmp_path / "thesis.tex").write_text("My thesis")
    assert "holds files that are not a run's" in refused("demo", "--output_dir", tmp_path, "--device=cpu")
    assert (tmp_path / "thesis.tex").read_text() == "My thesis"


def test_demo_deletes_only_the_runs_of_demos(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.demo.DEMO_GALAXIES", 12)
    asked = []

    def fail(*arguments, overwrite, **options):
        asked.append(overwrite)
        raise ValueError("stopped")

    monkeypatch.setattr("zoobot_hf.commands.demo.finetune", fail)
    checkpoints = tmp_path / "run-checkpoints"
    checkpoints.mkdir()
    (checkpoints / "run.json").write_text("{}")
    assert "already holds a run" in refused("demo", "--output_dir", tmp_path / "run", "--device=cpu")
    (checkpoints / "run.json").unlink()
    assert "stopped" in refused("demo", "--output_dir", tmp_path / "run", "--device=cpu")
    (checkpoints / "run.json").write_text("{}")
    assert "stopped" in refused("demo", "--output_dir", tmp_path / "run", "--device=cpu")
    assert asked == [False, True]


def test_a_curve_looks_at_its_folder_first(galaxy_folder, encoder_folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("zoobot_hf.commands.curve.measure_label_curve", lambda *args, **options: pytest.fail("ran"))
    (tmp_path / "curve").write_text("My thesis")
    options = ("--encoder", encoder_folder, "--dataset", galaxy_folder, "--label_column", "ring")
    assert "curve, which is a file" in refused("curve", *options, "--output_dir", tmp_path / "curve")
    (tmp_path / "label_curve.json").write_text("{}")
    assert "already holds a curve; choose another one" in refused("curve", *options, "--output_dir", tmp_path)


def test_an_overwriting_run_that_can_not_start_leaves_the_old_one(run_folder, galaxy_folder, encoder_folder, refused):
    before = contents(run_folder.parent)
    (galaxy_folder / "images" / "galaxy_03.png").write_bytes(b"")
    assert "the file is empty" in refused(*finetune_options(galaxy_folder, encoder_folder, run_folder), "--overwrite")
    assert contents(run_folder.parent) == before


def test_the_output_folder_may_be_the_one_we_are_in(
    shared_galaxy_folder, encoder_folder, tmp_path, zoobot_hf, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert zoobot_hf(*finetune_options(shared_galaxy_folder, encoder_folder, ".", unfrozen_epochs=0)).status == 0
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert (tmp_path / "here-checkpoints").is_dir()


def test_a_file_is_no_output_folder(shared_galaxy_folder, encoder_folder, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    line = refused(*finetune_options(shared_galaxy_folder, encoder_folder, tmp_path / "file"))
    assert re.search(r"output_dir is .*file, which is a file; choose a folder", line)
    assert (tmp_path / "file").read_text() == "mine"


def test_too_many_blocks_are_refused_before_training(shared_galaxy_folder, encoder_folder, tmp_path, refused):
    refused(*finetune_options(shared_galaxy_folder, encoder_folder, tmp_path / "out", last_blocks=99))
    assert list(tmp_path.iterdir()) == []


def test_the_embeddings_on_disk_are_listed_and_cleared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zoobot_hf.training.embedding_cache.HF_HOME", str(tmp_path))
    folder = tmp_path / "zoobot_hf" / "embeddings"
    folder.mkdir(parents=True)
    (folder / "key.safetensors.partial").write_bytes(b"x" * 2_000_000)
    assert main(["cache"]) == 0
    assert (
        "2.0 MB         0 images x 0 views  damaged or not finished  key.safetensors.partial" in capsys.readouterr().out
    )
    assert main(["cache", "--clear"]) == 0
    assert "2.0 MB freed" in capsys.readouterr().out
    assert list(folder.iterdir()) == []


def test_a_score_without_an_interval_is_printed_alone():
    assert _score_line("accuracy", Estimate(1.0, 0.95, 1.0)).endswith(" 1.000  0.950 to 1.000")
    assert _score_line("roc auc", Estimate(1.0, np.nan, np.nan)).endswith(" 1.000")
