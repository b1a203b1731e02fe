import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PilImage
from processes import run_on_two
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from zoobot_hf import FrozenStageArguments, UnfrozenStageArguments
from zoobot_hf.evaluation.calibration import fit_calibration, probabilities_at_prevalence
from zoobot_hf.evaluation.scores import score_probabilities
from zoobot_hf.training import cross_validation, stages
from zoobot_hf.training.cross_validation import cross_validate, write_cross_validation
from zoobot_hf.training.embedding_cache import Stored, Views
from zoobot_hf.training.trainer import FrozenStageTrainer


@pytest.fixture
def galaxies(galaxy_images, galaxy_labels):
    features = Features({"id_str": Value("string"), "image": Image(), "label": ClassLabel(names=["not ring", "ring"])})
    columns = {"id_str": [f"galaxy_{index:02d}" for index in range(40)], "image": galaxy_images, "label": galaxy_labels}
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def validate(layer_norm_model, processor, galaxies, tmp_path, monkeypatch):
    monkeypatch.setattr(cross_validation, "score_probabilities", partial(score_probabilities, draws=50))

    def run(**changes):
        frozen = FrozenStageArguments(
            num_train_epochs=1, use_cpu=True, disable_tqdm=True, embedding_cache_dir=str(tmp_path / "cache")
        )
        settings = {"dataset": galaxies, "folds": 2, "frozen": frozen, "skip_unfrozen": True, **changes}
        return cross_validate(layer_norm_model, processor, **settings)

    return run


@pytest.fixture
def remembered(monkeypatch):
    """What each fold was trained and tested with, and what its stages said."""
    folds = []
    train = cross_validation._train

    def train_and_remember(model, processor, splits, *arguments):
        stages = train(model, processor, splits, *arguments)
        folds.append((splits, stages, model))
        return stages

    monkeypatch.setattr(cross_validation, "_train", train_and_remember)
    return folds


def test_every_galaxy_is_predicted_once_by_a_model_that_did_not_see_it(validate, remembered, galaxies):
    result = validate()
    assert result.table["id_str"].tolist() == galaxies["id_str"][:]
    assert result.table["fold"].value_counts().tolist() == [20] * 2
    for fold, (splits, _, _) in enumerate(remembered):
        names = {name: set(split["id_str"]) for name, split in splits.items()}
        assert names["test"] == set(result.table.loc[result.table["fold"] == fold, "id_str"])
        assert not names["train"] & names["test"]
        assert not names["validation"] & (names["train"] | names["test"])
        assert len(names["train"] | names["validation"] | names["test"]) == 40
        assert len(splits["validation"]) == 4
        assert set(splits["validation"]["label"]) == {0, 1}


@pytest.fixture
def few_rings(galaxies):
    """20 galaxies without a ring and 8 with one."""
    return galaxies.select([row for row in range(40) if row % 2 == 0 or row < 16])


@pytest.mark.parametrize(("label_smoothing", "method"), [(0.0, "temperature"), (0.1, "bias_corrected")])
def test_the_calibration_of_a_fold_comes_from_its_own_validation_split(
    label_smoothing, method, validate, remembered, layer_norm_model, few_rings
):
    layer_norm_model.config.class_weights = [1.0, 3.0]  # count like so many galaxies
    layer_norm_model.config.label_smoothing = label_smoothing
    result = validate(dataset=few_rings)
    for fold, (splits, (stage,), _) in enumerate(remembered):
        weighted = np.bincount(splits["train"]["label"]) * [1.0, 3.0]
        shares = weighted / weighted.sum()
        calibration = fit_calibration(
            stage.validation_outputs, splits["validation"]["label"][:], training_prevalence=shares, method=method
        )
        expected = softmax(calibration.apply(np.asarray(stage.test_outputs)), axis=1)
        expected = probabilities_at_prevalence(expected, assumed_prevalence=shares, prevalence=[20 / 28, 8 / 28])
        rows = result.table[result.table["fold"] == fold].set_index("id_str").loc[splits["test"]["id_str"][:]]
        assert rows["probability_ring"].to_numpy() == pytest.approx(expected[:, 1], abs=1e-6)
        assert result.temperatures[fold] == calibration.temperature[0]


