"""Out-of-fold predictions: every galaxy judged by a model that was not trained on it.

Of a few hundred galaxies a test split has a few dozen, whose scores are noise. Here each fold is the test set once; a
part of the others is its validation split, which chooses epoch and stage and to which the calibration is fitted, and
the rest is trained on. The encoder runs once over all galaxies, for the frozen stage of every fold.

A model for everybody is then trained on all galaxies but those of one fold, which are its validation split:
`split_for_final_model` cuts them, and `finetune(..., out_of_fold=...)` reports the scores of the folds with it.
"""

import contextlib
import copy
import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, concatenate_datasets
from scipy.special import softmax
from transformers import EvalPrediction, set_seed

from zoobot_hf.data.balance import Strategy, balance_classes, measure_prevalence
from zoobot_hf.data.catalog import write_catalog
from zoobot_hf.evaluation.calibration import probabilities_at_prevalence
from zoobot_hf.evaluation.intervals import Estimate
from zoobot_hf.evaluation.judgement import calibrate_head, check_prevalence
from zoobot_hf.evaluation.label_audit import find_doubtful_labels, find_near_duplicates
from zoobot_hf.evaluation.metrics import SINGLE_LABEL, metrics_for_trainer, scored_labels
from zoobot_hf.evaluation.plots import plot_galaxy_sheet, shown_name
from zoobot_hf.evaluation.probability_plots import plot_reliability, plot_roc_and_precision_recall
from zoobot_hf.evaluation.scores import Scores, score_probabilities
from zoobot_hf.evaluation.tables import judged_table, probability_columns
from zoobot_hf.models.configuration_zoobot import ZoobotConfig
from zoobot_hf.models.heads import build_head, effective_training_prevalence
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification
from zoobot_hf.publishing.run_folder import write_json

from .arguments import FrozenStageArguments, UnfrozenStageArguments
from .embedding_cache import Stored, StoredEmbeddings, Views, store_embeddings
from .folds import assign_folds, check_classes, group_near_duplicates
from .machine import tune_memory_allocator
from .reading import Pictures
from .stages import StageResult, best_stage, check_same_run, choose_arguments, fingerprint_run, forget_run, run_stages
from .trainer import FrozenStageTrainer, check_kinds, check_labels

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 5  # a fifth of what is not the test fold
AUDITED = 24  # labels on the sheet
OUT_OF_FOLD = "out_of_fold.parquet"

Integers = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]


class CrossValidation(NamedTuple):
    """What models say of galaxies that they were not trained on.

    Attributes:
        table: A row for each galaxy, in the order of the dataset: `id_str`, `label`, `predicted_label`, a
            `probability_...` for each label (calibrated, for the sky's prevalence), `probability_of_label` and `fold`.
        accuracy: Of these galaxies as they are, with its interval.
        scores: Of the same, for their own prevalence.
        sky_scores: Expected in the sky; None where its prevalence is that of these galaxies.
        folds: A row for each fold and stage: `fold`, `stage`, `is_kept`, `test_galaxies`, `accuracy`, `roc_auc` and
            `log_loss` before calibration, `validation_loss` and `seconds`.
        temperatures: Of the calibration of each fold.
        doubtful: From `find_doubtful_labels`, at the training prevalence.
        duplicates: From `find_near_duplicates`, with the folds as splits.
        sky_prevalence: The share of each label in the sky that the probabilities are for.
    """

    table: pd.DataFrame
    accuracy: Estimate
    scores: Scores
    sky_scores: Scores | None
    folds: pd.DataFrame
    temperatures: list[float]
    doubtful: pd.DataFrame
    duplicates: pd.DataFrame
    sky_prevalence: dict[str, float]

    @property
    def probabilities(self) -> Floats:
        """Those of the table, after softmax, in its order: (galaxies, labels)."""
        return self.table[probability_columns(list(self.sky_prevalence))].to_numpy(dtype=np.float64)


class _Shared(NamedTuple):
    """The embeddings of all galaxies: plain, and of the views that the frozen stage trains on."""

    rows: dict[str, int]
    plain: Stored
    seen: Stored

    def of(self, dataset: Dataset, *, views: Views | None) -> StoredEmbeddings:
        """Those of some of the galaxies, with their labels."""
        stored = self.plain if views is None else self.seen
        rows = torch.tensor([self.rows[identifier] for identifier in dataset["id_str"][:]])
        return StoredEmbeddings(
            Stored(stored.values, stored.rows[rows], stored.key),
            torch.as_tensor(dataset["label"][:]),
        )


