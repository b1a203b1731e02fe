import json

import numpy as np
import pytest
import sklearn.metrics
from astropy.stats import binom_conf_interval
from scipy.special import softmax
from scipy.stats import beta, norm

from zoobot_hf.evaluation.calibration import probabilities_at_prevalence
from zoobot_hf.evaluation.intervals import class_weights_for
from zoobot_hf.evaluation.reliability import expected_calibration_error
from zoobot_hf.evaluation.scores import score_probabilities

NAMES = ["not ring", "ring"]


@pytest.fixture
def galaxies():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=300)
    score = generator.normal(2 * labels - 1.0)
    return softmax(np.stack([-score, score], axis=1), axis=1), labels


def expected_scores(probability, has_label, weights):
    return {
        "roc_auc": sklearn.metrics.roc_auc_score(has_label, probability, sample_weight=weights),
        "average_precision": sklearn.metrics.average_precision_score(has_label, probability, sample_weight=weights),
        "log_loss": sklearn.metrics.log_loss(has_label, probability, sample_weight=weights),
        "brier_score": sklearn.metrics.brier_score_loss(has_label, probability, sample_weight=weights),
    }


@pytest.mark.parametrize("sky", [None, [0.95, 0.05]])
def test_the_scores_are_scikit_learns_and_say_for_whom(galaxies, sky):
    probabilities, labels = galaxies
    scores = score_probabilities(probabilities, labels, label_names=NAMES, sky_prevalence=sky, draws=50)
    assert scores.population == ("labelled galaxies" if sky is None else "sky")
    assert scores.prevalence["ring"] == pytest.approx(labels.mean() if sky is None else 0.05)
    assert list(scores.labels) == ["ring"]
    weights = class_weights_for(labels, sky)
    accuracy = sklearn.metrics.accuracy_score(labels, probabilities.argmax(axis=1), sample_weight=weights)
    assert scores.overall["accuracy"].value == pytest.approx(accuracy)
    expected = expected_scores(probabilities[:, 1], labels, weights)
    for name, value in expected.items():
        estimate = scores.labels["ring"][name]
        assert estimate.value == pytest.approx(value)
        assert estimate.low < value < estimate.high
    assert ("calibration_error_by_chance" in scores.labels["ring"]) == (sky is None)
    error = scores.labels["ring"]["expected_calibration_error"]
    assert error.value == pytest.approx(expected_calibration_error(probabilities[:, 1], labels, weights=weights))
    # Drawn again it comes out larger than it is: an interval would miss the truth of good probabilities.
    for name in {"expected_calibration_error", "calibration_error_by_chance"} & set(scores.labels["ring"]):
        assert np.isnan(scores.labels["ring"][name][1:]).all()
    assert json.loads(json.dumps(scores.to_dict()))["labels"]["ring"]["roc_auc"]["value"] == pytest.approx(
        expected["roc_auc"]
    )


@pytest.mark.parametrize("sky", [None, [0.8, 0.2]])
def test_confidence_and_seed_decide_every_interval(galaxies, sky):
    def intervals(**options):
        scores = score_probabilities(*galaxies, label_names=NAMES, sky_prevalence=sky, draws=50, **options)
        of_all = {f"{name} of all": estimate for name, estimate in scores.overall.items()} | scores.labels["ring"]
        return {name: estimate[1:] for name, estimate in of_all.items() if not np.isnan(estimate.low)}

    wide, narrow, other = intervals(), intervals(confidence=0.5), intervals(seed=1)
    assert set(wide) == set(narrow) == set(other)
    assert len(wide) == 8
    for name, (low, high) in wide.items():
        assert low <= narrow[name][0] < narrow[name][1] < high
        is_jeffreys = sky is None and name == "accuracy of all"
        assert (other[name] == (low, high)) == is_jeffreys


@pytest.mark.parametrize("sky", [None, [0.8, 0.2]])
def test_completeness_at_a_purity_is_the_best_of_all_thresholds(galaxies, sky):
    probabilities, labels = galaxies
    weights = class_weights_for(labels, sky)
    scores = score_probabilities(probabilities, labels, label_names=NAMES, sky_prevalence=sky, draws=20, purity=0.8)
    purity, completeness, _ = sklearn.metrics.precision_recall_curve(labels, probabilities[:, 1], sample_weight=weights)
    ring = scores.labels["ring"]
    assert ring["completeness_at_purity_0.8"].value == pytest.approx(completeness[:-1][purity[:-1] >= 0.8].max())
    assert ring["purity_at_completeness_0.9"].value == pytest.approx(purity[completeness >= 0.9].max())


