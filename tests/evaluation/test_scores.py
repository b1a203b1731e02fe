import json

import numpy as np
import pytest
import sklearn.metrics
from scipy.special import softmax

from zoobot_hf.evaluation.calibration import probabilities_at_prevalence
from zoobot_hf.evaluation.intervals import class_weights_for
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
    expected = expected_scores(probabilities[:, 1], labels, class_weights_for(labels, sky))
    for name, value in expected.items():
        estimate = scores.labels["ring"][name]
        assert estimate.value == pytest.approx(value)
        assert estimate.low < value < estimate.high
    assert ("calibration_error_by_chance" in scores.labels["ring"]) == (sky is None)
    assert json.loads(json.dumps(scores.to_dict()))["labels"]["ring"]["roc_auc"]["value"] == pytest.approx(
        expected["roc_auc"]
    )


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


def test_several_labels_are_scored_where_they_are_known(galaxies):
    probabilities, classes = galaxies
    labels = np.stack([1 - classes, classes], axis=1).astype(float)
    labels[:100, 0] = np.nan
    scores = score_probabilities(
        probabilities, labels, label_names=NAMES, problem_type="multi_label_classification", draws=10
    )
    expected = expected_scores(probabilities[100:, 0], labels[100:, 0], None)
    assert {key: scores.labels["not ring"][key].value for key in expected} == pytest.approx(expected)


def test_the_interval_of_the_calibration_error_holds_the_truth():
    # Probabilities p of which p ** 1.5 come true: the mean of p - p ** 1.5 over 0-1 is 1/2 - 2/5, at a share of 2/5.
    inside, generator = 0, np.random.default_rng(3)
    for _ in range(60):
        drawn = generator.random(4000)
        is_true = generator.random(4000) < drawn**1.5
        probability = np.concatenate([drawn[is_true][:160], drawn[~is_true][:240]])
        labels = np.repeat([1, 0], [160, 240])
        scores = score_probabilities(
            np.stack([1 - probability, probability], axis=1), labels, label_names=NAMES, draws=60
        )
        estimate = scores.labels["ring"]["expected_calibration_error"]
        inside += estimate.low <= 0.1 <= estimate.high
    assert inside >= 48


def test_names_that_do_not_fit_are_refused(galaxies):
    with pytest.raises(ValueError, match="have 2 labels, label_names 1 and sky_prevalence None; give as many of each"):
        score_probabilities(*galaxies, label_names=["ring"])
