"""Values with the interval that the true one lies in, and galaxies weighted as the sky has them.

Shares of galaxies (accuracy, completeness, a rate of false positives) have Jeffreys intervals, which stay honest where
all or none of a few galaxies count. Everything else is bootstrapped: galaxies are drawn again with replacement, as many
of each class as there are, so that no draw is without a rare class. What is made of shares at all thresholds, like the
area under a curve, has intervals that also hold draws which agree with Jeffreys at each of them (`draw_with_ends`). All
are for a population with just these shares of the classes. A row is a galaxy: average several views of one first, or
the intervals come out too narrow.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from astropy.stats import binom_conf_interval

CONFIDENCE = 0.9
DRAWS = 500
SMALLEST_CLASS = 10  # with fewer galaxies of a class, drawing them again says too little

Floats = npt.NDArray[np.floating[Any]]
Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.integer[Any]]


class Estimate(NamedTuple):
    """A value and its interval.

    Attributes:
        value: As measured.
        low: The interval's lower end.
        high: Its upper end.
    """

    value: float
    low: float
    high: float


def check_confidence(confidence: float, *, name: str = "confidence") -> None:
    """Checks that a share is one that an interval can have.

    Args:
        confidence: The share, between 0 and 1.
        name: What the message calls it.

    Raises:
        ValueError: It is not between 0 and 1, or is one of these.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"{name} is {confidence!r}; give a share between 0 and 1, for example 0.9.")


def share_with_interval(successes: float, trials: float, *, confidence: float = CONFIDENCE) -> Estimate:
    """A share of galaxies with its Jeffreys interval (Brown, Cai & DasGupta 2001, Statistical Science 16, 101).

    Args:
        successes: How many galaxies count.
        trials: Of how many.
        confidence: How much the interval holds of the posterior with Jeffreys' prior, 0-1.

    Returns:
        0-1; all three are NaN where there are no trials.
    """
    check_confidence(confidence)
    if trials == 0:
        return Estimate(np.nan, np.nan, np.nan)
    low, high = binom_conf_interval(successes, trials, confidence_level=confidence, interval="jeffreys")
    return Estimate(successes / trials, float(low), float(high))


def interval_of_draws(value: float, draws: npt.ArrayLike, *, confidence: float = CONFIDENCE) -> Estimate:
    """A value with the middle share of its draws, widened to the value itself where that lies outside.

    Args:
        value: As measured.
        draws: (draws,); those that are NaN are left out.
        confidence: Share of the draws inside, 0-1.
    """
    check_confidence(confidence)
    known = np.asarray(draws, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) == 0 or np.isnan(value):
        return Estimate(float(value), np.nan, np.nan)
    # Of n draws, the k-th smallest has the level k / (n + 1): other rules make intervals of few draws too narrow.
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2], method="weibull")
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def hull(one: Estimate, other: Estimate) -> Estimate:
    """A value with an interval that holds both of its intervals; NaN is none.

    Args:
        one: The value with an interval.
        other: The same value with another one.
    """
    return Estimate(one.value, float(np.fmin(one.low, other.low)), float(np.fmax(one.high, other.high)))


def class_weights_for(labels: npt.ArrayLike, prevalence: Sequence[float] | None) -> Floats:
    """The weight of each galaxy that gives its class the share that it has in the sky.

    Args:
        labels: Class numbers, (n,).
        prevalence: The share of each class in the sky, 0-1; the galaxies weigh the same when absent.

    Returns:
        (n,), summing to n.

    Raises:
        ValueError: A class has a share in the sky, but no galaxy here to stand for it.
    """
    classes = np.asarray(labels).astype(np.int64)
    if prevalence is None:
        return np.ones(len(classes))
    shares = np.asarray(prevalence, dtype=np.float64)
    counts = np.bincount(classes, minlength=len(shares))
    missing = np.flatnonzero((counts[: len(shares)] == 0) & (shares > 0))
    if len(counts) > len(shares) or len(missing) or abs(shares.sum() - 1) > 2e-3 or (shares < 0).any():
        raise ValueError(
            f"prevalence is {shares.tolist()} and the galaxies of each class are {counts.tolist()}; give a share for "
            "each class, adding up to 1, and at least one galaxy of each class that the sky has."
        )
    weights = shares[classes] / counts[classes]
    return np.asarray(weights * len(classes) / weights.sum())


