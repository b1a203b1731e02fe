"""What the stages of a run gave, and the folder that is made of it."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, DatasetDict

from zoobot_hf.data.catalog import write_catalog
from zoobot_hf.data.dataset import HUB_IDENTIFIER
from zoobot_hf.evaluation.intervals import CONFIDENCE
from zoobot_hf.evaluation.judgement import Judgement, sky_of_label
from zoobot_hf.evaluation.metrics import SINGLE_LABEL, metrics_for, truth_of_label
from zoobot_hf.evaluation.scores import LABELLED_GALAXIES, Scores
from zoobot_hf.evaluation.selection import Selection
from zoobot_hf.evaluation.tables import judged_table, prediction_table
from zoobot_hf.evaluation.vote_metrics import score_votes
from zoobot_hf.models.heads import probabilities_from_logits
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from zoobot_hf.models.modeling_zoobot import ModelWithHead
from zoobot_hf.publishing.hub import METRICS, MODEL_CARD, PREDICTIONS
from zoobot_hf.publishing.model_card import (
    ModelCardFacts,
    OutOfFoldFacts,
    StageFacts,
    render_model_card,
    share_to_show,
)
from zoobot_hf.publishing.run_folder import JudgedLabel, JudgedVotes, draw_figures, save_model, write_json

from .cross_validation import CrossValidation
from .reading import Pictures
from .stages import StageResult
from .vote_report import judged_votes, read_observed_votes, remarks_on_votes, vote_tables

logger = logging.getLogger(__name__)

TEST_GALAXIES, GALAXIES_OUT_OF_FOLD = "test galaxies", "galaxies out of fold"
OF_FOLDS = "of the {folds} folds, each trained on fewer galaxies than the model here"
LIMITS = (
    "The scores are those of galaxies like the ones it was trained on. With images of another survey, other bands, "
    "depth or seeing, it was not measured.",
)


class Finetuned(NamedTuple):
    """A finetuned model and how it got there.

    Attributes:
        model: With the weights of the better stage.
        stages: The stages that were run, in order.
        kept_stage: Name of the stage with the lower validation loss.
        output_dir: The folder that is ready for the Hub.
        test_metrics: By stage, of the test galaxies as they are; of calibrated probabilities for their own prevalence.
            Of a decision tree as `score_votes` has them. Empty where the galaxies were judged out of fold.
        judgements: By stage, calibration, threshold and scores with intervals; for classes alone. Out of fold, of the
            kept stage alone.
        out_of_fold_metrics: Those of predictions out of fold in place of test metrics; None without them.
    """

    model: ModelWithHead
    stages: list[StageResult]
    kept_stage: str
    output_dir: Path
    test_metrics: dict[str, dict[str, Any]]
    judgements: dict[str, Judgement]
    out_of_fold_metrics: dict[str, Any] | None = None

    @property
    def kept(self) -> StageResult:
        """The stage that was kept."""
        return next(stage for stage in self.stages if stage.name == self.kept_stage)

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """By stage, of the test galaxies, or of the kept stage out of fold."""
        return self.test_metrics if self.out_of_fold_metrics is None else {self.kept_stage: self.out_of_fold_metrics}


def write_run(
    finetuned: Finetuned,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    *,
    judged: Dataset,
    out_of_fold: CrossValidation | None,
    counts: Mapping[str, Mapping[str, int]],
    dataset_name: str | None,
    cuts: Mapping[str, int],
    license_name: str | None,
) -> None:
    """Writes model, processor, card, metrics, tables of predictions and figures to the run's folder.

    Args:
        finetuned: The model with the kept stage's weights and calibration, and how it got there.
        processor: Its image processor.
        dataset: The splits that it was trained on.
        judged: The galaxies that the scores are of: the test split, or in the order of `out_of_fold` all galaxies.
        out_of_fold: What models of folds said of them; None where the model itself predicted a test split.
        counts: Galaxies by split and label, before balancing.
        dataset_name: As in `finetune`.
        cuts: As in `finetune`.
        license_name: As in `finetune`.
    """
    model, stages, kept, judgements = finetuned.model, finetuned.stages, finetuned.kept, finetuned.judgements
    folder, judgement, metrics = finetuned.output_dir, judgements.get(kept.name), finetuned.metrics
    config = model.config
    encoder = config.encoder_name or config.encoder_config.model_type
    dataset_id = _hub_id(dataset_name)
    save_model(folder, model, processor)
    tables = _test_tables(model, kept, judged, judgement) if out_of_fold is None else {PREDICTIONS: out_of_fold.table}
    for name, table in tables.items():
        write_catalog(table, folder / name)
    write_json(folder / METRICS, _metrics_file(finetuned, out_of_fold))
    figures = draw_figures(
        folder,
        histories={stage.name: stage.history for stage in stages},
        kept_stage=kept.name,
        kept_epoch=kept.kept_epoch,
        metrics=metrics[kept.name],
        label_names=config.label_names,
        images=Pictures(judged, processor),
        judged=_judged_table(model, judgement, judged),
        judged_labels=_judged_labels(model, judgement, judged),
        judged_votes=_judged_votes(model, kept, judged),
        whose=TEST_GALAXIES if out_of_fold is None else GALAXIES_OUT_OF_FOLD,
    )
    facts = ModelCardFacts(
        model_name=folder.resolve().name,
        encoder=encoder,
        base_model=_hub_id(model.name_or_path) or _hub_id(encoder),
        license=license_name,
        limits=LIMITS,
        labels=config.label_names,
        problem_type=config.problem_type,
        decision_tree=config.decision_tree,
        questions=metrics[kept.name].get("questions", {}),
        image_size=processor.pixels,
        stages=[_stage_facts(stage, judgements, finetuned.test_metrics) for stage in stages],
        kept_stage=kept.name,
        out_of_fold=None
        if out_of_fold is None
        else OutOfFoldFacts(
            folds=out_of_fold.folds["fold"].nunique(),
            galaxies=len(judged),
            metrics=metrics[kept.name],
            scores=_scores_by_population(judgement, GALAXIES_OUT_OF_FOLD),
        ),
        confidence=CONFIDENCE,
        temperature=config.calibration_temperature if judgement else None,
        shift=config.calibration_shift if judgement else None,
        predictions_for=config.predictions_for if judgement else None,
        selections={name: _selection_facts(selection) for name, selection in judgement.selections.items()}
        if judgement
        else {},
        remarks=_remarks(model, judgement, dataset),
        dataset_name=dataset_name,
        dataset_ids=[dataset_id] if dataset_id else (),
        counts=counts,
        cuts=cuts,
        training_prevalence=config.training_prevalence or {},
        sky_prevalence=config.sky_prevalence or {},
        seeds={stage.name: stage.settings["seed"] for stage in stages},
        versions={name: version(name) for name in ("zoobot-hf", "torch", "transformers", "datasets")},
        device=str(model.device),
        training_seconds=sum(stage.seconds for stage in stages),
        figures=figures,
        simulated=dataset_name == "simulated",
    )
    (folder / MODEL_CARD).write_text(render_model_card(facts), encoding="utf-8")


def metrics_of(
    model: ModelWithHead, stage: StageResult, judgement: Judgement | None, judged: Dataset
) -> dict[str, Any]:
    """The metrics on the test galaxies, or on galaxies out of fold, as they are.

    They are those of calibrated probabilities, of a regression's values, or of votes: see `score_votes`.

    Args:
        model: The model.
        stage: What the stage gave.
        judgement: Of this stage; None where there are no classes.
        judged: The galaxies.
    """
    if isinstance(model, ZoobotForGalaxyZoo):
        return dict(score_votes(stage.test_outputs, read_observed_votes(judged, model), model.config.decision_tree))
    predictions = np.asarray(stage.test_outputs) if judgement is None else judgement.probabilities_as_labelled
    metrics = metrics_for(model.config.problem_type, include_confusion=judgement is not None)
    results: dict[str, Any] = metrics.compute(predictions=predictions, references=np.asarray(judged["label"]))
    return results


def _hub_id(name: str | None) -> str | None:
    """The name where it is one on the Hub, with an owner; a path is nobody's business but the user's own."""
    return name if name and HUB_IDENTIFIER.fullmatch(name) and not Path(name).exists() else None


def _metrics_file(finetuned: Finetuned, out_of_fold: CrossValidation | None) -> dict[str, Any]:
    """By stage what was fitted and measured; what was measured out of fold has a place of its own."""
    kept_stage = finetuned.kept_stage
    fitted: dict[str, Any] = {stage.name: {"validation_loss": stage.validation_loss} for stage in finetuned.stages}
    measured: dict[str, Any] = {name: dict(values) for name, values in finetuned.metrics.items()}
    for name, judgement in finetuned.judgements.items():
        fitted[name] |= {
            "calibration": judgement.calibration and vars(judgement.calibration),
            "remarks": judgement.remarks,
        }
        measured[name] |= {
            "scores": [scores.to_dict() for scores in judgement.scores],
            "selections": {label: selection.to_dict() for label, selection in judgement.selections.items()},
        }
    if out_of_fold is None:
        return {**{name: {**measured[name], **fitted[name]} for name in fitted}, "kept_stage": kept_stage}
    folds = out_of_fold.folds["fold"].nunique()
    about = {"galaxies": len(out_of_fold.table), "folds": folds, "models": OF_FOLDS.format(folds=folds)}
    return {**fitted, "kept_stage": kept_stage, "out_of_fold": {**about, **measured[kept_stage]}}


def _stage_facts(
    stage: StageResult, judgements: Mapping[str, Judgement], test_metrics: Mapping[str, Mapping[str, Any]]
) -> StageFacts:
    """With the scores of the test split, where there is one."""
    facts = StageFacts(name=stage.name, hyperparameters=stage.settings)
    if stage.name not in test_metrics:
        return facts
    scores = _scores_by_population(judgements.get(stage.name), TEST_GALAXIES)
    return replace(facts, metrics=test_metrics[stage.name], scores=scores)


def _scores_by_population(judgement: Judgement | None, whose: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """A table of scores for each population and label, by a heading in words.

    Two labels of which a galaxy has one share a table. Of more labels, the scores over all have a table of their own.
    """
    tables: dict[str, dict[str, tuple[float, float, float]]] = {}
    for scores in _different_populations(judgement.scores) if judgement else ():
        place = f"{whose} as they are" if scores.population == LABELLED_GALAXIES else "expected in the sky"
        are_two = len(scores.prevalence) == 2
        if scores.overall and not are_two:
            tables[f"{place}, all labels together"] = dict(scores.overall)
        for label, own in scores.labels.items():
            heading = f"{place}, where {share_to_show(scores.prevalence[label])} are {label}"
            tables[heading] = {**scores.overall, **own} if are_two else dict(own)
    return tables


def _different_populations(scores: list[Scores]) -> list[Scores]:
    """The scores as labelled, and those in the sky where a share is another by a tenth of itself: 1% is not 0.2%."""
    first, rest = scores[:1], scores[1:]
    return first + [
        own
        for own in rest
        if any(
            not math.isclose(share, first[0].prevalence[name], rel_tol=0.1) for name, share in own.prevalence.items()
        )
    ]


def _selection_facts(selection: Selection) -> dict[str, Any]:
    return {
        "aim": selection.aim,
        "threshold": selection.threshold,
        "prevalence": selection.prevalence,
        **{name: tuple(getattr(selection, name)) for name in ("completeness", "purity", "f1")},
    }


def _judged_labels(model: ModelWithHead, judgement: Judgement | None, test: Dataset) -> list[JudgedLabel]:
    """What the figures about a label's probabilities need, for each label that has a threshold."""
    config = model.config
    labels, judged = np.asarray(test["label"]), []
    for name, selection in judgement.selections.items() if judgement else ():
        number = config.label_names.index(name)
        known, has_label = truth_of_label(labels, number, config.problem_type)
        assert judgement is not None
        judged.append(
            JudgedLabel(
                name,
                judgement.probabilities_as_labelled[known, number],
                judgement.probabilities[known, number],
                has_label,
                selection,
                sky_of_label(labels, number, config),
            )
        )
    return judged