def test_a_purity_that_no_threshold_reaches_is_a_completeness_of_zero():
    scores = score_probabilities([[0.1, 0.9], [0.4, 0.6]] * 5, [0, 1] * 5, label_names=NAMES, draws=5)
    assert scores.labels["ring"]["completeness_at_purity_0.9"].value == 0


def test_probabilities_for_the_sky_are_calibrated_in_the_sky_and_not_on_balanced_galaxies():
    generator = np.random.default_rng(1)
    labels = generator.integers(2, size=4000)
    ratios = 2 * generator.normal(2 * labels - 1.0)
    balanced = softmax(np.stack([0 * ratios, ratios], axis=1), axis=1)
    sky = [0.95, 0.05]
    for_sky = probabilities_at_prevalence(balanced, assumed_prevalence=[0.5, 0.5], prevalence=sky)
    errors = {
        (name, prevalence is None): score_probabilities(
            given, labels, label_names=NAMES, sky_prevalence=prevalence, draws=10
        )
        .labels["ring"]["expected_calibration_error"]
        .value
        for name, given in (("balanced", balanced), ("sky", for_sky))
        for prevalence in (None, sky)
    }
    assert max(errors["balanced", True], errors["sky", False]) < 0.02
    assert min(errors["balanced", False], errors["sky", True]) > 0.1