def test_the_scores_are_scikit_learns(validate):
    result = validate()
    truth, probability = result.table["label"] == "ring", result.table["probability_ring"].astype(float)
    scores = result.scores.labels["ring"]
    assert result.accuracy.value == pytest.approx(accuracy_score(truth, probability > 0.5))
    assert scores["roc_auc"].value == pytest.approx(roc_auc_score(truth, probability))
    assert scores["log_loss"].value == pytest.approx(log_loss(truth, probability), abs=1e-6)
    assert result.accuracy.low <= result.accuracy.value <= result.accuracy.high
    assert result.sky_scores is None
    own = [accuracy_score(part["label"], part["predicted_label"]) for _, part in result.table.groupby("fold")]
    assert result.folds["accuracy"].mean() == pytest.approx(np.mean(own), abs=0.11)  # folds are before calibration


def test_the_encoder_runs_once_for_all_folds_and_the_model_is_not_changed(validate, layer_norm_model, monkeypatch):
    before = {name: value.clone() for name, value in layer_norm_model.state_dict().items()}
    calls = []
    store = cross_validation.store_embeddings
    monkeypatch.setattr(
        cross_validation, "store_embeddings", lambda *args, **kwargs: (calls.append(1), store(*args, **kwargs))[1]
    )
    monkeypatch.setattr("zoobot_hf.training.trainer.store_embeddings", lambda *a, **k: pytest.fail("ran again"))
    validate()
    assert len(calls) == 2  # plain, and the augmented views
    assert all(torch.equal(value, before[name]) for name, value in layer_norm_model.state_dict().items())


def test_the_fullest_part_has_most_galaxies_of_its_rarest_class():
    part, labels = np.repeat([0, 1, 2], [4, 2, 4]), np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 1])
    assert cross_validation._fullest(part, labels) == 2


