"""Metrics of predicted votes as `evaluate.Metric` classes that need no network.

Predictions are the concentrations of a model that answers a decision tree, references are volunteers' votes, both
(galaxies, answers) in the order of the tree's vote columns. Each metric returns its value for every question, over the
galaxies that were asked it, under "NAME_QUESTION", and under its own name the mean over the questions that have one. A
question without a galaxy to score is NaN and is left out of the mean. Votes that are NaN are missing.

A vote fraction of few volunteers scatters around the answer's probability by chance alone: with 20 volunteers and a
probability of 0.5 by 0.11. `vote_mean_absolute_error` and `vote_root_mean_squared_error` hold that scatter; ask for a
larger `least_votes` to see less of it. `vote_interval_coverage` takes it into account.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import scipy.special
import torch
from transformers import EvalPrediction

from zoobot_hf.models.votes import (
    INTERVAL,
    TreeLayout,
    expected_vote_fractions,
    tree_layout,
    vote_fraction_intervals,
    vote_log_likelihood,
)

from .metrics import _MetricInMemory

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]

CONFIDENT_VOTES = 10  # as many as Galaxy Zoo asks for before a galaxy counts as a ring in its demonstration catalog
CONFIDENT_MAJORITY = 0.8  # Walmsley et al. 2022, MNRAS 509, 3966: volunteers who agree by more than this are right
CASES_AT_ONCE = 20000


class AskedGalaxies(NamedTuple):
    """A question's answers, (galaxies, answers), for the galaxies that were asked it."""

    concentrations: Floats
    votes: Floats
    predicted_fractions: Floats

    @property
    def volunteers(self) -> Floats:
        """How many answered the question, (galaxies,)."""
        return np.asarray(self.votes.sum(axis=1))

    @property
    def observed_fractions(self) -> Floats:
        """The share of them that gave each answer, (galaxies, answers)."""
        return np.asarray(self.votes / self.volunteers[:, None])

    def are_confident(self, *, least_votes: int = CONFIDENT_VOTES, majority: float = CONFIDENT_MAJORITY) -> Booleans:
        """Whether volunteers are confident about each galaxy, (galaxies,).

        Args:
            least_votes: How many votes on the question that takes.
            majority: The fraction that the answer chosen most has to exceed.
        """
        return np.asarray((self.volunteers >= least_votes) & (self.observed_fractions.max(axis=1) > majority))


