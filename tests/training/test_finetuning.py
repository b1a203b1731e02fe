import copy
import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from processes import run_on_two
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.metrics import log_loss
from tiny_models import tiny_model
from transformers import ResNetConfig, ResNetModel, TrainerCallback, TrainingArguments, ViTImageProcessor, pipeline

from zoobot_hf import (
    FrozenStageArguments,
    UnfrozenStageArguments,
    ZoobotForImageClassification,
    ZoobotImageProcessor,
    catalog_to_dataset,
    finetune,
    push_folder,
    read_catalog,
    split_dataset,
)
from zoobot_hf.training import finetuning, run_report
from zoobot_hf.training.cross_validation import cross_validate, split_for_final_model
from zoobot_hf.training.trainer import FrozenStageTrainer, UnfrozenStageTrainer

PROBABILITY_FIGURES = ("reliability", "completeness_and_purity", "roc")
SETTINGS = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}


class KilledError(RuntimeError):
    pass


class KillAt(TrainerCallback):
    """Ends the process, as far as a test can, in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.fixture
def rings(galaxy_folder):
    catalog = read_catalog(galaxy_folder / "catalog.csv")
    return split_dataset(catalog_to_dataset(catalog, label_column="ring"), seed=0, validation_fraction=0.2)


@pytest.fixture
def run(layer_norm_model, processor, rings, tmp_path):
    """A finetuning run of a copy of the same model, into tmp_path / name."""

    def start(name, **options):
        model = copy.deepcopy(options.pop("model", layer_norm_model))
        settings = {
            "frozen": FrozenStageArguments(**SETTINGS),
            "unfrozen": UnfrozenStageArguments(**SETTINGS, learning_rate=1e-2),
        }
        return finetune(
            model,
            options.pop("processor", processor),
            options.pop("dataset", rings),
            tmp_path / name,
            **{**settings, **options},
        )

    return start


def test_the_output_folder_is_ready_for_the_hub(run, rings, tmp_path):
    finetuned = run("out", dataset_name="drawn galaxies")
    folder = tmp_path / "out"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "metrics.json",
        "predictions.parquet",
        "figures/training_curves.png",
        "figures/confusion.png",
        "figures/most_wrong.png",
        *(f"figures/{name}.{ending}" for name in PROBABILITY_FIGURES for ending in ("png", "pdf")),
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    names = {"accuracy", "balanced_accuracy", "completeness", "purity", "f1", "roc_auc", "average_precision"}
    names |= {"log_loss", "confusion", "validation_loss", "scores", "calibration", "selections", "remarks"}
    assert names == set(metrics["frozen"]) == set(metrics["unfrozen"])
    assert metrics["kept_stage"] == finetuned.kept_stage
    table = pd.read_parquet(folder / "predictions.parquet")
    assert table["id_str"].tolist() == rings["test"]["id_str"][:]
    assert table["label"].tolist() == [("not ring", "ring")[label] for label in rings["test"]["label"]]
    right = (table["label"] == table["predicted_label"]).mean()
    assert metrics[finetuned.kept_stage]["accuracy"] == pytest.approx(right)
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()


def test_the_saved_model_gives_the_table_again(run, rings, processor, tmp_path):
    run("out")
    model = ZoobotForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        probabilities = model(**processor(rings["test"]["image"][:])).logits.softmax(-1)
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    expected = torch.tensor(table[["probability_not_ring", "probability_ring"]].to_numpy())
    assert torch.allclose(probabilities, expected, atol=1e-5)


def test_the_stage_with_the_lower_validation_loss_is_kept(run, caplog):
    caplog.set_level("INFO")
    # A rate at which the unfrozen stage can only do harm.
    spoiled = run("spoiled", unfrozen=UnfrozenStageArguments(**SETTINGS, learning_rate=10.0, max_grad_norm=1e9))
    frozen, unfrozen = spoiled.stages
    assert unfrozen.validation_loss > frozen.validation_loss
    assert spoiled.kept_stage == "frozen"
    assert "The frozen stage is kept" in caplog.text


def test_a_stage_that_diverges_is_left_out_and_the_other_is_not_lost(run, tmp_path, caplog):
    unfrozen = UnfrozenStageArguments(**SETTINGS, learning_rate=1e30)
    finetuned = run("out", unfrozen=unfrozen)
    assert [stage.name for stage in finetuned.stages] == ["frozen"] == [finetuned.kept_stage]
    assert "unfrozen stage has diverged" in caplog.text
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) == {"frozen", "kept_stage"}
    assert run("out", unfrozen=unfrozen, resume=True).test_metrics == finetuned.test_metrics
    with pytest.raises(ValueError, match=r"frozen stage has diverged.* lower learning_rate"):
        run("none", frozen=FrozenStageArguments(**SETTINGS, learning_rate=1e30), skip_unfrozen=True)


def test_the_weights_are_those_of_the_stage_that_was_kept(run, tmp_path):
    finetuned = run("out")
    best = load_file(tmp_path / "out-checkpoints" / finetuned.kept_stage / "best" / "model.safetensors")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(best[name], saved[name]) for name in saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in finetuned.model.state_dict().items())


def test_the_epoch_of_the_kept_weights_is_stated(run):
    # The loss falls from epoch to epoch, so that the highest is the first one's.
    for is_loaded, epoch in ((True, 1), (False, 3)):
        settings = {"greater_is_better": True, "load_best_model_at_end": is_loaded}
        finetuned = run(str(epoch), frozen=FrozenStageArguments(**SETTINGS, **settings), skip_unfrozen=True)
        assert finetuned.stages[0].kept_epoch == epoch


def test_only_the_frozen_stage_runs_where_the_other_is_skipped(run, layer_norm_model):
    finetuned = run("out", skip_unfrozen=True)
    assert [stage.name for stage in finetuned.stages] == ["frozen"]
    before, after = layer_norm_model.encoder.state_dict(), finetuned.model.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# transformers writes a ViT's weights under other names than the model's own.
@pytest.mark.parametrize(
    ("stage", "step", "name"),
    [
        ("frozen", 2, "layer_norm"),
        ("frozen", 7, "layer_norm"),
        ("unfrozen", 1, "layer_norm"),
        ("unfrozen", 7, "layer_norm"),
        ("unfrozen", 7, "vit"),
    ],
)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(stage, step, name, run, tiny_models, monkeypatch):
    model = tiny_models[name]
    unbroken = run("unbroken", model=model)
    trainer_class = {"frozen": FrozenStageTrainer, "unfrozen": UnfrozenStageTrainer}[stage]
    original = trainer_class.__init__

    def killed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(KillAt(step))

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "__init__", killed)
        with pytest.raises(KilledError):
            run("broken", model=model)
    resumed = run("broken", model=model, resume=True)
    for one, other in zip(unbroken.stages, resumed.stages, strict=True):
        assert one.test_outputs == other.test_outputs
        assert one.validation_loss == other.validation_loss
    weights = resumed.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unbroken.model.state_dict().items())


def be_killed(*args, **kwargs):
    raise KilledError


def test_a_run_that_was_moved_ends_with_its_best_weights(run, tmp_path, monkeypatch):
    # The loss falls from epoch to epoch, so that the highest is the first one's.
    options = {"frozen": FrozenStageArguments(**SETTINGS, greater_is_better=True), "skip_unfrozen": True}
    unbroken = run("unbroken", **options)
    with monkeypatch.context() as patch:
        patch.setattr(FrozenStageTrainer, "_load_best_model", be_killed)
        with pytest.raises(KilledError):
            run("broken", **options)
    (tmp_path / "broken-checkpoints").rename(tmp_path / "moved-checkpoints")
    resumed = run("moved", **options, resume=True)
    assert resumed.kept.kept_epoch == unbroken.kept.kept_epoch == 1
    assert resumed.kept.validation_outputs == unbroken.kept.validation_outputs


def test_a_finished_run_is_not_run_again_by_resume(run, tmp_path, monkeypatch):
    first = run("out")
    configuration = (tmp_path / "out" / "config.json").read_text()
    monkeypatch.setattr(FrozenStageTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run("out", resume=True).kept_stage == first.kept_stage
    assert (tmp_path / "out" / "config.json").read_text() == configuration


def test_a_model_that_is_written_again_has_no_card_until_all_is_written(run, tmp_path, monkeypatch):
    run("out", skip_unfrozen=True)
    monkeypatch.setattr("zoobot_hf.training.run_report.draw_figures", be_killed)
    with pytest.raises(KilledError):
        run("out", skip_unfrozen=True, resume=True, decision_aim="purity", decision_at_least=0.9)
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_run_on_a_full_disk_says_so_and_goes_on(run, tmp_path, monkeypatch):
    def find_no_space(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def be_full(place, folder, **options):
        with monkeypatch.context() as patch:
            patch.setattr(place, find_no_space)
            with pytest.raises(OSError, match=f"no space is left for the run in {folder} .*--resume"):
                run("out", skip_unfrozen=True, **options)

    be_full("zoobot_hf.ZoobotForImageClassification.save_pretrained", tmp_path / "out-checkpoints")
    be_full("zoobot_hf.training.run_report.save_model", tmp_path / "out", resume=True)
    assert run("out", skip_unfrozen=True, resume=True).kept_stage == "frozen"


def test_an_output_folder_that_holds_a_run_is_refused(run, tmp_path):
    run("out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds a run; .*--resume.*--overwrite"):
        run("out")
    shutil.rmtree(tmp_path / "out-checkpoints")
    with pytest.raises(FileExistsError, match=r"checkpoints are no longer in .*out-checkpoints, .*--overwrite"):
        run("out", resume=True, frozen=FrozenStageArguments(**SETTINGS, seed=7))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_finished_folds_without_their_checkpoints_may_be_overwritten(tmp_path):
    (tmp_path / "out-folds").mkdir()
    (tmp_path / "out-folds" / "out_of_fold.parquet").touch()
    with pytest.raises(FileExistsError, match=r"out-folds holds a finished run whose checkpoints .*--overwrite"):
        finetuning.check_output(tmp_path / "out-folds", resume=True)
    finetuning.check_output(tmp_path / "out-folds", overwrite=True)


def test_a_refused_choice_deletes_nothing_and_claims_no_folder(run, tmp_path):
    run("out", skip_unfrozen=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("out*/**/*") if path.is_file()}
    for name in ("out", "new"):
        with pytest.raises(ValueError, match="sky_prevalence has shares for Ring"):
            run(name, overwrite=True, skip_unfrozen=True, sky_prevalence={"Ring": 0.05})
        for stage, wanted in (("frozen", FrozenStageArguments), ("unfrozen", UnfrozenStageArguments)):
            with pytest.raises(ValueError, match=f"{stage} is of the type TrainingArguments; give {wanted.__name__},"):
                run(name, overwrite=True, **{stage: TrainingArguments(use_cpu=True)})
            with pytest.raises(
                ValueError, match=rf"{stage} has push_to_hub=True.*push the finished .* with push_folder"
            ):
                run(name, overwrite=True, **{stage: wanted(**SETTINGS, push_to_hub=True)})
    assert before == {path: path.read_bytes() for path in tmp_path.glob("out*/**/*") if path.is_file()}
    assert not list(tmp_path.glob("new*"))


def test_a_model_in_half_precision_is_refused_before_the_frozen_stage(run, layer_norm_model, tmp_path):
    with pytest.raises(ValueError, match=r"the model is in torch\.float16, and an encoder is trained in float32"):
        run("out", model=copy.deepcopy(layer_norm_model).half())
    assert not (tmp_path / "out-checkpoints").exists()


def test_overwrite_starts_anew(run, tmp_path):
    run("out")
    run("out", overwrite=True, skip_unfrozen=True)
    assert "unfrozen" not in json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.mark.parametrize("place", ["out", ".", "link"])
def test_overwrite_deletes_what_runs_write_and_nothing_else(place, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "out"
    (folder / "figures").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out-checkpoints").symlink_to("disk")
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(folder if place == "." else tmp_path)
    own = ["notes.txt", "figures/paper.png", "figures/roc.svg", "onnx/model.onnx"]
    (folder / "onnx").mkdir()
    of_run = ["config.json", "README.md", "model.safetensors", "metrics.json", "predictions-advanced.parquet"]
    for name in [*own, *of_run, "figures/confusion.png", "figures/roc_bar.png", "figures/roc_bar.pdf"]:
        (folder / name).touch()
    for name in ("frozen/best/model.safetensors", "unfrozen/finished.json", "other/frozen/x", "run.json", "thesis.tex"):
        (tmp_path / "disk" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / name).touch()
    finetuning._claim_output(Path(place), finetuning.checkpoints_folder(place), delete_first=True)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == set(own)
    assert {path.name for path in (tmp_path / "out-checkpoints").iterdir()} == {"other", "thesis.tex"}
    assert "onnx is an export of the earlier model; delete it, and export the new one" in caplog.text


def test_resuming_with_other_arguments_is_refused_by_name(run, rings, processor, tmp_path):
    run("out")
    with pytest.raises(ValueError, match=r"had another FrozenStageArguments\.learning_rate; resume"):
        run("out", resume=True, frozen=FrozenStageArguments(**SETTINGS, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"had another processor; resume"):
        run("out", resume=True, processor=ZoobotImageProcessor(32, zoom=1.5))
    with pytest.raises(ValueError, match=r"had another balance; resume"):
        run("out", resume=True, balance="oversample")
    model = ZoobotForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.predictions_for == "sky"
    with pytest.raises(ValueError, match=r"had another .*; resume"):
        finetune(model, processor, rings, tmp_path / "out", resume=True, sky_prevalence={"ring": 0.1})
    assert model.config.predictions_for == "training"  # what was fitted for other shares is forgotten
    path = tmp_path / "out-checkpoints" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"number of processes": 2}))
    with pytest.raises(ValueError, match=r"had another number of processes; resume"):
        run("out", resume=True)


@pytest.mark.parametrize(("field", "value"), [("class_weights", [1.0, 20.0]), ("label_smoothing", 0.1)])
def test_resuming_with_another_loss_is_refused_by_name(field, value, run, layer_norm_model):
    run("out")
    setattr(layer_norm_model.config, field, value)
    with pytest.raises(ValueError, match=rf"had another model\.{field}; resume"):
        run("out", resume=True)


def test_resuming_with_other_encoder_weights_is_refused(run, layer_norm_model):
    run("out")
    with torch.no_grad():
        next(layer_norm_model.encoder.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="had another encoder weights; resume"):
        run("out", resume=True)


def test_a_run_goes_on_whose_processor_was_given_tuples(run):
    means = {"do_normalize": True, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.2, 0.2, 0.2)}
    first = run("out", processor=ZoobotImageProcessor(32, **means))
    assert run("out", processor=ZoobotImageProcessor(32, **means), resume=True).kept_stage == first.kept_stage


def test_resuming_with_other_galaxies_or_labels_is_refused(run, rings):
    run("out", skip_unfrozen=True)
    train = rings["train"]
    for other in (train.select(range(20)), train.map(lambda galaxy: {"label": 1 - galaxy["label"]})):
        with pytest.raises(ValueError, match="had another dataset"):
            run("out", resume=True, skip_unfrozen=True, dataset=type(rings)({**rings, "train": other}))


def test_a_run_goes_on_where_its_images_were_copied_and_not_with_other_images(run, galaxy_folder, tmp_path):
    def load(folder):
        return split_dataset(catalog_to_dataset(read_catalog(folder / "catalog.csv"), label_column="ring"), seed=0)

    first = run("out", dataset=load(galaxy_folder), skip_unfrozen=True)
    copied = shutil.copytree(galaxy_folder, tmp_path / "copied", copy_function=shutil.copyfile)
    path, before = copied / "images/galaxy_03.png", (galaxy_folder / "images/galaxy_03.png").stat().st_mtime_ns
    os.utime(path, ns=(before + 10**10, before + 10**10))
    assert run("out", dataset=load(copied), resume=True, skip_unfrozen=True).test_metrics == first.test_metrics
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="had another set of images; resume"):
        run("out", dataset=load(copied), resume=True, skip_unfrozen=True)
    path.write_bytes(content)
    with_content = load(copied).map(lambda galaxy: galaxy)  # its images are bytes
    assert run("out", dataset=with_content, resume=True, skip_unfrozen=True).test_metrics == first.test_metrics


def test_balancing_records_both_prevalences(run, rings, tmp_path):
    labels = rings["train"]["label"][:]
    keep = [index for index, label in enumerate(labels) if label == 0] + [labels.index(1), len(labels) - 1]
    few = type(rings)({**rings, "train": rings["train"].select(sorted(set(keep)))})
    shares = [few["train"]["label"][:].count(label) / len(few["train"]) for label in (0, 1)]
    run("out", dataset=few, balance="oversample", skip_unfrozen=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sky_prevalence"] == pytest.approx({"not ring": shares[0], "ring": shares[1]})
    assert config["training_prevalence"] == {"not ring": 0.5, "ring": 0.5}


@pytest.fixture
def hard_rings(rings):
    """Half of the galaxies have another label than their picture says, so that there is something to calibrate."""

    def spoil(galaxy, index):
        return {**galaxy, "label": 1 - galaxy["label"] if index % 3 == 0 else galaxy["label"]}

    return type(rings)({name: split.map(spoil, with_indices=True) for name, split in rings.items()})


def test_probabilities_are_calibrated_and_for_the_sky(run, hard_rings, processor, tmp_path):
    finetuned = run("out", dataset=hard_rings, sky_prevalence={"ring": 0.1}, skip_unfrozen=True)
    config = ZoobotForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.predictions_for == "sky"
    assert config.sky_prevalence == {"not ring": 0.9, "ring": 0.1}
    judgement = finetuned.judgements["frozen"]
    assert config.calibration_temperature == judgement.calibration.config_fields()["calibration_temperature"]
    assert config.decision_threshold == {"ring": judgement.selections["ring"].threshold}
    assert [scores.population for scores in judgement.scores] == ["labelled galaxies", "sky"]
    assert judgement.scores[1].prevalence["ring"] == 0.1
    # By hand: logits by the temperature, and each class by what its share changes.
    stage, shares = finetuned.stages[0], config.training_prevalence
    logits = torch.tensor(stage.test_outputs) / (config.calibration_temperature or 1)
    shift = torch.tensor([0.9 / shares["not ring"], 0.1 / shares["ring"]]).log()
    assert torch.allclose(torch.tensor(judgement.probabilities), (logits + shift).softmax(-1).double(), atol=1e-5)
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert table["probability_ring"].to_numpy() == pytest.approx(judgement.probabilities[:, 1], abs=1e-6)
    # The metrics are of the test galaxies as they are.
    expected = log_loss(hard_rings["test"]["label"][:], judgement.probabilities_as_labelled)
    assert finetuned.test_metrics["frozen"]["log_loss"] == pytest.approx(expected, abs=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "They are for galaxies of which 90.0% are not ring, 10.0% are ring." in card
    assert "Expected in the sky, where 10.0% are ring:" in card
    classify = pipeline("image-classification", str(tmp_path / "out"))
    said = {answer["label"]: answer["score"] for answer in classify(hard_rings["test"][0]["image"])}
    assert said["ring"] == pytest.approx(judgement.probabilities[0, 1], abs=1e-5)


def test_a_card_has_the_facts_of_its_stages(run, hard_rings, layer_norm_model, monkeypatch):
    cards = []
    monkeypatch.setattr(run_report, "render_model_card", lambda facts: cards.append(facts) or "")
    layer_norm_model.config.label_smoothing = 0.2  # with a shift beside the temperature
    finetuned = run("out", dataset=hard_rings, frozen=FrozenStageArguments(**SETTINGS, seed=7))
    (facts,) = cards
    assert facts.seeds == {"frozen": 7, "unfrozen": 42}
    assert facts.training_seconds == sum(stage.seconds for stage in finetuned.stages)
    calibration = finetuned.judgements[finetuned.kept_stage].calibration
    assert (facts.temperature, facts.shift) == (calibration.temperature[0], calibration.shift)
    for stage in facts.stages:
        assert stage.metrics == finetuned.test_metrics[stage.name]
        as_they_are = finetuned.judgements[stage.name].scores[0]
        assert next(iter(stage.scores.values())) == {**as_they_are.overall, **as_they_are.labels["ring"]}


def test_a_second_finetuning_forgets_the_calibration_of_the_first_and_names_it(
    run, hard_rings, processor, tmp_path, repo_id, hub_token
):
    run("first", dataset=hard_rings, sky_prevalence={"ring": 0.1}, skip_unfrozen=True)
    push_folder(tmp_path / "first", repo_id, token=hub_token)
    model = ZoobotForImageClassification.from_pretrained(repo_id)
    model.config.encoder_name = "mwalmsley/zoobot-encoder-convnext_nano"  # what the first finetuning started from
    again = finetune(
        model, processor, hard_rings, tmp_path / "second", frozen=FrozenStageArguments(**SETTINGS), skip_unfrozen=True
    )
    assert again.model.config.sky_prevalence == again.model.config.training_prevalence
    raw = again.stages[0].validation_outputs
    assert again.judgements["frozen"].calibration.log_loss_before == pytest.approx(
        torch.nn.functional.cross_entropy(torch.tensor(raw), torch.tensor(hard_rings["validation"]["label"][:])).item(),
        abs=0.02,  # the validation galaxies' shares differ a little from the training split's
    )
    assert ModelCard.load(tmp_path / "second" / "README.md").data.base_model == repo_id


@pytest.fixture
def all_galaxies(galaxy_folder):
    return catalog_to_dataset(read_catalog(galaxy_folder / "catalog.csv"), label_column="ring")


@pytest.fixture
def out_of_fold(layer_norm_model, processor, all_galaxies):
    return cross_validate(
        layer_norm_model,
        processor,
        all_galaxies,
        folds=4,
        frozen=FrozenStageArguments(**SETTINGS),
        skip_unfrozen=True,
        sky_prevalence={"ring": 0.2},
    )


def test_a_model_without_a_test_split_reports_predictions_out_of_fold(run, all_galaxies, out_of_fold, tmp_path):
    splits = split_for_final_model(out_of_fold, all_galaxies)
    out_of_fold = out_of_fold._replace(folds=pd.concat([out_of_fold.folds] * 2))  # a row for each of two stages
    finetuned = run("out", dataset=splits, out_of_fold=out_of_fold)
    assert finetuned.test_metrics == {}
    assert [stage.test_outputs for stage in finetuned.stages] == [[], []]
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    pd.testing.assert_frame_equal(table, out_of_fold.table)
    assert len(table) == 40
    assert finetuned.model.config.sky_prevalence == pytest.approx({"not ring": 0.8, "ring": 0.2})
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) == {"frozen", "unfrozen", "kept_stage", "out_of_fold"}
    assert "scores" not in metrics[finetuned.kept_stage]
    measured = metrics["out_of_fold"]
    assert (measured["galaxies"], measured["folds"]) == (40, 4)
    assert measured["accuracy"] == pytest.approx(out_of_fold.accuracy.value)
    assert measured["accuracy"] == finetuned.out_of_fold_metrics["accuracy"]
    as_they_are, in_the_sky = measured["scores"]
    for own, expected in ((as_they_are, out_of_fold.scores), (in_the_sky, out_of_fold.sky_scores)):
        assert own["prevalence"] == pytest.approx(expected.prevalence)
        low, high = (own["labels"]["ring"]["roc_auc"][end] for end in ("low", "high"))
        assert (low, high) == pytest.approx(expected.labels["ring"]["roc_auc"][1:], abs=1e-6)
    selection = finetuned.judgements[finetuned.kept_stage].selections["ring"]
    assert selection.with_label + selection.without_label == len(splits["train"]) == 30
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Out of fold: 40 galaxies, each judged by a model that was not trained on it." in card
    assert "Each was trained on fewer galaxies than the model here" in card
    assert "| | 4 folds |" in card
    assert "test split" not in card
    assert "test galaxies" not in card.replace("has no test galaxies of its own", "")


def test_the_final_model_is_trained_on_all_galaxies_but_a_fold(all_galaxies, out_of_fold):
    splits = split_for_final_model(out_of_fold, all_galaxies)
    assert list(splits) == ["train", "validation"]
    folds = out_of_fold.table.set_index("id_str")["fold"]
    assert len(set(folds[splits["validation"]["id_str"][:]])) == 1
    assert len(splits["validation"]) == 10
    assert splits["validation"]["label"][:].count(1) == 5
    assert sorted(splits["train"]["id_str"][:] + splits["validation"]["id_str"][:]) == sorted(all_galaxies["id_str"])


def test_only_the_galaxies_that_were_judged_out_of_fold_are_taken(run, rings, all_galaxies, out_of_fold):
    splits = split_for_final_model(out_of_fold, all_galaxies)
    with pytest.raises(ValueError, match="40 galaxies in train, validation, test, and out_of_fold judges 40; give"):
        run("out", dataset=rings, out_of_fold=out_of_fold)
    fewer = type(rings)(train=splits["train"].select(range(20)), validation=splits["validation"])
    with pytest.raises(ValueError, match="the dataset has 30 galaxies in train, validation, and out_of_fold judges 40"):
        run("out", dataset=fewer, out_of_fold=out_of_fold)
    with pytest.raises(ValueError, match=r"sky_prevalence is \{'ring': 0.1\}, and the predictions out of fold are for"):
        run("out", dataset=splits, out_of_fold=out_of_fold, sky_prevalence={"ring": 0.1})
    with pytest.raises(ValueError, match="the dataset's 39 galaxies are not the 40 of the result in their order"):
        split_for_final_model(out_of_fold, all_galaxies.select(range(39)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sky_prevalence": {"bar": 0.1}}, "sky_prevalence has shares for bar; give one for each of not ring, ring"),
        ({"sky_prevalence": {"ring": 0.0}}, "each label's share lies between 0 and 1"),
        ({"sky_prevalence": {"ring": 0.5, "not ring": 0.6}}, "which adds up to 1.1"),
        ({"decision_aim": "beauty"}, "aim is 'beauty'; choose one of purity, completeness, f1"),
        ({"decision_aim": "purity"}, "at_least is None; give the purity to be reached"),
    ],
)
def test_prevalences_and_aims_are_checked_before_training(options, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_validation_is_refused(run, rings):
    with pytest.raises(ValueError, match="the dataset has no galaxies in validation; make the splits"):
        run("out", dataset=type(rings)({"train": rings["train"], "test": rings["test"]}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"processor": ViTImageProcessor()}, "processor is of the type ViTImageProcessor; give a ZoobotImageProc"),
        ({"model": ResNetModel(ResNetConfig(hidden_sizes=[8], depths=[1]))}, "model is of the type ResNetModel; give"),
    ],
)
def test_a_model_or_a_processor_of_another_class_is_refused(wrong, message, run):
    with pytest.raises(ValueError, match=message):
        run("out", **wrong)


def test_a_stage_may_have_another_precision_than_the_one_before(run):
    # Arguments that are made later would forget the precision of the stage before.
    stages = {"frozen": FrozenStageArguments(**SETTINGS), "unfrozen": UnfrozenStageArguments(**SETTINGS, bf16=True)}
    assert [stage.name for stage in run("out", **stages).stages] == ["frozen", "unfrozen"]


def test_a_split_without_a_column_is_named(run, rings):
    rings["test"] = rings["test"].remove_columns("id_str")
    with pytest.raises(ValueError, match=r"the split test has no column id_str; it has .*image.* rename_column"):
        run("out", dataset=rings)


def test_a_class_without_a_training_galaxy_is_named(run, rings):
    smooth = rings["train"].filter(lambda galaxy: galaxy["label"] == 0)
    with pytest.raises(ValueError, match="no galaxy with and one without the label not ring, ring"):
        run("out", dataset=type(rings)({**rings, "train": smooth}))


def test_an_unreadable_image_stops_before_training_and_is_named(run, rings, tmp_path):
    path = rings["train"].cast_column("image", rings["train"].features["image"].__class__(decode=False))[3]["image"][
        "path"
    ]
    Path(path).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"1 of 40 images can't be read: .*{Path(path).name}"):
        run("out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_several_labels_and_values_are_learned_with_gaps(problem_type, processor, galaxy_folder, tmp_path):
    catalog = read_catalog(galaxy_folder / "catalog.csv")
    catalog["bar"] = [float("nan") if index % 3 == 0 else index % 2 for index in range(len(catalog))]
    dataset = catalog_to_dataset(catalog, label_column=["ring", "bar"], problem_type=problem_type)
    tiny_model("batch_norm").save_pretrained(tmp_path / "encoder")
    model = ZoobotForImageClassification.from_pretrained(
        tmp_path / "encoder", label_names=["ring", "bar"], problem_type=problem_type
    )
    arguments = {"frozen": FrozenStageArguments(**SETTINGS), "unfrozen": UnfrozenStageArguments(**SETTINGS)}
    finetuned = finetune(model, processor, split_dataset(dataset, seed=0), tmp_path / "out", **arguments)
    assert all(math.isfinite(stage.validation_loss) for stage in finetuned.stages)
    prefix = "predicted" if problem_type == "regression" else "probability"
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert table.columns.tolist() == ["id_str", f"{prefix}_ring", f"{prefix}_bar"]
    assert table.notna().all().all()


SCRIPT = """
import sys
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from zoobot_hf import *
from zoobot_hf.models.heads import head_loss

