"""How far probabilities can be believed: reliability, expected calibration error, the Brier score and its parts.

All of it is about one label: a probability for each galaxy, and whether it has the label. Galaxies can be weighted, for
scores as they are in the sky (`intervals.class_weights_for`).

Bins hold equal numbers of galaxies, so that no bin is empty and none has a value by chance. Galaxies with the same
probability are all in the bin of the middle one of them; where that is just between two bins, in the upper.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import rankdata

from .intervals import share_with_interval

BINS = 10

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]


class BrierScore(NamedTuple):
    """The mean squared distance of a probability from the truth, and what it is made of.

    Score = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance, exactly, for any bins
    (Stephenson, Coelho & Jolliffe 2008, Weather and Forecasting 23, 752). With a bin for each different probability the
    last two are 0 and the first three are those of Murphy 1973 (Journal of Applied Meteorology 12, 595).

    Attributes:
        score: 0-1; lower is better.
        reliability: How far each bin's share of galaxies with the label is from its mean probability; 0 is calibrated.
        resolution: How far the bins' shares are from each other; higher is better.
        uncertainty: p (1 - p) of the prevalence p: the score of always predicting it.
        within_bin_variance: Of the probabilities inside the bins.
        within_bin_covariance: Twice that of probabilities and truth inside the bins: what the bins hide.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bin_variance: float
    within_bin_covariance: float


def reliability_table(probability: npt.ArrayLike, has_label: npt.ArrayLike, *, bins: int = BINS) -> pd.DataFrame:
    """Mean probability and share of galaxies with the label, bin by bin.

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        bins: How many bins of equal numbers of galaxies.

    Returns:
        A row for each bin, from low to high probability: `galaxies`, `lowest`, `highest`, `mean_probability`, `share`,
        and its 90% Jeffreys interval `share_low`, `share_high`. It is of the galaxies given, at their own prevalence.

    Raises:
        ValueError: No galaxies, probabilities that are none, or not as many as labels.
    """
    given, truth, _ = checked_galaxies(probability, has_label, None)
    numbers = _equal_bins(given, bins)
    rows = []
    for number in range(numbers.max() + 1):
        inside = numbers == number
        share = share_with_interval(truth[inside].sum(), inside.sum())
        mean = given[inside].mean()
        rows.append([int(inside.sum()), given[inside].min(), given[inside].max(), mean, *share])
    names = ["galaxies", "lowest", "highest", "mean_probability", "share", "share_low", "share_high"]
    return pd.DataFrame(rows, columns=names)


def expected_calibration_error(
    probability: npt.ArrayLike, has_label: npt.ArrayLike, *, weights: npt.ArrayLike | None = None, bins: int = BINS
) -> float:
    """The mean distance between the probability said and the share found, in bins of equal numbers of galaxies.

    With few galaxies it is above 0 for perfect probabilities too: compare with `calibration_error_by_chance`.

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        weights: Of each galaxy, (n,); all the same when absent.
        bins: How many bins.

    Returns:
        0-1; 0 is calibrated.

    Raises:
        ValueError: As `reliability_table`.
    """
    given, truth, heavy = checked_galaxies(probability, has_label, weights)
    return _calibration_error(given, truth, heavy, _equal_bins(given, bins))


def calibration_error_by_chance(probability: npt.ArrayLike, *, draws: int = 100, seed: int = 0) -> float:
    """The expected calibration error that these galaxies would have if their probabilities were perfect.

    Args:
        probability: Of the label, 0-1, (n,).
        draws: How often the labels are drawn from the probabilities.
        seed: Decides the draws.

    Raises:
        ValueError: As `reliability_table`.
    """
    given, _, heavy = checked_galaxies(probability, np.zeros(np.shape(probability)), None)
    numbers, generator = _equal_bins(given, BINS), np.random.default_rng(seed)
    drawn = [_calibration_error(given, generator.random(len(given)) < given, heavy, numbers) for _ in range(draws)]
    return float(np.mean(drawn))


def decompose_brier_score(
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    bins: int | None = BINS,
) -> BrierScore:
    """The Brier score and its parts.

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        weights: Of each galaxy, (n,); all the same when absent.
        bins: How many bins of equal numbers of galaxies; None makes one for each different probability, which gives
            Murphy's three parts and, where hardly two galaxies share a probability, says nothing of reliability.

    Raises:
        ValueError: As `reliability_table`.
    """
    given, truth, heavy = checked_galaxies(probability, has_label, weights)
    numbers = np.unique(given, return_inverse=True)[1] if bins is None else _equal_bins(given, bins)
    shares = heavy / heavy.sum()
    sizes, means, found = _bin_means(given, truth, shares, numbers)
    prevalence = float(shares @ truth)
    inside_given, inside_truth = given - means[numbers], truth - found[numbers]
    return BrierScore(
        float(shares @ (given - truth) ** 2),
        float(sizes @ (means - found) ** 2),
        float(sizes @ (found - prevalence) ** 2),
        prevalence * (1 - prevalence),
        float(shares @ inside_given**2),
        float(2 * shares @ (inside_given * inside_truth)),
    )


def checked_galaxies(
    probability: npt.ArrayLike, has_label: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[Floats, Floats, Floats]:
    """Probabilities, labels as 0 and 1, and weights of as many galaxies, in float64.

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        weights: Of each galaxy, (n,), at least 0; all 1 when absent.

    Raises:
        ValueError: No galaxies, other shapes, or values out of range.
    """
    given, truth = np.asarray(probability, dtype=np.float64), np.asarray(has_label, dtype=np.float64)
    heavy = np.ones(len(given)) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.ndim != 1 or truth.shape != given.shape or heavy.shape != given.shape or len(given) == 0:
        raise ValueError(
            f"probability, has_label and weights have the shapes {given.shape}, {truth.shape} and {heavy.shape}; give "
            "a number of each for every galaxy, and at least one galaxy."
        )
    if not (np.isfinite(given).all() and given.min() >= 0 and given.max() <= 1 + 1e-6):
        raise ValueError(f"probability is between {given.min():.3g} and {given.max():.3g}; it lies in 0-1.")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"has_label holds {np.unique(truth)[:5].tolist()}; give True and False for known labels only.")
    if not (np.isfinite(heavy).all() and heavy.min() >= 0 and heavy.sum() > 0):
        raise ValueError("weights hold numbers below 0, or none above; give each galaxy a weight of at least 0.")
    return given, truth, heavy


def _equal_bins(given: Floats, bins: int) -> Integers:
    """The bin of each galaxy, numbered from 0 without gaps."""
    # By the middle, and not by an end, so that 1 - p has the bins of p, unless a middle is just between two bins.
    twice_the_middles = (2 * rankdata(given)).astype(np.int64) - 1
    return np.unique(twice_the_middles * bins // (2 * len(given)), return_inverse=True)[1]


def _bin_means(given: Floats, truth: Floats, shares: Floats, numbers: Integers) -> tuple[Floats, Floats, Floats]:
    sizes = np.bincount(numbers, weights=shares).astype(np.float64)
    divisor = np.where(sizes > 0, sizes, 1)  # a bin that a bootstrap draw left empty counts for nothing
    return (
        sizes,
        np.bincount(numbers, weights=shares * given) / divisor,
        np.bincount(numbers, weights=shares * truth) / divisor,
    )


def _calibration_error(given: Floats, truth: npt.NDArray[Any], weights: Floats, numbers: Integers) -> float:
    sizes, means, found = _bin_means(given, truth.astype(np.float64), weights / weights.sum(), numbers)
    return float(sizes @ np.abs(means - found))
