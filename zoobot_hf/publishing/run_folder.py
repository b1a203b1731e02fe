"""The folder of a finished run, ready for the Hub, from plain values."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import pandas as pd
from PIL import Image

from zoobot_hf.data.catalog import whole_file
from zoobot_hf.evaluation.plots import plot_confusion, plot_most_wrong, plot_training_curves
from zoobot_hf.evaluation.probability_plots import (
    plot_completeness_and_purity,
    plot_reliability,
    plot_roc_and_precision_recall,
)
from zoobot_hf.evaluation.selection import Selection
from zoobot_hf.evaluation.tables import number_repeats
from zoobot_hf.evaluation.vote_plots import plot_vote_fractions
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotPreTrainedModel

from .hub import FIGURES, METRICS, MODEL_CARD
from .model_card import ModelCardFacts, StageFacts, render_model_card, share_to_show

# Unsaid, the gap between the two looks like overfitting or its opposite. Without a grid of heads, one head is both.
FROZEN_LOSSES = (
    " In the frozen stage the training loss is the mean over all heads that were tried, with the augmentation if there "
    "was any; the validation loss is that of the best head."
)


class JudgedLabel(NamedTuple):
    """A label's probabilities and truth, for the figures.

    Attributes:
        name: The label's.
        as_labelled: Its probabilities for the prevalence of the judged galaxies, 0-1, (n,).
        probability: Its probabilities as the model gives them to a survey, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        selection: What its threshold selects of them.
        sky: The sky that `probability` is for, as `choose_threshold` takes it: `prevalence`, and `classes` where there
            are three or more.
    """

    name: str
    as_labelled: npt.NDArray[Any]
    probability: npt.NDArray[Any]
    has_label: npt.NDArray[Any]
    selection: Selection
    sky: Mapping[str, Any]


class JudgedVotes(NamedTuple):
    """What a model says of the answers to a decision tree, and what volunteers said, for the figure.

    Attributes:
        concentrations: (galaxies, answers).
        votes: Counts, (galaxies, answers), NaN where they are missing.
        decision_tree: As plain values.
        least_votes: How many votes on a question a galaxy needs to be drawn.
    """

    concentrations: npt.NDArray[Any]
    votes: npt.NDArray[Any]
    decision_tree: dict[str, Any]
    least_votes: int


def save_model(folder: Path, model: ZoobotPreTrainedModel, processor: ZoobotImageProcessor) -> None:
    """Writes model and processor; nothing else is needed to load them. A card that lies there is deleted.

    Args:
        folder: Made where it isn't there.
        model: The finetuned model.
        processor: Its image processor.
    """
    (folder / MODEL_CARD).unlink(missing_ok=True)  # of other weights: without a card, a push refuses the folder
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_stage(
    folder: Path,
    model: ZoobotPreTrainedModel,
    processor: ZoobotImageProcessor,
    *,
    stage: StageFacts,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Writes all that a push needs of a single stage: model, processor, card, and scores on the validation split.

    Args:
        folder: Made where it isn't there.
        model: The trained model.
        processor: Its image processor.
        stage: Name and settings of the stage; it has no metrics of a test split.
        history: `TrainerState.log_history`.
    """
    save_model(folder, model, processor)
    evaluations = [record for record in history if "eval_loss" in record]
    write_json(folder / METRICS, {stage.name: {"evaluations": evaluations}})
    config = model.config
    facts = ModelCardFacts(
        model_name=folder.resolve().name,
        encoder=config.encoder_name or config.encoder_config.model_type,
        labels=config.label_names,
        problem_type=config.problem_type,
        decision_tree=config.decision_tree,
        image_size=processor.pixels,
        stages=[stage],
        kept_stage=stage.name,
    )
    (folder / MODEL_CARD).write_text(render_model_card(facts), encoding="utf-8")


