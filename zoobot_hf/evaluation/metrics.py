"""Metrics of classification and regression as `evaluate.Metric` classes that need no network.

`evaluate.load` fetches a metric's code when it is called; these are ordinary classes, with scikit-learn's arithmetic.

Single-label classification with two labels scores label 1 as the positive class. With more labels every label is scored
against the rest, and multi-label classification scores every label by itself, over the galaxies where it is known; both
report the mean over the labels. A score that is not defined is NaN, without a warning, and such a label is left out of
the mean:

- `completeness` of a label that no galaxy in the references has,
- `purity` of a label that was never predicted,
- `f1` of a label that is neither in the references nor predicted,
- `roc_auc` of a label that no galaxy has, or that every galaxy has,
- `average_precision` of a label that no galaxy has,
- `r2` of an output with fewer than two different references,
- every score of an output, or of one of several labels, without any reference.

Otherwise `accuracy`, `balanced_accuracy` (the mean completeness of the classes that are there), `log_loss` and
`confusion` are always defined.
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import sklearn.metrics
from scipy.special import expit
from transformers import EvalPrediction

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)

DECISION_THRESHOLD = 0.5  # multi-label: a label is predicted from this probability on
SUM_TOLERANCE = 1e-3  # float16 probabilities of many labels add up to 1 no more closely than this

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Booleans = npt.NDArray[np.bool_]


class _MetricInMemory(evaluate.Metric):
    """A metric that keeps what it is given in memory and writes nothing to disk."""

    summary = ""

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        super().__init__(config_name, keep_in_memory=True, **options)

    def _build_data_dir(self) -> str:
        # The original makes a folder under HF_HOME for a cache file that a metric in memory never writes.
        return ""

    def _module_information(self, features: datasets.Features) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.summary, citation="", inputs_description="", features=features)


class ClassificationMetric(_MetricInMemory):
    """A score of predicted probabilities against labels.

    `compute(predictions=..., references=...)` returns a dictionary with the metric's name and its value.
    `predictions` are probabilities, 0-1: after softmax, (n, labels), for single-label classification; after sigmoid,
    (n, labels), for multi-label classification. `references` are label numbers, (n,), or 0, 1 and NaN where it is not
    known, (n, labels).

    Args:
        config_name: "single_label_classification", which is also the meaning of leaving it out, or
            "multi_label_classification".
        options: Further arguments of `evaluate.Metric`.

    Raises:
        ValueError: From `compute`, when there is no galaxy, when a prediction is not a probability, or when a reference
            is not one of the labels.
    """

    def _info(self) -> evaluate.MetricInfo:
        several = datasets.Sequence(datasets.Value("float64"))
        references = several if self.config_name == MULTI_LABEL else datasets.Value("int64")
        return self._module_information(datasets.Features({"predictions": several, "references": references}))

    def _compute(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[Any]
    ) -> dict[str, float | list[Any]]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        if self.config_name == MULTI_LABEL:
            several = np.asarray(references, dtype=np.float64)  # None, as a table has what is missing, becomes NaN
            _check_multi_label(probabilities, several)
            return {self.name: self._score_multi_label(probabilities, several)}
        labels = np.asarray(references)
        _check_single_label(probabilities, labels)
        return {self.name: self._score_single_label(_rows_that_add_up_to_one(probabilities), labels)}

    def _score_single_label(self, probabilities: Floats, labels: Integers) -> float | list[Any]:
        """The score of one label for each galaxy."""
        raise NotImplementedError

    def _score_multi_label(self, probabilities: Floats, labels: Floats) -> float | list[Any]:
        scores = []
        for probability, label in zip(probabilities.T, labels.T, strict=True):
            known = ~np.isnan(label)
            if known.any():
                is_predicted = probability[known] >= DECISION_THRESHOLD
                scores.append(self._score_label(label[known] == 1, is_predicted, probability=probability[known]))
        return _mean_of_defined(scores)

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        """The score of one label by itself; all three are (n,)."""
        raise NotImplementedError


class _MeanOverLabels(ClassificationMetric):
    """A score that each label has by itself also where a galaxy has one label only."""

    def _score_single_label(self, probabilities: Floats, labels: Integers) -> float:
        predicted = probabilities.argmax(axis=1)
        scored = scored_labels(probabilities.shape[1], SINGLE_LABEL)
        return _mean_of_defined(
            [self._score_label(labels == i, predicted == i, probability=probabilities[:, i]) for i in scored]
        )


class Accuracy(ClassificationMetric):
    """The share of galaxies whose most probable label is the true one."""

    summary = "Share of galaxies that were given their true label, 0-1."

    def _score_single_label(self, probabilities: Floats, labels: Integers) -> float:
        return float(np.mean(probabilities.argmax(axis=1) == labels))

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        return float(np.mean(is_true == is_predicted))


class BalancedAccuracy(ClassificationMetric):
    """The mean over classes of the share of a class that was recognised."""

    summary = "Mean completeness of the classes that are in the references, 0-1."

    def _score_single_label(self, probabilities: Floats, labels: Integers) -> float:
        return _mean_completeness(labels, probabilities.argmax(axis=1))

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        return _mean_completeness(is_true, is_predicted)


class Completeness(_MeanOverLabels):
    """The share of the galaxies with a label that were given it (recall)."""

    summary = "Completeness (recall), 0-1."

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        return float(sklearn.metrics.recall_score(is_true, is_predicted, zero_division=np.nan))


class Purity(_MeanOverLabels):
    """The share of the galaxies that were given a label that do have it (precision)."""

    summary = "Purity (precision), 0-1."

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        return float(sklearn.metrics.precision_score(is_true, is_predicted, zero_division=np.nan))


class F1(_MeanOverLabels):
    """The harmonic mean of completeness (recall) and purity (precision)."""

    summary = "Harmonic mean of completeness and purity, 0-1."

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        return float(sklearn.metrics.f1_score(is_true, is_predicted, zero_division=np.nan))


class RocAuc(_MeanOverLabels):
    """The chance that a galaxy with a label is given a higher probability of it than a galaxy without."""

    summary = "Area under the receiver operating characteristic, 0-1; 0.5 is guessing."

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        if is_true.all() or not is_true.any():
            return float("nan")
        return float(sklearn.metrics.roc_auc_score(is_true, probability))


class AveragePrecision(_MeanOverLabels):
    """The area under the curve of purity against completeness; guessing scores the label's prevalence."""

    summary = "Area under the curve of purity against completeness, 0-1."

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        if not is_true.any():
            return float("nan")
        return float(sklearn.metrics.average_precision_score(is_true, probability))