class VoteMetric(_MetricInMemory):
    """A score of predicted concentrations against volunteers' votes.

    `compute(predictions=..., references=...)` returns a dictionary: the metric's name with the mean over the questions,
    and its name with each question's.

    Args:
        decision_tree: The survey's questions as plain values, as a model's configuration holds them.
        least_votes: How many votes on a question a galaxy needs to count.
        options: Further arguments of `evaluate.Metric`.

    Raises:
        ValueError: From `compute`, when there is no galaxy, the shapes are not the tree's, a concentration is not above
            0, or votes are no counts.
    """

    def __init__(self, decision_tree: dict[str, Any], *, least_votes: int = 1, **options: Any) -> None:
        self.layout = tree_layout(decision_tree)
        self.least_votes = least_votes
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return self._module_information(datasets.Features({"predictions": values, "references": values}))

    def _compute(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        concentrations = np.asarray(predictions, dtype=np.float64)
        votes = np.asarray(references, dtype=np.float64)
        _check(concentrations, votes, self.layout)
        scores = {}
        for name, asked in asked_by_question(concentrations, votes, self.layout, least_votes=self.least_votes):
            scores[f"{self.name}_{name}"] = self._score_question(asked) if len(asked.votes) else float("nan")
        defined = [score for score in scores.values() if not np.isnan(score)]
        return {self.name: float(np.mean(defined)) if defined else float("nan"), **scores}

    def _score_question(self, asked: AskedGalaxies) -> float:
        """The score of one question, for one galaxy or more."""
        raise NotImplementedError


class VoteAccuracy(VoteMetric):
    """The share of confident galaxies whose majority answer has the largest expected fraction.

    Args:
        decision_tree: As in `VoteMetric`.
        least_votes: How many votes on a question make volunteers confident.
        majority: The fraction that the answer chosen most has to exceed.
        options: Further arguments of `evaluate.Metric`.
    """

    summary = "Share of galaxies whose answer, sure among volunteers, is also the predicted one, 0-1."

    def __init__(
        self,
        decision_tree: dict[str, Any],
        *,
        least_votes: int = CONFIDENT_VOTES,
        majority: float = CONFIDENT_MAJORITY,
        **options: Any,
    ) -> None:
        self.majority = majority
        super().__init__(decision_tree, least_votes=least_votes, **options)

    def _score_question(self, asked: AskedGalaxies) -> float:
        is_confident = asked.are_confident(least_votes=self.least_votes, majority=self.majority)
        if not is_confident.any():
            return float("nan")
        is_right = asked.predicted_fractions.argmax(axis=1) == asked.votes.argmax(axis=1)
        return float(is_right[is_confident].mean())


class VoteMeanAbsoluteError(VoteMetric):
    """The mean distance between expected and observed vote fractions, over galaxies and answers."""

    summary = "Mean absolute error of vote fractions, 0-1."

    def _score_question(self, asked: AskedGalaxies) -> float:
        return float(np.abs(asked.predicted_fractions - asked.observed_fractions).mean())


class VoteRootMeanSquaredError(VoteMetric):
    """The root of the mean squared distance between expected and observed vote fractions."""

    summary = "Root of the mean squared error of vote fractions, 0-1."

    def _score_question(self, asked: AskedGalaxies) -> float:
        return float(np.sqrt(np.square(asked.predicted_fractions - asked.observed_fractions).mean()))


class VoteLogLikelihood(VoteMetric):
    """The mean logarithm of the probability of a galaxy's votes on a question.

    Minus the sum over the questions, each times the share of galaxies that were asked it, is the model's loss with
    the `vote_loss_reduction` "sum".
    """

    summary = "Mean logarithm of the probability of the votes, in nats, 0 or less; higher is better."

    def _score_question(self, asked: AskedGalaxies) -> float:
        answers = asked.votes.shape[1]
        columns = [str(number) for number in range(answers)]
        one_question = TreeLayout(
            ["question"], columns, np.zeros(answers, dtype=np.int64), np.zeros((answers, 1), bool), 1
        )
        tensors = torch.from_numpy(asked.concentrations), torch.from_numpy(asked.votes)
        return float(vote_log_likelihood(*tensors, one_question).mean())


class VoteIntervalCoverage(VoteMetric):
    """The share of observed vote counts inside the interval that should hold 90% of them.

    A count of n volunteers follows a beta-binomial distribution. It takes few values, so that no interval holds exactly
    90%; a count on the interval's edge is therefore inside with the part of its probability that is, as if counts were
    spread evenly over the steps of their distribution. The expectation is then 0.9 for right concentrations, whatever
    the numbers of votes.
    """

    summary = "Share of vote counts inside their 90% interval, 0-1; 0.9 is right."

    def _score_question(self, asked: AskedGalaxies) -> float:
        volunteers = np.repeat(asked.volunteers, asked.votes.shape[1])
        concentrations = asked.concentrations
        others = concentrations.sum(axis=1, keepdims=True) - concentrations
        cases = asked.votes.ravel(), volunteers, concentrations.ravel(), others.ravel()
        return float(_share_inside(*cases).mean())


_VOTE_METRICS = (VoteAccuracy, VoteMeanAbsoluteError, VoteRootMeanSquaredError, VoteLogLikelihood, VoteIntervalCoverage)


def vote_metrics_for(decision_tree: dict[str, Any]) -> evaluate.CombinedEvaluations:
    """Every metric of votes, combined into one.

    Args:
        decision_tree: The survey's questions as plain values, as a model's configuration holds them.

    Returns:
        An object whose `compute(predictions=..., references=...)` returns a dictionary from metric name, and metric
        name with question, to value.
    """
    return evaluate.combine([metric(decision_tree) for metric in _VOTE_METRICS])


def vote_metrics_for_trainer(
    decision_tree: dict[str, Any], *, by_question: bool = False
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A function for `Trainer`'s `compute_metrics`.

    Args:
        decision_tree: The survey's questions as plain values, as a model's configuration holds them.
        by_question: Whether each question's values are among the results, and not their means alone.

    Returns:
        A function from an `EvalPrediction`, with concentrations and votes, to a dictionary from metric name to value;
        NaN for each where the model has diverged and some concentration is not finite.
    """
    endings = ["", *(f"_{question}" for question in tree_layout(decision_tree).question_names if by_question)]
    names = [f"{metric(decision_tree).name}{ending}" for metric in _VOTE_METRICS for ending in endings]

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        # A stage that diverges must not end a run whose other stage is done.
        if not np.isfinite(evaluated.predictions).all():
            return dict.fromkeys(names, float("nan"))
        results: dict[str, float] = vote_metrics_for(decision_tree).compute(
            predictions=evaluated.predictions, references=evaluated.label_ids
        )
        return {name: results[name] for name in names}

    return compute_metrics


def score_votes(
    concentrations: npt.ArrayLike, votes: npt.ArrayLike, decision_tree: dict[str, Any]
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Every metric of votes, overall and for each question, with the numbers of galaxies behind it.

    Args:
        concentrations: What a model predicts, (galaxies, answers).
        votes: Counts, (galaxies, answers), NaN where they are missing.
        decision_tree: The survey's questions as plain values, as a model's configuration holds them.

    Returns:
        By the metric's name its mean over the questions that have one; and under `questions`, by the question's name,
        the metrics and how many galaxies were `asked` and, of these, how many volunteers were `confident` about.

    Raises:
        ValueError: As `VoteMetric`.
    """
    results = vote_metrics_for(decision_tree).compute(predictions=concentrations, references=votes)
    names = [metric(decision_tree).name for metric in _VOTE_METRICS]
    values, layout = np.asarray(votes, dtype=np.float64), tree_layout(decision_tree)
    questions = {}
    for question, asked in asked_by_question(np.asarray(concentrations), values, layout):
        counts = {"asked": len(asked.votes), "confident": int(asked.are_confident().sum())}
        questions[question] = counts | {name: results[f"{name}_{question}"] for name in names}
    return {**{name: results[name] for name in names}, "questions": questions}


def coverage_of_probabilities(
    concentrations: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    decision_tree: dict[str, Any],
    *,
    share: float = INTERVAL,
) -> dict[str, float]:
    """The share of true answer probabilities inside their predicted interval, for simulated volunteers.

    Args:
        concentrations: (galaxies, answers), above 0.
        probabilities: Of each answer for a volunteer who is asked the question, (galaxies, answers), 0-1; NaN where a
            galaxy doesn't count for a question.
        decision_tree: The survey's questions as plain values.
        share: What the interval should hold, 0-1.

    Returns:
        The share for each question, over galaxies and answers; NaN for one without a galaxy.
    """
    layout = tree_layout(decision_tree)
    truth = np.asarray(probabilities, dtype=np.float64)
    lower, upper = vote_fraction_intervals(concentrations, layout, share=share)
    is_inside = (truth >= lower) & (truth <= upper)
    return _mean_by_question(np.where(np.isnan(truth), np.nan, is_inside), layout)


def error_of_probabilities(
    concentrations: npt.ArrayLike, probabilities: npt.ArrayLike, decision_tree: dict[str, Any]
) -> dict[str, float]:
    """The mean distance between expected vote fractions and true answer probabilities, for simulated volunteers.

    Unlike `VoteMeanAbsoluteError` it doesn't hold the chance scatter of a few volunteers' votes.

    Args:
        concentrations: As in `coverage_of_probabilities`.
        probabilities: As in `coverage_of_probabilities`.
        decision_tree: The survey's questions as plain values.

    Returns:
        The distance for each question, 0-1, over galaxies and answers; NaN for one without a galaxy.
    """
    layout = tree_layout(decision_tree)
    distances = np.abs(expected_vote_fractions(concentrations, layout) - np.asarray(probabilities, dtype=np.float64))
    return _mean_by_question(distances, layout)


def were_asked(votes: Floats, layout: TreeLayout, *, least_votes: int = 1) -> Booleans:
    """Whether each galaxy was asked each question, (galaxies, questions).

    Args:
        votes: Counts, (galaxies, answers), NaN where they are missing.
        layout: Of the decision tree.
        least_votes: How many votes on a question a galaxy needs to count; at least 1.
    """
    questions = range(len(layout.question_names))
    totals = [votes[:, layout.question_of_answer == number].sum(axis=1) for number in questions]
    # NaN is not at least any number, so a missing question is not asked.
    return np.asarray(np.stack(totals, axis=1) >= max(least_votes, 1))


def asked_by_question(
    concentrations: Floats, votes: Floats, layout: TreeLayout, *, least_votes: int = 1
) -> Iterator[tuple[str, AskedGalaxies]]:
    """Each question's name, and the answers of the galaxies that were asked it.

    Args:
        concentrations: What a model predicts, (galaxies, answers).
        votes: As in `were_asked`.
        layout: As in `were_asked`.
        least_votes: As in `were_asked`.
    """
    fractions = expected_vote_fractions(concentrations, layout)
    is_asked = were_asked(votes, layout, least_votes=least_votes)
    for number, name in enumerate(layout.question_names):
        cells = np.ix_(is_asked[:, number], layout.question_of_answer == number)
        yield name, AskedGalaxies(concentrations[cells], votes[cells], fractions[cells])


def _mean_by_question(values: Floats, layout: TreeLayout) -> dict[str, float]:
    """The mean over galaxies and answers where the value is not NaN; NaN for a question without one."""
    means = {}
    for number, name in enumerate(layout.question_names):
        of_question = values[:, layout.question_of_answer == number]
        known = of_question[~np.isnan(of_question)]
        means[name] = float(known.mean()) if len(known) else float("nan")
    return means


def _share_inside(counts: Floats, volunteers: Floats, concentrations: Floats, others: Floats) -> Floats:
    """How much of each count's step in its cumulative distribution is inside the central 90%."""
    shares = []
    for start in range(0, len(counts), CASES_AT_ONCE):
        part = slice(start, start + CASES_AT_ONCE)
        below, here = _cumulative(counts[part], volunteers[part], concentrations[part], others[part])
        edge = (1 - INTERVAL) / 2
        inside = np.minimum(below + here, 1 - edge) - np.maximum(below, edge)
        # A count whose probability is too small for a float is a step of no height.
        shares.append(np.divide(np.clip(inside, 0, None), here, out=np.zeros_like(here), where=here > 0))
    return np.concatenate(shares)


def _cumulative(counts: Floats, volunteers: Floats, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The probability of a smaller count than each, and of the count itself."""
    k = np.arange(counts.max() + 1)
    n, a, b = volunteers[:, None], a[:, None], b[:, None]
    with np.errstate(invalid="ignore"):
        logarithms = (
            scipy.special.betaln(k + a, n - k + b)
            - scipy.special.betaln(a, b)
            - scipy.special.betaln(k + 1, n - k + 1)
            - np.log1p(n)
        )
    probabilities = np.where(k <= n, np.exp(logarithms), 0)
    below = np.where(k < counts[:, None], probabilities, 0).sum(axis=1)
    return below, probabilities[np.arange(len(counts)), counts.astype(np.int64)]


def _check(concentrations: Floats, votes: Floats, layout: TreeLayout) -> None:
    if len(concentrations) == 0:
        raise ValueError("predictions and references are empty; a metric needs at least one galaxy.")
    answers = len(layout.vote_columns)
    if concentrations.shape != votes.shape or concentrations.shape[1:] != (answers,):
        raise ValueError(
            f"predictions have the shape {concentrations.shape} and references {votes.shape}; pass (n, {answers}) for "
            "both: the decision tree's answers."
        )
    if not (concentrations > 0).all() or not np.isfinite(concentrations).all():
        raise ValueError(f"predictions go down to {concentrations.min():.3g}; pass concentrations, which are above 0.")
    known = votes[~np.isnan(votes)]
    if (known < 0).any() or (known % 1 != 0).any():
        wrong = known[(known < 0) | (known % 1 != 0)][0]
        raise ValueError(f"references hold {wrong:g}; pass counts of votes, whole and not negative, or NaN.")
