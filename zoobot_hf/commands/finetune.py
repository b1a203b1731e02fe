"""`zoobot-hf finetune`: a new head on an encoder, then both."""

import argparse
import math
from pathlib import Path
from typing import get_args

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import set_seed

from ..data.balance import Strategy
from ..data.dataset import split_dataset
from ..data.decision_tree import DecisionTree, load_survey, load_tree
from ..evaluation.intervals import Estimate
from ..evaluation.selection import AIMS, check_aim
from ..models.configuration_zoobot import HEAD_TYPES
from ..models.image_processing_zoobot import ZoobotImageProcessor
from ..models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from ..models.modeling_zoobot import ModelWithHead, ZoobotForImageClassification
from ..publishing.hub import ADVANCED, FRIENDLY, PREDICTIONS, check_push, push_folder
from ..training.arguments import FrozenStageArguments, UnfrozenStageArguments
from ..training.cross_validation import (
    CrossValidation,
    cross_validate,
    split_for_final_model,
    write_cross_validation,
)
from ..training.finetuning import check_output, checkpoints_folder, finetune
from ..training.run_report import Finetuned
from .inputs import choose_device, load_dataset, load_processor, load_votes, stage_arguments
from .options import add_device, add_encoder_and_dataset, add_precision, add_seed, number, share

FRACTIONS = ("validation_fraction", "test_fraction")
FRACTION = 0.2
SCORES_OF_LABELS = ("accuracy", "roc_auc", "completeness", "purity", "log_loss")
COLUMNS_OF_VOTES = {
    "vote_accuracy": "accuracy",
    "vote_mean_absolute_error": "mean error",
    "vote_root_mean_squared_error": "RMS error",
    "vote_log_likelihood": "log likelihood",
    "vote_interval_coverage": "coverage",
}
Stages = tuple[FrozenStageArguments, UnfrozenStageArguments]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_and_dataset(parser)
    parser.add_argument(
        "--survey",
        metavar="NAME|FILE.json",
        help="train on volunteers' votes on the questions of this survey, or of a decision tree of your own; a model "
        "that answers another survey starts from the answers that both share",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="where model, card, table and figures go")
    _add_splits(parser)
    _add_sky_and_decision(parser)
    _add_balance_and_folds(parser)
    _add_stages(parser)
    parser.add_argument("--license", metavar="NAME", help="the model's licence on its card, for example apache-2.0")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="push the finetuned model to this repository")
    _add_earlier_run(parser)
    add_seed(parser)
    add_device(parser)
    parser.set_defaults(advice="; go on with --resume")


def _add_splits(parser: argparse.ArgumentParser) -> None:
    for name in FRACTIONS:
        split = name.removesuffix("_fraction")
        parser.add_argument(
            f"--{name}",
            type=float,
            help=f"share of the galaxies in the {split} split, unless the dataset has one (default: {FRACTION})",
        )


def _add_sky_and_decision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sky_prevalence",
        nargs="+",
        action="extend",
        type=share,
        metavar="LABEL=SHARE",
        help="share of each label in the sky that predictions are for; one may be left out, and is the rest "
        "(default: that of the training split before balancing)",
    )
    parser.add_argument(
        "--decision_aim",
        choices=AIMS,
        help="what the threshold for selecting galaxies is for (default: f1, the best there is)",
    )
    parser.add_argument(
        "--decision_at_least",
        type=number(float, above=0, at_most=1),
        help="the purity or completeness to be reached in the sky",
    )


def _add_balance_and_folds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--balance", choices=get_args(Strategy), help="balance the classes of the training split")
    parser.add_argument(
        "--folds",
        type=number(int, 2),
        help="judge every galaxy by a model that was not trained on it, in this many folds, and then train a model on "
        "all of them but a fold for validation; its card has the scores of the folds, and their label audit goes to a "
        "folder beside output_dir",
    )