class LogLoss(ClassificationMetric):
    """The mean of minus the natural logarithm of the probability of the true label.

    scikit-learn clips probabilities at a float64's smallest step: a certain and wrong prediction costs about 36.
    """

    summary = "Cross-entropy in nats, 0 or more; lower is better."

    def _score_single_label(self, probabilities: Floats, labels: Integers) -> float:
        return float(sklearn.metrics.log_loss(labels, probabilities, labels=np.arange(probabilities.shape[1])))

    def _score_label(self, is_true: Booleans, is_predicted: Booleans, *, probability: Floats) -> float:
        return float(sklearn.metrics.log_loss(is_true, probability, labels=[False, True]))


class Confusion(ClassificationMetric):
    """Counts of galaxies as a nested list: rows are the true label, columns the predicted one.

    For multi-label classification: a list with one such table, without and with the label, for each label.
    """

    summary = "Counts of galaxies; rows are the true label, columns the predicted one."

    def _score_single_label(self, probabilities: Floats, labels: Integers) -> list[Any]:
        return _counts(labels, probabilities.argmax(axis=1), label_count=probabilities.shape[1])

    def _score_multi_label(self, probabilities: Floats, labels: Floats) -> list[Any]:
        tables = []
        for probability, label in zip(probabilities.T, labels.T, strict=True):
            known = ~np.isnan(label)
            tables.append(_counts(label[known] == 1, probability[known] >= DECISION_THRESHOLD, label_count=2))
        return tables


