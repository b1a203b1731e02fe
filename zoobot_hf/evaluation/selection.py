"""Selecting galaxies by a threshold: which one for which aim, and how complete and how pure the selection is.

Completeness (recall) is the share of the galaxies with a label that are selected; it is the same at any prevalence, as
long as galaxies with the label look the same. Purity (precision) is the share of the selected that have the label. It
depends on the prevalence: a selection that is 90% pure among balanced galaxies is 32% pure where one in twenty has the
label. So every purity here is for a prevalence that is named, and the galaxies are weighted to have it. Of three or
more classes of which a galaxy has one, it depends on the shares of all: edge-on galaxies pass for rings more often than
smooth ones do, and may be common or rare. So then the galaxies are weighted to have the share of each class.

A galaxy is selected when its probability is at or above the threshold.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from .intervals import CONFIDENCE, Estimate, check_confidence, class_weights_for, interval_of_draws, share_with_interval
from .metrics import class_numbers
from .reliability import checked_galaxies

AIMS = ("purity", "completeness", "f1")
POSTERIOR_DRAWS = 4000
BINS = 8

Floats = npt.NDArray[np.floating[Any]]
Booleans = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.integer[Any]]


class Selection(NamedTuple):
    """A threshold and what it selects.

    Attributes:
        threshold: The lowest probability that is selected, 0-1.
        prevalence: The share of galaxies with the label that purity and f1 are for.
        completeness: The share of the galaxies with the label that are selected (recall).
        purity: The share of the selected that have the label (precision), at this prevalence.
        f1: The harmonic mean of both.
        false_positive_rate: The share of the galaxies without the label that are selected.
        with_label: How many labelled galaxies with the label this was measured on.
        without_label: How many without.
        aim: What the threshold was chosen for, in words; empty where it was given.
    """

    threshold: float
    prevalence: float
    completeness: Estimate
    purity: Estimate
    f1: Estimate
    false_positive_rate: Estimate
    with_label: int
    without_label: int
    aim: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, each estimate as value, low and high."""
        estimates = ("completeness", "purity", "f1", "false_positive_rate")
        return {**self._asdict(), **{name: getattr(self, name)._asdict() for name in estimates}}


class SelectionCurve(NamedTuple):
    """What each threshold selects, from the highest, which selects the fewest galaxies, down to the lowest.

    Attributes:
        thresholds: Halfway between the probabilities of one galaxy and the next, (thresholds,).
        completeness: 0-1, (thresholds,).
        purity: 0-1, (thresholds,), of galaxies with the weights given.
        false_positive_rate: 0-1, (thresholds,).
    """

    thresholds: Floats
    completeness: Floats
    purity: Floats
    false_positive_rate: Floats

    @property
    def f1(self) -> Floats:
        """The harmonic mean of completeness and purity, (thresholds,)."""
        total = self.completeness + self.purity
        return np.asarray(2 * self.completeness * self.purity / np.where(total > 0, total, 1))

    @property
    def roc_auc(self) -> float:
        """The area under completeness against the false positive rate, 0-1; 0.5 is guessing."""
        from_zero = np.append(0.0, self.completeness)
        return float(np.diff(self.false_positive_rate, prepend=0.0) @ (from_zero[1:] + from_zero[:-1]) / 2)

    @property
    def average_precision(self) -> float:
        """The area under purity against completeness, 0-1; guessing has the prevalence."""
        return float(np.diff(self.completeness, prepend=0.0) @ self.purity)


class WeightedGalaxies(NamedTuple):
    """Galaxies that stand for those of the sky.

    Attributes:
        share: Of the galaxies with the label, 0-1.
        weights: Of each galaxy, (n,), summing to n.
        classes: Whose share each galaxy stands for, as a number, (n,).
    """

    share: float
    weights: Floats
    classes: Integers


