"""The frozen and then the unfrozen stage, in a folder from which a run that was killed goes on."""

import contextlib
import copy
import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from transformers import EvalPrediction, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from zoobot_hf.data.catalog import whole_file
from zoobot_hf.evaluation.metrics import metrics_for_trainer
from zoobot_hf.evaluation.vote_metrics import vote_metrics_for_trainer
from zoobot_hf.models.checkpoint import FIELDS_OF_OLD_HEAD
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ModelWithHead
from zoobot_hf.publishing.run_folder import write_json

from .arguments import FrozenStageArguments, UnfrozenStageArguments
from .embedding_cache import hash_images, hash_weights
from .trainer import FrozenStageTrainer, UnfrozenStageTrainer, read_labels

logger = logging.getLogger(__name__)

BEST_FOLDER = "best"
RUN_FILE = "run.json"
STAGES = ("frozen", "unfrozen")
STATE_FILE = "trainer_state.json"  # the last that Trainer writes of a checkpoint
# What a run itself writes into a model's configuration.
FIELDS_SET_BY_RUN = set(FIELDS_OF_OLD_HEAD) - {"class_weights"}
# What safetensors and PyTorch (caffe2/serialize/inline_container.cc, or its stream) say of a disk that is full.
TEXTS_OF_FULL_DISK = ("No space left", "quota exceeded", "unexpected pos", "iostream error")


@dataclass
class StageResult:
    """What one stage of finetuning gave.

    Attributes:
        name: "frozen" or "unfrozen".
        history: `TrainerState.log_history`.
        kept_epoch: The epoch whose weights were kept, counted from the stage's start.
        validation_loss: Of these weights.
        validation_outputs: (validation galaxies, labels), the head's own logits, before softmax; for a decision tree
            concentrations (validation galaxies, answers).
        test_outputs: (test galaxies, labels), in the order of the test split, likewise; empty without a test split.
        seconds: How long the stage took.
        settings: The arguments worth knowing, by name.
    """

    name: str
    history: list[dict[str, Any]]
    kept_epoch: float
    validation_loss: float
    validation_outputs: list[list[float]]
    test_outputs: list[list[float]]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


def choose_arguments(
    frozen: FrozenStageArguments | None, unfrozen: UnfrozenStageArguments | None
) -> tuple[FrozenStageArguments, UnfrozenStageArguments]:
    """The arguments of both stages, the usual ones where there are none.

    Args:
        frozen: Of the frozen stage.
        unfrozen: Of the unfrozen stage.

    Raises:
        ValueError: They are of another class, or have push_to_hub.
    """
    stages = {"frozen": (frozen, FrozenStageArguments), "unfrozen": (unfrozen, UnfrozenStageArguments)}
    for name, (given, wanted) in stages.items():
        if given is not None and not isinstance(given, wanted):
            raise ValueError(f"{name} is of the type {type(given).__name__}; give {wanted.__name__}, or leave it out.")
        if given is not None and given.push_to_hub:
            raise ValueError(
                f"{name} has push_to_hub=True, and no stage is pushed here; leave it out, and push the finished "
                "output_dir with push_folder."
            )
    return frozen or FrozenStageArguments(), unfrozen or UnfrozenStageArguments()


def run_stages(
    model: ModelWithHead,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    work_dir: Path,
    *,
    frozen: FrozenStageArguments,
    unfrozen: UnfrozenStageArguments | None,
    frozen_trainer: Callable[..., FrozenStageTrainer] = FrozenStageTrainer,
) -> list[StageResult]:
    """What the stages gave, without one that has diverged; the model has the last stage's weights.

    A stage that was finished in `work_dir` is read, and an unfinished one goes on. The weights that a stage ended with
    are in `work_dir / name / BEST_FOLDER`.

    Args:
        model: The model to be trained.
        processor: Its image processor.
        dataset: With `train`, `validation` and, as wanted, `test`.
        work_dir: For checkpoints and results.
        frozen: Arguments of the frozen stage; their `output_dir` is not used.
        unfrozen: Arguments of the unfrozen stage, likewise; None leaves it out.
        frozen_trainer: What makes the frozen stage's trainer.

    Raises:
        FileNotFoundError: The best checkpoint of an unfinished stage is gone.
        OSError: No space left; what is finished stays.
        ValueError: All stages have diverged.
    """
    with full_disk_named(work_dir):
        stages = [_run_stage("frozen", frozen_trainer, model, frozen, processor, dataset, work_dir)]
        if unfrozen is not None:
            stages.append(_run_stage("unfrozen", UnfrozenStageTrainer, model, unfrozen, processor, dataset, work_dir))
    return _without_diverged(stages)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Says in one error what every library says of a full disk in its own words, and how to go on.

    Args:
        folder: What is written to.

    Raises:
        OSError: No space left.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # The cache of embeddings, which lies elsewhere, has said so itself, in an error without a number.
        if isinstance(error, OSError):
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        else:  # the memory that data loaders share is a disk too, but not this one
            is_full = "shared memory" not in str(error) and any(text in str(error) for text in TEXTS_OF_FULL_DISK)
        if not is_full:
            raise
        raise OSError(
            f"no space is left for the run in {folder} ({error}); make room, and go on with it (resume=True, --resume; "
            "of cross_validate the same work_dir)."
        ) from error


