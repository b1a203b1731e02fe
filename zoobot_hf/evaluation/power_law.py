"""How an error falls with the number of labelled galaxies, and what more labels would bring.

An inverse power law, error = floor + scale * labels ** -exponent, fits the learning curves of many classifiers
(Figueroa et al. 2012, BMC Medical Informatics and Decision Making 12, 8).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .intervals import CONFIDENCE, Estimate

EXPONENTS = np.geomspace(0.02, 3, 200)
DRAWS = 1000
FEWEST_POINTS = 4  # one more than the law has numbers
GAIN = 0.01  # how much less error is asked for
FURTHEST = 10.0  # times the most labels that were tried; beyond, the law's form decides and not the measurements

Floats = npt.NDArray[np.floating[Any]]


class PowerLaw(NamedTuple):
    """error = floor + scale * labels ** -exponent.

    Attributes:
        floor: The error that no number of labels falls below, 0-1.
        scale: Not negative.
        exponent: Above 0.
    """

    floor: float
    scale: float
    exponent: float

    def __call__(self, labels: npt.ArrayLike) -> Floats:
        """The error with some numbers of labelled galaxies.

        Args:
            labels: Numbers above 0, of any shape.
        """
        return np.asarray(self.floor + self.scale * np.asarray(labels, dtype=np.float64) ** -self.exponent)

    def labels_for(self, error: float) -> float:
        """The number of labelled galaxies with some error; infinite where no number has it.

        Args:
            error: 0-1.
        """
        if self.scale <= 0 or error <= self.floor:
            return math.inf
        # A NumPy number goes over to infinity, where Python's own raises an error.
        with np.errstate(over="ignore"):
            return float(np.float64((error - self.floor) / self.scale) ** (-1 / self.exponent))


@dataclass(frozen=True)
class Extrapolation:
    """What more labels would bring.

    Attributes:
        law: The fitted one, of the error against the labelled galaxies of each class.
        labels: The most labelled galaxies of each class that were tried.
        more: How many more galaxies, of all classes together, have to be labelled for an error that is 0.01 lower, with
            its 90% interval; infinite where no number is enough.
        can_tell: Whether the interval ends within ten times the labels that were tried.
    """

    law: PowerLaw
    labels: int
    more: Estimate
    can_tell: bool

    def describe(self, score: str = "accuracy") -> str:
        """One sentence for a log or a figure.

        Args:
            score: What 1 - error is called.
        """
        aim = f"1 more point of {score}"
        start = f"beyond {self.labels} of each class"
        if self.can_tell:
            return (
                f"about {_rounded(self.more.value)} more labels {start} for {aim} "
                f"({CONFIDENCE:.0%} interval: {_rounded(self.more.low)} to {_rounded(self.more.high)})"
            )
        if math.isinf(self.more.low):
            return f"no number of labels {start} seems to bring {aim}: the curve is flat"
        return (
            f"can't tell how many more labels {start} bring {aim}: at least {_rounded(self.more.low)}, maybe no number"
        )


def fit_power_law(labels: npt.ArrayLike, errors: npt.ArrayLike, *, weights: npt.ArrayLike | None = None) -> PowerLaw:
    """The inverse power law of least squares, with a floor and a scale that are not negative.

    Args:
        labels: Numbers of labelled galaxies, (points,).
        errors: 0-1, (points,).
        weights: One over the variance of each error, (points,); all the same when absent.

    Raises:
        ValueError: Fewer than four different numbers of labels.
    """
    numbers, values = np.asarray(labels, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if len(np.unique(numbers)) < FEWEST_POINTS:
        raise ValueError(
            f"labels are {numbers.astype(int).tolist()}; a power law needs at least {FEWEST_POINTS} different numbers."
        )
    heavy = np.ones(len(numbers)) if weights is None else np.asarray(weights, dtype=np.float64)
    return _fit(numbers, values[None], heavy)[0]


def extrapolate(
    labels: npt.ArrayLike,
    errors: npt.ArrayLike,
    *,
    classes: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> Extrapolation:
    """How many more labels lower the error by 0.01, from runs with several seeds at each number of labels.

    The law is fitted to the mean over the seeds; the interval comes from drawing that mean from Student's t
    distribution, as the runs of so few seeds allow. With 2 to 5 seeds it is still too narrow: 90% intervals held the
    truth in 75 to 89 of 100 drawn experiments, with 10 or 20 seeds in 86 to 97. It leaves out that all runs have the
    same galaxies, and that the law may not hold.

    Args:
        labels: Numbers of labelled galaxies of each class, (points,).
        errors: (seeds, points), 0-1.
        classes: How many classes there are.
        draws: How often the mean is drawn.
        seed: Decides the draws.

    Raises:
        ValueError: What `fit_power_law` refuses, or fewer than two seeds.
    """
    numbers, runs = np.asarray(labels, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if len(runs) < 2:
        raise ValueError(f"errors are of {len(runs)} seed; an interval needs at least 2.")
    variance = runs.var(axis=0, ddof=1)
    weights = 1 / np.maximum(variance, 1e-6)
    law = fit_power_law(numbers, runs.mean(axis=0), weights=weights)
    means = _draw_means(runs, draws=draws, seed=seed)
    last = numbers.max()
    more = np.sort([_more_labels(drawn, last) for drawn in _fit(numbers, means, weights)])
    ends = [math.floor((1 - CONFIDENCE) / 2 * (draws - 1)), math.ceil((1 + CONFIDENCE) / 2 * (draws - 1))]
    low, high = (float(more[end]) for end in ends)  # no quantile, which lies half-way between finite and infinite
    value = _more_labels(law, last)
    estimate = Estimate(classes * value, classes * min(low, value), classes * max(high, value))
    return Extrapolation(law, int(last), estimate, bool(max(high, value) <= (FURTHEST - 1) * last))


def _draw_means(runs: Floats, *, draws: int, seed: int) -> Floats:
    """Means over the seeds that are as likely, 0-1, (draws, points)."""
    generator, freedom = np.random.default_rng(seed), len(runs) - 1
    # Sums of whole runs' deviations: of one seed, errors with different numbers of labels go together.
    deviations = (runs - runs.mean(axis=0)) / math.sqrt(len(runs) * freedom)
    widths = np.sqrt(freedom / generator.chisquare(freedom, size=(draws, 1)))
    drawn = runs.mean(axis=0) + widths * (generator.normal(size=(draws, len(runs))) @ deviations)
    return np.asarray(np.clip(drawn, 0, 1))


def _more_labels(law: PowerLaw, labels: float) -> float:
    return law.labels_for(float(law(labels)) - GAIN) - labels


def _fit(labels: Floats, errors: Floats, weights: Floats) -> list[PowerLaw]:
    """The law for each row of errors, (rows, points): for a given exponent floor and scale are linear least squares."""
    powers = labels[:, None] ** -EXPONENTS
    total = weights.sum()
    power_mean, error_mean = weights @ powers / total, errors @ weights / total
    spread = weights @ (powers - power_mean) ** 2
    scale = np.maximum((errors - error_mean[:, None]) * weights @ (powers - power_mean) / spread, 0)
    floor = error_mean[:, None] - scale * power_mean
    # Where the best floor is negative, the best allowed one is 0.
    scale_from_zero = np.maximum(errors * weights @ powers / (weights @ powers**2), 0)
    scale, floor = np.where(floor < 0, scale_from_zero, scale), np.maximum(floor, 0)
    misses = errors[:, :, None] - floor[:, None] - scale[:, None] * powers
    best = np.einsum("rpe,p->re", misses**2, weights).argmin(axis=1)
    rows = np.arange(len(errors))
    return [
        PowerLaw(*map(float, numbers))
        for numbers in zip(floor[rows, best], scale[rows, best], EXPONENTS[best], strict=True)
    ]


def _rounded(number: float) -> str:
    """Two digits: no extrapolation is known to more."""
    if math.isinf(number):
        return "any number"
    digits = max(0, len(str(int(number))) - 2)
    return f"{round(number, -digits):.0f}"