def test_the_seed_decides_the_new_heads(validate, layer_norm_model, monkeypatch):
    layer_norm_model.config.head_type = "mlp"
    heads = []

    def stop(model, *_):
        heads.append(model.head[1].weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(cross_validation, "_train", stop)
    for earlier in (0, 1):
        torch.manual_seed(earlier)
        with pytest.raises(KeyboardInterrupt):
            validate()
    assert torch.equal(*heads)


def test_a_fold_is_trained_on_views_and_judged_by_plain_galaxies(galaxies):
    plain, seen = (Stored(torch.zeros(40, count, 3), torch.arange(40), "") for count in (1, 4))
    rows = {identifier: row for row, identifier in enumerate(galaxies["id_str"])}
    shared, some = cross_validation._Shared(rows, plain, seen), galaxies.select([7, 3])
    assert len(shared.of(some, views=Views(4))) == 8
    assert len(shared.of(some, views=None)) == 2
    assert shared.of(some, views=None).rows.tolist() == [7, 3]


def test_each_fold_has_a_new_head(validate, remembered, layer_norm_model):
    settings = {"num_train_epochs": 1, "learning_rate": 1e-9, "embedding_cache": False}
    validate(frozen=FrozenStageArguments(use_cpu=True, disable_tqdm=True, **settings))
    assert layer_norm_model.head[-1].weight.abs().max() > 1e-3
    assert all(model.head[-1].weight.abs().max() < 1e-6 for _, _, model in remembered[:2])


def test_the_unfrozen_stage_of_a_fold_is_kept_where_its_validation_loss_is_lower(validate, remembered):
    unfrozen = UnfrozenStageArguments(
        num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True
    )
    result = validate(skip_unfrozen=False, unfrozen=unfrozen)
    assert result.folds["stage"].tolist() == ["frozen", "unfrozen"] * 2
    for fold, rows in result.folds.groupby("fold"):
        assert rows["is_kept"].sum() == 1
        assert rows.loc[rows["is_kept"], "validation_loss"].item() == rows["validation_loss"].min()
        stages = remembered[fold][1]
        assert not np.allclose(stages[0].test_outputs, stages[1].test_outputs)


def test_an_unfrozen_stage_that_diverges_costs_a_fold_nothing(validate, caplog):
    alone = validate()
    caplog.set_level("INFO")
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    unfrozen = UnfrozenStageArguments(learning_rate=1e30, max_grad_norm=0, **settings)
    result = validate(skip_unfrozen=False, unfrozen=unfrozen)
    pd.testing.assert_frame_equal(result.table, alone.table)
    assert result.folds["stage"].tolist() == ["frozen", "frozen"]
    for fold, accuracy in enumerate(result.folds["accuracy"]):
        assert f"Fold {fold + 1} of 2, frozen stage: accuracy {accuracy:.3f}" in caplog.text


def test_folds_that_were_killed_go_on_where_they_were(validate, tmp_path, monkeypatch):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    unfrozen = {"skip_unfrozen": False, "unfrozen": UnfrozenStageArguments(learning_rate=1e-2, **settings)}
    unbroken = validate(**unfrozen)
    run_stage, trained = stages._run_stage, []

    def run_and_be_killed(name, make_trainer, model, arguments, processor, dataset, work_dir):
        trained.append((work_dir.name, name))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return run_stage(name, make_trainer, model, arguments, processor, dataset, work_dir)

    monkeypatch.setattr(stages, "_run_stage", run_and_be_killed)
    with pytest.raises(KeyboardInterrupt):
        validate(**unfrozen, work_dir=tmp_path / "work")
    monkeypatch.setattr(FrozenStageTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    (tmp_path / "work/fold-0").mkdir()  # as if killed before the finished fold's checkpoints were deleted
    resumed = validate(**unfrozen, work_dir=tmp_path / "work")
    assert trained[4:] == [("fold-1", "frozen"), ("fold-1", "unfrozen")]
    pd.testing.assert_frame_equal(resumed.table, unbroken.table)
    pd.testing.assert_frame_equal(resumed.folds.drop(columns="seconds"), unbroken.folds.drop(columns="seconds"))
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["fold-0.json", "fold-1.json", "run.json"]
    with pytest.raises(ValueError, match=r"had another seed; resume .* or start anew"):
        validate(**unfrozen, work_dir=tmp_path / "work", seed=1)
    (tmp_path / "work" / "notes.txt").touch()
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        validate(**unfrozen, work_dir=tmp_path / "work", overwrite=True)
    assert (tmp_path / "work" / "notes.txt").exists()


def test_predictions_are_for_the_sky_and_scores_say_which_population(validate):
    result = validate(sky_prevalence={"ring": 0.05})
    assert result.table["probability_ring"].mean() < 0.2
    assert result.scores.prevalence["ring"] == 0.5
    assert result.sky_scores.prevalence["ring"] == 0.05
    assert validate(sky_prevalence={"ring": 0.499}).sky_scores.prevalence["ring"] == 0.499
    back = probabilities_at_prevalence(
        result.table[["probability_not_ring", "probability_ring"]].to_numpy(dtype=float),
        assumed_prevalence=[0.95, 0.05],
        prevalence=[0.5, 0.5],
    )
    truth = (result.table["label"] == "ring").to_numpy()
    in_sky = log_loss(truth, result.probabilities[:, 1], sample_weight=np.where(truth, 0.05, 0.95))
    assert result.sky_scores.labels["ring"]["log_loss"].value == pytest.approx(in_sky)
    assert result.scores.labels["ring"]["log_loss"].value == pytest.approx(log_loss(truth, back), abs=1e-5)
    # The labels are audited at the training prevalence, which is one half too.
    own = pd.Series(back[np.arange(40), truth.astype(int)], result.table["id_str"])[result.doubtful["id_str"]]
    assert result.doubtful["probability_of_label"].to_numpy() == pytest.approx(own.to_numpy(), abs=1e-5)


def test_near_duplicates_stay_in_one_fold_and_in_one_split(validate, remembered, galaxies, galaxy_images, caplog):
    twin = np.asarray(galaxy_images[0]).copy()
    twin[0, 0] += 1
    row = Dataset.from_dict({"id_str": ["twin"], "image": [PilImage.fromarray(twin)], "label": [0]}, galaxies.features)
    joined = DatasetDict(train=galaxies, test=row)
    # Without their group, the twins would be in two splits for some of these seeds.
    for seed in range(4):
        result = validate(dataset=joined, seed=seed)
        folds = result.table.set_index("id_str")["fold"]
        assert folds["twin"] == folds["galaxy_00"]
    for splits, _, _ in remembered:
        assert [len({"twin", "galaxy_00"} & set(split["id_str"])) for split in splits.values()].count(2) == 1
    assert ("galaxy_00", "twin") in set(
        zip(result.duplicates["id_str"], result.duplicates["other_id_str"], strict=True)
    )
    assert not result.duplicates["leaks"].any()
    assert "near-duplicates and stay in one fold" in caplog.text


def test_balanced_folds_have_the_labels_own_prevalence_again(validate, few_rings, remembered):
    result = validate(dataset=few_rings, balance="oversample")
    for splits, _, _ in remembered:
        assert len(set(np.bincount(splits["train"]["label"]))) == 1
    assert len(result.table) == 28
    assert result.scores.prevalence["ring"] == pytest.approx(8 / 28)


def test_tables_scores_and_figures_are_written(validate, galaxies, processor, tmp_path):
    result = validate()
    (tmp_path / "out").mkdir()
    for name in ("roc_of_my_paper.pdf", "roc_earlier_label.png"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / "out_of_fold.json").write_text('{"figures": ["roc_earlier_label.png", "roc_gone.png"]}')
    paths = write_cross_validation(result, galaxies, tmp_path / "out", processor=processor)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"roc_of_my_paper.pdf", *(p.name for p in paths)}
    assert {path.name for path in paths} == {
        "out_of_fold.parquet",
        "out_of_fold.json",
        "label_audit.csv",
        "label_audit.png",
        "near_duplicates.csv",
        "reliability.png",
        "reliability.pdf",
        "roc.png",
        "roc.pdf",
    }
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "out_of_fold.parquet"), result.table)
    facts = json.loads((tmp_path / "out" / "out_of_fold.json").read_text())
    assert facts["accuracy"]["value"] == pytest.approx(result.accuracy.value)
    assert len(facts["folds"]) == 2
    assert facts["figures"] == ["reliability.png", "reliability.pdf", "roc.png", "roc.pdf"]
    audit = pd.read_csv(tmp_path / "out" / "label_audit.csv", dtype={"id_str": str})
    assert audit["id_str"].tolist() == result.doubtful["id_str"].tolist()