def selection_curve(
    probability: npt.ArrayLike, has_label: npt.ArrayLike, *, weights: npt.ArrayLike | None = None
) -> SelectionCurve:
    """Completeness and purity at every threshold that makes a difference.

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,); some have and some don't.
        weights: Of each galaxy, (n,); all the same when absent.

    Raises:
        ValueError: Numbers that don't fit, or all galaxies have the label, or none.
    """
    given, truth, heavy = checked_galaxies(probability, has_label, weights)
    if truth.min() == truth.max():
        raise ValueError(
            f"all {len(truth)} galaxies are {'with' if truth[0] else 'without'} the label; completeness and purity "
            "need some of both kinds."
        )
    order = np.argsort(-given, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(given[order])), len(given) - 1)  # galaxies of one probability go together
    selected = np.cumsum((heavy * truth)[order])[ends]
    mistaken = np.cumsum((heavy * (1 - truth))[order])[ends]
    levels = given[order][ends]
    following = np.append(levels[1:], 0.0)
    middle = (levels + following) / 2
    total = selected + mistaken
    return SelectionCurve(
        np.where(middle > following, middle, levels),  # of two neighbouring floats the middle may be the lower
        selected / selected[-1],
        selected / np.where(total > 0, total, 1),
        mistaken / mistaken[-1],
    )


def choose_threshold(
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    *,
    aim: str,
    at_least: float | None = None,
    prevalence: float | Sequence[float] | None = None,
    classes: npt.ArrayLike | None = None,
) -> Selection:
    """The threshold that meets an aim best, and what it selects.

    For a purity it is the threshold of the highest completeness, for a completeness that of the highest purity. It is
    chosen on these galaxies, so on others it does a little worse than here: choose on validation galaxies and measure
    with `measure_selection` on test galaxies.

    Args:
        probability: Of the label, 0-1, (n,), as the model gives it to a survey.
        has_label: Whether each galaxy has it, (n,).
        aim: "purity", "completeness" or "f1" (the best there is).
        at_least: The purity or completeness to be reached, 0-1; not for f1.
        prevalence: The share of galaxies with the label in the sky, 0-1, or with `classes` the share of each class,
            adding up to 1; that of these galaxies when absent.
        classes: The class of each galaxy as a number from 0 on, (n,), where there are three or more, the label being
            one of them: so that also those without the label are as many of each kind as in the sky.

    Raises:
        ValueError: Another aim; a goal that is missing, out of range or can't be reached, with what can be; what
            `weigh_galaxies` refuses, or `selection_curve`.
    """
    check_aim(aim, at_least)
    given, truth, _ = checked_galaxies(probability, has_label, None)
    weighted = weigh_galaxies(truth, prevalence=prevalence, classes=classes)
    curve = selection_curve(given, truth, weights=weighted.weights)
    if aim == "f1":
        best, words = int(curve.f1.argmax()), "best F1"
    else:
        reached, other = (curve.purity, curve.completeness) if aim == "purity" else (curve.completeness, curve.purity)
        allowed = reached >= float(at_least or 0) - 1e-12
        if not allowed.any():
            raise ValueError(_what_can_be(curve, at_least, weighted.share))
        values = np.where(allowed, other, -1)
        # Thresholds fall along the curve: of equal ones the first has the highest purity, the last most galaxies.
        best = int(values.argmax()) if aim == "purity" else len(values) - 1 - int(values[::-1].argmax())
        words = f"{aim} of at least {at_least:g}"
    threshold = float(curve.thresholds[best])
    selection = measure_selection(given, truth, threshold=threshold, prevalence=prevalence, classes=classes)
    return selection._replace(aim=words)