class RegressionMetric(_MetricInMemory):
    """A score of predicted values against measured ones, the mean over the outputs that have any reference.

    `compute(predictions=..., references=...)` returns a dictionary with the metric's name and its value. Both inputs
    are (n, outputs), in the units of the labels; a reference that is NaN is missing and counts for nothing.

    Raises:
        ValueError: From `compute`, when there is no galaxy, when the shapes differ, or when a prediction is not finite.
    """

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return self._module_information(datasets.Features({"predictions": values, "references": values}))

    def _compute(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        predicted = np.asarray(predictions, dtype=np.float64)
        measured = np.asarray(references, dtype=np.float64)
        _check_regression(predicted, measured)
        scores = []
        for output in range(measured.shape[1]):
            there = ~np.isnan(measured[:, output])
            if there.any():
                scores.append(self._score_output(measured[there, output], predicted[there, output]))
        return {self.name: _mean_of_defined(scores)}

    def _score_output(self, measured: Floats, predicted: Floats) -> float:
        raise NotImplementedError


class MeanAbsoluteError(RegressionMetric):
    """The mean distance between prediction and reference."""

    summary = "Mean absolute error, in the units of the labels."

    def _score_output(self, measured: Floats, predicted: Floats) -> float:
        return float(sklearn.metrics.mean_absolute_error(measured, predicted))


class RootMeanSquaredError(RegressionMetric):
    """The root of the mean squared distance between prediction and reference."""

    summary = "Root of the mean squared error, in the units of the labels."

    def _score_output(self, measured: Floats, predicted: Floats) -> float:
        return float(sklearn.metrics.root_mean_squared_error(measured, predicted))


class R2(RegressionMetric):
    """The share of the references' variance that the predictions explain; 0 is predicting the mean, 1 is exact."""

    summary = "Coefficient of determination, 1 or less."

    def _score_output(self, measured: Floats, predicted: Floats) -> float:
        if measured.min() == measured.max():
            return float("nan")
        return float(sklearn.metrics.r2_score(measured, predicted))


_CLASSIFICATION_METRICS = (
    Accuracy,
    BalancedAccuracy,
    Completeness,
    Purity,
    F1,
    RocAuc,
    AveragePrecision,
    LogLoss,
    Confusion,
)
_REGRESSION_METRICS = (MeanAbsoluteError, RootMeanSquaredError, R2)


def metrics_for(problem_type: str, *, include_confusion: bool = True) -> evaluate.CombinedEvaluations:
    """Every metric that belongs to a problem type, combined into one.

    A metric holds what it was given until it is computed: make one for each thread.

    Args:
        problem_type: "single_label_classification", "multi_label_classification" or "regression".
        include_confusion: Whether the counts, which are lists and not numbers, are among the results.

    Returns:
        An object whose `compute(predictions=..., references=...)` returns a dictionary from metric name to value. For
        classification the predictions are probabilities, after softmax or sigmoid.

    Raises:
        ValueError: When the problem type is none of the three.
    """
    if problem_type == REGRESSION:
        return evaluate.combine([metric() for metric in _REGRESSION_METRICS])
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {problem_type!r}; choose one of {', '.join(PROBLEM_TYPES)}.")
    chosen = [metric for metric in _CLASSIFICATION_METRICS if include_confusion or metric is not Confusion]
    return evaluate.combine([metric(problem_type) for metric in chosen])


def metrics_for_trainer(
    problem_type: str, *, include_confusion: bool = False
) -> Callable[[EvalPrediction], dict[str, Any]]:
    """A function for `Trainer`'s `compute_metrics`.

    Args:
        problem_type: "single_label_classification", "multi_label_classification" or "regression".
        include_confusion: Whether the counts are among the results. `Trainer` logs numbers only, so leave them out of
            training and ask for them when the results go to a file.

    Returns:
        A function from an `EvalPrediction` to a dictionary from metric name to value. It takes logits, before softmax
        or sigmoid, and applies that itself; a regression's outputs are taken as they are. Each value is NaN where the
        model has diverged and some output is not finite.

    Raises:
        ValueError: When the problem type is none of the three.
    """
    metrics_for(problem_type)  # a wrong problem type shows here, and not after the first epoch

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, Any]:
        # Trainer hands over a tuple when the model returns more than logits; logits come first.
        given = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        outputs = np.asarray(given, dtype=np.float64)
        metrics = metrics_for(problem_type, include_confusion=include_confusion)
        # A stage that diverges must not end a run whose other stage is done.
        if not np.isfinite(outputs).all():
            return dict.fromkeys((metric.name for metric in metrics.evaluation_modules), float("nan"))
        predictions, references = _predictions_and_references(outputs, evaluated.label_ids, problem_type)
        results: dict[str, Any] = metrics.compute(predictions=predictions, references=references)
        return results

    return compute_metrics