def test_the_sheet_shows_the_likeliest_wrong_labels_first(galaxies, processor, tmp_path, monkeypatch):
    probability = np.where(np.arange(40) % 2 == 1, 0.8, 0.2)
    probability[[7, 8]] = [0.03, 0.9]
    doubtful = cross_validation.find_doubtful_labels(
        galaxies["id_str"][:],
        np.stack([1 - probability, probability], axis=1),
        galaxies["label"][:],
        label_names=["not ring", "ring"],
    )
    sheets = []
    monkeypatch.setattr(cross_validation, "plot_galaxy_sheet", lambda *given: sheets.append(given))
    cross_validation.plot_doubtful_labels(doubtful, galaxies, tmp_path / "sheet.png", processor=processor, count=2)
    ((images, titles, _),) = sheets
    assert titles == [
        "1. galaxy_07\nlabel: ring\nP(ring) = 0.030",
        "2. galaxy_08\nlabel: not ring\nP(not ring) = 0.100",
    ]
    assert np.array_equal(np.asarray(images[0]), np.asarray(galaxies[7]["image"]))


def test_too_few_galaxies_for_the_folds_are_refused(validate, layer_norm_model, galaxies):
    few = galaxies.select([*range(0, 40, 2), 1, 3, 5])
    with pytest.raises(ValueError, match="class 'ring' has 3 galaxies, fewer than the 4 folds"):
        validate(dataset=few, folds=4)
    with pytest.raises(ValueError, match="class 'ring' has 2 galaxies, fewer than the 3 folds"):
        validate(dataset=few.select(range(22)), folds=2)
    with pytest.raises(ValueError, match="frozen is of the type UnfrozenStageArguments; give FrozenStageArguments, or"):
        validate(frozen=UnfrozenStageArguments(use_cpu=True))
    with pytest.raises(ValueError, match="processor is of the type dict; give a ZoobotImageProcessor, which"):
        cross_validate(layer_norm_model, {}, galaxies, folds=2)