def measure_selection(
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    *,
    threshold: float,
    prevalence: float | Sequence[float] | None = None,
    classes: npt.ArrayLike | None = None,
    confidence: float = CONFIDENCE,
) -> Selection:
    """Completeness and purity of the galaxies that a threshold selects, with intervals.

    Completeness and false positive rate have Jeffreys intervals. Those of purity and f1, and of the false positive rate
    of several classes, come from draws of the posteriors of each class: so a selection with no false positive among 50
    galaxies is not called pure without a doubt.

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        threshold: The lowest probability that is selected, 0-1.
        prevalence: As in `choose_threshold`.
        classes: As in `choose_threshold`.
        confidence: Of the intervals, 0-1.

    Returns:
        The selection; its purity is NaN where nothing is selected.

    Raises:
        ValueError: Numbers that don't fit, or all galaxies have the label, or none; or what `weigh_galaxies` refuses.
    """
    check_confidence(confidence)
    given, truth, _ = checked_galaxies(probability, has_label, None)
    with_label, without = _count_both_kinds(truth)
    weighted = weigh_galaxies(truth, prevalence=prevalence, classes=classes)
    share, is_selected, lacks_label = weighted.share, given >= threshold, truth == 0
    hits, generator = int(truth[is_selected].sum()), np.random.default_rng(0)
    completeness = share_with_interval(hits, with_label, confidence=confidence)
    found = generator.beta(hits + 0.5, with_label - hits + 0.5, POSTERIOR_DRAWS)
    rate, mistaken = _false_positive_rate(
        is_selected[lacks_label],
        weighted.classes[lacks_label],
        weighted.weights[lacks_label],
        generator=generator,
        confidence=confidence,
    )
    pairs: tuple[tuple[Any, Any], ...] = ((completeness.value, rate.value), (found, mistaken))
    purity, drawn_purity = (_purity(c, f, share) for c, f in pairs)
    f1, drawn_f1 = (_f1(c, f, share) for c, f in pairs)
    return Selection(
        float(threshold),
        share,
        completeness,
        interval_of_draws(float(purity), drawn_purity, confidence=confidence),
        interval_of_draws(float(f1), drawn_f1, confidence=confidence),
        rate,
        with_label,
        without,
    )


def weigh_galaxies(
    has_label: npt.ArrayLike,
    *,
    prevalence: float | Sequence[float] | None = None,
    classes: npt.ArrayLike | None = None,
) -> WeightedGalaxies:
    """Weights that give the galaxies with a label, or those of each class, the share that they have in the sky.

    Args:
        has_label: Whether each galaxy has it, (n,).
        prevalence: As in `choose_threshold`; without it all weigh the same, and classes make no difference.
        classes: As in `choose_threshold`.

    Raises:
        ValueError: A share out of range, shares that are not for these classes, a label that is not one of them, or
            with a prevalence galaxies that all have it, or none.
    """
    truth = np.asarray(has_label) == 1
    if prevalence is None:
        return WeightedGalaxies(float(truth.mean()), np.ones(len(truth)), truth.astype(np.int64))
    _count_both_kinds(truth)
    shares = np.asarray(prevalence, dtype=np.float64)
    if shares.ndim != (classes is not None) or not ((shares > 0) & (shares < 1)).all():
        raise ValueError(
            f"prevalence is {prevalence!r}; give the share of galaxies with the label, between 0 and 1, or with "
            "classes the share of each."
        )
    if classes is None:
        numbers, shares = truth.astype(np.int64), np.array([1 - shares, shares])
    else:
        numbers = class_numbers(classes)
        if numbers.shape != truth.shape or not np.array_equal(numbers == numbers[truth.argmax()], truth):
            raise ValueError(
                f"classes, of the shape {numbers.shape}, don't go with has_label, of the shape {truth.shape}; give the "
                "class of each galaxy, which is one of them for all galaxies with the label, and for no others."
            )
    weights = class_weights_for(numbers, shares.tolist())
    return WeightedGalaxies(float(shares[numbers[truth.argmax()]] / shares.sum()), weights, numbers)


def _count_both_kinds(truth: npt.NDArray[Any]) -> tuple[int, int]:
    with_label, without = int(truth.sum()), int(len(truth) - truth.sum())
    if with_label == 0 or without == 0:
        raise ValueError(f"{with_label} galaxies are with the label and {without} without; give some of both kinds.")
    return with_label, without


