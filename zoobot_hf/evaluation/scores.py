"""The scores of a model's probabilities with their intervals, each saying which population it is for.

A test split may be balanced, or have more of a rare class than the sky. What is found there and what is to be expected
in the sky are different numbers for everything but completeness and, of two classes, ROC AUC: of more, it depends on
how common those are that a label is told apart from. So each report names its population: "labelled galaxies", as they
are, or "sky", where the galaxies of each class are weighted to the share that the class has there. The probabilities
have to be for the same population; `calibration.probabilities_at_prevalence` takes them from one to the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .intervals import (
    CONFIDENCE,
    DRAWS,
    Estimate,
    bootstrap_estimates,
    class_weights_for,
    draw_with_ends,
    estimates_of_draws,
    hull,
    interval_of_draws,
    share_with_interval,
)
from .metrics import SINGLE_LABEL, checked_labels, count_labelled, scored_labels, truth_of_label
from .reliability import calibration_error_by_chance, expected_calibration_error
from .selection import POSTERIOR_DRAWS, selection_curve

LABELLED_GALAXIES = "labelled galaxies"
SKY = "sky"
BRIER_SCORE = "brier_score"
HEAVIEST_GALAXY = 1 / 3
CALIBRATION_ERROR = "expected_calibration_error"
CALIBRATION_ERROR_BY_CHANCE = "calibration_error_by_chance"
FIXED_SHARE = 0.9
SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)  # scikit-learn's, so that a report has one log loss

Floats = npt.NDArray[np.floating[Any]]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """What probabilities are worth, label by label.

    Attributes:
        population: "labelled galaxies" or "sky".
        prevalence: The share of each label in this population, by its name.
        galaxies: How many galaxies with a known label the scores were measured on.
        confidence: Of the intervals, 0-1.
        overall: `accuracy` and `log_loss` over all labels, where each galaxy has one label; empty where it has several.
        labels: For each label's name its scores by name. Two labels of which each galaxy has one have the scores of the
            second. A label that no galaxy has, or that all have, is left out.
    """

    population: str
    prevalence: dict[str, float]
    galaxies: int
    confidence: float
    overall: dict[str, Estimate]
    labels: dict[str, dict[str, Estimate]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, each score as value, low and high."""
        labels = {
            label: {name: estimate._asdict() for name, estimate in scores.items()}
            for label, scores in self.labels.items()
        }
        overall = {name: estimate._asdict() for name, estimate in self.overall.items()}
        return {**vars(self), "overall": overall, "labels": labels}


