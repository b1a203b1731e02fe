"""finetune(): the frozen stage, then the unfrozen stage, and a folder that is ready for the Hub."""

import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from safetensors.torch import load_model
from transformers.trainer_utils import get_last_checkpoint

from zoobot_hf.data.balance import Strategy, balance_classes, measure_prevalence
from zoobot_hf.data.catalog import write_catalog
from zoobot_hf.data.images import check_images
from zoobot_hf.evaluation.metrics import metrics_for_trainer
from zoobot_hf.evaluation.tables import prediction_table
from zoobot_hf.models.heads import probabilities_from_logits
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification
from zoobot_hf.publishing.hub import METRICS, MODEL_CARD, PREDICTIONS
from zoobot_hf.publishing.model_card import ModelCardFacts, StageFacts, render_model_card
from zoobot_hf.publishing.run_folder import draw_figures, save_model, write_json

from .arguments import FrozenStageArguments, UnfrozenStageArguments
from .machine import tune_memory_allocator
from .trainer import FrozenStageTrainer, UnfrozenStageTrainer, check_labels

logger = logging.getLogger(__name__)

BEST_FOLDER = "best"
RUN_FILE = "run.json"
# What the model card says of a stage.
SHOWN_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "layer_decay",
    "last_blocks",
    "num_train_epochs",
    "per_device_train_batch_size",
    "augment",
    "views",
    "seed",
)
# Arguments that say where and how a run works, not what comes out of it.
MACHINE_ARGUMENTS = (
    "output_dir",
    "logging_dir",
    "report_to",
    "run_name",
    "disable_tqdm",
    "use_cpu",
    "hub_token",
    "embedding_cache_dir",
)


@dataclass
class StageResult:
    """What one stage of finetuning gave.

    Attributes:
        name: "frozen" or "unfrozen".
        history: `TrainerState.log_history`.
        kept_epoch: The epoch of lowest validation loss, counted from the stage's start; its weights were kept.
        validation_loss: Of these weights.
        validation: Metrics of these weights on the validation split.
        test: Metrics of these weights on the test split.
        test_logits: (test galaxies, labels), in the order of the test split, before softmax.
        seconds: How long the stage took.
        settings: The arguments worth knowing, by name.
    """

    name: str
    history: list[dict[str, Any]]
    kept_epoch: float
    validation_loss: float
    validation: dict[str, Any]
    test: dict[str, Any]
    test_logits: list[list[float]]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


class Finetuned(NamedTuple):
    """A finetuned model and how it got there.

    Attributes:
        model: With the weights of the better stage.
        stages: The stages that were run, in order.
        kept_stage: Name of the stage with the lower validation loss.
        output_dir: The folder that is ready for the Hub.
    """

    model: ZoobotForImageClassification
    stages: list[StageResult]
    kept_stage: str
    output_dir: Path


