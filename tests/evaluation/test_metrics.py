import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import EvalPrediction

from zoobot_hf.evaluation import metrics

SINGLE, MULTI = "single_label_classification", "multi_label_classification"

# Four galaxies without a ring, three of them found; two with, one of them found.
PROBABILITIES = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.6, 0.4], [0.1, 0.9]]
LABELS = [0, 0, 0, 0, 1, 1]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def compute(problem_type, predictions, references):
    return metrics.metrics_for(problem_type).compute(predictions=predictions, references=references)


def test_two_labels_score_label_one():
    results = compute(SINGLE, PROBABILITIES, LABELS)
    assert results["accuracy"] == pytest.approx(4 / 6)
    assert results["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert results["completeness"] == pytest.approx(1 / 2)
    assert results["purity"] == pytest.approx(1 / 2)
    assert results["f1"] == pytest.approx(1 / 2)
    assert results["roc_auc"] == pytest.approx(7 / 8)  # of 8 pairs, only (0.4, 0.6) is the wrong way round
    assert results["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    expected_loss = -np.mean(np.log([0.9, 0.8, 0.7, 0.4, 0.4, 0.9]))
    assert results["log_loss"] == pytest.approx(expected_loss)
    assert results["confusion"] == [[3, 1], [1, 1]]


def test_more_labels_report_the_mean_over_labels():
    probabilities = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]
    results = compute(SINGLE, probabilities, [0, 1, 2, 2])
    assert results["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert results["completeness"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert results["balanced_accuracy"] == pytest.approx(results["completeness"])
    assert results["purity"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert results["roc_auc"] == pytest.approx((1 + 5 / 6 + 3 / 4) / 3)


def test_a_class_that_is_absent_leaves_its_scores_undefined():
    results = compute(SINGLE, PROBABILITIES[:3], [0, 0, 0])
    undefined = ("completeness", "purity", "f1", "roc_auc", "average_precision")
    assert [math.isnan(results[name]) for name in undefined] == [True] * 5
    assert results["accuracy"] == 1.0
    assert results["balanced_accuracy"] == 1.0
    assert results["log_loss"] == pytest.approx(-np.mean(np.log([0.9, 0.8, 0.7])))
    assert results["confusion"] == [[3, 0], [0, 0]]


def test_only_the_positive_class_has_no_roc_auc_but_a_completeness():
    results = compute(SINGLE, PROBABILITIES[-2:], [1, 1])
    assert math.isnan(results["roc_auc"])
    assert results["completeness"] == 0.5
    assert results["purity"] == 1.0


def test_a_label_that_is_absent_is_left_out_of_the_mean():
    probabilities = [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]
    results = compute(SINGLE, probabilities, [0, 1])
    assert results["completeness"] == 1.0
    assert results["roc_auc"] == 1.0


def test_a_certain_and_wrong_prediction_has_a_finite_loss():
    assert compute(SINGLE, [[1.0, 0.0]], [1])["log_loss"] == pytest.approx(36.04, abs=0.01)


def test_float32_probabilities_do_not_warn():
    generator = np.random.default_rng(0)
    probabilities = metrics.softmax(generator.normal(size=(1000, 7))).astype(np.float32)
    results = compute(SINGLE, probabilities, generator.integers(0, 7, 1000))
    assert results["roc_auc"] == pytest.approx(0.5, abs=0.05)


def test_several_labels_are_scored_one_by_one():
    results = compute(MULTI, [[0.9, 0.2], [0.4, 0.3], [0.8, 0.5]], [[1, 0], [1, 0], [0, 1]])
    assert results["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert results["balanced_accuracy"] == pytest.approx((1 / 4 + 1) / 2)
    assert results["completeness"] == pytest.approx((1 / 2 + 1) / 2)
    assert results["roc_auc"] == pytest.approx((1 / 2 + 1) / 2)
    assert results["confusion"] == [[[0, 1], [1, 1]], [[2, 0], [0, 1]]]


@pytest.mark.parametrize("unknown", [float("nan"), None])
def test_a_multi_label_reference_that_is_unknown_counts_for_nothing(unknown):
    probabilities = [[0.9, 0.2], [0.2, 0.3], [0.8, 0.6]]
    results = compute(MULTI, probabilities, [[1, unknown], [0, unknown], [unknown, unknown]])
    assert results["accuracy"] == 1.0
    assert results["log_loss"] == pytest.approx(-np.mean(np.log([0.9, 0.8])))
    assert results["confusion"] == [[[1, 0], [0, 1]], [[0, 0], [0, 0]]]


def test_regression_ignores_references_that_are_missing():
    missing = float("nan")
    predictions = [[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]]
    results = compute("regression", predictions, [[1.0, missing], [3.0, missing], [4.0, 8.0]])
    assert results["mean_absolute_error"] == pytest.approx((1 / 3 + 3) / 2)
    assert results["root_mean_squared_error"] == pytest.approx((np.sqrt(1 / 3) + 3) / 2)
    assert results["r2"] == pytest.approx(1 - 1 / (14 / 3))  # of the first output alone: the second has one reference


def test_regression_without_any_reference_is_undefined():
    results = compute("regression", [[1.0]], [[float("nan")]])
    assert all(math.isnan(value) for value in results.values())


def test_results_can_be_written_as_json():
    results = compute(SINGLE, PROBABILITIES, LABELS)
    assert json.loads(json.dumps(results)) == results


def test_a_metric_can_be_used_in_batches_and_by_itself():
    accuracy = metrics.Accuracy()
    accuracy.add_batch(predictions=PROBABILITIES[:4], references=LABELS[:4])
    accuracy.add_batch(predictions=PROBABILITIES[4:], references=LABELS[4:])
    assert accuracy.compute() == {"accuracy": pytest.approx(4 / 6)}


def test_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    compute(SINGLE, PROBABILITIES, LABELS)
    assert list(tmp_path.iterdir()) == []


def test_threads_do_not_disturb_each_other():
    function = metrics.metrics_for_trainer(SINGLE)
    evaluated = EvalPrediction(predictions=np.log(PROBABILITIES), label_ids=np.array(LABELS))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(function, [evaluated] * 16))
    assert all(result == results[0] for result in results)


def test_trainer_gets_numbers_from_logits():
    function = metrics.metrics_for_trainer(SINGLE)
    results = function(EvalPrediction(predictions=np.log(PROBABILITIES), label_ids=np.array(LABELS)))
    expected = compute(SINGLE, PROBABILITIES, LABELS)
    del expected["confusion"]
    assert results == pytest.approx(expected)


def test_trainer_gets_the_confusion_counts_when_asked():
    function = metrics.metrics_for_trainer(SINGLE, include_confusion=True)
    results = function(EvalPrediction(predictions=np.log(PROBABILITIES), label_ids=np.array(LABELS)))
    assert results["confusion"] == [[3, 1], [1, 1]]


def test_trainer_may_hand_over_more_than_logits():
    function = metrics.metrics_for_trainer(SINGLE)
    predictions = (np.log(PROBABILITIES), np.zeros((6, 3)))
    assert function(EvalPrediction(predictions=predictions, label_ids=np.array(LABELS)))["accuracy"] == pytest.approx(
        4 / 6
    )


def test_trainer_gets_multi_label_scores_from_logits():
    function = metrics.metrics_for_trainer(MULTI)
    logits = np.array([[2.0, -1.0], [-1e4, 1e4]])
    scores = function(EvalPrediction(predictions=logits, label_ids=np.array([[1.0, 0], [0, 1]])))
    assert scores["accuracy"] == 1.0
    assert scores["log_loss"] == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 4)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, "regression"])