def _add_stages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head_type", choices=HEAD_TYPES, default="linear", help="(default: %(default)s)")
    parser.add_argument(
        "--frozen_epochs",
        type=number(float, above=0),
        help=f"most epochs with the encoder frozen (default: {FrozenStageArguments.num_train_epochs})",
    )
    parser.add_argument(
        "--unfrozen_epochs",
        type=number(float, 0),
        help=f"most epochs after that; 0 leaves the stage out (default: {UnfrozenStageArguments.num_train_epochs})",
    )
    parser.add_argument(
        "--last_blocks",
        type=number(int, 1),
        help="unfreeze only this many of the encoder's last blocks (default: all)",
    )
    add_precision(
        parser,
        default="on a GPU that has it in hardware; on a CPU with AMX or AVX512_BF16 only in the unfrozen stage's steps",
    )


def _add_earlier_run(parser: argparse.ArgumentParser) -> None:
    earlier_run = parser.add_mutually_exclusive_group()
    earlier_run.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    earlier_run.add_argument("--overwrite", action="store_true", help="delete the run in output_dir and start anew")


def run(options: argparse.Namespace) -> int:
    choose_device(options.device)
    tree = _choose_tree(options)
    _check_before_training(options)
    galaxies = load_dataset(options) if tree is None else load_votes(options, tree)
    dataset = _split(options, galaxies) if options.folds is None else None
    processor = load_processor(options.encoder, options)
    set_seed(options.seed)  # the new head's weights
    model = _load_model(options, galaxies, tree=tree)
    stages = _read_stages(options)
    out_of_fold = None
    if dataset is None:
        assert isinstance(model, ZoobotForImageClassification)  # with a survey, folds are refused
        out_of_fold = _cross_validate(options, model, processor=processor, galaxies=galaxies, stages=stages)
        dataset = split_for_final_model(out_of_fold, galaxies)
    finetuned = _finetune(options, model, processor=processor, dataset=dataset, stages=stages, out_of_fold=out_of_fold)
    if PartialState().is_main_process:
        print_report(finetuned)
        if options.push_to_hub:
            print(f"pushed to {push_folder(finetuned.output_dir, options.push_to_hub)}")
    return 0