def softmax(logits: npt.ArrayLike) -> Floats:
    """Probabilities over labels that add up to 1 in each row, without overflow for logits of any size.

    Args:
        logits: Unbounded scores, (n, labels).

    Returns:
        float64, (n, labels), in the order of the rows given.
    """
    scores = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _predictions_and_references(
    outputs: Floats, labels: npt.ArrayLike, problem_type: str
) -> tuple[Floats, npt.NDArray[Any]]:
    references = np.asarray(labels)
    if problem_type == SINGLE_LABEL:
        return softmax(outputs), references
    if problem_type == MULTI_LABEL:
        return expit(outputs), references
    return outputs.reshape(len(outputs), -1), references.reshape(len(outputs), -1)


def check_probabilities(probabilities: Floats, problem_type: str) -> None:
    """Checks that numbers are probabilities of labels.

    Args:
        probabilities: (n, labels).
        problem_type: "single_label_classification", where a row sums to 1, or "multi_label_classification".

    Raises:
        ValueError: There is no galaxy, a number is outside 0-1, or a row of a single label doesn't sum to 1.
    """
    if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
        raise ValueError(f"problem_type is {problem_type!r}; choose one of {SINGLE_LABEL}, {MULTI_LABEL}.")
    _check_probabilities(probabilities)
    if problem_type == SINGLE_LABEL:
        _check_sums(probabilities)


def checked_labels(labels: npt.ArrayLike, probabilities: Floats, problem_type: str) -> npt.NDArray[Any]:
    """Labels that belong to probabilities: class numbers as int64, or float64 for several labels.

    Args:
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
        probabilities: (n, labels).
        problem_type: "single_label_classification" or "multi_label_classification".

    Raises:
        ValueError: As `check_probabilities`, or labels of another shape, that are no whole numbers, or that the
            probabilities have no column for.
    """
    check_probabilities(probabilities, problem_type)
    if problem_type == MULTI_LABEL:
        several = np.asarray(labels, dtype=np.float64)
        _check_multi_label(probabilities, several)
        return several
    classes = class_numbers(labels)
    if classes.shape != probabilities.shape[:1]:
        raise ValueError(
            f"references have the shape {classes.shape} and predictions {probabilities.shape}; pass a label number for "
            "each galaxy."
        )
    _check_single_label(probabilities, classes)
    return classes