def _remarks(model: ModelWithHead, judgement: Judgement | None, dataset: DatasetDict) -> list[str]:
    if isinstance(model, ZoobotForGalaxyZoo):
        remarks = remarks_on_votes(dataset, model)
        for remark in remarks:
            logger.warning(remark)
        return remarks
    return judgement.remarks if judgement else []


def _judged_votes(model: ModelWithHead, stage: StageResult, test: Dataset) -> JudgedVotes | None:
    return judged_votes(stage.test_outputs, test, model) if isinstance(model, ZoobotForGalaxyZoo) else None


def _test_tables(
    model: ModelWithHead, stage: StageResult, test: Dataset, judgement: Judgement | None
) -> dict[str, pd.DataFrame]:
    """By the name of its file, each table of the test galaxies."""
    if isinstance(model, ZoobotForGalaxyZoo):
        return vote_tables(stage.test_outputs, test, model)
    return {PREDICTIONS: _test_predictions(model, stage, test, judgement)}


def _test_predictions(
    model: ModelWithHead, stage: StageResult, test: Dataset, judgement: Judgement | None
) -> pd.DataFrame:
    if judgement is not None:
        return _table_of(model, test, judgement.probabilities)
    logits = torch.tensor(stage.test_outputs, dtype=torch.float32)
    return _table_of(model, test, probabilities_from_logits(logits, model.config).numpy())