@pytest.mark.parametrize("output", [np.nan, np.inf])
def test_trainer_gets_nan_of_a_model_that_diverged(problem_type, output):
    function = metrics.metrics_for_trainer(problem_type)
    labels = np.array([0, 1]) if problem_type == SINGLE else np.array([[0.0, 1.0], [1.0, 0.0]])
    finite, diverged = (
        function(EvalPrediction(predictions=np.array([[0.0, 1.0], [value, 0.0]]), label_ids=labels))
        for value in (2.0, output)
    )
    assert diverged.keys() == finite.keys()
    assert all(math.isnan(value) for value in diverged.values())
    assert not any(math.isnan(value) for value in finite.values())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_trainer_takes_regression_values_as_they_are(shape):
    function = metrics.metrics_for_trainer("regression")
    evaluated = EvalPrediction(
        predictions=np.array([[1.0], [2.0], [3.0]]), label_ids=np.array([1.0, 2.0, 5.0]).reshape(shape)
    )
    assert function(evaluated)["mean_absolute_error"] == pytest.approx(2 / 3)


def test_softmax_does_not_overflow():
    assert metrics.softmax([[1e4, 0.0], [-1e4, -1e4]]).tolist() == [[1.0, 0.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("problem_type", "predictions", "references", "message"),
    [
        (SINGLE, [[2.0, -1.0]], [0], "between -1 and 2; pass probabilities"),
        (SINGLE, [[float("nan"), 0.5]], [0], "pass probabilities, 0-1"),
        (SINGLE, [[0.5, 0.2]], [0], "adds up to 0.7, not 1"),
        (SINGLE, [[0.5, 0.5]], [2], "label numbers from 0 to 1"),
        (SINGLE, [[0.5, 0.5]], [-1], "between -1 and -1"),
        (SINGLE, [], [], "at least one galaxy"),
        (MULTI, [[0.5, 0.5]], [[1, 2]], r"\[1.0, 2.0\]; a multi-label reference is 0, 1 or NaN"),
        (MULTI, [[0.5, 0.5]], [[1]], r"shape \(1, 1\) and predictions \(1, 2\)"),
        ("regression", [[1.0, 2.0]], [[1.0]], r"predictions have the shape \(1, 2\) and references \(1, 1\)"),
        ("regression", [[float("inf")]], [[1.0]], "not finite for 1 galaxies"),
        ("regression", [], [], "at least one galaxy"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(problem_type, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compute(problem_type, predictions, references)


@pytest.mark.parametrize("function", [metrics.metrics_for, metrics.metrics_for_trainer])
def test_an_unknown_problem_type_is_named(function):
    with pytest.raises(ValueError, match="'ranking'; choose one of single_label_classification"):
        function("ranking")