def score_probabilities(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    label_names: Sequence[str],
    problem_type: str = SINGLE_LABEL,
    sky_prevalence: Sequence[float] | None = None,
    purity: float = FIXED_SHARE,
    completeness: float = FIXED_SHARE,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Scores:
    """Scores of each label with intervals from drawing the galaxies of each class again.

    Where there are none says `intervals.estimates_of_draws`. Accuracy is a share: its interval is that of Jeffreys, and
    in the sky that of the classes' posteriors.

    - `roc_auc`, `average_precision`, `completeness_at_purity_0.9` and `purity_at_completeness_0.9`, from completeness
      and purity at all thresholds: the last two are the best that a threshold reaches, chosen anew on each draw, and a
      completeness of 0 where no threshold is pure enough. Intervals of galaxies drawn again and of `draw_with_ends`
      together, of 90% each, hold the truth in 95-100% of cases with 40 to 300 galaxies of each class or 12 of one, in
      skies of 5% to 50%. A completeness at a purity comes out too high where its interval is wide: among 40 galaxies,
      one without the label stands for so much of a sky of 5% that a purity of 0.9 only says that none was selected;
    - `log_loss` and `brier_score`, bootstrapped: 79-94% likewise. The Brier score has no interval where one galaxy
      weighs more than a third of all of the other kind, as in a sky of 5% any of 40 without the label does;
    - `expected_calibration_error` in ten bins of equal numbers of galaxies and, for the labelled galaxies as they are,
      `calibration_error_by_chance`: what perfect probabilities would have with so few of them. Both without interval:
      drawing again adds noise to what is a distance already, and of good probabilities the truth lies below the draws.

    Args:
        probabilities: For the population that is scored, 0-1, (n, labels).
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
        label_names: In the order of the columns.
        problem_type: "single_label_classification" or "multi_label_classification".
        sky_prevalence: The share of each label in the sky; the galaxies are scored as they are when absent.
        purity: At which completeness is given, 0-1.
        completeness: At which purity is given, 0-1.
        confidence: Of the intervals, 0-1.
        draws: How often the galaxies are drawn again.
        seed: Decides the draws.

    Raises:
        ValueError: Predictions and labels that don't fit, no label that some galaxies have and some don't, or a
            prevalence that doesn't fit.
    """
    given = np.asarray(probabilities, dtype=np.float64)
    truth = checked_labels(labels, given, problem_type)
    if given.shape[1] != len(label_names) or (sky_prevalence is not None and len(sky_prevalence) != len(label_names)):
        raise ValueError(
            f"the probabilities have {given.shape[1]} labels, label_names {len(label_names)} and sky_prevalence "
            f"{sky_prevalence and len(sky_prevalence)}; give as many of each."
        )
    if sky_prevalence is not None:
        _check_sky(label_names, sky_prevalence)
    is_single = problem_type == SINGLE_LABEL
    scored = scored_labels(len(label_names), problem_type)
    results, shares = {}, {}
    for number, name in enumerate(label_names):
        known, has_label = truth_of_label(truth, number, problem_type)
        classes = truth if is_single else has_label
        own_share = has_label.mean() if known.any() else np.nan
        shares[name] = float(own_share if sky_prevalence is None else sky_prevalence[number])
        if number in scored and 0 < own_share < 1:
            weights = _weights(classes, number, sky_prevalence, is_single=is_single)
            label = _Label(given[known, number], has_label, weights, sky_prevalence is not None)
            results[name] = label.score(classes, purity, completeness, confidence=confidence, draws=draws, seed=seed)
    if not results:
        raise ValueError(
            f"all galaxies are with or all are without {', '.join(label_names)}; a score needs some of both kinds."
        )
    population = LABELLED_GALAXIES if sky_prevalence is None else SKY
    overall = _overall(given, truth, sky_prevalence, confidence=confidence, draws=draws, seed=seed) if is_single else {}
    return Scores(population, shares, count_labelled(truth), confidence, overall, results)


def _overall(
    given: Floats, classes: npt.NDArray[Any], sky: Sequence[float] | None, *, confidence: float, draws: int, seed: int
) -> dict[str, Estimate]:
    surprise = -np.log(np.clip(given[np.arange(len(given)), classes], SMALLEST_PROBABILITY, 1))

    def scores_of(weights: Floats) -> dict[str, float]:
        return {"log_loss": float(np.average(surprise, weights=weights))}

    weights = class_weights_for(classes, sky)
    drawn = bootstrap_estimates(scores_of, classes, weights, confidence=confidence, draws=draws, seed=seed)
    return {
        "accuracy": _accuracy(given.argmax(axis=1) == classes, classes, sky, confidence=confidence, seed=seed),
        **drawn,
    }


def _accuracy(
    is_right: Booleans, classes: npt.NDArray[Any], sky: Sequence[float] | None, *, confidence: float, seed: int
) -> Estimate:
    if sky is None:
        return share_with_interval(int(is_right.sum()), len(is_right), confidence=confidence)
    right = np.bincount(classes, weights=is_right)
    counts, shares = np.bincount(classes), np.asarray(sky) / np.sum(sky)
    posterior = np.random.default_rng(seed).beta(right + 0.5, counts - right + 0.5, (POSTERIOR_DRAWS, len(shares)))
    return interval_of_draws(float(shares @ (right / counts)), posterior @ shares, confidence=confidence)


def _check_sky(label_names: Sequence[str], sky: Sequence[float]) -> None:
    wrong = [f"{share} of {name!r}" for name, share in zip(label_names, sky, strict=True) if not 0 < share < 1]
    if wrong:
        raise ValueError(f"sky_prevalence has {', '.join(wrong)}; give each label a share between 0 and 1.")


def _weights(classes: npt.NDArray[Any], number: int, sky: Sequence[float] | None, *, is_single: bool) -> Floats:
    if sky is None or is_single:
        return class_weights_for(classes, sky)
    return class_weights_for(classes, [1 - sky[number], sky[number]])


@dataclass(frozen=True)
class _Label:
    """One label's probabilities and truth."""

    probability: Floats
    has_label: Booleans
    weights: Floats
    is_weighted: bool

    def score(
        self,
        classes: npt.NDArray[Any],
        purity: float,
        completeness: float,
        *,
        confidence: float,
        draws: int,
        seed: int,
    ) -> dict[str, Estimate]:
        def scores_of(weights: Floats) -> dict[str, float]:
            return self._curve_scores(weights, purity, completeness) | self._losses(weights)

        estimates = bootstrap_estimates(scores_of, classes, self.weights, confidence=confidence, draws=draws, seed=seed)
        with_ends, of_curve = self._with_ends(classes), self._curve_scores(self.weights, purity, completeness)
        drawn = (
            with_ends._curve_scores(own, purity, completeness)
            for own in draw_with_ends(classes, self.weights, draws=draws, seed=seed)
        )
        unseen = estimates_of_draws(of_curve, drawn, classes, confidence=confidence)
        estimates |= {name: hull(estimates[name], own) for name, own in unseen.items()}
        if self._heaviest() > HEAVIEST_GALAXY:
            estimates[BRIER_SCORE] = Estimate(estimates[BRIER_SCORE].value, np.nan, np.nan)
        error = expected_calibration_error(self.probability, self.has_label, weights=self.weights)
        estimates[CALIBRATION_ERROR] = Estimate(error, np.nan, np.nan)
        if not self.is_weighted:
            chance = calibration_error_by_chance(self.probability, seed=seed)
            estimates[CALIBRATION_ERROR_BY_CHANCE] = Estimate(chance, np.nan, np.nan)
        return estimates

    def _with_ends(self, classes: npt.NDArray[Any]) -> "_Label":
        """With the galaxies that `draw_with_ends` adds, which no threshold selects, or any."""
        _, first = np.unique(classes, return_index=True)
        probability = np.append(self.probability, np.tile([0.0, 1.0], len(first)))
        return replace(
            self, probability=probability, has_label=np.append(self.has_label, np.repeat(self.has_label[first], 2))
        )

    def _heaviest(self) -> float:
        """The largest share that one galaxy, with the label or without, weighs of all of the other kind together."""
        with_label, without = self.weights[self.has_label], self.weights[~self.has_label]
        return float(max(without.max() / with_label.sum(), with_label.max() / without.sum()))

    def _curve_scores(self, weights: Floats, purity: float, completeness: float) -> dict[str, float]:
        curve = selection_curve(self.probability, self.has_label, weights=weights)
        pure, complete = curve.purity >= purity - 1e-12, curve.completeness >= completeness - 1e-12
        return {
            "roc_auc": curve.roc_auc,
            "average_precision": curve.average_precision,
            f"completeness_at_purity_{purity:g}": float(curve.completeness[pure].max(initial=0.0)),
            f"purity_at_completeness_{completeness:g}": float(curve.purity[complete].max()),
        }

    def _losses(self, weights: Floats) -> dict[str, float]:
        of_label = np.where(self.has_label, self.probability, 1 - self.probability)
        return {
            "log_loss": float(-np.average(np.log(np.clip(of_label, SMALLEST_PROBABILITY, 1)), weights=weights)),
            BRIER_SCORE: float(np.average((self.probability - self.has_label) ** 2, weights=weights)),
        }