def _judged_table(model: ModelWithHead, judgement: Judgement | None, test: Dataset) -> pd.DataFrame | None:
    """The table with the probabilities for the test galaxies as they are; None where no galaxy has a single label."""
    if judgement is None or model.config.problem_type != SINGLE_LABEL:
        return None
    return _table_of(model, test, judgement.probabilities_as_labelled)


def _table_of(model: ModelWithHead, test: Dataset, predictions: npt.NDArray[np.floating[Any]]) -> pd.DataFrame:
    config, identifiers = model.config, test["id_str"][:]
    if config.problem_type == SINGLE_LABEL:
        return judged_table(identifiers, predictions, test["label"], label_names=config.label_names)
    return prediction_table(identifiers, predictions, label_names=config.label_names, problem_type=config.problem_type)


def count_labels(dataset: DatasetDict) -> dict[str, dict[str, int]]:
    """Galaxies by split and label; without a class label, by split alone.

    Args:
        dataset: Splits with `label`.
    """
    counts = {}
    for name, split in dataset.items():
        feature = split.features["label"]
        if isinstance(feature, ClassLabel):
            numbers = np.bincount(split["label"], minlength=len(feature.names))
            counts[name] = dict(zip(feature.names, numbers.tolist(), strict=True))
        else:
            counts[name] = {"galaxies": len(split)}
    return counts