def test_a_class_of_near_duplicates_is_refused_before_a_fold_is_trained(validate, remembered, galaxies):
    rings, others = ([row for row in range(40) if row % 2 == ring] for ring in (1, 0))
    copies = [rings[0]] * 5
    few = galaxies.select([*others, *copies, rings[1]])
    few = few.remove_columns("id_str").add_column("id_str", [f"galaxy_{row:02d}" for row in range(len(few))])
    with pytest.raises(ValueError, match=r"without fold . there is no galaxy of class ring in .*near-duplicates"):
        validate(dataset=few)
    assert not remembered


def test_the_figures_are_for_the_galaxies_that_are_drawn(validate, galaxies, processor, tmp_path, monkeypatch):
    result = validate(sky_prevalence={"ring": 0.05})
    drawn = {}
    for name in ("plot_reliability", "plot_roc_and_precision_recall"):
        monkeypatch.setattr(cross_validation, name, lambda *given, name=name, **_: drawn.update({name: given}))
    write_cross_validation(result, galaxies, tmp_path / "out", processor=processor)
    own = np.bincount(galaxies["label"][:]) / len(galaxies)
    expected = probabilities_at_prevalence(result.probabilities, assumed_prevalence=[0.95, 0.05], prevalence=own)
    for probabilities, has_label, *_ in drawn.values():
        np.testing.assert_allclose(probabilities, expected[:, 1])
        assert has_label.tolist() == (result.table["label"] == "ring").tolist()
    assert len(drawn) == 2
    assert np.abs(expected[:, 1] - result.probabilities[:, 1]).max() > 0.1


SCRIPT = """
import sys
from accelerate.utils import gather_object
from zoobot_hf import *
from zoobot_hf.training import cross_validation, stages

def measure_and_compare(name, trainer, *args, measure=stages._measure, **kwargs):
    weights = trainer.model.head[-1].weight.tolist()
    first, second = gather_object([(trainer.state.best_model_checkpoint, weights)])
    assert first[0] is not None and first == second, (first[0], second[0])
    return measure(name, trainer, *args, **kwargs)

folder, model, cache = sys.argv[1:]
stages._measure = measure_and_compare
rings = catalog_to_dataset(read_catalog(folder + "/catalog.csv"), label_column="ring")
model = ZoobotForImageClassification.from_pretrained(model)
frozen = FrozenStageArguments(num_train_epochs=2, embedding_cache_dir=cache, disable_tqdm=True)
cross_validation.cross_validate(model, ZoobotImageProcessor(32), rings, folds=2, frozen=frozen, skip_unfrozen=True)
"""


@pytest.mark.slow
def test_two_processes_load_the_same_best_checkpoint(layer_norm_model, galaxy_folder, tmp_path):
    layer_norm_model.save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_two(script, galaxy_folder, tmp_path / "model", tmp_path / "cache")