def best_stage(stages: list[StageResult]) -> StageResult:
    """The stage of lowest validation loss.

    Args:
        stages: From `run_stages`.
    """
    return min(stages, key=lambda stage: stage.validation_loss)


def fingerprint_run(
    model: ModelWithHead,
    processor: ZoobotImageProcessor,
    dataset: Mapping[str, Dataset],
    arguments: tuple[FrozenStageArguments, UnfrozenStageArguments],
    **choices: Any,
) -> dict[str, Any]:
    """What must not change between a run and its resumption, as plain values.

    Args:
        model: As it was given, before anything of the run is written into its configuration.
        processor: Its image processor.
        dataset: The splits, before balancing.
        arguments: Of both stages.
        **choices: Whatever else decides what comes out.
    """
    labels = {name: read_labels(split, model) for name, split in dataset.items()}
    galaxies = {
        name: [dataset[name]["id_str"][:], known.tolist()] for name, known in labels.items() if known is not None
    }
    images = {name: hash_images(split) for name, split in dataset.items()}
    settings = {
        f"{stage.__class__.__name__}.{name}": value for stage in arguments for name, value in stage.decisive.items()
    }
    configuration = {name: value for name, value in model.config.decisive.items() if name not in FIELDS_SET_BY_RUN}
    facts = {
        "encoder weights": hash_weights(model.base_model.encoder),
        **{f"model.{name}": value for name, value in configuration.items()},
        "processor": processor.to_dict(),
        "dataset": _hash_json(galaxies),
        "set of images": _hash_json(images),
        "number of processes": PartialState().num_processes,
        **choices,
        **settings,
    }
    # As it will be read again: tuples are lists, and the numbers of labels are texts.
    return dict(json.loads(json.dumps(facts)))


def check_same_run(work_dir: Path, fingerprint: dict[str, Any]) -> None:
    """Writes down what a run is, or finds that the folder's run is the same.

    Args:
        work_dir: The run's folder.
        fingerprint: From `fingerprint_run`.

    Raises:
        ValueError: The folder's run is another; the message names what differs.
    """
    path = work_dir / RUN_FILE
    earlier = json.loads(path.read_text()) if path.is_file() else fingerprint
    changed = [name for name, value in fingerprint.items() if earlier.get(name) != value]
    if changed:
        raise ValueError(
            f"the run in {work_dir} had another {', '.join(changed)}; resume with the same data and arguments, and the "
            "model as from_pretrained gives it, or start anew (overwrite=True, --overwrite, or another folder)."
        )
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        write_json(path, fingerprint)


def forget_run(work_dir: Path, parts: Iterable[Path]) -> None:
    """Deletes what a run wrote to its folder; other files there stay.

    Args:
        work_dir: The run's folder.
        parts: Its files and folders there, besides the one that says what the run is.
    """
    for path in parts:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (work_dir / RUN_FILE).unlink(missing_ok=True)  # last: without it, the parts would be taken for those of any run


