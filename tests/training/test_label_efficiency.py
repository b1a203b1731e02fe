import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import cross_val_predict

from zoobot_hf.evaluation.power_law import extrapolate
from zoobot_hf.training import label_efficiency
from zoobot_hf.training.embedding_cache import Views
from zoobot_hf.training.label_efficiency import (
    make_untrained,
    measure_label_curve,
    predict_from_few,
    summarise_runs,
    write_label_curve,
)
from zoobot_hf.training.linear_heads import PENALTIES, standardise


@pytest.fixture
def galaxies(galaxy_images, galaxy_labels):
    features = Features({"id_str": Value("string"), "image": Image(), "label": ClassLabel(names=["not ring", "ring"])})
    columns = {"id_str": [f"galaxy_{index:02d}" for index in range(40)], "image": galaxy_images, "label": galaxy_labels}
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def measure(layer_norm_model, processor, galaxies, tmp_path):
    def run(**changes):
        settings = {"numbers": [2, 4, 8, 16], "seeds": 5, "cache_dir": tmp_path / "cache", "dataset": galaxies}
        return measure_label_curve(layer_norm_model, processor, **{**settings, **changes})

    return run


def embedded(labels, *, size=12, views=2):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(len(labels), size, generator=generator)
    plain[:, 0] += 1.5 * torch.from_numpy(labels)
    seen = plain[:, None] + 0.3 * torch.randn(len(labels), views, size, generator=generator)
    return label_efficiency._Embedded(plain, seen)


def test_a_curve_has_every_series_score_and_number(measure):
    curve = measure()
    assert set(zip(curve.table["series"], curve.table["score"], curve.table["labels"], strict=True)) == {
        (series, score, number)
        for series in ("Frozen stage", "Logistic regression", "Untrained encoder")
        for score in ("accuracy", "roc_auc", "log_loss")
        for number in (2, 4, 8, 16)
    }
    assert (curve.table["seeds"] == 5).all()
    assert (curve.table["low"] <= curve.table["value"]).all()
    assert (curve.table["value"] <= curve.table["high"]).all()
    losses = curve.runs.pivot_table(index=["labels", "seed"], columns="series", values="log_loss")
    assert (losses.corr().to_numpy()[np.triu_indices(3, 1)] < 0.99).all()  # each series is of its own
    assert curve.extrapolation is not None


def test_the_law_is_of_the_errors_and_knows_how_many_classes_there_are():
    numbers, generator = np.array([5, 10, 20, 40]), np.random.default_rng(0)
    errors = 0.8 * numbers**-0.5 + 0.01 * generator.normal(size=(6, 4))
    rows = [(number, seed, 1 - errors[seed, place]) for place, number in enumerate(numbers) for seed in range(6)]
    runs = pd.DataFrame(rows, columns=["labels", "seed", "accuracy"])
    runs = runs.assign(series="Frozen stage", roc_auc=0.5, log_loss=0.7)
    law = summarise_runs(runs, classes=3, seconds={}).extrapolation
    assert law.describe() == extrapolate(numbers, errors, classes=3).describe()
    assert law.describe() != extrapolate(numbers, errors, classes=2).describe()


def test_every_galaxy_is_tested_once_in_five_seeds_and_never_labelled_in_its_own(galaxies):
    labels = np.array(galaxies["label"])
    rings, plain = np.flatnonzero(labels), embedded(labels).plain
    plain[rings[:4]] = plain[rings[4:8]]
    draws = label_efficiency._plan_draws(galaxies, labels, np.zeros(40, dtype=bool), plain, seeds=5, seed=0)
    assert sorted(np.concatenate([draw.test for draw in draws])) == list(range(40))
    for draw in draws:
        assert np.array_equal(np.isin(rings[:4], draw.test), np.isin(rings[4:8], draw.test))
        assert set(draw.labelled(16)).isdisjoint(draw.test)
        assert set(draw.labelled(4)) < set(draw.labelled(8))
        assert np.bincount(labels[draw.labelled(4)]).tolist() == [4, 4]


def test_a_test_split_stays_the_test_set(measure, galaxies, monkeypatch):
    splits, seen = DatasetDict(train=galaxies.select(range(30)), test=galaxies.select(range(30, 40))), {}

    def summarise(runs, **options):
        seen.update(options)
        return summarise_runs(runs, **options)

    monkeypatch.setattr(label_efficiency, "summarise_runs", summarise)
    curve = measure(dataset=splits, numbers=[2, 8], seeds=2, with_untrained=False)
    assert seen["classes"] == 2
    assert (curve.runs["test_galaxies"] == 10).all()
    assert curve.extrapolation is None


