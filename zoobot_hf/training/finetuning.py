"""finetune(): the frozen stage, then the unfrozen stage, and a folder that is ready for the Hub."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets

from zoobot_hf.data.balance import Strategy, balance_classes
from zoobot_hf.data.images import check_images
from zoobot_hf.evaluation.judgement import Judgement, check_prevalence, judge, judge_out_of_fold, prevalence_of
from zoobot_hf.evaluation.selection import check_aim
from zoobot_hf.models.configuration_zoobot import ZoobotConfig
from zoobot_hf.models.export import FORMATS
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ModelWithHead
from zoobot_hf.publishing.hub import CONFIGURATION, FIGURE_OF_RUN, FIGURES, METRICS, OPTIONAL_FILES, REQUIRED_FILES

from .arguments import FrozenStageArguments, UnfrozenStageArguments
from .cross_validation import OUT_OF_FOLD, CrossValidation
from .machine import tune_memory_allocator
from .run_report import Finetuned, count_labels, metrics_of, write_run
from .stages import (
    BEST_FOLDER,
    RUN_FILE,
    STAGES,
    StageResult,
    best_stage,
    check_same_run,
    choose_arguments,
    fingerprint_run,
    forget_run,
    full_disk_named,
    run_stages,
)
from .trainer import check_kinds, check_labels

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SPLITS_OF_FINAL_MODEL = ("train", "validation")  # after every galaxy was judged out of fold
# Problems without classes, and what the model's outputs are.
WITHOUT_CLASSES = {"regression": "values", "votes": "the answers to a decision tree"}


def finetune(
    model: ModelWithHead,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    output_dir: str | Path,
    *,
    frozen: FrozenStageArguments | None = None,
    unfrozen: UnfrozenStageArguments | None = None,
    skip_unfrozen: bool = False,
    balance: Strategy | None = None,
    out_of_fold: CrossValidation | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dataset_name: str | None = None,
    cuts: Mapping[str, int] | None = None,
    sky_prevalence: Mapping[str, float] | None = None,
    decision_aim: str | None = None,
    decision_at_least: float | None = None,
    license_name: str | None = None,
) -> Finetuned:
    """The model after the frozen and the unfrozen stage, and a folder with everything about it.

    The unfrozen stage starts from the best weights of the frozen one and is kept only if its validation loss is lower.
    After that a temperature is fitted to the validation galaxies, a threshold is chosen on them, and the model gives
    probabilities for the sky's prevalence. What the validation galaxies don't allow is left out, and card and log say
    so. A model that answers a decision tree is trained on votes and gives concentrations, and none of this applies.

    Of a few hundred galaxies a test split is too small to say much. With `out_of_fold` there is none: the model is
    trained on all galaxies outside the validation split, and card, metrics and table are those of the predictions out
    of fold. They say that these come from the models of the folds, which were trained on fewer galaxies than this one.

    Under `accelerate launch` the processes share the work, and the first one writes.

    Args:
        model: From `from_pretrained`, with the dataset's labels; a `ZoobotForGalaxyZoo` for votes. One that was trained
            on another survey starts from the answers that both surveys share: load it with the new `decision_tree`.
        processor: The image processor that suits the encoder.
        dataset: With `train`, `validation` and `test`; each with `id_str`, `image` and `label`. With `out_of_fold`,
            what `split_for_final_model` gives.
        output_dir: Gets config.json, model.safetensors, preprocessor_config.json, README.md, metrics.json,
            predictions.parquet and figures/, and for a decision tree predictions-friendly.parquet and
            predictions-advanced.parquet. Checkpoints go to a folder beside it, `<output_dir>-checkpoints`.
        frozen: Arguments of the frozen stage; their `output_dir` is not used.
        unfrozen: Arguments of the unfrozen stage; likewise.
        skip_unfrozen: Whether to end after the frozen stage.
        balance: Whether and how to balance the classes of the training split; the prevalence before is kept in the
            model's configuration as the sky's.
        out_of_fold: What models that were trained in the same way said of these galaxies, from `cross_validate`; the
            model is for the sky that its predictions are for.
        resume: Whether to go on with a run that was killed in this `output_dir`.
        overwrite: Whether to delete what an earlier run left in this `output_dir`, and its checkpoints; other files in
            both folders stay, exports of the earlier model too.
        dataset_name: How the model card calls the dataset: a Hub id or a name.
        cuts: How many galaxies each cut removed, for the model card.
        sky_prevalence: The share of each label in the sky that the predictions are for, by its name, above 0; that of
            the training split before balancing when absent.
        decision_aim: What the threshold of the selection is for, at the sky's prevalence: "purity", "completeness" or
            "f1" (the best there is); f1 when absent.
        decision_at_least: The purity or completeness to be reached, 0-1; not for f1.
        license_name: The Hub's short name of the model's licence, for the model card: "apache-2.0".

    Returns:
        The model, the stages' results, and where everything is.

    Raises:
        FileExistsError: The output folder holds a run, and neither `resume` nor `overwrite` was asked for; or `resume`,
            and the run was finished and its checkpoints are gone.
        FileNotFoundError: The best checkpoint of the run to resume is gone.
        OSError: No space left; what is finished stays.
        UnreadableImageError: Some images can't be read.
        ValueError: A model, a processor or arguments of another class, or with push_to_hub; the dataset lacks a split
            or a column, or its labels aren't the model's; a class without a training galaxy; a prevalence or an aim
            that doesn't fit, or one of these, or balancing, where there are no classes; galaxies that are not those of
            `out_of_fold`, or a `sky_prevalence` beside it; or the run to resume had other data or arguments.
    """
    tune_memory_allocator()
    check_kinds(model, processor)
    _check_splits(dataset, needed=SPLITS if out_of_fold is None else SPLITS_OF_FINAL_MODEL)
    if out_of_fold is not None:
        sky_prevalence = _sky_of(out_of_fold, given=sky_prevalence)
    judged = dataset["test"] if out_of_fold is None else _order_as_judged(dataset, out_of_fold)
    choices = {"balance": balance, "sky_prevalence": sky_prevalence}
    _check_classes_are_there(model, **choices, decision_aim=decision_aim, decision_at_least=decision_at_least)
    check_aim(decision_aim or "f1", decision_at_least)
    output_dir, work_dir = Path(output_dir), checkpoints_folder(output_dir)
    frozen, unfrozen = choose_arguments(frozen, unfrozen)
    for split in dataset.values():
        check_labels(split, model)
    if not skip_unfrozen:
        model.unfreeze_encoder(unfrozen.last_blocks)  # raises now what it would raise after the frozen stage
    check_output(output_dir, resume=resume, overwrite=overwrite)
    images = concatenate_datasets([split.select_columns(["id_str", "image"]) for split in dataset.values()])
    check_images(images, prepare=processor.crop_and_resize)
    fingerprint = fingerprint_run(model, processor, dataset, (frozen, unfrozen), balance=balance)
    counts = count_labels(dataset)
    model.config.forget_calibration()
    dataset = _with_prevalence(model, dataset, balance=balance, seed=frozen.seed, sky_prevalence=sky_prevalence)
    # Whatever there is to refuse was refused: what lies in the folder may be deleted.
    _claim_output(output_dir, work_dir, delete_first=overwrite)
    check_same_run(work_dir, fingerprint)

    second = None if skip_unfrozen else unfrozen
    stages = run_stages(model, processor, dataset, work_dir, frozen=frozen, unfrozen=second)
    kept = _keep_best(model, stages, work_dir)
    aim, at_least = decision_aim or "f1", decision_at_least
    if out_of_fold is None:
        judgements = _judge(model, stages, dataset, aim=aim, at_least=at_least)
    else:
        own = _judge_out_of_fold(model, kept, dataset, judged, out_of_fold, aim=aim, at_least=at_least)
        judgements = {kept.name: own}
    if kept.name in judgements:
        _take_calibration(model, judgements[kept.name])
    measured = stages if out_of_fold is None else [kept]
    metrics = {stage.name: metrics_of(model, stage, judgements.get(stage.name), judged) for stage in measured}
    finetuned = Finetuned(
        model,
        stages,
        kept.name,
        output_dir,
        test_metrics=metrics if out_of_fold is None else {},
        judgements=judgements,
        out_of_fold_metrics=None if out_of_fold is None else metrics[kept.name],
    )
    if PartialState().is_main_process:
        with full_disk_named(output_dir):
            write_run(
                finetuned,
                processor,
                dataset,
                judged=judged,
                out_of_fold=out_of_fold,
                counts=counts,
                dataset_name=dataset_name,
                cuts=cuts or {},
                license_name=license_name,
            )
    PartialState().wait_for_everyone()
    return finetuned


def _keep_best(model: ModelWithHead, stages: list[StageResult], work_dir: Path) -> StageResult:
    kept = best_stage(stages)
    model.load_weights(work_dir / kept.name / BEST_FOLDER)
    model.eval()
    losses = ", ".join(f"{stage.name} {stage.validation_loss:.4f}" for stage in stages)
    logger.info("The %s stage is kept; validation losses: %s.", kept.name, losses)
    return kept


def _judge(
    model: ModelWithHead,
    stages: list[StageResult],
    dataset: DatasetDict,
    *,
    aim: str,
    at_least: float | None,
) -> dict[str, Judgement]:
    """What each stage's head is worth; nothing where there are no classes."""
    if model.config.problem_type in WITHOUT_CLASSES:
        return {}
    return {
        stage.name: judge(
            model.config,
            validation_logits=stage.validation_outputs,
            validation_labels=dataset["validation"]["label"][:],
            test_logits=stage.test_outputs,
            test_labels=dataset["test"]["label"][:],
            aim=aim,
            at_least=at_least,
        )
        for stage in stages
    }


