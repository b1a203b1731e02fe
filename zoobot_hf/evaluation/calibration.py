"""Probabilities that mean what they say: calibration, prevalence, expected counts, conformal sets.

Everything here takes and gives numpy arrays. `fit_calibration` works on a head's logits and its result goes into the
model's configuration, so that the model itself applies it; the other functions work on the probabilities in a table of
predictions.

Two things are told apart everywhere. *Calibration* makes the odds right for galaxies with the prevalence that the model
was trained at. *Prevalence* turns these odds into those of another population, whose classes look the same and are
rarer or commoner. A validation split that has the sky's prevalence shows both errors of a model that was trained on
balanced classes at once: so the shift from one prevalence to the other is known and fixed while the temperature is
fitted.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit, softmax

from zoobot_hf.models.heads import prevalence_shift

from .intervals import CONFIDENCE, Estimate, bootstrap_counts, check_confidence, interval_of_draws
from .metrics import MULTI_LABEL, SINGLE_LABEL, check_probabilities, checked_labels, class_numbers, count_labelled

logger = logging.getLogger(__name__)

METHODS = ("temperature", "bias_corrected", "vector")
LARGEST_SCALE = 20.0  # temperatures from 1/20 to 20
LARGEST_SHIFT = 20.0
# Before a validation galaxy is seen, a scale (1 / temperature) is believed to be 1 with this standard deviation. Heads
# on 470 real rings (MobileNetV2, fifteen splits), held-out log loss without calibration, with the scale of lowest loss,
# and with this one: 15 validation galaxies 0.757, 0.826, 0.770; 75 of them 0.642, 0.644, 0.642; 75 of them and logits
# three times too large 0.774, 0.644, 0.641.
SPREAD_OF_SCALES = 0.5
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
SMALLEST_DOUBT = float(np.finfo(np.float32).eps) / 2  # a float32 probability of "1" says no more than this
EM_TOLERANCE = 1e-7
SMALLEST_START = 0.01  # a share that starts at 0 stays there
EM_ROUNDS = 500
TESTED_GALAXIES = 5000  # of a catalog, in the test of the assumption; beyond, the validation galaxies set the limit
DOUBTFUL = 0.01  # p-value below which the assumption looks broken
BOOTSTRAP_DRAWS = 200
UNDECIDED = "can't tell"

Floats = npt.NDArray[np.floating[Any]]
Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.integer[Any]]
_Map = tuple[Floats, Floats]  # a scale and a shift for each class


@dataclass(frozen=True)
class Calibration:
    """What makes a head's logits calibrated: logits / temperature + shift.

    Attributes:
        temperature: One number for each label, above 1 where the model was too sure.
        shift: One number for each label.
        log_loss_before: Of the validation galaxies, in nats, at their own prevalence.
        log_loss_after: The same with the calibration, never higher.
        galaxies: How many galaxies with a known label it was fitted on.
        helps: Whether the log loss fell; where not, the temperature is 1 and the shift 0.
    """

    temperature: list[float]
    shift: list[float]
    log_loss_before: float
    log_loss_after: float
    galaxies: int
    helps: bool

    def config_fields(self) -> dict[str, Any]:
        """The fields of `ZoobotConfig` that apply it; both are None where it doesn't help."""
        is_one_number = len(set(self.temperature)) == 1
        temperature = self.temperature[0] if is_one_number else self.temperature
        return {
            "calibration_temperature": temperature if self.helps else None,
            "calibration_shift": self.shift if self.helps and any(self.shift) else None,
        }

    def apply(self, logits: npt.ArrayLike) -> Floats:
        """Calibrated logits, still for the training prevalence.

        Args:
            logits: A head's own, (n, labels).
        """
        return np.asarray(logits, dtype=np.float64) / self.temperature + self.shift


@dataclass(frozen=True)
class PrevalenceEstimate:
    """The share of each label among a survey's galaxies, and what is needed to count them.

    Attributes:
        shares: The share of each label, 0-1.
        prevalence: The same with their intervals.
        share_draws: (draws, labels), the shares that are as likely.
        scale: (1 + draws, labels), of the log probabilities, from the validation galaxies; the first row is the best.
        shift: (1 + draws, labels), likewise.
        assumed_prevalence: Of each label, where the probabilities that it was estimated from are right.
        problem_type: Single or multi-label classification.
        p_values: For each label, how probable such a difference between the catalog and the validation galaxies is if
            only the prevalence differs; one in all for a single label; none without validation galaxies.
        p_value: The same for the largest difference of all labels; None without validation galaxies.
    """

    shares: list[float]
    prevalence: list[Estimate]
    share_draws: Floats
    scale: Floats
    shift: Floats
    assumed_prevalence: list[float]
    problem_type: str
    p_values: list[float]
    p_value: float | None

    @property
    def assumption_holds(self) -> bool | None:
        """Whether the catalog looks as if only the prevalence had changed; None where that could not be tested."""
        smallest = 1 / (1 + len(self.share_draws))  # of few draws, every p-value is large
        return None if self.p_value is None or smallest >= DOUBTFUL else self.p_value >= DOUBTFUL


