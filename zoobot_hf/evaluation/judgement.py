"""What a trained head is worth: its calibration, its threshold and its scores.

All of it comes from galaxies that a head was not trained on. The calibration and the threshold are fitted on validation
galaxies, and the scores are those of test galaxies, or of predictions out of fold.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zoobot_hf.models.configuration_zoobot import ZoobotConfig
from zoobot_hf.models.heads import (
    calibrate_logits,
    effective_training_prevalence,
    prevalence_shift,
    probabilities_from_logits,
)

from .calibration import SMALLEST_PROBABILITY, Calibration, fit_calibration, probabilities_at_prevalence
from .metrics import SINGLE_LABEL, scored_labels, truth_of_label
from .scores import Scores, score_probabilities
from .selection import Selection, choose_threshold, measure_selection

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[Any]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Judgement:
    """What a trained head is worth.

    Attributes:
        fields: What the model's configuration gets, so that the model gives calibrated probabilities for the sky.
        calibration: None where the validation galaxies don't allow one.
        probabilities: Of the test galaxies, as the model then gives them, (n, labels); or out of fold, of all galaxies.
        probabilities_as_labelled: The same for galaxies with these galaxies' own prevalence.
        scores: Of these galaxies as they are and, where the sky's prevalence is known, as expected in the sky.
        selections: What the threshold of each label selects among them, at the sky's prevalence; out of fold, among
            those outside the validation split.
        remarks: What could not be done and why, a sentence each.
    """

    fields: dict[str, Any]
    calibration: Calibration | None
    probabilities: Floats
    probabilities_as_labelled: Floats
    scores: list[Scores]
    selections: dict[str, Selection]
    remarks: list[str]


def judge(
    config: ZoobotConfig,
    *,
    validation_logits: npt.ArrayLike,
    validation_labels: npt.ArrayLike,
    test_logits: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    aim: str = "f1",
    at_least: float | None = None,
) -> Judgement:
    """The calibration, the threshold and the scores of a trained head.

    What can't be measured on these galaxies, because a class is missing or the aim can't be met, is left out, and a
    remark says why: training is over by now, and its result is not to be lost.

    Args:
        config: The model's configuration; its calibration is not looked at. Predictions are for the sky where it has
            both prevalences.
        validation_logits: The head's own, (m, labels), before softmax.
        validation_labels: Class numbers (m,), or 0, 1 and NaN where it is not known (m, labels).
        test_logits: The head's own, (n, labels).
        test_labels: As `validation_labels`, (n,) or (n, labels).
        aim: What the threshold is for: "purity", "completeness" or "f1" (the best there is).
        at_least: The purity or completeness to be reached at the sky's prevalence, 0-1; not for f1.

    Raises:
        ValueError: A problem type without classes, or prevalences that don't fit the labels.
    """
    judge = _Judge(copy.deepcopy(config))
    calibration = judge.calibrate(np.asarray(validation_logits), np.asarray(validation_labels))
    judge.choose_thresholds(np.asarray(validation_logits), np.asarray(validation_labels), aim, at_least)
    return judge.measure(judge.probabilities(np.asarray(test_logits)), np.asarray(test_labels), calibration)


def judge_out_of_fold(
    config: ZoobotConfig,
    *,
    validation_logits: npt.ArrayLike,
    validation_labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    is_validation: npt.ArrayLike,
    aim: str = "f1",
    at_least: float | None = None,
) -> Judgement:
    """The calibration and the threshold of a trained head, and the scores of models of folds in its place.

    The threshold is the head's own, chosen on its validation galaxies. What it selects is measured on the predictions
    out of fold of the other galaxies, which had no part in the choice.

    Args:
        config: The model's configuration, with both prevalences; its calibration is not looked at.
        validation_logits: As in `judge`.
        validation_labels: As in `judge`.
        probabilities: Of all galaxies, each from a model that was not trained on it, calibrated and for the sky's
            prevalence, 0-1, (n, labels).
        labels: Of the same galaxies, class numbers (n,).
        is_validation: Whether each of them is in the validation split, (n,).
        aim: As in `judge`.
        at_least: As in `judge`.

    Raises:
        ValueError: As in `judge`.
    """
    judge = _Judge(copy.deepcopy(config))
    calibration = judge.calibrate(np.asarray(validation_logits), np.asarray(validation_labels))
    judge.choose_thresholds(np.asarray(validation_logits), np.asarray(validation_labels), aim, at_least)
    given = np.asarray(probabilities, dtype=np.float64)
    return judge.measure(given, np.asarray(labels), calibration, is_selectable=~np.asarray(is_validation, dtype=bool))


class _Judge:
    """A configuration that is filled in step by step, and remarks on what could not be."""

    def __init__(self, config: ZoobotConfig) -> None:
        config.forget_calibration()
        self.config = config
        self.scored = scored_labels(config.num_labels, config.problem_type)
        self.remarks: list[str] = []
        self.sky: list[float] | None = None
        self.assumed: list[float] | None = None
        if config.training_prevalence is not None:
            self.assumed = effective_training_prevalence(config)

    def calibrate(self, logits: Floats, labels: Labels) -> Calibration | None:
        calibration, lacking = None, self.labels_without_contrast(labels)
        if lacking:
            consequence = f"The probabilities are not calibrated, and no threshold selects {', '.join(lacking)}"
            self.remark(consequence, whose="validation galaxies")
        else:
            calibration = calibrate_head(logits, labels, self.config)
            for name, value in calibration.config_fields().items():
                setattr(self.config, name, value)
        if self.assumed is not None and self.config.sky_prevalence is not None:
            self.config.predictions_for = "sky"
            self.sky = self.assumed = [self.config.sky_prevalence[name] for name in self.config.label_names]
        return calibration

    def probabilities(self, logits: Floats) -> Floats:
        outputs = calibrate_logits(torch.tensor(logits, dtype=torch.float32), self.config)
        return np.asarray(probabilities_from_logits(outputs, self.config).double().numpy())

    def choose_thresholds(self, logits: Floats, labels: Labels, aim: str, at_least: float | None) -> None:
        given, thresholds = self.probabilities(logits), {}
        lacking = self.labels_without_contrast(labels)
        if self.cannot_stand_for_the_sky(lacking):
            self.remark(
                f"There are no thresholds for the sky, which has {', '.join(lacking)}", whose="validation galaxies"
            )
            return
        for number in self.scored:
            name = self.config.label_names[number]
            if name in lacking:
                continue
            known, has_label = truth_of_label(labels, number, self.config.problem_type)
            try:
                selection = choose_threshold(
                    given[known, number],
                    has_label,
                    aim=aim,
                    at_least=at_least,
                    **sky_of_label(labels, number, self.config),
                )
            except ValueError as error:
                self.remarks.append(f"No threshold selects {name!r}: {error}")
            else:
                thresholds[name] = selection.threshold
                self.config.decision_aim = selection.aim
        self.config.decision_threshold = thresholds or None

    def measure(
        self,
        given: Floats,
        labels: Labels,
        calibration: Calibration | None,
        *,
        is_selectable: Booleans | None = None,
    ) -> Judgement:
        selectable = slice(None) if is_selectable is None else is_selectable
        whose = "test galaxies" if is_selectable is None else "galaxies out of fold"
        as_labelled = self._as_labelled(given, labels)
        names = ("calibration_temperature", "calibration_shift", "predictions_for", "decision_threshold")
        return Judgement(
            fields={name: getattr(self.config, name) for name in (*names, "decision_aim")},
            calibration=calibration,
            probabilities=given,
            probabilities_as_labelled=as_labelled,
            scores=[
                *self._score(as_labelled, labels, None, whose=whose),
                *(self._score(given, labels, self.sky, whose=whose) if self.sky else []),
            ],
            selections=self._measure_selections(given[selectable], labels[selectable], whose=whose),
            remarks=self.remarks,
        )

    def labels_without_contrast(self, labels: Labels) -> list[str]:
        """The labels that all of these galaxies have, or none: nothing can be fitted to them or measured of them."""
        names, problem_type = self.config.label_names, self.config.problem_type
        truths = {names[number]: truth_of_label(labels, number, problem_type)[1] for number in self.scored}
        return [name for name, has_label in truths.items() if len(np.unique(has_label)) < 2]

    def cannot_stand_for_the_sky(self, lacking: list[str]) -> bool:
        """Whether three or more classes lack galaxies of some: no weight gives these their share of the sky."""
        is_one_of_several = self.config.problem_type == SINGLE_LABEL and self.config.num_labels > 2
        return self.sky is not None and is_one_of_several and len(lacking) > 0

    def remark(self, consequence: str, *, whose: str) -> None:
        remark = f"{consequence}: the {whose} need some with and some without it."
        if remark not in self.remarks:
            self.remarks.append(remark)

    def _as_labelled(self, given: Floats, labels: Labels) -> Floats:
        """Probabilities for the prevalence of the galaxies given.

        Those of a label that all or none of the galaxies have are as they are, where a galaxy has several labels.
        """
        shares = np.array(prevalence_of(labels, self.config.problem_type, count=self.config.num_labels))
        is_single = self.config.problem_type == SINGLE_LABEL
        if self.assumed is None or (is_single and shares.max() == 1):  # of one class alone any head knows all
            return given
        if is_single:
            # Not by `probabilities_at_prevalence`: a class without a galaxy here has a share of 0.
            weighted = np.clip(given, SMALLEST_PROBABILITY, None) * shares / self.assumed
            return np.asarray(weighted / weighted.sum(axis=1, keepdims=True))
        shares = np.where((shares > 0) & (shares < 1), shares, self.assumed)
        return probabilities_at_prevalence(
            given,
            assumed_prevalence=self.assumed,
            prevalence=shares.tolist(),
            problem_type=self.config.problem_type,
        )

    def _score(self, given: Floats, labels: Labels, sky: list[float] | None, *, whose: str) -> list[Scores]:
        names, problem_type = self.config.label_names, self.config.problem_type
        lacking = self.labels_without_contrast(labels)
        if lacking:
            self.remark(f"There are no scores of {', '.join(lacking)}", whose=whose)
        if len(lacking) == len(self.scored):
            return []
        if sky and self.cannot_stand_for_the_sky(lacking):
            self.remark(f"There are no scores for the sky, which has {', '.join(lacking)}", whose=whose)
            return []
        return [score_probabilities(given, labels, label_names=names, problem_type=problem_type, sky_prevalence=sky)]

    def _measure_selections(self, given: Floats, labels: Labels, *, whose: str) -> dict[str, Selection]:
        selections, thresholds = {}, self.config.decision_threshold or {}
        lacking = self.labels_without_contrast(labels)
        if thresholds and self.cannot_stand_for_the_sky(lacking):
            self.remark(f"No selection can be measured for the sky, which has {', '.join(lacking)}", whose=whose)
            return {}
        lacking = [name for name in lacking if name in thresholds]
        if lacking:
            self.remark(f"The selections of {', '.join(lacking)} can't be measured", whose=whose)
        for name, threshold in thresholds.items():
            if name in lacking:
                continue
            number = self.config.label_names.index(name)
            known, has_label = truth_of_label(labels, number, self.config.problem_type)
            selection = measure_selection(
                given[known, number], has_label, threshold=threshold, **sky_of_label(labels, number, self.config)
            )
            selections[name] = selection._replace(aim=str(self.config.decision_aim))
        return selections


def sky_of_label(labels: npt.ArrayLike, number: int, config: ZoobotConfig) -> dict[str, Any]:
    """The sky that predictions are for, as `choose_threshold` takes it; nothing where they are for training.

    Args:
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
        number: The label's.
        config: The configuration of the model that has the labels.

    Returns:
        `prevalence` and, of three or more labels of which a galaxy has one, `classes`.
    """
    if config.predictions_for != "sky" or config.sky_prevalence is None:
        return {}
    shares = [config.sky_prevalence[name] for name in config.label_names]
    if config.problem_type == SINGLE_LABEL and len(shares) > 2:
        return {"prevalence": shares, "classes": labels}
    return {"prevalence": shares[number]}


def calibrate_head(logits: npt.ArrayLike, labels: npt.ArrayLike, config: ZoobotConfig) -> Calibration:
    """The calibration of a trained head: a temperature, and a shift too where its labels were smoothed.

    What smoothing does is no matter of scale alone. Of drawn galaxies with 10% rings, an ROC AUC of 0.92 and a
    smoothing of 0.2 the mean probability of a ring is 0.08 with a temperature and 0.10 with a shift as well.

    Args:
        logits: The head's own of validation galaxies, (m, labels), before softmax.
        labels: Class numbers (m,), or 0, 1 and NaN where it is not known (m, labels).
        config: The model's configuration.

    Raises:
        ValueError: As `fit_calibration`.
    """
    return fit_calibration(
        logits,
        labels,
        problem_type=str(config.problem_type),
        method="bias_corrected" if config.label_smoothing else "temperature",
        training_prevalence=None if config.training_prevalence is None else effective_training_prevalence(config),
    )


def prevalence_of(labels: npt.ArrayLike, problem_type: str, *, count: int) -> list[float]:
    """The share of each label among labelled galaxies.

    Args:
        labels: Class numbers (n,), or 0, 1 and NaN where it is not known (n, labels).
        problem_type: "single_label_classification" or "multi_label_classification".
        count: How many labels there are.
    """
    values = np.asarray(labels, dtype=np.float64)
    if problem_type == SINGLE_LABEL:
        return (np.bincount(values.astype(np.int64), minlength=count) / max(len(values), 1)).tolist()
    with np.errstate(invalid="ignore"):  # NaN for a label that is known of no galaxy
        return (np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0)).tolist()


def check_prevalence(given: Mapping[str, float], config: ZoobotConfig) -> dict[str, float]:
    """The shares of all labels; of the labels of which a galaxy has one, one may be left out and is the rest.

    Args:
        given: The share of each label in the sky, by its name, above 0.
        config: The configuration of the model that has the labels.

    Raises:
        ValueError: Shares for other labels, out of range, or, where a galaxy has one label, not adding up to 1.
    """
    shares, names = dict(given), config.label_names
    left_out = [name for name in names if name not in shares]
    if config.problem_type == SINGLE_LABEL and len(left_out) == 1:
        shares[left_out[0]] = 1 - sum(shares.values())
    if set(shares) != set(names):
        raise ValueError(f"sky_prevalence has shares for {', '.join(given)}; give one for each of {', '.join(names)}.")
    prevalence_shift(
        [shares[name] for name in names], [shares[name] for name in names], problem_type=config.problem_type
    )
    return {name: float(shares[name]) for name in names}