def completeness_by_column(
    values: npt.ArrayLike,
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    *,
    threshold: float,
    bins: int | Sequence[float] = BINS,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Completeness as a function of a catalog's column: magnitude, size, redshift.

    It is completeness relative to the labelled galaxies: what was too faint for anyone to label is not in it.

    Args:
        values: The column, (n,), in its own unit; galaxies where it is NaN are left out.
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        threshold: The lowest probability that is selected, 0-1.
        bins: The bins' edges, rising; or how many bins with as many galaxies that have the label in each.
        confidence: Of the Jeffreys intervals, 0-1.

    Returns:
        A row for each bin: `low` and `high` (a value on an edge belongs to the bin above, the highest to the last),
        `galaxies` with the label, `selected` of them, `completeness`, `completeness_low`, `completeness_high`, which
        are NaN in a bin without galaxies.

    Raises:
        ValueError: Numbers that don't fit, edges that don't rise, or no galaxy with the label has a value.
    """
    given, truth, _ = checked_galaxies(probability, has_label, None)
    column = np.asarray(values, dtype=np.float64)
    if column.shape != given.shape:
        raise ValueError(f"values have the shape {column.shape} for {len(given)} galaxies; give one for each.")
    used = (truth == 1) & np.isfinite(column)
    if not used.any():
        raise ValueError("no galaxy with the label has a value; completeness can't be measured along this column.")
    edges = _edges(column[used], bins)
    numbers = np.clip(np.searchsorted(edges, column, side="right") - 1, 0, len(edges) - 2)
    used &= (column >= edges[0]) & (column <= edges[-1])
    rows = []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = used & (numbers == number)
        selected = int((given[inside] >= threshold).sum())
        share = share_with_interval(selected, inside.sum(), confidence=confidence)
        rows.append([low, high, int(inside.sum()), selected, *share])
    names = ["low", "high", "galaxies", "selected", "completeness", "completeness_low", "completeness_high"]
    return pd.DataFrame(rows, columns=names)


def check_aim(aim: str, at_least: float | None) -> None:
    """Checks that an aim is one, and that its goal fits.

    Args:
        aim: As in `choose_threshold`.
        at_least: As in `choose_threshold`.

    Raises:
        ValueError: Another aim, or a goal that is missing, too many, or out of range.
    """
    if aim not in AIMS:
        raise ValueError(f"aim is {aim!r}; choose one of {', '.join(AIMS)}.")
    if aim == "f1" and at_least is not None:
        raise ValueError(
            f"at_least is {at_least!r}, but for f1 the best there is gets chosen; leave it out, or choose purity or "
            "completeness as aim (in finetuning: decision_aim)."
        )
    if aim != "f1" and (at_least is None or not 0 < at_least <= 1):
        raise ValueError(
            f"at_least is {at_least!r}; give the {aim} to be reached, above 0 and at most 1, as at_least (in "
            "finetuning: decision_at_least)."
        )


def _what_can_be(curve: SelectionCurve, at_least: float | None, share: float) -> str:
    best = int(curve.purity.argmax())
    return (
        f"a purity of {at_least:g} can't be reached: the highest on these galaxies, where {share:.2%} have the label, "
        f"is {curve.purity[best]:.3f}, at a completeness of {curve.completeness[best]:.3f}; ask for that or less."
    )


def _false_positive_rate(
    is_selected: Booleans, classes: Integers, weights: Floats, *, generator: np.random.Generator, confidence: float
) -> tuple[Estimate, Floats]:
    """The rate of galaxies that all lack the label, and draws of its posterior; each class has one with a prior."""
    rate, drawn, numbers = 0.0, np.zeros(POSTERIOR_DRAWS), np.unique(classes)
    for number in numbers:
        inside = classes == number
        mistakes, trials = int(is_selected[inside].sum()), int(inside.sum())
        part = float(weights[inside].sum() / weights.sum())
        rate += part * mistakes / trials
        drawn += part * generator.beta(mistakes + 0.5, trials - mistakes + 0.5, POSTERIOR_DRAWS)
    if len(numbers) == 1:
        return share_with_interval(mistakes, trials, confidence=confidence), drawn
    return interval_of_draws(rate, drawn, confidence=confidence), drawn


def _purity(completeness: Any, false_positive_rate: Any, share: float) -> Any:
    right, wrong = share * completeness, (1 - share) * false_positive_rate
    total = np.asarray(right + wrong)
    return np.where(total > 0, right / np.where(total > 0, total, 1), np.nan)


def _f1(completeness: Any, false_positive_rate: Any, share: float) -> Any:
    # 2 TP / (2 TP + FP + FN): defined where nothing is selected, too.
    right, wrong = share * completeness, (1 - share) * false_positive_rate
    return 2 * right / (right + wrong + share)


def _edges(column: Floats, bins: int | Sequence[float]) -> Floats:
    if isinstance(bins, int):
        edges = np.unique(np.quantile(column, np.linspace(0, 1, bins + 1)))
        return edges if len(edges) > 1 else np.array([edges[0], np.nextafter(edges[0], np.inf)])
    edges = np.asarray(bins, dtype=np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"bins are {edges.tolist()}; give rising edges, at least two, or a number of bins.")
    return edges