folder, model, output = sys.argv[1:]
settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
rings = split_dataset(catalog_to_dataset(read_catalog(folder + "/catalog.csv"), label_column="ring"), seed=0)
rings["test"] = rings["test"].select(range(7))
model = ZoobotForImageClassification.from_pretrained(model)
processor = ZoobotImageProcessor(32)
unfrozen = UnfrozenStageArguments(**settings, learning_rate=1e-2)
finetune(model, processor, rings, output, frozen=FrozenStageArguments(**settings), unfrozen=unfrozen)

# finetune() ends with the same file on every rank: whether the ranks agree shows without its reload.
unfrozen.load_best_model_at_end = False
unfrozen.output_dir = output + "-agree"
unfrozen.per_device_eval_batch_size = 2
data = {"train_dataset": rings["train"], "eval_dataset": rings["test"]}
trainer = UnfrozenStageTrainer(model, unfrozen, processing_class=processor, **data)
trainer.train()
predicted = trainer.predict(rings["test"])
logits, labels = torch.tensor(predicted.predictions), torch.tensor(predicted.label_ids)
expected = head_loss(logits, labels, model.config, training=False).item()
assert abs(predicted.metrics["test_loss"] - expected) < 1e-6, (predicted.metrics, expected)
save_file(model.state_dict(), f"{output}-rank-{PartialState().process_index}.safetensors")
print(sorted(rings["test"]["id_str"]))
"""


@pytest.mark.slow
def test_two_processes_agree_and_predict_each_galaxy_once(layer_norm_model, galaxy_folder, tmp_path):
    layer_norm_model.save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    printed = run_on_two(script, galaxy_folder, tmp_path / "model", tmp_path / "out")
    first, second = (load_file(f"{tmp_path}/out-rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = layer_norm_model.state_dict()
    assert not any(torch.equal(before[name], first[name]) for name, _ in layer_norm_model.named_parameters())
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert len(table) == 7  # which two processes do not divide
    assert str(sorted(table["id_str"])) in printed