def test_a_test_split_without_a_class_is_refused(measure, galaxies):
    rings, others = np.flatnonzero(galaxies["label"]), np.flatnonzero(np.logical_not(galaxies["label"]))
    splits = DatasetDict(train=galaxies.select([*others, *rings[5:]]), test=galaxies.select(rings[:5]))
    with pytest.raises(ValueError, match="split has no galaxy of class not ring, and its scores would look too good"):
        measure(dataset=splits)


def test_a_test_set_without_a_class_is_refused(measure, galaxies, monkeypatch):
    # As near-duplicates are, all rings are in one fold.
    folds = np.where(galaxies["label"], 0, np.arange(40) % 5)
    monkeypatch.setattr(label_efficiency, "assign_folds", lambda *_, **__: folds)
    with pytest.raises(ValueError, match=r"set has no galaxy of class ring, .* near-duplicates of each other, which"):
        measure()


def test_the_encoder_sees_each_galaxy_and_view_once(measure, layer_norm_model, monkeypatch):
    images = 0
    forward = layer_norm_model.zoobot.forward

    def count(pixel_values):
        nonlocal images
        images += 1
        return forward(pixel_values)

    monkeypatch.setattr(layer_norm_model.zoobot, "forward", count)
    measure(with_untrained=False, views=Views(2), seeds=2, numbers=[4])
    first = images
    measure(with_untrained=False, views=Views(2), seeds=5, numbers=[2, 4])
    assert first > 0
    assert images == first


def test_logistic_regression_is_scikit_learns_with_a_penalty_by_the_embeddings_size():
    labels = np.tile([0, 1], 40)
    draw = label_efficiency._Draw(0, np.arange(60, 80), [np.arange(0, 20, 2), np.arange(1, 20, 2)])
    plain, rows = embedded(labels).plain.numpy(), draw.labelled(10)
    (logits,) = label_efficiency._predict_by_logistic_regression(plain, labels, [draw], 10)
    mean, spread = plain[rows].mean(axis=0), plain[rows].std(axis=0)
    theirs = LogisticRegression(C=1 / 12).fit((plain[rows] - mean) / spread, labels[rows])
    assert np.exp(logits) == pytest.approx(theirs.predict_proba((plain[draw.test] - mean) / spread), abs=1e-4)


def test_heads_and_their_regularisation_are_scikit_learns():
    labels = np.tile([0, 1], 40)
    draw = label_efficiency._Draw(0, np.arange(60, 80), [np.arange(0, 8, 2), np.arange(1, 8, 2)])
    data = embedded(labels, views=1)
    data = data._replace(seen=data.plain[:, None])
    (logits,) = predict_from_few(data, labels, [draw], 4)
    train, test = (each.double().numpy() for each in standardise(data.plain[draw.labelled(4)], data.plain[draw.test]))
    truth = labels[draw.labelled(4)]
    folds = np.arange(8) // 2 % 4
    splits = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(4)]

    def losses(penalty):
        model = LogisticRegression(C=2 / (penalty * 6), tol=1e-8)
        return log_loss(truth, cross_val_predict(model, train, truth, cv=splits, method="predict_proba"))

    best = min(PENALTIES, key=losses)
    expected = LogisticRegression(C=2 / (best * 8), tol=1e-8).fit(train, truth).predict_proba(test)
    assert np.exp(logits)[:, 1] / np.exp(logits).sum(1) == pytest.approx(expected[:, 1], abs=5e-3)


def test_the_scores_are_scikit_learns_for_the_shares_of_the_test_galaxies():
    labels = np.tile([0, 0, 0, 1], 10)
    draw = label_efficiency._Draw(3, np.arange(20), [])
    logits = np.random.default_rng(0).normal(size=(20, 2))
    (row,) = label_efficiency._score("Frozen stage", 5, [draw], [logits], labels)
    odds = np.exp(logits[:, 1] - logits[:, 0]) * 0.25 / 0.75
    probability = odds / (1 + odds)
    assert row["accuracy"] == accuracy_score(labels[:20], probability > 0.5)
    assert row["roc_auc"] == pytest.approx(roc_auc_score(labels[:20], probability))
    assert row["log_loss"] == pytest.approx(log_loss(labels[:20], probability))