def fit_calibration(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    problem_type: str = SINGLE_LABEL,
    method: str = "temperature",
    training_prevalence: Sequence[float] | None = None,
) -> Calibration:
    """The most probable calibration, given validation galaxies.

    That is the one of lowest log loss where they are many. Few of them can't tell the temperature, which stays near 1:
    its inverse has a Gaussian prior of mean 1 and standard deviation 0.5. Temperature scaling is Guo et al. 2017
    (arXiv:1706.04599), bias-corrected temperature scaling Alexandari, Kundaje & Shrikumar 2020 (arXiv:1901.06852).
    Several labels are calibrated one by one, on the galaxies where each is known.

    Args:
        logits: A head's own, (n, labels), before any calibration.
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
        problem_type: "single_label_classification" or "multi_label_classification".
        method: "temperature" (one scale; one for each of several labels), "bias_corrected" (a shift for each label as
            well) or "vector" (a scale and a shift for each label).
        training_prevalence: The share of each label that the head believes in, as `heads.effective_training_prevalence`
            gives it. Where the validation galaxies have others, the shift between them is part of what is fitted. When
            absent, they are taken for the same.

    Returns:
        The calibration, for the training prevalence.

    Raises:
        ValueError: Another problem type or method; no galaxies; a label that no validation galaxy has, or that all
            have; shapes that don't fit; logits that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    scores = np.asarray(logits, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"logits have the shape {scores.shape}; pass finite numbers, (n, labels), before softmax.")
    truth = np.asarray(labels)
    problems = _problems(scores, truth, problem_type, training_prevalence)
    galaxies = count_labelled(truth)
    fits = [_fit_scale_and_shift(problem, method=method) for problem in problems]
    before = float(np.mean([problem.log_loss() for problem in problems]))
    after = float(np.mean([p.log_loss(*fit) for p, fit in zip(problems, fits, strict=True)]))
    if not after < before - 1e-12:
        logger.warning(
            "calibration by %s can't lower the validation log loss of %.4f on %d galaxies; the temperature stays 1.",
            method,
            before,
            galaxies,
        )
        return Calibration([1.0] * scores.shape[1], [0.0] * scores.shape[1], before, before, galaxies, False)
    scale, shift = _joined(fits, problem_type)
    return Calibration((1 / scale).tolist(), shift.tolist(), before, after, galaxies, True)


def probabilities_at_prevalence(
    probabilities: npt.ArrayLike,
    *,
    assumed_prevalence: Sequence[float],
    prevalence: Sequence[float],
    problem_type: str = SINGLE_LABEL,
) -> Floats:
    """The same predictions for galaxies of another prevalence, by Bayes' theorem; exact, and back again.

    Args:
        probabilities: After softmax or sigmoid, 0-1, (n, labels).
        assumed_prevalence: The share of each label where the probabilities are right.
        prevalence: The share of each label where they are wanted.
        problem_type: "single_label_classification" or "multi_label_classification".

    Returns:
        (n, labels), in the order given; rows sum to 1 for a single label.

    Raises:
        ValueError: Probabilities that are none; a share of 0 or 1; shares of a single label that don't add up to 1.
    """
    given = _checked_probabilities(probabilities, problem_type)
    shift = np.asarray(prevalence_shift(assumed_prevalence, prevalence, problem_type=problem_type))
    # Multiplied and not added to logarithms: a probability of 0 or 1 stays what it is.
    factors = np.exp(shift)
    if problem_type == SINGLE_LABEL:
        weighted = given * factors
        return np.asarray(weighted / weighted.sum(axis=1, keepdims=True))
    return np.asarray(given * factors / (given * factors + 1 - given))


def estimate_prevalence(
    probabilities: npt.ArrayLike,
    *,
    assumed_prevalence: Sequence[float],
    validation_probabilities: npt.ArrayLike | None = None,
    validation_labels: npt.ArrayLike | None = None,
    problem_type: str = SINGLE_LABEL,
    confidence: float = CONFIDENCE,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> PrevalenceEstimate:
    """The share of each label in a catalog that nobody has labelled, by expectation maximisation.

    Saerens, Latinne & Decaestecker 2002 (Neural Computation 14, 21). It assumes that the classes look as they do among
    the labelled galaxies and that only their shares differ. With validation galaxies the probabilities are calibrated
    first (bias-corrected temperature scaling, as Alexandari, Kundaje & Shrikumar 2020 found best), the interval
    includes the error of that, and the assumption is tested; without them the interval is that of perfectly calibrated
    probabilities and too narrow for any real model. With fewer than a few hundred validation galaxies it is a little
    too narrow as well: a 90% one held the truth in 85 to 91 of 100 drawn catalogs.

    The test: the distribution of each label's log odds in the catalog against that of the validation galaxies, each
    class weighted with its estimated share, by the largest distance between the two (Kolmogorov and Smirnov). How large
    that distance gets when the assumption holds comes from drawing catalogs, of at most 5000 galaxies, and validation
    galaxies anew from the validation galaxies, the prevalence being estimated in each. Of several labels the largest
    distance counts, each in units of its label's median draw: one of many p-values is small by chance. Below a p-value
    of 0.01, for which it takes 100 draws, the assumption looks broken, and the log says so. It sees classes that look
    different or are new; it can't see what leaves the distribution of the probabilities as it is.

    Args:
        probabilities: Of the catalog's galaxies, after softmax or sigmoid, 0-1, (n, labels).
        assumed_prevalence: The share of each label where these probabilities are right: the sky's of the model for its
            ordinary predictions, the training prevalence for those that were asked for.
        validation_probabilities: Of labelled galaxies that the model was not trained on, for the same prevalence.
        validation_labels: Of these: class numbers (m,), or 0, 1 and NaN where it is not known (m, labels).
        problem_type: "single_label_classification" or "multi_label_classification".
        confidence: Share of the draws inside the interval, 0-1.
        draws: How often catalog and validation galaxies are drawn again.
        seed: Decides the draws.

    Returns:
        The shares in the order of the labels, with their intervals, and what `expected_counts` needs.

    Raises:
        ValueError: Probabilities that are none; prevalences that don't fit; validation probabilities without labels;
            a label that no validation galaxy has.
    """
    check_confidence(confidence)
    scores = _log_odds(_checked_probabilities(probabilities, problem_type), problem_type)
    validation = _validation_scores(validation_probabilities, validation_labels, problem_type)
    problems = _problems(*validation, problem_type, assumed_prevalence) if validation else None
    parts = []
    for number, (columns, old) in enumerate(_parts(scores, assumed_prevalence, problem_type)):
        problem = problems[number] if problems else None
        parts.append(_estimate_part(columns, old, problem, draws=draws, seed=seed + number))
    estimate = _joined_estimate(parts, assumed_prevalence, problem_type, confidence)
    _report(estimate)
    return estimate


def prevalence_from_counts(
    counts: Sequence[int],
    *,
    assumed_prevalence: Sequence[float],
    galaxies: int | None = None,
    validation_probabilities: npt.ArrayLike | None = None,
    validation_labels: npt.ArrayLike | None = None,
    problem_type: str = SINGLE_LABEL,
    confidence: float = CONFIDENCE,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> PrevalenceEstimate:
    """The share of each label in a sky of which a random sample was labelled, for `expected_counts`.

    Its draws are those of the posterior with Jeffreys' prior.

    Args:
        counts: How many of the sample's galaxies have each label.
        assumed_prevalence: The share of each label where the probabilities of the catalog are right.
        galaxies: How many galaxies the sample has, for several labels; for a single one the sum of the counts.
        validation_probabilities: As in `estimate_prevalence`.
        validation_labels: As in `estimate_prevalence`.
        problem_type: "single_label_classification" or "multi_label_classification".
        confidence: Share of the draws inside the interval, 0-1.
        draws: How often.
        seed: Decides the draws.

    Raises:
        ValueError: A label without a galaxy; not as many counts as labels; several labels without `galaxies`; what
            `estimate_prevalence` refuses.
    """
    if problem_type != SINGLE_LABEL and galaxies is None:
        raise ValueError("galaxies is None; of several labels a galaxy has any number: give the size of the sample.")
    numbers = np.asarray(counts, dtype=np.float64)
    total = float(numbers.sum() if galaxies is None or problem_type == SINGLE_LABEL else galaxies)
    if numbers.shape != (len(assumed_prevalence),) or (numbers <= 0).any() or (numbers >= total).any():
        raise ValueError(
            f"counts are {list(counts)} of {total:g} galaxies for {len(assumed_prevalence)} labels; each label needs "
            "galaxies with and without it."
        )
    check_confidence(confidence)
    prevalence_shift(assumed_prevalence, assumed_prevalence, problem_type=problem_type)  # refuses shares that are none
    generator = np.random.default_rng(seed)
    if problem_type == SINGLE_LABEL:
        share_draws = generator.dirichlet(numbers + 0.5, size=draws)
    else:
        share_draws = generator.beta(numbers + 0.5, total - numbers + 0.5, size=(draws, len(numbers)))
    validation = _validation_scores(validation_probabilities, validation_labels, problem_type)
    maps = np.tile([[1.0], [0.0]], (1 + draws, 1, len(numbers)))
    if validation:
        problems = _problems(*validation, problem_type, assumed_prevalence)
        fits = [_calibration_draws(problem, draws=draws, seed=seed + i) for i, problem in enumerate(problems)]
        maps = np.stack([np.stack(_joined(list(row), problem_type)) for row in zip(*fits, strict=True)])
    shares = numbers / total
    return PrevalenceEstimate(
        shares.tolist(),
        [interval_of_draws(s, d, confidence=confidence) for s, d in zip(shares, share_draws.T, strict=True)],
        share_draws,
        maps[:, 0],
        maps[:, 1],
        list(assumed_prevalence),
        problem_type,
        [],
        None,
    )


def expected_counts(
    probabilities: npt.ArrayLike, prevalence: PrevalenceEstimate, *, confidence: float = CONFIDENCE, seed: int = 0
) -> list[Estimate]:
    """How many galaxies of a catalog have each label.

    The interval is of the true number in this catalog: each draw takes a calibration, a prevalence and, for each
    galaxy, whether it has the label. The value is the sum of the probabilities, calibrated on the validation galaxies
    and for the prevalence given; it can differ from the sum of the probabilities in the table, which know neither.

    Args:
        probabilities: After softmax or sigmoid, 0-1, (n, labels), for the prevalence that the estimate says it assumed.
        prevalence: From `estimate_prevalence` of this catalog, or from `prevalence_from_counts`.
        confidence: Share of the draws inside the interval, 0-1.
        seed: Decides the draws.

    Returns:
        A number of galaxies for each label, in the order of the labels.

    Raises:
        ValueError: Probabilities that are none.
    """
    given = _checked_probabilities(probabilities, prevalence.problem_type)
    scores = _log_odds(given, prevalence.problem_type)
    generator = np.random.default_rng(seed)
    values = _mapped_probabilities(scores, prevalence, 0, prevalence.shares).sum(axis=0)
    drawn = []
    for row, shares in enumerate(prevalence.share_draws, start=1):
        chances = _mapped_probabilities(scores, prevalence, row, shares)
        drawn.append((generator.random(chances.shape) < chances).sum(axis=0))
    return [interval_of_draws(v, d, confidence=confidence) for v, d in zip(values, np.transpose(drawn), strict=True)]


def fit_conformal_thresholds(probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, coverage: float = 0.9) -> Floats:
    """The probability from which each class belongs to a galaxy's set, so that sets hold the true class often enough.

    Split conformal prediction with a threshold for each class (Vovk 2012, arXiv:1209.2673): of each class, at least
    the promised share of new galaxies has it in its set. That holds at any prevalence, because each class is looked at
    by itself, as long as the classes look the same. With n validation galaxies of a class the share is, over many
    validation splits, the promised one or up to 1 / (n + 1) more; from split to split it varies by about
    sqrt(coverage * (1 - coverage) / n).

    Args:
        probabilities: Of validation galaxies, after softmax, 0-1, (n, classes). For one of several labels pass its
            1 - p and p.
        labels: Class numbers, (n,).
        coverage: The share promised, 0-1.

    Returns:
        A threshold for each class. It is 0, so that every set holds the class, where a class has too few galaxies to
        promise more.

    Raises:
        ValueError: Probabilities that are none; labels that don't fit; a class without a galaxy.
    """
    check_confidence(coverage, name="coverage")
    given = np.asarray(probabilities, dtype=np.float64)
    classes = checked_labels(labels, given, SINGLE_LABEL)
    thresholds = []
    for number in range(given.shape[1]):
        own = np.sort(given[classes == number, number])
        if len(own) == 0:
            raise ValueError(f"labels hold no galaxy of class {number}; conformal sets need some of every class.")
        # The k-th smallest of n, such that a new galaxy is below it with probability k / (n + 1).
        rank = int(np.floor((len(own) + 1) * (1 - coverage) + 1e-9))
        thresholds.append(own[rank - 1] if rank > 0 else 0.0)
    return np.array(thresholds)


def conformal_sets(probabilities: npt.ArrayLike, thresholds: npt.ArrayLike) -> Booleans:
    """Which classes each galaxy may have.

    Args:
        probabilities: After softmax, 0-1, (n, classes), for the same prevalence as the thresholds.
        thresholds: From `fit_conformal_thresholds`.

    Returns:
        (n, classes). A galaxy that is unlike the validation galaxies of every class has none.

    Raises:
        ValueError: Not as many thresholds as classes, or probabilities that are none.
    """
    given, limits = _checked_probabilities(probabilities, SINGLE_LABEL), np.asarray(thresholds)
    if limits.shape != given.shape[1:]:
        raise ValueError(f"thresholds are {limits.tolist()} for {given.shape[1]} classes; give one for each.")
    return np.asarray(given >= limits)


def name_conformal_sets(sets: Booleans, label_names: Sequence[str]) -> list[str]:
    """The class of each galaxy whose set has one, and "can't tell" for sets with several classes or none.

    Args:
        sets: From `conformal_sets`, (n, classes).
        label_names: In the order of the classes.
    """
    names = np.asarray(label_names, dtype=object)
    return [names[row.argmax()] if row.sum() == 1 else UNDECIDED for row in np.asarray(sets)]


@dataclass(frozen=True)
class _Problem:
    """Labelled galaxies of one set of classes that exclude each other; several labels are one such problem each."""

    scores: Floats  # (n, classes): logits or log probabilities
    classes: Integers  # (n,)
    offset: Floats  # (classes,): from the prevalence of the scores to that of these galaxies

    def log_loss(self, scale: Floats | float = 1.0, shift: Floats | float = 0.0) -> float:
        logarithms = log_softmax(self.scores * scale + shift + self.offset, axis=1)
        return float(-logarithms[np.arange(len(self.classes)), self.classes].mean())


def _problems(
    scores: Floats, labels: npt.NDArray[Any], problem_type: str, assumed: Sequence[float] | None
) -> list[_Problem]:
    if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
        raise ValueError(f"problem_type is {problem_type!r}; choose one of {SINGLE_LABEL}, {MULTI_LABEL}.")
    wanted = scores.shape[:1] if problem_type == SINGLE_LABEL else scores.shape
    if labels.shape != wanted or len(scores) == 0:
        raise ValueError(f"labels have the shape {labels.shape} and the scores {scores.shape}; give labels {wanted}.")
    parts = _parts(scores, assumed, problem_type)
    if problem_type == SINGLE_LABEL:
        return [_problem(scores, class_numbers(labels), assumed)]
    problems = []
    for (columns, old), own in zip(parts, labels.T, strict=True):
        known = ~np.isnan(own.astype(np.float64))
        if not np.isin(own[known], (0, 1)).all():
            raise ValueError(f"labels hold {np.unique(own[known])[:5].tolist()}; a multi-label one is 0, 1 or NaN.")
        problems.append(_problem(columns[known], own[known].astype(np.int64), old))
    return problems


def _problem(scores: Floats, classes: Integers, old: Sequence[float] | None) -> _Problem:
    if len(classes) and (classes.min() < 0 or classes.max() >= scores.shape[1]):
        raise ValueError(f"labels run from {classes.min()} to {classes.max()} for {scores.shape[1]} classes.")
    counts = np.bincount(classes, minlength=scores.shape[1])
    if (counts == 0).any():
        raise ValueError(
            f"the labelled galaxies of each class are {counts.tolist()}; calibration needs some of every class: take "
            "a larger validation split, stratified by class."
        )
    shares = counts / counts.sum()
    shift = np.zeros(len(shares)) if old is None else prevalence_shift(old, shares.tolist(), problem_type=SINGLE_LABEL)
    return _Problem(scores, classes, np.asarray(shift))


def _parts(
    scores: Floats, assumed: Sequence[float] | None, problem_type: str
) -> list[tuple[Floats, Sequence[float] | None]]:
    """The scores of each set of classes that exclude each other, with the shares that they are right for."""
    if assumed is not None and len(assumed) != scores.shape[1]:
        raise ValueError(f"the prevalence has {len(assumed)} shares for {scores.shape[1]} labels; give one for each.")
    if assumed is not None:
        prevalence_shift(assumed, assumed, problem_type=problem_type)  # refuses shares that are none
    if problem_type == SINGLE_LABEL:
        return [(scores, assumed)]
    columns = [np.stack([np.zeros(len(scores)), column], axis=1) for column in scores.T]
    if assumed is None:
        return [(column, None) for column in columns]
    return [(column, [1 - share, share]) for column, share in zip(columns, assumed, strict=True)]


def _joined(fits: Sequence[_Map], problem_type: str) -> _Map:
    """The scale and shift of each label, from those of the parts."""
    if problem_type == SINGLE_LABEL:
        return fits[0]
    # In the part of one label, "without it" has the logit 0.
    return np.array([scale[1] for scale, _ in fits]), np.array([shift[1] - shift[0] for _, shift in fits])


def _fit_scale_and_shift(
    problem: _Problem,
    *,
    method: str,
    weights: Floats | None = None,
    start: Floats | None = None,
) -> _Map:
    """The most probable scale and shift of each class; convex, so that there is one."""
    count = problem.scores.shape[1]
    scales = count if method == "vector" else 1
    shifts = 0 if method == "temperature" else count - 1  # the last class' shift is 0: only differences matter
    shares = np.full(len(problem.classes), 1 / len(problem.classes)) if weights is None else weights / weights.sum()
    rows = np.arange(len(problem.classes))
    precision = 1 / (SPREAD_OF_SCALES**2 * len(rows))

    def loss_and_slope(parameters: Floats) -> tuple[float, Floats]:
        shift = np.append(parameters[scales:], np.zeros(count - shifts))
        logarithms = log_softmax(problem.scores * parameters[:scales] + shift + problem.offset, axis=1)
        excess = np.exp(logarithms)
        excess[rows, problem.classes] -= 1
        excess *= shares[:, None]
        slopes = (excess * problem.scores).sum(axis=0)
        slope_of_scale = slopes if scales > 1 else slopes.sum(keepdims=True)
        loss = -(shares * logarithms[rows, problem.classes]).sum()
        distances = parameters[:scales] - 1
        loss += precision / 2 * (distances**2).sum()
        slope_of_scale += precision * distances
        return float(loss), np.append(slope_of_scale, excess.sum(axis=0)[:shifts])

    first = np.append(np.ones(scales), np.zeros(shifts)) if start is None else start
    bounds = [(1 / LARGEST_SCALE, LARGEST_SCALE)] * scales + [(-LARGEST_SHIFT, LARGEST_SHIFT)] * shifts
    found = minimize(loss_and_slope, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12})
    shift = np.append(found.x[scales:], np.zeros(count - shifts))
    return np.broadcast_to(found.x[:scales], count).copy(), shift - shift.mean()


def _calibration_draws(problem: _Problem, *, draws: int, seed: int) -> list[_Map]:
    """The best calibration, and one for each time that the labelled galaxies are drawn again."""
    # Without the prior, the scale of a few galaxies that are told apart nearly without error runs away: of 30 to 200
    # validation galaxies, drawn 150 times, 90% intervals held the prevalence in 56-89% and counts in 51-87% of the
    # draws; with it in 85-91% and 80-91%.
    fit = functools.partial(_fit_scale_and_shift, problem, method="bias_corrected")
    best = fit()
    start = np.append(best[0][:1], (best[1] - best[1][-1])[:-1])
    return [
        best,
        *(
            fit(weights=counts.astype(np.float64), start=start)
            for counts in bootstrap_counts(problem.classes, draws=draws, seed=seed)
        ),
    ]


@dataclass(frozen=True)
class _PartEstimate:
    """The prevalence of one set of classes that exclude each other."""

    shares: Floats
    share_draws: Floats
    maps: list[_Map]
    distances: Floats | None  # (1 + draws,): the catalog's from the validation galaxies, and those of the drawn ones


def _estimate_part(
    scores: Floats, old: Sequence[float] | None, problem: _Problem | None, *, draws: int, seed: int
) -> _PartEstimate:
    count = scores.shape[1]
    unchanged = (np.ones(count), np.zeros(count))
    maps: list[_Map] = [unchanged] * (1 + draws)
    if problem:
        maps = _calibration_draws(problem, draws=draws, seed=seed)
    prior = np.asarray(old)
    shares = _maximise_expectation(_ratios(scores, maps[0], prior), prior)
    generator = np.random.default_rng([seed, 1])  # not the stream that the validation galaxies were drawn from
    share_draws = np.empty((draws, count))
    for row in range(draws):
        drawn = generator.multinomial(len(scores), np.full(len(scores), 1 / len(scores))) / len(scores)
        share_draws[row] = _maximise_expectation(_ratios(scores, maps[1 + row], prior), shares, weights=drawn)
    distances = _distances(scores, problem, maps, prior, shares, seed=seed) if problem else None
    return _PartEstimate(shares, share_draws, maps, distances)


def _ratios(scores: Floats, calibration: _Map, prior: Floats) -> Floats:
    """The likelihood of each class, but for a factor for each galaxy."""
    scale, shift = calibration
    logarithms = scores * scale + shift - np.log(prior)
    return np.asarray(np.exp(logarithms - logarithms.max(axis=1, keepdims=True)))


def _maximise_expectation(ratios: Floats, start: Floats, *, weights: Floats | None = None) -> Floats:
    """The shares of the highest likelihood: expectation maximisation, with the steps lengthened.

    Plain steps creep where classes overlap; SQUAREM (Varadhan & Roland 2008, Scandinavian Journal of Statistics 35,
    335) extrapolates two of them, and is dropped for a step where it does not raise the likelihood.

    A step multiplies each share by its gain, so small ones move little wherever the maximum is. At the maximum no gain
    is above 1, and elsewhere the mean log likelihood lacks at most the largest gain minus 1 (Lindsay 1983, Annals of
    Statistics 11, 86): the rounds end with that.
    """
    shares_of_galaxies = np.full(len(ratios), 1 / len(ratios)) if weights is None else weights
    shares = np.clip(start, SMALLEST_START, None) / np.clip(start, SMALLEST_START, None).sum()

    def step(old: Floats) -> tuple[Floats, float, float]:
        totals = ratios @ old
        gains = (shares_of_galaxies / totals) @ ratios
        return old * gains, float(shares_of_galaxies @ np.log(totals)), float(gains.max())

    for _ in range(EM_ROUNDS):
        once, _, gain = step(shares)
        twice, _, _ = step(once)
        change, curve = once - shares, twice - 2 * once + shares
        length = np.linalg.norm(curve)
        if length < 1e-15 or (np.abs(twice - shares).max() < EM_TOLERANCE and gain < 1 + EM_TOLERANCE):
            return twice
        reach = np.linalg.norm(change) / length
        # Not as far as 0, from which no step leads back.
        far = np.maximum(shares + 2 * reach * change + reach**2 * curve, 0.1 * twice)
        far /= far.sum()
        after_far, likelihood_far, _ = step(far)
        _, likelihood_twice, _ = step(twice)
        shares = after_far if likelihood_far >= likelihood_twice else twice
    return shares


def _distances(
    scores: Floats,
    problem: _Problem,
    maps: Sequence[_Map],
    prior: Floats,
    shares: Floats,
    *,
    seed: int,
) -> Floats:
    """How far the catalog is from the validation galaxies, and catalogs are from which only the prevalence differs."""
    generator = np.random.default_rng([seed, 2])
    size = min(len(scores), TESTED_GALAXIES)
    tested = scores[generator.choice(len(scores), size=size, replace=False)]
    ones = np.ones(len(problem.classes))
    distances = [_largest_distance(tested, problem, ones, shares)]
    groups = [np.flatnonzero(problem.classes == number) for number in range(len(shares))]
    # The same draws of the validation galaxies that the calibrations were fitted on.
    validation_draws = bootstrap_counts(problem.classes, draws=len(maps) - 1, seed=seed)
    for calibration, counts in zip(maps[1:], validation_draws, strict=True):
        sizes = generator.multinomial(size, shares)
        rows = np.concatenate([generator.choice(group, size=n) for group, n in zip(groups, sizes, strict=True)])
        drawn = problem.scores[rows]
        drawn_shares = _maximise_expectation(_ratios(drawn, calibration, prior), shares)
        distances.append(_largest_distance(drawn, problem, counts.astype(np.float64), drawn_shares))
    return np.array(distances)


def _largest_distance(scores: Floats, problem: _Problem, counts: Floats, shares: Floats) -> float:
    """The largest difference of the distributions of any class' log odds: the catalog's, and the classes' mixed."""
    sizes = np.bincount(problem.classes, weights=counts, minlength=len(shares))
    own = counts * shares[problem.classes] / sizes[problem.classes]
    steps = np.concatenate([np.full(len(scores), 1 / len(scores)), -own])
    distances = []
    for odds in _odds_of_each(np.concatenate([scores, problem.scores])).T:
        order = np.argsort(odds, kind="stable")
        difference = np.cumsum(steps[order])
        ends = np.append(odds[order][1:] != odds[order][:-1], True)  # equal scores are one step
        distances.append(np.abs(difference[ends]).max())
    return float(max(distances))