def finetune(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    output_dir: str | Path,
    *,
    frozen: FrozenStageArguments | None = None,
    unfrozen: UnfrozenStageArguments | None = None,
    skip_unfrozen: bool = False,
    balance: Strategy | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dataset_name: str | None = None,
    cuts: Mapping[str, int] | None = None,
) -> Finetuned:
    """The model after the frozen and the unfrozen stage, and a folder with everything about it.

    The unfrozen stage starts from the best weights of the frozen one and is kept only if its validation loss is lower.
    Under `accelerate launch` the processes share the work, and the first one writes.

    Args:
        model: From `from_pretrained`, with the dataset's labels.
        processor: The image processor that suits the encoder.
        dataset: With `train`, `validation` and `test`; each with `id_str`, `image` and `label`.
        output_dir: Gets config.json, model.safetensors, preprocessor_config.json, README.md, metrics.json,
            predictions.parquet and figures/. Checkpoints go to a folder beside it, `<output_dir>-checkpoints`.
        frozen: Arguments of the frozen stage; their `output_dir` is not used.
        unfrozen: Arguments of the unfrozen stage; likewise.
        skip_unfrozen: Whether to end after the frozen stage.
        balance: Whether and how to balance the classes of the training split; the prevalence before is kept in the
            model's configuration as the sky's.
        resume: Whether to go on with a run that was killed in this `output_dir`.
        overwrite: Whether to delete what an earlier run left in this `output_dir`.
        dataset_name: How the model card calls the dataset: a Hub id or a name.
        cuts: How many galaxies each cut removed, for the model card.

    Returns:
        The model, the stages' results, and where everything is.

    Raises:
        FileExistsError: The output folder holds a run, and neither `resume` nor `overwrite` was asked for.
        UnreadableImageError: Some images can't be read.
        ValueError: The dataset's labels aren't the model's, or the run to resume had other data or arguments.
    """
    tune_memory_allocator()
    output_dir = Path(output_dir)
    # Resolved, because "." and ".." have no name that the checkpoints' folder could be called after.
    work_dir = output_dir.resolve().with_name(f"{output_dir.resolve().name}-checkpoints")
    frozen, unfrozen = frozen or FrozenStageArguments(), unfrozen or UnfrozenStageArguments()
    for split in dataset.values():
        check_labels(split, model)
    if not skip_unfrozen and unfrozen.last_blocks is not None:
        model.unfreeze_encoder(unfrozen.last_blocks)  # raises now what it would raise after the frozen stage
    _check_output(output_dir, work_dir, resume=resume, overwrite=overwrite)
    check_images(concatenate_datasets([split.select_columns(["id_str", "image"]) for split in dataset.values()]))
    _claim_output(output_dir, work_dir, delete_first=overwrite)
    _check_same_run(work_dir, _fingerprint(model, processor, dataset, (frozen, unfrozen), balance))
    counts = _count_labels(dataset)
    dataset = _with_prevalence(model, dataset, balance=balance, seed=frozen.seed)

    stages = [_run_stage("frozen", FrozenStageTrainer, model, frozen, processor, dataset, work_dir)]
    if not skip_unfrozen:
        stages.append(_run_stage("unfrozen", UnfrozenStageTrainer, model, unfrozen, processor, dataset, work_dir))
    kept = min(stages, key=lambda stage: stage.validation_loss)
    load_model(model, work_dir / kept.name / BEST_FOLDER / "model.safetensors")
    model.eval()
    logger.info(
        "The %s stage is kept; validation losses: %s.",
        kept.name,
        ", ".join(f"{stage.name} {stage.validation_loss:.4f}" for stage in stages),
    )
    finetuned = Finetuned(model, stages, kept.name, output_dir)
    if PartialState().is_main_process:
        _write_output(finetuned, processor, dataset, counts=counts, dataset_name=dataset_name, cuts=cuts or {})
    PartialState().wait_for_everyone()
    return finetuned


def _run_stage(
    name: str,
    trainer_class: type[FrozenStageTrainer] | type[UnfrozenStageTrainer],
    model: ZoobotForImageClassification,
    arguments: FrozenStageArguments | UnfrozenStageArguments,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    work_dir: Path,
) -> StageResult:
    """One stage, or what is on disk of it: a finished stage is read, an unfinished one goes on."""
    folder = work_dir / name
    finished = folder / "finished.json"
    if finished.is_file():
        load_model(model, folder / BEST_FOLDER / "model.safetensors")
        return StageResult(**json.loads(finished.read_text()))
    arguments = copy.copy(arguments)
    arguments.output_dir = str(folder)
    trainer = trainer_class(
        model,
        arguments,
        processing_class=processor,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        compute_metrics=metrics_for_trainer(model.config.problem_type),
    )
    logger.info("The %s stage: at most %g epochs.", name, arguments.num_train_epochs)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
    result = _measure(name, trainer, dataset, seconds=time.monotonic() - started)
    if PartialState().is_main_process:
        model.save_pretrained(folder / BEST_FOLDER)
        write_json(finished, asdict(result))
    PartialState().wait_for_everyone()
    return result