def test_heads_that_know_nothing_are_scored_as_the_shares_of_the_test_galaxies():
    labels = np.array([0, 0, 0, 1, 0, 2])  # the test galaxies lack a class
    draw = label_efficiency._Draw(0, np.arange(5), [])
    (row,) = label_efficiency._score("Frozen stage", 5, [draw], [np.zeros((5, 3))], labels)
    assert row["accuracy"] == 0.8
    assert row["log_loss"] == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))


def test_intervals_hold_nine_tenths_of_the_seeds():
    runs = pd.DataFrame(
        {"series": "Frozen stage", "labels": 5, "seed": range(19), "accuracy": np.arange(19) / 20, "roc_auc": 0.5}
    ).assign(log_loss=0.7)
    table = summarise_runs(runs, classes=2, seconds={}).table.set_index("score")
    # Of 19 values the smallest and the largest are the 5% and 95% points.
    assert table.loc["accuracy", ["value", "low", "high"]].tolist() == pytest.approx([0.45, 0, 0.9])
    assert table.loc["log_loss", ["low", "high"]].tolist() == pytest.approx([0.7, 0.7])


def test_an_untrained_encoder_tells_images_apart_and_is_another_one(timm_model, processor, galaxy_images):
    untrained = make_untrained(timm_model, seed=1)
    assert any(
        not torch.equal(own, other)
        for own, other in zip(untrained.encoder.parameters(), timm_model.encoder.parameters(), strict=True)
    )
    with torch.inference_mode():
        embeddings = untrained.zoobot(**processor(galaxy_images[:6])).embeddings
    assert (embeddings.std(0) / embeddings.abs().mean(0).clamp(min=1e-12)).median() > 1e-3
    again = make_untrained(timm_model, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(untrained.parameters(), again.parameters(), strict=True))


def test_numbers_that_are_not_there_are_left_out_or_refused(measure, caplog):
    curve = measure(numbers=[4, 17], seeds=2, with_untrained=False)
    assert set(curve.runs["labels"]) == {4}
    assert "17 labelled galaxies of each class are left out: 'not ring' has 16 outside the test set" in caplog.text
    with pytest.raises(ValueError, match="numbers start at 17, and outside the test set there are 16 galaxies"):
        measure(numbers=[17])
    with pytest.raises(ValueError, match=r"numbers are \[1, 4\]; give at least 2 galaxies of each class"):
        measure(numbers=[1, 4])
    with pytest.raises(ValueError, match="seeds is 1; an interval over seeds needs at least 2"):
        measure(seeds=1)


def be_killed(*args, **kwargs):
    raise KeyboardInterrupt


def test_tables_figure_and_extrapolation_are_written(measure, tmp_path, monkeypatch):
    curve = measure(with_untrained=False)
    with monkeypatch.context() as patch:
        patch.setattr(label_efficiency, "plot_label_curves", be_killed)
        with pytest.raises(KeyboardInterrupt):
            write_label_curve(curve, tmp_path / "out")
    label_efficiency.make_curve_folder(tmp_path / "out")  # may be written again
    paths = write_label_curve(curve, tmp_path / "out")
    assert all(path.stat().st_size > 100 for path in paths)
    table = pd.read_csv(tmp_path / "out" / "label_curve.csv")
    assert table["value"].tolist() == pytest.approx(curve.table["value"].tolist())
    facts = json.loads((tmp_path / "out" / "label_curve.json").read_text())
    value = facts["extrapolation"]["more_labels"]["value"]
    assert value == (curve.extrapolation.more.value if math.isfinite(curve.extrapolation.more.value) else None)
    assert facts["extrapolation"]["in_words"] == curve.extrapolation.describe()
    write_label_curve(curve._replace(runs=curve.runs.head(3)), tmp_path / "out")
    assert len(pd.read_csv(tmp_path / "out" / "label_curve_runs.csv")) == 3


def test_an_output_that_holds_a_curve_or_is_a_file_is_refused_before_the_measurement(tmp_path):
    (label_efficiency.make_curve_folder(tmp_path / "out") / "label_curve.json").touch()
    with pytest.raises(FileExistsError, match="out already holds a curve; choose another one, or delete the folder"):
        label_efficiency.make_curve_folder(tmp_path / "out")
    (tmp_path / "curve").write_text("My thesis")
    with pytest.raises(NotADirectoryError, match="curve, which is a file; choose a folder"):
        label_efficiency.make_curve_folder(tmp_path / "curve")