def test_three_labels_are_scored_one_by_one(galaxies):
    generator = np.random.default_rng(2)
    labels = np.arange(120) % 3
    probabilities = softmax(generator.normal(size=(120, 3)) + np.eye(3)[labels], axis=1)
    scores = score_probabilities(
        probabilities, labels, label_names=["a", "b", "c"], sky_prevalence=[0.2, 0.3, 0.5], draws=10
    )
    weights = class_weights_for(labels, [0.2, 0.3, 0.5])
    for number, name in enumerate("abc"):
        expected = expected_scores(probabilities[:, number], labels == number, weights)
        assert {key: scores.labels[name][key].value for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("sky", [None, [0.9, 0.2]])
def test_several_labels_are_scored_where_they_are_known(galaxies, sky):
    probabilities, classes = galaxies
    labels = np.stack([1 - classes, classes], axis=1).astype(float)
    labels[:100, 0] = np.nan
    scores = score_probabilities(
        probabilities,
        labels,
        label_names=NAMES,
        problem_type="multi_label_classification",
        sky_prevalence=sky,
        draws=10,
    )
    weights = class_weights_for(labels[100:, 0], sky and [1 - sky[0], sky[0]])
    expected = expected_scores(probabilities[100:, 0], labels[100:, 0], weights)
    assert {key: scores.labels["not ring"][key].value for key in expected} == pytest.approx(expected)


def test_names_that_do_not_fit_are_refused(galaxies):
    with pytest.raises(ValueError, match="have 2 labels, label_names 1 and sky_prevalence None; give as many of each"):
        score_probabilities(*galaxies, label_names=["ring"])


def test_the_interval_of_accuracy_is_that_of_a_share():
    labels = np.arange(40) % 2
    probabilities = 0.1 + 0.8 * np.eye(2)[labels]
    scores = score_probabilities(probabilities, labels, label_names=NAMES, draws=20)
    low, high = binom_conf_interval(40, 40, confidence_level=0.9, interval="jeffreys")
    assert scores.overall["accuracy"] == pytest.approx((1, low, high))


def test_what_was_not_seen_among_few_galaxies_may_be_there_in_the_sky():
    labels = np.arange(80) % 2
    probabilities = 0.1 + 0.8 * np.eye(2)[labels]  # told apart without error
    labelled, sky = (
        score_probabilities(probabilities, labels, label_names=NAMES, sky_prevalence=prevalence).labels["ring"]
        for prevalence in (None, [0.95, 0.05])
    )
    # A rate of false positives above this makes it impure at any completeness: Jeffreys' posterior of 0 among 40.
    impure = 1 - beta(0.5, 40.5).cdf(0.05 / 9 / 0.95)
    assert 0.05 < impure < 0.95
    assert sky["completeness_at_purity_0.9"] == (1, 0, 1)
    assert labelled["completeness_at_purity_0.9"].low > 0.85
    for scores in (labelled, sky):
        assert 0.9 < scores["roc_auc"].low < scores["roc_auc"].high == 1
    assert sky["average_precision"].low < 0.6 < 0.9 < labelled["average_precision"].low


def test_a_classifier_nearly_without_error_may_be_better_than_it_was_measured():
    labels, distance, inside = np.repeat([0, 1], 300), 4.5, []
    for seed in range(20):
        ratio = distance * (np.random.default_rng(seed).normal(size=600) + distance * (labels - 0.5))
        given = softmax(np.stack([0 * ratio, ratio], axis=1), axis=1)
        scores = score_probabilities(given, labels, label_names=NAMES, draws=60, seed=seed).labels["ring"]
        inside.append(scores["roc_auc"].low < norm.cdf(distance / np.sqrt(2)) < scores["roc_auc"].high)
    assert np.mean(inside) > 0.9  # of draws with ends alone 0.7, of galaxies drawn again alone 0.85


@pytest.mark.parametrize(("share", "has_interval"), [(0.07, True), (0.06, False), (0.94, False)])
def test_no_interval_of_a_brier_score_that_hangs_on_a_few_galaxies(share, has_interval):
    labels = np.arange(80) % 2
    given = softmax(np.random.default_rng(0).normal(size=(80, 2)) + np.eye(2)[labels], axis=1)
    scores = score_probabilities(given, labels, label_names=NAMES, sky_prevalence=[1 - share, share], draws=20)
    assert np.isfinite(scores.labels["ring"]["brier_score"][1:]).all() == has_interval
    assert np.isfinite(scores.labels["ring"]["log_loss"]).all()


def test_the_interval_of_accuracy_in_the_sky_holds_the_truth_as_often_as_promised():
    generator, held, labels = np.random.default_rng(4), 0, np.repeat([0, 1], [30, 20])
    for _ in range(60):
        is_right = generator.random(50) < np.array([0.97, 0.8])[labels]
        given = 0.2 + 0.6 * np.eye(2)[np.where(is_right, labels, 1 - labels)]
        scores = score_probabilities(given, labels, label_names=NAMES, sky_prevalence=[0.9, 0.1], draws=2)
        accuracy = scores.overall["accuracy"]
        held += accuracy.low <= 0.9 * 0.97 + 0.1 * 0.8 <= accuracy.high
    assert held >= 48


def test_a_label_that_cannot_be_scored_is_left_out():
    labels = np.array([[0, 1, np.nan], [0, 0, np.nan], [0, 1, np.nan], [np.nan] * 3])
    given = [[0.1, 0.9, 0.5], [0.2, 0.4, 0.5], [0.1, 0.3, 0.5], [0.5, 0.5, 0.5]]
    several = {"label_names": ["a", "b", "c"], "problem_type": "multi_label_classification", "draws": 5}
    scores = score_probabilities(given, labels, **several)
    assert list(scores.labels) == ["b"]
    assert scores.galaxies == 3
    assert scores.prevalence == pytest.approx({"a": 0, "b": 2 / 3, "c": np.nan}, nan_ok=True)
    with pytest.raises(ValueError, match="all galaxies are with or all are without a, b, c"):
        score_probabilities(given, np.zeros((4, 3)), **several)


def test_class_numbers_come_in_any_type_that_holds_whole_numbers(galaxies):
    probabilities, labels = galaxies
    expected = score_probabilities(probabilities, labels, label_names=NAMES, draws=5)
    for own in (labels.astype(float), labels == 1):
        assert score_probabilities(probabilities, own, label_names=NAMES, draws=5) == expected
    with pytest.raises(ValueError, match=r"labels hold \['no', 'yes'\]; give whole numbers from 0 on"):
        score_probabilities(probabilities, np.where(labels == 1, "yes", "no"), label_names=NAMES)
    with pytest.raises(ValueError, match=r"labels hold \[0.0, nan\]; give whole numbers from 0 on"):
        score_probabilities(probabilities, np.where(labels == 1, np.nan, 0), label_names=NAMES)


def test_a_sky_without_a_label_is_refused(galaxies):
    with pytest.raises(
        ValueError, match=r"sky_prevalence has 1.0 of 'not ring', 0.0 of 'ring'; give each label a share"
    ):
        score_probabilities(*galaxies, label_names=NAMES, sky_prevalence=[1.0, 0.0])


def test_a_certain_mistake_costs_what_it_does_in_the_metrics():
    labels = [0, 1, 1, 1]
    given = np.array([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0], [0.4, 0.6]])
    scores = score_probabilities(given, labels, label_names=NAMES, draws=5)
    expected = sklearn.metrics.log_loss(labels, given)
    assert scores.overall["log_loss"].value == pytest.approx(expected)
    assert scores.labels["ring"]["log_loss"].value == pytest.approx(expected)