def class_numbers(labels: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Class numbers as int64; 1.0 and True are a 1.

    Args:
        labels: One for each galaxy, of any shape.

    Raises:
        ValueError: A label that is no whole number: a vote fraction, NaN or a name.
    """
    values = np.asarray(labels)
    if values.dtype.kind not in "biuf" or not (np.isfinite(values) & (values == np.floor(values))).all():
        raise ValueError(
            f"labels hold {np.unique(values)[:5].tolist()}; give whole numbers from 0 on, the class of each galaxy."
        )
    return values.astype(np.int64)


def scored_labels(count: int, problem_type: str) -> Sequence[int]:
    """The labels that have scores of their own: of two of which each galaxy has one, the second, such as a ring.

    Args:
        count: How many labels there are.
        problem_type: "single_label_classification" or "multi_label_classification".
    """
    return [1] if problem_type == SINGLE_LABEL and count == 2 else range(count)


def truth_of_label(labels: npt.ArrayLike, number: int, problem_type: str) -> tuple[Booleans, Booleans]:
    """Of which galaxies a label is known, (n,), and whether these have it.

    Args:
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
        number: The label's.
        problem_type: "single_label_classification" or "multi_label_classification".
    """
    values = np.asarray(labels, dtype=np.float64)  # None, as a table has what is missing, becomes NaN
    if problem_type == SINGLE_LABEL:
        return np.ones(len(values), dtype=bool), values == number
    known = ~np.isnan(values[:, number])
    return known, values[known, number] == 1


def count_labelled(labels: npt.ArrayLike) -> int:
    """How many galaxies have a label that is known.

    Args:
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
    """
    values = np.asarray(labels, dtype=np.float64)
    return int((~np.isnan(values.reshape(len(values), -1))).any(axis=1).sum())


def _mean_of_defined(scores: Sequence[float]) -> float:
    defined = [score for score in scores if not np.isnan(score)]
    return float(np.mean(defined)) if defined else float("nan")


def _mean_completeness(labels: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> float:
    return float(np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)]))


def _counts(labels: npt.NDArray[Any], predicted: npt.NDArray[Any], *, label_count: int) -> list[Any]:
    table = np.zeros((label_count, label_count), dtype=np.int64)
    np.add.at(table, (labels.astype(np.int64), predicted.astype(np.int64)), 1)
    counts: list[Any] = table.tolist()
    return counts


def _rows_that_add_up_to_one(probabilities: Floats) -> Floats:
    # A softmax in float32 adds up to 1 only to 1e-7, and scikit-learn warns about that in float64.
    return np.asarray(probabilities / probabilities.sum(axis=1, keepdims=True))


def _check_probabilities(probabilities: Floats) -> None:
    if len(probabilities) == 0:
        raise ValueError("predictions and references are empty; a metric needs at least one galaxy.")
    if probabilities.ndim != 2:
        raise ValueError(f"predictions have the shape {probabilities.shape}; pass probabilities as (n, labels).")
    if not (np.isfinite(probabilities).all() and probabilities.min() >= 0 and probabilities.max() <= 1 + SUM_TOLERANCE):
        raise ValueError(
            f"predictions are between {probabilities.min():.3g} and {probabilities.max():.3g}; "
            "pass probabilities, 0-1, after softmax or sigmoid."
        )


def _check_sums(probabilities: Floats) -> None:
    sums = probabilities.sum(axis=1)
    if np.abs(sums - 1).max() > SUM_TOLERANCE:
        worst = sums[np.abs(sums - 1).argmax()]
        raise ValueError(f"a row of predictions adds up to {worst:.3g}, not 1; pass probabilities after softmax.")


def _check_single_label(probabilities: Floats, labels: Integers) -> None:
    _check_probabilities(probabilities)
    _check_sums(probabilities)
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"references are between {labels.min()} and {labels.max()}, but predictions have {probabilities.shape[1]} "
            f"labels; pass label numbers from 0 to {probabilities.shape[1] - 1}."
        )


def _check_multi_label(probabilities: Floats, labels: npt.NDArray[Any]) -> None:
    _check_probabilities(probabilities)
    if labels.shape != probabilities.shape:
        raise ValueError(
            f"references have the shape {labels.shape} and predictions {probabilities.shape}; "
            "pass 0, 1 or NaN for each label."
        )
    known = labels[~np.isnan(labels)]
    if not np.isin(known, (0, 1)).all():
        raise ValueError(f"references hold {np.unique(known)[:5].tolist()}; a multi-label reference is 0, 1 or NaN.")


def _check_regression(predicted: Floats, measured: Floats) -> None:
    if len(predicted) == 0:
        raise ValueError("predictions and references are empty; a metric needs at least one galaxy.")
    if predicted.shape != measured.shape:
        raise ValueError(
            f"predictions have the shape {predicted.shape} and references {measured.shape}; pass (n, outputs) for both."
        )
    if not np.isfinite(predicted).all():
        galaxies = int((~np.isfinite(predicted)).any(axis=1).sum())
        raise ValueError(
            f"predictions are not finite for {galaxies} galaxies; look at the learning rate and the labels."
        )