def draw_figures(
    folder: Path,
    *,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    kept_stage: str,
    kept_epoch: float,
    metrics: Mapping[str, Any],
    label_names: Sequence[str],
    images: Sequence[Image.Image],
    judged: pd.DataFrame | None,
    judged_labels: Sequence[JudgedLabel] = (),
    judged_votes: JudgedVotes | None = None,
    whose: str = "test galaxies",
) -> dict[str, str]:
    """The caption of each figure by its path relative to the folder, after drawing them.

    Args:
        folder: The run's folder.
        histories: `TrainerState.log_history` by stage.
        kept_stage: The stage whose weights were kept.
        kept_epoch: Their epoch, counted from the stage's start.
        metrics: Of the judged galaxies, with `confusion` for a single label.
        label_names: In the order of the logits.
        images: Of the judged galaxies, in the table's order.
        judged: As `plot_most_wrong` takes it, whose figure is left out where no galaxy is wrong; None for problems that
            have no single true label.
        judged_labels: The labels whose probabilities are drawn.
        judged_votes: The votes that are drawn; None for a model without a decision tree.
        whose: The judged galaxies in words.
    """
    has_scores = any("eval_accuracy" in record for history in histories.values() for record in history)
    drawn = "Loss and scores" if has_scores else "Loss"
    curves = f"{drawn} by epoch; the kept epoch is marked.{FROZEN_LOSSES if 'frozen' in histories else ''}"
    captions = {f"{FIGURES}/training_curves.png": curves}
    plot_training_curves(
        histories, folder / FIGURES / "training_curves.png", kept_stage=kept_stage, kept_epoch=kept_epoch
    )
    if judged is not None:
        captions[f"{FIGURES}/confusion.png"] = f"True and predicted labels of the {whose}."
        plot_confusion(metrics["confusion"], label_names, folder / FIGURES / "confusion.png")
        if (judged["label"] != judged["predicted_label"]).any():
            captions[f"{FIGURES}/most_wrong.png"] = f"The {whose} that were predicted most wrongly, the worst first."
            plot_most_wrong(images, judged, folder / FIGURES / "most_wrong.png")
    if judged_votes is not None:
        path = f"{FIGURES}/vote_fractions.png"
        plot_vote_fractions(
            judged_votes.concentrations,
            judged_votes.votes,
            judged_votes.decision_tree,
            folder / path,
            least_votes=judged_votes.least_votes,
        )
        captions[path] = (
            "Expected and observed vote fractions of the test galaxies, a panel for each question. On the diagonal, "
            f"expectations are right on average. Galaxies with at least {judged_votes.least_votes} votes on it."
        )
    # "z<1" and "z>1" have the same letters and numbers.
    names = number_repeats([slug(label.name) for label in judged_labels])
    for name, label in zip(names, judged_labels, strict=True):
        ending = f"_{name}" if len(judged_labels) > 1 else ""
        captions |= _draw_probabilities(folder, label, ending=ending, whose=whose)
    return captions


def _draw_probabilities(folder: Path, label: JudgedLabel, *, ending: str, whose: str) -> dict[str, str]:
    reliability, selection, ranking = (
        f"{FIGURES}/{name}{ending}.png" for name in ("reliability", "completeness_and_purity", "roc")
    )
    plot_reliability(
        label.as_labelled,
        label.has_label,
        folder / reliability,
        label=label.name,
        population=f"{whose} as they are",
    )
    share = label.selection.prevalence
    plot_completeness_and_purity(
        label.probability,
        label.has_label,
        folder / selection,
        label=label.name,
        selection=label.selection,
        **label.sky,
    )
    plot_roc_and_precision_recall(label.probability, label.has_label, folder / ranking, label=label.name, **label.sky)
    return {
        reliability: f"Share of {label.name!r} found at each probability, among the {whose} as they are.",
        selection: f"Completeness and purity of galaxies selected as {label.name!r}, where {share_to_show(share)} are.",
        ranking: f"ROC, and purity against completeness where {share_to_show(share)} are {label.name!r}.",
    }


def slug(name: str) -> str:
    """A label's name as a part of a file's name.

    Args:
        name: The label's.
    """
    return re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_")


def write_json(path: Path, values: Any) -> None:
    """Writes values as JSON, at once or not at all; NaN becomes null.

    Args:
        path: The file.
        values: Nested dictionaries, lists, texts and numbers.
    """
    with whole_file(path) as partial:
        partial.write_text(json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _without_nan(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _without_nan(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