def _choose_tree(options: argparse.Namespace) -> DecisionTree | None:
    """The decision tree to train on votes for; None without `--survey`."""
    if options.survey is None:
        return None
    for name in ("label_column", "folds"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is for labels, and with a survey the model is trained on votes; leave it out.")
    return load_tree(options.survey) if options.survey.endswith(".json") else load_survey(options.survey)


def _check_before_training(options: argparse.Namespace) -> None:
    """Refuses now what would be refused after hours of training."""
    if options.push_to_hub:
        check_push(options.push_to_hub)
    if options.folds is None:
        return
    for name in FRACTIONS:
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is for a model that is tested on a split of its own; leave it out with folds.")
    check_aim(options.decision_aim or "f1", options.decision_at_least)
    for folder in (options.output_dir, _folds_folder(options)):
        check_output(folder, resume=options.resume, overwrite=options.overwrite)


def _folds_folder(options: argparse.Namespace) -> Path:
    output_dir: Path = options.output_dir.resolve()
    return output_dir.with_name(f"{output_dir.name}-folds")


def _split(options: argparse.Namespace, galaxies: Dataset | DatasetDict) -> DatasetDict:
    given = (getattr(options, name) for name in FRACTIONS)
    validation, test = (FRACTION if fraction is None else fraction for fraction in given)
    return split_dataset(galaxies, seed=options.seed, validation_fraction=validation, test_fraction=test)


def _read_stages(options: argparse.Namespace) -> Stages:
    """How the frozen and the unfrozen stage train, of the folds and of the final model alike."""
    frozen, unfrozen = stage_arguments(options, bf16=options.bf16)
    if options.frozen_epochs is not None:
        frozen.num_train_epochs = options.frozen_epochs
    if options.unfrozen_epochs is not None:
        unfrozen.num_train_epochs = options.unfrozen_epochs
    unfrozen.last_blocks = options.last_blocks
    return frozen, unfrozen


def _sky_prevalence(options: argparse.Namespace) -> dict[str, float] | None:
    shares = options.sky_prevalence and dict(options.sky_prevalence)
    if shares and len(shares) < len(options.sky_prevalence):
        raise ValueError(f"sky_prevalence has a label twice: {options.sky_prevalence}; give each label one share.")
    return shares


def _load_model(
    options: argparse.Namespace, galaxies: Dataset | DatasetDict, *, tree: DecisionTree | None
) -> ModelWithHead:
    if tree is not None:
        return ZoobotForGalaxyZoo.from_pretrained(
            options.encoder, decision_tree=tree.to_dict(), head_type=options.head_type
        )
    split = next(iter(galaxies.values())) if isinstance(galaxies, DatasetDict) else galaxies
    return ZoobotForImageClassification.from_pretrained(
        options.encoder,
        label_names=split.features["label"].names,
        problem_type="single_label_classification",
        head_type=options.head_type,
    )


def _cross_validate(
    options: argparse.Namespace,
    model: ZoobotForImageClassification,
    *,
    processor: ZoobotImageProcessor,
    galaxies: Dataset | DatasetDict,
    stages: Stages,
) -> CrossValidation:
    (frozen, unfrozen), folder = stages, _folds_folder(options)
    result = cross_validate(
        model,
        processor,
        galaxies,
        folds=options.folds,
        frozen=frozen,
        unfrozen=unfrozen,
        skip_unfrozen=options.unfrozen_epochs == 0,
        balance=options.balance,
        sky_prevalence=_sky_prevalence(options),
        seed=options.seed,
        work_dir=checkpoints_folder(folder),
        overwrite=options.overwrite,
    )
    if PartialState().is_main_process:
        paths = write_cross_validation(result, galaxies, folder, processor=processor)
        _report_folds(result)
        print("\n" + "\n".join(map(str, paths)))
    return result


def _score_line(name: str, score: Estimate) -> str:
    interval = f"  {score.low:.3f} to {score.high:.3f}" if math.isfinite(score.low) else ""
    return f"{name:40}{score.value:8.3f}{interval}"


def _report_folds(result: CrossValidation) -> None:
    names = ("roc_auc", "log_loss", "expected_calibration_error")
    print(f"\nout of fold, {len(result.table)} galaxies: value and {result.scores.confidence:.0%} interval")
    print(_score_line("accuracy", result.accuracy))
    for label, scores in result.scores.labels.items():
        for name in names:
            print(_score_line(f"{name.replace('_', ' ')} of {label}", scores[name]))
    print(f"{int(result.doubtful['is_doubtful'].sum())} labels are doubtful")


def _finetune(
    options: argparse.Namespace,
    model: ModelWithHead,
    *,
    processor: ZoobotImageProcessor,
    dataset: DatasetDict,
    stages: Stages,
    out_of_fold: CrossValidation | None,
) -> Finetuned:
    frozen, unfrozen = stages
    return finetune(
        model,
        processor,
        dataset,
        options.output_dir,
        frozen=frozen,
        unfrozen=unfrozen,
        skip_unfrozen=options.unfrozen_epochs == 0,
        balance=options.balance,
        out_of_fold=out_of_fold,
        resume=options.resume,
        overwrite=options.overwrite,
        dataset_name=options.dataset,
        sky_prevalence=_sky_prevalence(options) if out_of_fold is None else None,
        decision_aim=options.decision_aim,
        decision_at_least=options.decision_at_least,
        license_name=options.license,
    )


def print_report(finetuned: Finetuned) -> None:
    answers_a_tree = isinstance(finetuned.model, ZoobotForGalaxyZoo)
    names = COLUMNS_OF_VOTES if answers_a_tree else {name: name.replace("_", " ") for name in SCORES_OF_LABELS}
    out_of_fold, measured = finetuned.out_of_fold_metrics, finetuned.test_metrics
    heading = "on the test split" if out_of_fold is None else "out of fold"
    print(f"\n{heading:17}" + "".join(f"{words:>16}" for words in names.values()))
    for stage, metrics in (measured if out_of_fold is None else {"models of folds": out_of_fold}).items():
        kept = " (kept)" if stage == finetuned.kept_stage else ""
        print(f"{stage + kept:17}" + "".join(f"{metrics[name]:16.3f}" for name in names))
    folder = finetuned.output_dir
    print(f"\nmodel    {folder}\ncard     {folder / 'README.md'}")
    tables = (folder / name for name in (PREDICTIONS, FRIENDLY, ADVANCED) if (folder / name).is_file())
    print(f"table    {', '.join(map(str, tables))}")
    print(f"figures  {', '.join(str(path) for path in sorted((folder / 'figures').glob('*.png')))}")