class _Fold(NamedTuple):
    """What the model of a fold says of its test galaxies.

    Attributes:
        at_training: Calibrated probabilities for the training prevalence, (test galaxies, labels).
        at_sky: The same for the sky's.
        temperature: Of the calibration.
        rows: Of `CrossValidation.folds`.
    """

    at_training: Floats
    at_sky: Floats
    temperature: float
    rows: list[dict[str, Any]]


class _SharedEmbeddingsTrainer(FrozenStageTrainer):
    """The frozen stage on embeddings that all folds share."""

    def __init__(self, *args: Any, shared: _Shared, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = shared

    def _embeddings(self, dataset: Dataset, *, views: Views | None = None) -> StoredEmbeddings:
        return self.shared.of(dataset, views=views)


def cross_validate(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    dataset: Dataset | DatasetDict,
    *,
    folds: int = 5,
    frozen: FrozenStageArguments | None = None,
    unfrozen: UnfrozenStageArguments | None = None,
    skip_unfrozen: bool = False,
    balance: Strategy | None = None,
    sky_prevalence: Mapping[str, float] | None = None,
    seed: int = 42,
    work_dir: str | Path | None = None,
    overwrite: bool = False,
) -> CrossValidation:
    """Calibrated out-of-fold predictions of every galaxy, their scores with intervals, and an audit of the labels.

    Each fold starts from the model's encoder and a new head. An encoder that was already finetuned on these galaxies
    makes every fold look better than it is. The intervals are for these galaxies drawn again, and not for other draws
    of the galaxies that were trained on.

    Args:
        model: From `from_pretrained`, with the dataset's labels; it is not changed.
        processor: The image processor that suits the encoder.
        dataset: With `id_str`, `image` and `label`; splits are joined. Near-duplicates stay in one fold.
        folds: How many.
        frozen: Arguments of the frozen stage; their `output_dir` is not used.
        unfrozen: Arguments of the unfrozen stage; likewise.
        skip_unfrozen: Whether to end each fold after the frozen stage.
        balance: Whether and how to balance the classes of each fold's training split.
        sky_prevalence: The share of each label in the sky that the predictions are for, by its name, above 0; that of
            these galaxies when absent.
        seed: Decides the folds and the new heads.
        work_dir: A folder for checkpoints and for what each fold gave: the same call goes on there with a run that was
            killed. When absent, a run that is killed starts anew.
        overwrite: Whether to delete what an earlier run left in `work_dir`; other files there stay.

    Raises:
        FileNotFoundError: The best checkpoint of a fold that was killed is gone.
        OSError: No space left; what is finished in `work_dir` stays.
        ValueError: A model, processor or arguments of another class, or with push_to_hub; no `ClassLabel`, a class with
            fewer galaxies than folds (or than three), a galaxy that is there twice, labels that aren't the model's, a
            prevalence that doesn't fit, a class of which nearly all are near-duplicates of each other, or a `work_dir`
            of another run.
    """
    check_kinds(model, processor)
    tune_memory_allocator()
    galaxies = _join(dataset)
    check_labels(galaxies, model)
    labels = check_classes(galaxies, folds=folds)
    check_classes(galaxies, folds=3)  # one each to train on, to validate with and to test
    sky = measure_prevalence(galaxies) if sky_prevalence is None else check_prevalence(sky_prevalence, model.config)
    frozen, unfrozen = choose_arguments(frozen, unfrozen)
    shared = _embed(model, processor, galaxies, frozen)
    fold_of, duplicates, groups = _find_folds(galaxies, labels, shared, folds=folds, seed=seed)
    cut = [_split(galaxies, labels, fold_of, groups, fold=fold, seed=seed, balance=balance) for fold in range(folds)]
    choices = {"balance": balance, "folds": folds, "seed": seed, "skip_unfrozen": skip_unfrozen}
    fingerprint = fingerprint_run(model, processor, {"galaxies": galaxies}, (frozen, unfrozen), **choices)
    second = None if skip_unfrozen else unfrozen
    judged = []
    with _open_work_dir(work_dir, delete_first=overwrite) as folder:
        check_same_run(folder, fingerprint)
        for fold, splits in enumerate(cut):
            set_seed(seed + fold)
            fold_model = _new_model(model, splits["train"])
            stages = _train(fold_model, processor, splits, shared, frozen, second, folder / f"fold-{fold}")
            judged.append(_judge_fold(fold, stages, splits, fold_model.config, sky, folds=folds))
    return _join_folds(judged, galaxies, fold_of, duplicates, sky)


def write_cross_validation(
    result: CrossValidation, dataset: Dataset | DatasetDict, output_dir: str | Path, *, processor: ZoobotImageProcessor
) -> list[Path]:
    """The files that were written: tables, scores, and figures.

    Under `accelerate launch`, where each process has the whole result, call it in one of them.

    Args:
        result: From `cross_validate`.
        dataset: What it was given, for the pictures.
        processor: Likewise.
        output_dir: Made where it isn't there; gets `out_of_fold.parquet`, `out_of_fold.json` (scores),
            `label_audit.csv`, `near_duplicates.csv`, and the figures `label_audit.png` (the 24 likeliest wrong labels),
            `reliability.png` and `roc.png`, in place of those of an earlier result.
    """
    folder, galaxies = Path(output_dir), _join(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    names = (OUT_OF_FOLD, "out_of_fold.json", "label_audit.csv", "near_duplicates.csv", "label_audit.png")
    table, scores, audit, duplicates, sheet = paths = [folder / name for name in names]
    if scores.is_file():
        for name in json.loads(scores.read_text()).get("figures", []):
            (folder / name).unlink(missing_ok=True)  # it may be of a label that this result doesn't have
    write_catalog(result.table, table)
    write_catalog(result.doubtful, audit)
    write_catalog(result.duplicates, duplicates)
    plot_doubtful_labels(result.doubtful, galaxies, sheet, processor=processor)
    figures = _draw_probabilities(result, galaxies, folder)
    facts = {
        "accuracy": result.accuracy._asdict(),
        "scores": result.scores.to_dict(),
        "sky_scores": result.sky_scores and result.sky_scores.to_dict(),
        "temperatures": result.temperatures,
        "folds": result.folds.to_dict("records"),
        "figures": [path.name for path in figures],
    }
    write_json(scores, facts)
    return paths + figures


def _draw_probabilities(result: CrossValidation, galaxies: Dataset, folder: Path) -> list[Path]:
    """The figures of each scored label, as PNG and PDF."""
    names = galaxies.features["label"].names
    labels = result.table["label"]
    # The figures draw these galaxies as they are, so the probabilities have to be for them and not for the sky.
    here = probabilities_at_prevalence(
        result.probabilities,
        assumed_prevalence=[result.sky_prevalence[name] for name in names],
        prevalence=[float((labels == name).mean()) for name in names],
    )
    figures = []
    for number in scored_labels(len(names), SINGLE_LABEL):
        name = names[number]
        end = "" if len(names) == 2 else probability_columns(names)[number].removeprefix("probability")
        given = (here[:, number], labels == name)
        reliability, ranking = folder / f"reliability{end}.png", folder / f"roc{end}.png"
        plot_reliability(*given, reliability, label=name, population="Out of fold")
        plot_roc_and_precision_recall(*given, ranking, label=name)
        figures += [path.with_suffix(ending) for path in (reliability, ranking) for ending in (".png", ".pdf")]
    return figures


def split_for_final_model(result: CrossValidation, dataset: Dataset | DatasetDict) -> DatasetDict:
    """One fold as `validation`, all other galaxies as `train`: what a model for everybody is trained on.

    No galaxy is left for a test, since the folds have judged each. Near-duplicates stay in one split.

    Args:
        result: From `cross_validate`.
        dataset: What it was given.

    Returns:
        `train` and `validation`; rows in the order of the dataset. Of the folds, the one with most galaxies of its
        rarest class is for validation.

    Raises:
        ValueError: Other galaxies than those of the result.
    """
    galaxies = _join(dataset)
    if galaxies["id_str"][:] != result.table["id_str"].tolist():
        raise ValueError(
            f"the dataset's {len(galaxies)} galaxies are not the {len(result.table)} of the result in their order; "
            "give the dataset that cross_validate was given."
        )
    fold_of = result.table["fold"].to_numpy()
    is_validation = fold_of == _fullest(fold_of, np.asarray(galaxies["label"][:]))
    return DatasetDict(
        train=galaxies.select(np.flatnonzero(~is_validation)),
        validation=galaxies.select(np.flatnonzero(is_validation)),
    )


def plot_doubtful_labels(
    doubtful: pd.DataFrame,
    galaxies: Dataset,
    path: str | Path,
    *,
    processor: ZoobotImageProcessor,
    count: int = AUDITED,
) -> None:
    """Draw the galaxies whose labels are most likely wrong, the likeliest first.

    Args:
        doubtful: From `find_doubtful_labels`.
        galaxies: With `id_str` and `image`; only the images that are drawn are read.
        path: Where the PNG is written; its folder is made.
        processor: The encoder's image processor, which has the stretch of FITS images.
        count: How many galaxies are drawn at most.
    """
    pictures = Pictures(galaxies, processor)
    rows = {identifier: row for row, identifier in enumerate(galaxies["id_str"][:])}
    first = doubtful.head(count).to_dict("records")
    titles = []
    for number, galaxy in enumerate(first, start=1):
        label, probability = shown_name(galaxy["label"]), galaxy["probability_of_label"]
        titles.append(f"{number}. {galaxy['id_str']}\nlabel: {label}\nP({label}) = {probability:.3f}")
    plot_galaxy_sheet([pictures[rows[galaxy["id_str"]]] for galaxy in first], titles, path)


def _join(dataset: Dataset | DatasetDict) -> Dataset:
    return concatenate_datasets(list(dataset.values())) if isinstance(dataset, DatasetDict) else dataset


def _embed(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    galaxies: Dataset,
    arguments: FrozenStageArguments,
) -> _Shared:
    views = Views(
        arguments.views,
        seed=arguments.seed,
        zoom_range=arguments.zoom_range,
        max_shift=arguments.max_shift,
    )
    model.to(arguments.device)
    plain, seen = (
        store_embeddings(
            model,
            galaxies,
            processor,
            views=each,
            dtype=arguments.embedding_dtype,
            cache_dir=arguments.embedding_cache_dir,
            torch_compile=arguments.torch_compile,
            bf16=arguments.bf16,
        )
        for each in (None, views if arguments.augment else None)
    )
    return _Shared({identifier: row for row, identifier in enumerate(galaxies["id_str"][:])}, plain, seen)


def _find_folds(
    galaxies: Dataset, labels: Integers, shared: _Shared, *, folds: int, seed: int
) -> tuple[Integers, pd.DataFrame, Integers]:
    """The fold of each galaxy, the near-duplicates, and the group of near-duplicates that each galaxy is in."""
    identifiers = galaxies["id_str"][:]
    embeddings = shared.plain.values[shared.plain.rows][:, 0].float().numpy()  # noqa: PD011  a tensor
    pairs = find_near_duplicates(identifiers, embeddings, [""] * len(identifiers))
    groups = group_near_duplicates(identifiers, pairs)
    fold_of = assign_folds(identifiers, labels, folds=folds, seed=seed, groups=groups)
    fold_by_id = dict(zip(identifiers, fold_of.tolist(), strict=True))
    pairs["split"], pairs["other_split"] = pairs["id_str"].map(fold_by_id), pairs["other_id_str"].map(fold_by_id)
    if len(pairs):
        logger.warning(
            "%d pairs of galaxies are near-duplicates and stay in one fold; the closest: %s and %s.",
            len(pairs),
            pairs["id_str"].iloc[0],
            pairs["other_id_str"].iloc[0],
        )
    return fold_of, pairs, groups


def _split(
    galaxies: Dataset,
    labels: Integers,
    fold_of: Integers,
    groups: Integers,
    *,
    fold: int,
    seed: int,
    balance: Strategy | None,
) -> DatasetDict:
    others = np.flatnonzero(fold_of != fold)
    part = assign_folds(
        galaxies.select(others)["id_str"][:],
        labels[others],
        folds=VALIDATION_SHARE,
        seed=seed + fold,
        groups=groups[others],
    )
    is_validation = part == _fullest(part, labels[others])
    train = galaxies.select(others[~is_validation])
    if balance is not None:
        train = balance_classes(train, seed=seed + fold, strategy=balance).dataset
    splits = DatasetDict(
        train=train,
        validation=galaxies.select(others[is_validation]),
        test=galaxies.select(np.flatnonzero(fold_of == fold)),
    )
    for name in ("train", "validation"):
        missing = [label for label, share in measure_prevalence(splits[name]).items() if share == 0]
        if missing:
            raise ValueError(
                f"without fold {fold} there is no galaxy of class {', '.join(missing)} in {name}: many of them are "
                "near-duplicates of each other, which stay in one fold; add galaxies of this class."
            )
    return splits


def _fullest(part: Integers, labels: Integers) -> int:
    """The part with most galaxies of its rarest class: of a class with few galaxies, some parts may have none."""
    rarest = [min(np.bincount(labels[part == number], minlength=labels.max() + 1)) for number in range(part.max() + 1)]
    return int(np.argmax(rarest))


def _new_model(model: ZoobotForImageClassification, train: Dataset) -> ZoobotForImageClassification:
    """A copy with a new head: the old one may have seen the galaxies of this fold."""
    fresh = copy.deepcopy(model)
    fresh.head = build_head(fresh.config).to(model.device)
    fresh.config.training_prevalence = measure_prevalence(train)
    return fresh


@contextlib.contextmanager
def _open_work_dir(work_dir: str | Path | None, *, delete_first: bool) -> Iterator[Path]:
    """The folder, or one for this run alone; all processes have the same, since they read the best checkpoint there."""
    if work_dir is None:
        with tempfile.TemporaryDirectory() as own:
            yield Path(broadcast_object_list([own])[0])
            PartialState().wait_for_everyone()
        return
    folder = Path(work_dir)
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if delete_first:
            forget_run(folder, folder.glob("fold-*"))
    PartialState().wait_for_everyone()
    yield folder


def _train(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    splits: DatasetDict,
    shared: _Shared,
    frozen: FrozenStageArguments,
    unfrozen: UnfrozenStageArguments | None,
    folder: Path,
) -> list[StageResult]:
    """What a fold's stages gave; of a fold that was finished earlier, what is on disk of it."""
    finished = folder.with_suffix(".json")
    if not finished.is_file():
        trainer = functools.partial(_SharedEmbeddingsTrainer, shared=shared)
        stages = run_stages(model, processor, splits, folder, frozen=frozen, unfrozen=unfrozen, frozen_trainer=trainer)
        if PartialState().is_main_process:
            write_json(finished, [asdict(stage) for stage in stages])
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of a fold that was finished earlier it is mostly gone
    return [StageResult(**values) for values in json.loads(finished.read_text())]


def _judge_fold(
    fold: int,
    stages: list[StageResult],
    splits: DatasetDict,
    config: ZoobotConfig,
    sky: Mapping[str, float],
    *,
    folds: int,
) -> _Fold:
    kept, labels = best_stage(stages), np.asarray(splits["test"]["label"][:])
    calibration = calibrate_head(kept.validation_outputs, splits["validation"]["label"][:], config)
    at_training = softmax(calibration.apply(np.asarray(kept.test_outputs)), axis=1)
    at_sky = probabilities_at_prevalence(
        at_training, assumed_prevalence=effective_training_prevalence(config), prevalence=list(sky.values())
    )
    rows = [_row(fold, stage, labels, is_kept=stage is kept) for stage in stages]
    own = next(row for row in rows if row["is_kept"])
    logger.info(
        "Fold %d of %d, %s stage: accuracy %.3f, ROC AUC %.3f, temperature %.2f.",
        fold + 1,
        folds,
        kept.name,
        own["accuracy"],
        own["roc_auc"],
        calibration.temperature[0],
    )
    return _Fold(at_training, at_sky, calibration.temperature[0], rows)


def _row(fold: int, stage: StageResult, labels: Integers, *, is_kept: bool) -> dict[str, Any]:
    scores = metrics_for_trainer(SINGLE_LABEL)(EvalPrediction(np.asarray(stage.test_outputs), labels))
    return {
        "fold": fold,
        "stage": stage.name,
        "is_kept": is_kept,
        "test_galaxies": len(labels),
        **{name: scores[name] for name in ("accuracy", "roc_auc", "log_loss")},
        "validation_loss": stage.validation_loss,
        "seconds": stage.seconds,
    }


def _join_folds(
    judged: list[_Fold], galaxies: Dataset, fold_of: Integers, duplicates: pd.DataFrame, sky: dict[str, float]
) -> CrossValidation:
    """The galaxies of all folds in the order of the dataset, scored as they are and for the sky."""
    names, labels, identifiers = list(sky), np.asarray(galaxies["label"][:]), galaxies["id_str"][:]
    at_training, at_sky = np.empty((len(galaxies), len(names))), np.empty((len(galaxies), len(names)))
    for fold, own in enumerate(judged):
        at_training[fold_of == fold], at_sky[fold_of == fold] = own.at_training, own.at_sky
    shares, here = list(sky.values()), list(measure_prevalence(galaxies).values())
    as_they_are = probabilities_at_prevalence(at_sky, assumed_prevalence=shares, prevalence=here)
    scores = score_probabilities(as_they_are, labels, label_names=names)
    is_sky_another = not np.allclose(shares, here, atol=1e-6)
    return CrossValidation(
        table=judged_table(identifiers, at_sky, labels, label_names=names).assign(fold=fold_of),
        accuracy=scores.overall["accuracy"],
        scores=scores,
        sky_scores=score_probabilities(at_sky, labels, label_names=names, sky_prevalence=shares)
        if is_sky_another
        else None,
        folds=pd.DataFrame([row for own in judged for row in own.rows]),
        temperatures=[own.temperature for own in judged],
        doubtful=find_doubtful_labels(identifiers, at_training, labels, label_names=names),
        duplicates=duplicates,
        sky_prevalence=sky,
    )
