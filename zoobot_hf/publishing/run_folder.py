"""The folder of a finished run, ready for the Hub, from plain values."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from zoobot_hf.evaluation.plots import plot_confusion, plot_most_wrong, plot_training_curves
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification

from .hub import FIGURES, METRICS, MODEL_CARD
from .model_card import ModelCardFacts, StageFacts, render_model_card


def save_model(folder: Path, model: ZoobotForImageClassification, processor: ZoobotImageProcessor) -> None:
    """Writes model and processor; nothing else is needed to load them.

    Args:
        folder: Made where it isn't there.
        model: The finetuned model.
        processor: Its image processor.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_stage(
    folder: Path,
    model: ZoobotForImageClassification,
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
    test_metrics: Mapping[str, Any],
    label_names: Sequence[str],
    images: Sequence[Image.Image],
    judged: pd.DataFrame | None,
) -> dict[str, str]:
    """The caption of each figure by its path relative to the folder, after drawing them.

    Args:
        folder: The run's folder.
        histories: `TrainerState.log_history` by stage.
        kept_stage: The stage whose weights were kept.
        kept_epoch: Their epoch, counted from the stage's start.
        test_metrics: Of the kept weights, with `confusion` for a single label.
        label_names: In the order of the logits.
        images: The test galaxies' images, in the table's order.
        judged: As `plot_most_wrong` takes it; None for problems that have no single true label.
    """
    captions = {f"{FIGURES}/training_curves.png": "Loss and scores by epoch; the kept epoch is marked."}
    plot_training_curves(
        histories, folder / FIGURES / "training_curves.png", kept_stage=kept_stage, kept_epoch=kept_epoch
    )
    if judged is not None:
        captions[f"{FIGURES}/confusion.png"] = "True and predicted labels of the test galaxies."
        plot_confusion(test_metrics["confusion"], label_names, folder / FIGURES / "confusion.png")
        captions[f"{FIGURES}/most_wrong.png"] = "The test galaxies that the model got most wrong, the worst first."
        plot_most_wrong(images, judged, folder / FIGURES / "most_wrong.png")
    return captions


def write_json(path: Path, values: Any) -> None:
    """Writes values as JSON, at once or not at all; NaN becomes null.

    Args:
        path: The file.
        values: Nested dictionaries, lists, texts and numbers.
    """
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _without_nan(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _without_nan(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