def _judge_out_of_fold(
    model: ModelWithHead,
    stage: StageResult,
    dataset: DatasetDict,
    judged: Dataset,
    out_of_fold: CrossValidation,
    *,
    aim: str,
    at_least: float | None,
) -> Judgement:
    return judge_out_of_fold(
        model.config,
        validation_logits=stage.validation_outputs,
        validation_labels=dataset["validation"]["label"][:],
        probabilities=out_of_fold.probabilities,
        labels=judged["label"][:],
        is_validation=np.isin(judged["id_str"][:], dataset["validation"]["id_str"][:]),
        aim=aim,
        at_least=at_least,
    )


def _take_calibration(model: ModelWithHead, judgement: Judgement) -> None:
    for name, value in judgement.fields.items():
        setattr(model.config, name, value)
    for remark in judgement.remarks:
        logger.warning(remark)
    if judgement.calibration is not None and judgement.calibration.helps:
        logger.info(
            "Calibrated on %d validation galaxies: temperature %s, log loss %.4f before and %.4f after.",
            judgement.calibration.galaxies,
            np.round(model.config.calibration_temperature, 3),
            judgement.calibration.log_loss_before,
            judgement.calibration.log_loss_after,
        )


def _check_splits(dataset: DatasetDict, *, needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in dataset or len(dataset[name]) == 0]
    if missing:
        raise ValueError(
            f"the dataset has no galaxies in {', '.join(missing)}; make the splits with split_dataset. Validation "
            "galaxies choose between the stages, calibrate and set the threshold; test galaxies measure."
        )
    for name, split in dataset.items():
        absent = [column for column in ("id_str", "image") if column not in split.column_names]
        if absent:
            raise ValueError(
                f"the split {name} has no column {', '.join(absent)}; it has {', '.join(split.column_names)}. Rename a "
                "column with rename_column, or make the dataset with load_galaxy_dataset."
            )