def _measure(
    name: str, trainer: FrozenStageTrainer | UnfrozenStageTrainer, dataset: DatasetDict, *, seconds: float
) -> StageResult:
    problem_type = trainer.model.config.problem_type
    validation = trainer.predict(dataset["validation"], metric_key_prefix="validation")
    test = trainer.predict(dataset["test"], metric_key_prefix="test")
    arguments = trainer.args
    shown = [name for name in SHOWN_ARGUMENTS if getattr(arguments, name, None) is not None]
    compute = metrics_for_trainer(problem_type, include_confusion=problem_type != "regression")
    return StageResult(
        name=name,
        history=trainer.state.log_history,
        kept_epoch=_best_epoch(trainer.state.log_history),
        validation_loss=float(validation.metrics["validation_loss"]),
        validation=compute(validation),
        test=compute(test),
        test_logits=np.asarray(test.predictions, dtype=np.float64).tolist(),
        seconds=seconds,
        settings={key: getattr(arguments, key) for key in shown},
    )


def _check_output(output_dir: Path, work_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses an output folder whose files are not to be lost; changes nothing."""
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"output_dir is {output_dir}, which is a file; choose a folder.")
    is_finished = (output_dir / METRICS).is_file() and (output_dir / "config.json").is_file()
    holds_run = is_finished or (work_dir / RUN_FILE).is_file()
    if not holds_run and any(folder.is_dir() and any(folder.iterdir()) for folder in (output_dir, work_dir)):
        raise FileExistsError(
            f"{output_dir} or {work_dir} holds files that are not a run's, and would lose them; choose a new folder."
        )
    if holds_run and not (resume or overwrite):
        raise FileExistsError(
            f"{output_dir} already holds a run; go on with it (resume=True, --resume), start anew and delete it "
            "(overwrite=True, --overwrite), or choose another output_dir."
        )


def _claim_output(output_dir: Path, work_dir: Path, *, delete_first: bool) -> None:
    # Every process looks before the first one writes.
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        for folder in (output_dir, work_dir):
            if delete_first and folder.is_dir():
                shutil.rmtree(folder)
        work_dir.mkdir(parents=True, exist_ok=True)
    PartialState().wait_for_everyone()


def _check_same_run(work_dir: Path, fingerprint: dict[str, Any]) -> None:
    path = work_dir / RUN_FILE
    earlier = json.loads(path.read_text()) if path.is_file() else fingerprint
    changed = [name for name, value in fingerprint.items() if earlier.get(name) != value]
    if changed:
        raise ValueError(
            f"the run in {work_dir} had another {', '.join(changed)}; resume with the same data and arguments, or "
            "start anew (overwrite=True, --overwrite)."
        )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        write_json(path, fingerprint)


def _fingerprint(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    arguments: tuple[FrozenStageArguments, UnfrozenStageArguments],
    balance: str | None,
) -> dict[str, Any]:
    """What must not change between a run and its resumption, as plain values."""
    galaxies = {name: [split["id_str"][:], np.asarray(split["label"]).tolist()] for name, split in dataset.items()}
    settings = {
        stage.__class__.__name__: {key: value for key, value in stage.to_dict().items() if key not in MACHINE_ARGUMENTS}
        for stage in arguments
    }
    return {
        "encoder": model.config.encoder_name,
        "head": [model.config.head_type, model.config.head_hidden_size, model.config.head_dropout],
        "label_names": model.config.label_names,
        "processor": processor.to_dict(),
        "dataset": hashlib.sha256(json.dumps(galaxies).encode()).hexdigest(),
        "balance": balance,
        **json.loads(json.dumps(settings, default=str)),
    }


def _with_prevalence(
    model: ZoobotForImageClassification, dataset: DatasetDict, *, balance: Strategy | None, seed: int
) -> DatasetDict:
    """The dataset, its training split balanced where asked for; the prevalences go into the model's configuration."""
    train = dataset["train"]
    if not isinstance(train.features["label"], ClassLabel):
        if balance is not None:
            raise ValueError(f"balance is {balance!r}, which needs one class for each galaxy; leave it out.")
        return dataset
    sky_prevalence = model.config.sky_prevalence or measure_prevalence(train)
    if balance is not None:
        train = balance_classes(train, seed=seed, strategy=balance).dataset
    model.config.sky_prevalence = sky_prevalence
    model.config.training_prevalence = measure_prevalence(train)
    return DatasetDict({**dataset, "train": train})


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; what a kill left of a later one is deleted."""
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))):
        # Trainer writes this file last.
        if (Path(checkpoint) / "trainer_state.json").is_file():
            return checkpoint
        if PartialState().is_main_process:
            shutil.rmtree(checkpoint)
        PartialState().wait_for_everyone()
    return None


def _best_epoch(history: list[dict[str, Any]]) -> float:
    evaluations = [record for record in history if "eval_loss" in record]
    return float(min(evaluations, key=lambda record: record["eval_loss"])["epoch"]) if evaluations else 0.0


def _count_labels(dataset: DatasetDict) -> dict[str, dict[str, int]]:
    """Galaxies by split and label; without a class label, by split alone."""
    counts = {}
    for name, split in dataset.items():
        feature = split.features["label"]
        if isinstance(feature, ClassLabel):
            numbers = np.bincount(split["label"], minlength=len(feature.names))
            counts[name] = dict(zip(feature.names, numbers.tolist(), strict=True))
        else:
            counts[name] = {"galaxies": len(split)}
    return counts


def _write_output(
    finetuned: Finetuned,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    *,
    counts: dict[str, dict[str, int]],
    dataset_name: str | None,
    cuts: Mapping[str, int],
) -> None:
    """Writes everything but the checkpoints."""
    folder, config = finetuned.output_dir, finetuned.model.config
    kept = next(stage for stage in finetuned.stages if stage.name == finetuned.kept_stage)
    save_model(folder, finetuned.model, processor)
    table = _test_predictions(finetuned.model, kept, dataset["test"])
    write_catalog(table, folder / PREDICTIONS)
    stage_metrics = {stage.name: {**stage.test, "validation_loss": stage.validation_loss} for stage in finetuned.stages}
    write_json(folder / METRICS, {**stage_metrics, "kept_stage": kept.name})
    figures = draw_figures(
        folder,
        histories={stage.name: stage.history for stage in finetuned.stages},
        kept_stage=kept.name,
        kept_epoch=kept.kept_epoch,
        test_metrics=kept.test,
        label_names=config.label_names,
        images=dataset["test"]["image"],
        judged=table if config.problem_type == "single_label_classification" else None,
    )
    facts = ModelCardFacts(
        model_name=folder.resolve().name,
        encoder=config.encoder_name or config.encoder_config.model_type,
        labels=config.label_names,
        problem_type=config.problem_type,
        image_size=processor.pixels,
        stages=[StageFacts(name=s.name, hyperparameters=s.settings, metrics=s.test) for s in finetuned.stages],
        kept_stage=kept.name,
        dataset_name=dataset_name,
        counts=counts,
        cuts=cuts,
        training_prevalence=config.training_prevalence or {},
        sky_prevalence=config.sky_prevalence or {},
        seeds={stage.name: stage.settings["seed"] for stage in finetuned.stages},
        versions={name: version(name) for name in ("zoobot-hf", "torch", "transformers", "datasets")},
        device=str(finetuned.model.device),
        training_seconds=sum(stage.seconds for stage in finetuned.stages),
        figures=figures,
        simulated=dataset_name == "simulated",
    )
    (folder / MODEL_CARD).write_text(render_model_card(facts), encoding="utf-8")


def _test_predictions(model: ZoobotForImageClassification, stage: StageResult, test: Dataset) -> pd.DataFrame:
    config = model.config
    predictions = probabilities_from_logits(torch.tensor(stage.test_logits, dtype=torch.float32), config).numpy()
    table = prediction_table(
        test["id_str"][:],
        predictions,
        label_names=config.label_names,
        problem_type=config.problem_type,
    )
    if config.problem_type == "single_label_classification":
        labels = np.asarray(test["label"])
        table.insert(1, "label", [config.label_names[index] for index in labels])
        table["probability_of_label"] = predictions[np.arange(len(labels)), labels]
    return table