def _odds_of_each(scores: Floats) -> Floats:
    if scores.shape[1] == 2:
        return scores[:, 1:] - scores[:, :1]
    return np.asarray(logit(np.clip(softmax(scores, axis=1), SMALLEST_PROBABILITY, 1 - SMALLEST_DOUBT)))


def _joined_estimate(
    parts: Sequence[_PartEstimate], assumed: Sequence[float], problem_type: str, confidence: float
) -> PrevalenceEstimate:
    if problem_type == SINGLE_LABEL:
        shares, drawn = parts[0].shares, parts[0].share_draws
    else:
        shares = np.array([part.shares[1] for part in parts])
        drawn = np.stack([part.share_draws[:, 1] for part in parts], axis=1)
    maps = [_joined(row, problem_type) for row in zip(*(part.maps for part in parts), strict=True)]
    distances = [part.distances for part in parts if part.distances is not None]
    return PrevalenceEstimate(
        shares.tolist(),
        [interval_of_draws(s, d, confidence=confidence) for s, d in zip(shares, drawn.T, strict=True)],
        drawn,
        np.stack([scale for scale, _ in maps]),
        np.stack([shift for _, shift in maps]),
        list(assumed),
        problem_type,
        [_share_as_large(own) for own in distances],
        _share_as_large(np.max([own / (np.median(own) or 1.0) for own in distances], axis=0)) if distances else None,
    )