def bootstrap_counts(strata: npt.ArrayLike, *, draws: int, seed: int) -> Iterator[Integers]:
    """How often each galaxy is in each draw, as many galaxies of each stratum as there are.

    Args:
        strata: The class of each galaxy, (n,).
        draws: How many draws.
        seed: Decides them.

    Yields:
        (n,), whole numbers, in the order given.
    """
    generator = np.random.default_rng(seed)
    values = np.asarray(strata)
    groups = [np.flatnonzero(values == value) for value in np.unique(values)]
    for _ in range(draws):
        counts = np.zeros(len(values), dtype=np.int64)
        for group in groups:
            counts[group] = np.bincount(generator.integers(len(group), size=len(group)), minlength=len(group))
        yield counts


def draw_with_ends(strata: npt.ArrayLike, weights: Floats, *, draws: int, seed: int) -> Iterator[Floats]:
    """Weights of galaxies, with half a galaxy of each class beyond either end of those that were seen.

    It is the Bayesian bootstrap (Rubin 1981, Annals of Statistics 9, 130) with a prior: the share of a class above any
    threshold has the posterior of Jeffreys. Galaxies drawn again can't be other than those seen; but where a few stand
    for most of the sky, that none of them was seen above a threshold doesn't mean that none is there. The ends only
    lower the area under a curve: a classifier that is nearly without error may be better than these draws say.

    Args:
        strata: The class of each galaxy, (n,).
        weights: Of each galaxy, (n,), the same for all of a class.
        draws: How many draws.
        seed: Decides them.

    Yields:
        (n + 2 * classes,): the galaxies' weights, then for each class those of the lower and of the upper end; each
        class weighs what it weighs here.
    """
    generator = np.random.default_rng(seed)
    names, numbers = np.unique(strata, return_inverse=True)
    total = np.bincount(numbers, weights=weights)
    shapes = np.repeat([1.0, 0.5], [len(numbers), 2 * len(names)])
    numbers = np.append(numbers, np.repeat(np.arange(len(names)), 2))
    for _ in range(draws):
        drawn = generator.standard_gamma(shapes)
        yield drawn * (total / np.bincount(numbers, weights=drawn))[numbers]


def bootstrap_estimates(
    score: Callable[[Floats], dict[str, float]],
    strata: npt.ArrayLike,
    weights: Floats,
    *,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Scores of weighted galaxies with their bootstrap intervals.

    Args:
        score: From weights (n,) to scores by name.
        strata: The class of each galaxy, (n,).
        weights: Of each galaxy, (n,).
        confidence: Share of the draws inside the interval, 0-1.
        draws: How many draws.
        seed: Decides them.
    """
    counts = bootstrap_counts(strata, draws=draws, seed=seed)
    return estimates_of_draws(score(weights), (score(weights * each) for each in counts), strata, confidence=confidence)


def estimates_of_draws(
    values: Mapping[str, float],
    drawn: Iterable[Mapping[str, float]],
    strata: npt.ArrayLike,
    *,
    confidence: float = CONFIDENCE,
) -> dict[str, Estimate]:
    """Scores with the intervals of their draws, where these say enough.

    A single galaxy of a class is in every draw, and a few are drawn too alike: both ends are NaN where a class has
    fewer than 10 galaxies; and where they would be the same, because draws that agree don't say how far the truth is.

    Args:
        values: By name, of the galaxies as they are.
        drawn: By name, of each draw; not looked at where there is no interval.
        strata: The class of each galaxy, (n,).
        confidence: Share of the draws inside the interval, 0-1.
    """
    if np.unique(strata, return_counts=True)[1].min() < SMALLEST_CLASS:
        return {name: Estimate(value, np.nan, np.nan) for name, value in values.items()}
    draws, estimates = list(drawn), {}
    for name, value in values.items():
        estimate = interval_of_draws(value, [own[name] for own in draws], confidence=confidence)
        has_width = not np.isclose(estimate.low, estimate.high, rtol=0, atol=1e-12)
        estimates[name] = estimate if has_width else Estimate(value, np.nan, np.nan)
    return estimates