def _sky_of(out_of_fold: CrossValidation, *, given: Mapping[str, float] | None) -> dict[str, float]:
    if given is not None:
        raise ValueError(
            f"sky_prevalence is {dict(given)}, and the predictions out of fold are for a sky already; leave it out, "
            "and give it to cross_validate."
        )
    return out_of_fold.sky_prevalence


def _order_as_judged(dataset: DatasetDict, out_of_fold: CrossValidation) -> Dataset:
    """The galaxies of all splits in the order of the table of predictions out of fold."""
    galaxies = concatenate_datasets(list(dataset.values()))
    identifiers, judged = galaxies["id_str"][:], out_of_fold.table["id_str"].tolist()
    if set(dataset) != set(SPLITS_OF_FINAL_MODEL) or sorted(identifiers) != sorted(judged):
        raise ValueError(
            f"the dataset has {len(galaxies)} galaxies in {', '.join(dataset)}, and out_of_fold judges {len(judged)}; "
            "give the same galaxies in train and validation, as split_for_final_model does."
        )
    rows = {identifier: row for row, identifier in enumerate(identifiers)}
    return galaxies.select([rows[identifier] for identifier in judged])


def _check_classes_are_there(model: ModelWithHead, **choices: object) -> None:
    """Refuses choices that only classes have, for a model without."""
    given = [name for name, value in choices.items() if value is not None]
    outputs = WITHOUT_CLASSES.get(model.config.problem_type)
    if outputs is not None and given:
        raise ValueError(
            f"{given[0]} is {choices[given[0]]!r}, which is for classes, and this model's outputs are {outputs}; leave "
            f"out {' and '.join(given)}."
        )