def _share_as_large(values: Floats) -> float:
    """The p-value of the first of some values, the others of which were drawn."""
    return float((values >= values[0]).mean())


def _report(estimate: PrevalenceEstimate) -> None:
    if estimate.p_value is None:
        logger.warning(
            "the prevalence was estimated without labelled galaxies: its interval leaves out the error of the "
            "calibration, and whether only the prevalence changed was not tested; give validation_probabilities."
        )
    elif estimate.assumption_holds is False:
        logger.warning(
            "the catalog does not look like a mixture of the validation galaxies' classes (p = %.3f): more than the "
            "prevalence has changed, and the estimate may be wrong by more than its interval; label a few hundred of "
            "its galaxies.",
            estimate.p_value,
        )


def _mapped_probabilities(scores: Floats, prevalence: PrevalenceEstimate, row: int, shares: npt.ArrayLike) -> Floats:
    """Probabilities with one of the estimate's calibrations, for galaxies of the shares given."""
    mapped = scores * prevalence.scale[row] + prevalence.shift[row]
    new, old = np.asarray(shares, dtype=np.float64), np.asarray(prevalence.assumed_prevalence)
    with np.errstate(divide="ignore"):  # a share of 0 has the logarithm -inf, and its probability is 0
        if prevalence.problem_type == SINGLE_LABEL:
            return np.asarray(softmax(mapped + np.log(new) - np.log(old), axis=1))
        return np.asarray(expit(mapped + logit(new) - logit(old)))


def _log_odds(probabilities: Floats, problem_type: str) -> Floats:
    """Logits that give these probabilities, finite for those of 0 and 1."""
    if problem_type == SINGLE_LABEL:
        return np.asarray(np.log(np.clip(probabilities, SMALLEST_PROBABILITY, None)))
    return np.asarray(logit(np.clip(probabilities, SMALLEST_PROBABILITY, 1 - SMALLEST_DOUBT)))


def _validation_scores(
    probabilities: npt.ArrayLike | None, labels: npt.ArrayLike | None, problem_type: str
) -> tuple[Floats, npt.NDArray[Any]] | None:
    if (probabilities is None) != (labels is None):
        raise ValueError("validation_probabilities and validation_labels belong together; give both or neither.")
    if probabilities is None or labels is None:
        return None
    given = _checked_probabilities(probabilities, problem_type)
    return _log_odds(given, problem_type), np.asarray(labels)


def _checked_probabilities(probabilities: npt.ArrayLike, problem_type: str) -> Floats:
    given = np.asarray(probabilities, dtype=np.float64)
    check_probabilities(given, problem_type)
    return given