def _hash_json(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _run_stage(
    name: str,
    make_trainer: Callable[..., FrozenStageTrainer | UnfrozenStageTrainer],
    model: ModelWithHead,
    arguments: FrozenStageArguments | UnfrozenStageArguments,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    work_dir: Path,
) -> StageResult:
    folder = work_dir / name
    finished = folder / "finished.json"
    if finished.is_file():
        model.load_weights(folder / BEST_FOLDER)
        model.config.use_cache = arguments.use_cache  # as Trainer does it, so that the same configuration is saved
        return StageResult(**json.loads(finished.read_text()))
    arguments = copy.copy(arguments)
    arguments.output_dir = str(folder)
    # Accelerate keeps the precision of the stage before this one, and refuses another.
    AcceleratorState._reset_state()
    trainer = make_trainer(
        model,
        arguments,
        processing_class=processor,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        compute_metrics=_metrics_in_training(model),
    )
    logger.info("The %s stage: at most %g epochs.", name, arguments.num_train_epochs)
    started = time.monotonic()
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint is not None:
        _take_best_beside(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    result = _measure(name, trainer, dataset, seconds=time.monotonic() - started)
    if PartialState().is_main_process:
        model.save_pretrained(folder / BEST_FOLDER)
        write_json(finished, asdict(result))
    PartialState().wait_for_everyone()
    return result


def _metrics_in_training(model: ModelWithHead) -> Callable[[EvalPrediction], dict[str, float]]:
    config = model.config
    if config.problem_type == "votes":
        return vote_metrics_for_trainer(config.decision_tree)
    return metrics_for_trainer(config.problem_type)


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; what a kill left of a later one is deleted."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        checkpoint = Path(last)
        is_whole = _is_whole(checkpoint)
        # Every process looks before the first one deletes.
        PartialState().wait_for_everyone()
        if is_whole:
            return checkpoint
        if PartialState().is_main_process:
            shutil.rmtree(checkpoint)
        PartialState().wait_for_everyone()
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _take_best_beside(checkpoint: Path) -> None:
    """Writes down that the best checkpoint is the one of the same folder, which may have been moved or copied.

    Where it is missing, `Trainer` would end with the last weights.
    """
    path = checkpoint / STATE_FILE
    state = TrainerState.load_from_json(str(path))
    if state.best_model_checkpoint is None:
        return
    # A Windows path is split at both separators: the run may have begun on another system.
    best = checkpoint.with_name(PureWindowsPath(state.best_model_checkpoint).name)
    if not best.is_dir():
        raise FileNotFoundError(
            f"{best}, the best checkpoint of the run to resume, is gone; put it back, or start anew (overwrite=True, "
            "--overwrite, or another folder)."
        )
    if PartialState().is_main_process:
        state.best_model_checkpoint = str(best)
        with whole_file(path) as partial:
            state.save_to_json(str(partial))
    PartialState().wait_for_everyone()


def _measure(
    name: str, trainer: FrozenStageTrainer | UnfrozenStageTrainer, dataset: DatasetDict, *, seconds: float
) -> StageResult:
    validation = trainer.predict(dataset["validation"], metric_key_prefix="validation")
    test = trainer.predict(dataset["test"], metric_key_prefix="test").predictions if "test" in dataset else []
    return StageResult(
        name=name,
        history=trainer.state.log_history,
        kept_epoch=_kept_epoch(trainer),
        validation_loss=float(validation.metrics["validation_loss"]),
        validation_outputs=np.asarray(validation.predictions, dtype=np.float64).tolist(),
        test_outputs=np.asarray(test, dtype=np.float64).tolist(),
        seconds=seconds,
        settings=trainer.args.shown,
    )


def _kept_epoch(trainer: FrozenStageTrainer | UnfrozenStageTrainer) -> float:
    evaluated = {record["step"]: record["epoch"] for record in trainer.state.log_history if "eval_loss" in record}
    kept_step = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return float(evaluated.get(kept_step, trainer.state.epoch))


def _without_diverged(stages: list[StageResult]) -> list[StageResult]:
    # Of a resumed run what is not finite is None.
    numbers = {
        stage.name: [stage.validation_loss, *np.ravel(stage.validation_outputs), *np.ravel(stage.test_outputs)]
        for stage in stages
    }
    diverged = [name for name, values in numbers.items() if not np.isfinite(np.array(values, dtype=float)).all()]
    remedy = f"The {' and the '.join(diverged)} stage has diverged to values that are not finite: lower learning_rate"
    if len(diverged) == len(stages):
        raise ValueError(f"{remedy}, and start anew (overwrite=True, --overwrite, or another folder).")
    if diverged:
        logger.warning("%s; the stage is left out.", remedy)
    return [stage for stage in stages if stage.name not in diverged]