def check_output(output_dir: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuses an output folder whose files are not to be lost; changes nothing.

    Args:
        output_dir: As in `finetune`.
        resume: As in `finetune`.
        overwrite: As in `finetune`.

    Raises:
        FileExistsError: As in `finetune`.
        NotADirectoryError: It is a file.
    """
    output_dir, work_dir = Path(output_dir), checkpoints_folder(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"output_dir is {output_dir}, which is a file; choose a folder.")
    is_model = (output_dir / METRICS).is_file() and (output_dir / CONFIGURATION).is_file()
    is_finished = is_model or (output_dir / OUT_OF_FOLD).is_file()
    can_go_on = (work_dir / RUN_FILE).is_file()
    holds_run = is_finished or can_go_on
    if not holds_run and any(folder.is_dir() and any(folder.iterdir()) for folder in (output_dir, work_dir)):
        raise FileExistsError(
            f"{output_dir} or {work_dir} holds files that are not a run's, and would lose them; choose a new folder."
        )
    if is_finished and resume and not can_go_on:
        raise FileExistsError(
            f"{output_dir} holds a finished run whose checkpoints are no longer in {work_dir}, so that it can't be "
            "resumed; start anew and delete it (overwrite=True, --overwrite), or choose another output_dir."
        )
    if holds_run and not (resume or overwrite):
        raise FileExistsError(
            f"{output_dir} already holds a run; go on with it (resume=True, --resume), start anew and delete it "
            "(overwrite=True, --overwrite), or choose another output_dir."
        )


def checkpoints_folder(output_dir: str | Path) -> Path:
    """Where the checkpoints of a run lie, beside its output.

    Args:
        output_dir: As in `finetune`.
    """
    # Resolved, because "." and ".." have no name that the checkpoints' folder could be called after.
    resolved = Path(output_dir).resolve()
    # It may be a link to a disk with more space.
    return resolved.with_name(f"{resolved.name}-checkpoints").resolve()


def _claim_output(output_dir: Path, work_dir: Path, *, delete_first: bool) -> None:
    # Every process looks before the first one writes.
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        if delete_first:
            for path in _files_of_run(output_dir):
                path.unlink(missing_ok=True)
            forget_run(work_dir, [work_dir / name for name in STAGES])
            for folder in filter(Path.is_dir, (output_dir / name for name in FORMATS)):
                logger.warning("%s is an export of the earlier model; delete it, and export the new one.", folder)
        work_dir.mkdir(parents=True, exist_ok=True)
    PartialState().wait_for_everyone()


def _files_of_run(output_dir: Path) -> list[Path]:
    """What a run can have written to its folder, some figures as PDF too; all else there is the user's."""
    drawn = [path for ending in ("png", "pdf") for path in output_dir.glob(f"{FIGURES}/*.{ending}")]
    figures = [path for path in drawn if FIGURE_OF_RUN.fullmatch(f"{FIGURES}/{path.stem}.png")]
    return [output_dir / name for name in (*REQUIRED_FILES, *OPTIONAL_FILES)] + figures


def _with_prevalence(
    model: ModelWithHead,
    dataset: DatasetDict,
    *,
    balance: Strategy | None,
    seed: int,
    sky_prevalence: Mapping[str, float] | None,
) -> DatasetDict:
    """The dataset, its training split balanced where asked for; the prevalences go into the model's configuration."""
    config, train = model.config, dataset["train"]
    if config.problem_type in WITHOUT_CLASSES:
        return dataset
    is_single_label = isinstance(train.features["label"], ClassLabel)
    if balance is not None and not is_single_label:
        raise ValueError(f"balance is {balance!r}, which needs one class for each galaxy; leave it out.")
    measured = _prevalence_of_split(train, config)
    if balance is not None:
        train = balance_classes(train, seed=seed, strategy=balance).dataset
    config.training_prevalence = _prevalence_of_split(train, config)
    config.sky_prevalence = measured if sky_prevalence is None else check_prevalence(sky_prevalence, config)
    return DatasetDict({**dataset, "train": train})


def _prevalence_of_split(split: Dataset, config: ZoobotConfig) -> dict[str, float]:
    labels = np.asarray(split["label"])
    shares = prevalence_of(labels, config.problem_type, count=config.num_labels)
    missing = [name for name, share in zip(config.label_names, shares, strict=True) if not 0 < share < 1]
    if missing:
        raise ValueError(
            f"the training split has no galaxy with and one without the label {', '.join(missing)}; add some, or leave "
            "the label out."
        )
    return dict(zip(config.label_names, shares, strict=True))
