"""The command `zoobot-hf`: each subcommand is one call into the library."""

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import set_seed

from .data.balance import Strategy
from .data.catalog import check_catalog_can_be_written, find_catalog, read_galaxies, write_catalog
from .data.dataset import load_galaxy_dataset, split_dataset
from .data.rings import load_rings
from .evaluation.selection import AIMS
from .models.configuration_zoobot import HEAD_TYPES, PREVALENCES, ZoobotConfig, small_encoder_config
from .models.conversion import DEFAULT_ZOOM, NORMALIZATIONS, image_processor_for, local_copy, read_configuration
from .models.export import FORMATS, export_to_onnx, export_to_transformers
from .models.image_processing_zoobot import ZoobotImageProcessor
from .models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from .models.modeling_zoobot import ZoobotForImageClassification
from .prediction.galaxies import Classifier
from .prediction.merge import TABLES, merge_predictions
from .prediction.survey import predict_galaxies, predict_survey
from .publishing.hub import check_push, push_folder
from .training.arguments import FrozenStageArguments, UnfrozenStageArguments, unfrozen_arguments_from_scratch
from .training.cross_validation import CrossValidation, cross_validate, write_cross_validation
from .training.embedding_cache import cache_folder, clear_cache, list_cache
from .training.finetuning import Finetuned, finetune
from .training.label_efficiency import NUMBERS, SEEDS, measure_label_curve, write_label_curve

DEMO_GALAXIES = 1500
DRAWN_PIXELS = 128
DEMO_PIXELS = 96
COMPARED_GALAXIES = 20
# numpy, which seeds the splits and the augmentation, takes no more.
LARGEST_SEED = 2**32 - 1


def main(arguments: list[str] | None = None) -> int:
    """The exit status of a command line: 0 when all went well.

    Args:
        arguments: The command line without the program's name; the process's own when absent.
    """
    options = _parser().parse_args(arguments)
    try:
        with _log_on_stdout():
            return int(options.command(options))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        if options.debug:
            raise
        _complain(_in_one_line(error))
        return 1
    except KeyboardInterrupt:
        if options.debug:
            raise
        advice = "; go on with --resume" if options.command is _finetune else ""
        _complain(f"interrupted{advice}")
        return 130  # what shells give for SIGINT


@contextlib.contextmanager
def _log_on_stdout() -> Iterator[None]:
    # The package's log alone: the libraries' loggers have handlers of their own, and would say everything twice.
    logger, handler = logging.getLogger(__package__), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _complain(message: str) -> None:
    # Not print: the message would end up on the line of a progress bar that was left half way.
    tqdm.write(f"zoobot-hf: {message}", file=sys.stderr)


def _in_one_line(error: Exception) -> str:
    # Libraries below spread some of their messages over several lines, and a few have none.
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SafetensorError):  # says neither what it read nor what to do
        return f"the model's weights, model.safetensors, are damaged ({message}); copy or download them again."
    return message


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; argparse's own repeat every option before they say what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _number(
    kind: type[int] | type[float], at_least: float = -math.inf, *, above: float = -math.inf, at_most: float = math.inf
) -> Callable[[str], float]:
    """A function that reads an option's number and refuses one out of range; NaN and infinity always are."""
    limits = {"at least": at_least, "above": above, "at most": at_most}
    wanted = " and ".join(f"{name} {limit:.0f}" for name, limit in limits.items() if math.isfinite(limit))

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (at_least <= number <= at_most and above < number < math.inf):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"it is {text!r}; give {noun} {wanted}")
        return number

    return read


def _share(text: str) -> tuple[str, float]:
    label, _, share = text.rpartition("=")
    try:
        return label, float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a label and its share, as in ring=0.05") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zoobot-hf", description="Finetune a galaxy encoder, publish it, predict a survey.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = _add_command(commands, "demo", help="finetune an encoder to drawn ring galaxies, with no network")
    _add_demo_options(demo)
    tune = _add_command(commands, "finetune", help="train a new head on an encoder, then both")
    _add_finetune_options(tune)
    curve = _add_command(commands, "curve", help="measure how many labels are enough")
    _add_curve_options(curve)
    predict = _add_command(commands, "predict", help="write a table of predictions for a catalog or a folder of images")
    _add_predict_options(predict)
    merge = _add_command(commands, "merge", help="turn the folder that predict wrote into one table")
    _add_merge_options(merge)
    cache = _add_command(commands, "cache", help="list the embeddings that are kept on disk, or delete them")
    cache.add_argument("--clear", action="store_true", help="delete them all")
    cache.add_argument("--debug", action="store_true", help="show where an error came from")
    cache.set_defaults(command=_cache)
    push = _add_command(commands, "push", help="send a finished run to the Hub in one commit")
    _add_push_options(push)
    export = _add_command(commands, "export", help="turn a finetuned model into plain transformers or ONNX")
    _add_export_options(export)
    for command in (demo, tune, curve):
        command.add_argument(
            "--seed", type=_number(int, 0, at_most=LARGEST_SEED), default=42, help="(default: %(default)s)"
        )
    for command in (demo, tune, curve, predict):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    for command in (demo, tune, curve, predict, merge, push, export):
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def _add_command(commands: Any, name: str, *, help: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    return command


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--output_dir", default="demo", type=Path, help="where the results go (default: %(default)s)")
    demo.set_defaults(command=_demo)


def _add_finetune_options(tune: argparse.ArgumentParser) -> None:
    _add_encoder_and_dataset(tune)
    tune.add_argument("--output_dir", required=True, type=Path, help="where model, card, table and figures go")
    for split in ("validation", "test"):
        tune.add_argument(
            f"--{split}_fraction",
            type=float,
            default=0.2,
            help=f"share of the galaxies in the {split} split, unless the dataset has one (default: %(default)s)",
        )
    tune.add_argument(
        "--sky_prevalence",
        nargs="+",
        type=_share,
        metavar="LABEL=SHARE",
        help="share of each label in the sky that predictions are for; one may be left out, and is the rest "
        "(default: that of the training split before balancing)",
    )
    tune.add_argument(
        "--decision_aim",
        choices=AIMS,
        default="f1",
        help="what the threshold for selecting galaxies is for (default: %(default)s, the best there is)",
    )
    tune.add_argument(
        "--decision_at_least",
        type=_number(float, above=0, at_most=1),
        help="the purity or completeness to be reached in the sky",
    )
    tune.add_argument("--balance", choices=get_args(Strategy), help="balance the classes of the training split")
    tune.add_argument(
        "--folds",
        type=_number(int, 2),
        help="judge every galaxy by a model that was not trained on it, in this many folds, before the finetuning; the "
        "tables go to a folder beside output_dir",
    )
    _add_training_options(tune)
    tune.set_defaults(command=_finetune)


def _add_encoder_and_dataset(command: argparse.ArgumentParser) -> None:
    command.add_argument("--encoder", required=True, help="folder or Hub id of an encoder or a finetuned model")
    command.add_argument("--dataset", required=True, help="catalog, folder, Hub id, or 'simulated' for drawn rings")
    command.add_argument("--label_column", default="label", help="column with the labels (default: %(default)s)")
    command.add_argument("--configuration", help="configuration of a Hub dataset")
    command.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    command.add_argument(
        "--zoom",
        type=_number(float, 1),
        help=f"magnify the centre of each image by this (default: {DEFAULT_ZOOM}, or the finetuned model's own)",
    )
    command.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="auto",
        help="'encoder' applies the mean and standard deviation that the encoder's repository states; 'none' gives "
        "RGB in 0-1, as Galaxy Zoo's encoders take it; 'auto' is 'none' for encoders in timm's layout and 'encoder' "
        "for others that state them (default: %(default)s)",
    )


def _add_curve_options(curve: argparse.ArgumentParser) -> None:
    _add_encoder_and_dataset(curve)
    curve.add_argument("--output_dir", required=True, type=Path, help="where the tables and the figure go")
    curve.add_argument(
        "--numbers",
        nargs="+",
        type=_number(int, 2),
        default=list(NUMBERS),
        help="labelled galaxies of each class (default: %(default)s)",
    )
    curve.add_argument(
        "--seeds", type=_number(int, 2), default=SEEDS, help="draws of labelled galaxies (default: %(default)s)"
    )
    curve.add_argument("--skip_untrained", action="store_true", help="leave out the encoder with random weights")
    curve.set_defaults(command=_curve)


def _add_training_options(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("--head_type", choices=HEAD_TYPES, default="linear", help="(default: %(default)s)")
    tune.add_argument(
        "--frozen_epochs",
        type=_number(float, above=0),
        help=f"most epochs with the encoder frozen (default: {FrozenStageArguments.num_train_epochs})",
    )
    tune.add_argument(
        "--unfrozen_epochs",
        type=_number(float, 0),
        help=f"most epochs after that; 0 leaves the stage out (default: {UnfrozenStageArguments.num_train_epochs})",
    )
    tune.add_argument(
        "--last_blocks",
        type=_number(int, 1),
        help="unfreeze only this many of the encoder's last blocks (default: all)",
    )
    tune.add_argument("--license", metavar="NAME", help="the model's licence on its card, for example apache-2.0")
    tune.add_argument("--push_to_hub", metavar="USER/NAME", help="push the finetuned model to this repository")
    earlier_run = tune.add_mutually_exclusive_group()
    earlier_run.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    earlier_run.add_argument("--overwrite", action="store_true", help="delete the run in output_dir and start anew")


def _add_predict_options(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("--model", required=True, help="folder or Hub id of a finetuned model")
    predict.add_argument(
        "--images",
        required=True,
        help="catalog, or folder with a catalog or images; for an output folder also a pattern for many catalogs, in "
        "quotes",
    )
    predict.add_argument(
        "--output",
        required=True,
        type=Path,
        help="one table: .csv, .parquet, .fits, .vot or .ecsv; or a folder, for a survey of any size: the same command "
        "goes on with a run that was stopped",
    )
    predict.add_argument(
        "--batch_size",
        type=_number(int, 1),
        help="galaxies that the encoder sees at once (default: what suits the device)",
    )
    predict.add_argument(
        "--prevalence", choices=PREVALENCES, help="probabilities for this prevalence (default: the model's own)"
    )
    predict.add_argument(
        "--torch_compile", action="store_true", help="compile the model, which pays from some thousand images on"
    )
    predict.add_argument(
        "--retry_failures", action="store_true", help="try again what an earlier run into the folder couldn't read"
    )
    predict.add_argument(
        "--max_failures", type=_number(int, 0), help="stop a run into a folder after more failures than this"
    )
    predict.set_defaults(command=_predict)


def _add_merge_options(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("folder", type=Path, metavar="FOLDER", help="what predict wrote and finished")
    merge.add_argument("--output", required=True, type=Path, help="the table: .parquet, .csv, .fits or .vot")
    merge.add_argument(
        "--table",
        choices=TABLES,
        default="predictions",
        help="for a decision tree also Galaxy Zoo's friendly and advanced tables (default: %(default)s)",
    )
    merge.add_argument("--catalog", type=Path, help="a catalog whose columns are joined by id_str")
    merge.set_defaults(command=_merge)


def _add_push_options(push: argparse.ArgumentParser) -> None:
    push.add_argument("folder", type=Path, metavar="OUT", help="output_dir of a finished run")
    push.add_argument("repo_id", metavar="USER/NAME", help="the repository; made where it doesn't exist")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--branch", help="branch to commit to, made where it doesn't exist (default: main)")
    push.add_argument("--pull_request", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--message", help="first line of the commit")
    push.add_argument("--include_code", action="store_true", help="let it load where zoobot_hf is not installed")
    push.set_defaults(command=_push)


def _add_export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("model", metavar="OUT", help="folder or Hub id of a finetuned model")
    export.add_argument("--format", choices=FORMATS, required=True, help="'onnx' needs the extra zoobot-hf[onnx]")
    export.add_argument("--output_dir", type=Path, help="a new folder (default: OUT/FORMAT, or FORMAT for a Hub id)")
    export.set_defaults(command=_export)


def _demo(options: argparse.Namespace) -> int:
    _check_device(options.device)
    set_seed(options.seed)
    dataset = load_rings("simulated", seed=options.seed, count=DEMO_GALAXIES, size=DRAWN_PIXELS)
    # Until a trained encoder comes with the package, the demo's is new, and the unfrozen stage trains it from scratch.
    model = ZoobotForImageClassification(small_encoder_config(dataset["train"].features["label"].names))
    processor = ZoobotImageProcessor(DEMO_PIXELS, zoom=DEFAULT_ZOOM)
    frozen, _ = _stage_arguments(options)
    frozen.num_train_epochs = 5
    unfrozen = unfrozen_arguments_from_scratch(seed=options.seed, use_cpu=options.device == "cpu")
    finetuned = finetune(
        model,
        processor,
        dataset,
        options.output_dir,
        frozen=frozen,
        unfrozen=unfrozen,
        overwrite=True,
        dataset_name="simulated",
    )
    _report(finetuned)
    return 0


def _finetune(options: argparse.Namespace) -> int:
    _check_device(options.device)
    if options.push_to_hub:
        check_push(options.push_to_hub)
    fractions = {"validation_fraction": options.validation_fraction, "test_fraction": options.test_fraction}
    galaxies = _load(options)
    dataset = split_dataset(galaxies, seed=options.seed, **fractions)
    processor = image_processor_for(options.encoder, normalization=options.normalization, zoom=options.zoom)
    set_seed(options.seed)  # the new head's weights
    model = ZoobotForImageClassification.from_pretrained(
        options.encoder, label_names=dataset["train"].features["label"].names, head_type=options.head_type
    )
    frozen, unfrozen = _stage_arguments(options)
    if options.frozen_epochs is not None:
        frozen.num_train_epochs = options.frozen_epochs
    if options.unfrozen_epochs is not None:
        unfrozen.num_train_epochs = options.unfrozen_epochs
    unfrozen.last_blocks = options.last_blocks
    if options.folds is not None:
        _cross_validate(options, model, processor, galaxies, frozen, unfrozen)
    finetuned = finetune(
        model,
        processor,
        dataset,
        options.output_dir,
        frozen=frozen,
        unfrozen=unfrozen,
        skip_unfrozen=options.unfrozen_epochs == 0,
        balance=options.balance,
        resume=options.resume,
        overwrite=options.overwrite,
        dataset_name=Path(options.dataset).name if Path(options.dataset).exists() else options.dataset,
        sky_prevalence=dict(options.sky_prevalence) if options.sky_prevalence else None,
        decision_aim=options.decision_aim,
        decision_at_least=options.decision_at_least,
        license_name=options.license,
    )
    if PartialState().is_main_process:
        _report(finetuned)
        if options.push_to_hub:
            print(f"pushed to {push_folder(finetuned.output_dir, options.push_to_hub)}")
    return 0


def _cross_validate(
    options: argparse.Namespace,
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    galaxies: Dataset | DatasetDict,
    frozen: FrozenStageArguments,
    unfrozen: UnfrozenStageArguments,
) -> None:
    result = cross_validate(
        model,
        processor,
        galaxies,
        folds=options.folds,
        frozen=frozen,
        unfrozen=unfrozen,
        skip_unfrozen=options.unfrozen_epochs == 0,
        balance=options.balance,
        seed=options.seed,
    )
    folder = options.output_dir.resolve().with_name(f"{options.output_dir.resolve().name}-folds")
    paths = write_cross_validation(result, galaxies, folder)
    _report_folds(result)
    print("\n" + "\n".join(map(str, paths)))


def _report_folds(result: CrossValidation) -> None:
    names = ("roc_auc", "log_loss", "expected_calibration_error")
    print(f"\nout of fold, {len(result.table)} galaxies: value and {result.scores.confidence:.0%} interval")
    print("{:40}{:8.3f}  {:.3f} to {:.3f}".format("accuracy", *result.accuracy))
    for label, scores in result.scores.labels.items():
        for name in names:
            print("{:40}{:8.3f}  {:.3f} to {:.3f}".format(f"{name.replace('_', ' ')} of {label}", *scores[name]))
    print(f"{int(result.doubtful['is_doubtful'].sum())} labels are doubtful")


def _curve(options: argparse.Namespace) -> int:
    device = _check_device(options.device)
    dataset = _load(options)
    features = (next(iter(dataset.values())) if isinstance(dataset, DatasetDict) else dataset).features
    processor = image_processor_for(options.encoder, normalization=options.normalization, zoom=options.zoom)
    model = ZoobotForImageClassification.from_pretrained(options.encoder, label_names=features["label"].names)
    curve = measure_label_curve(
        model.to(device),
        processor,
        dataset,
        numbers=options.numbers,
        seeds=options.seeds,
        with_untrained=not options.skip_untrained,
        seed=options.seed,
    )
    paths = write_label_curve(curve, options.output_dir)
    wide = curve.table.pivot_table(index=["score", "series"], columns="labels", values="value", sort=False)
    print(
        f"\nmean over {options.seeds} seeds, by labelled galaxies of each class\n{wide.to_string(float_format='%.3f')}"
    )
    if curve.extrapolation is not None:
        print(f"\n{curve.extrapolation.describe()}")
    print("\n" + "\n".join(map(str, paths)))
    return 0


def _predict(options: argparse.Namespace) -> int:
    if not options.output.suffix:
        return _predict_survey(options)
    return _predict_table(options)


def _predict_survey(options: argparse.Namespace) -> int:
    device = _check_device(options.device)
    model, processor = _load_classifier(options.model)
    done = predict_survey(
        model,
        processor,
        options.images,
        options.output,
        model_name=options.model,
        batch_size=options.batch_size,
        device=device,
        prevalence=options.prevalence,
        torch_compile=options.torch_compile,
        retry_failures=options.retry_failures,
        max_failures=options.max_failures,
    )
    if PartialState().is_main_process:
        print(f"{done.galaxies - done.failures} galaxies: {done.folder / 'predictions'}")
        if done.failures:
            path = done.folder / "failures.parquet"
            _complain(f"{done.failures} of {done.galaxies} galaxies can't be predicted; their reasons: {path}")
    return 1 if done.failures else 0


def _predict_table(options: argparse.Namespace) -> int:
    for name in ("retry_failures", "max_failures"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{name} is for an output folder, and {options.output} is one table; leave it out.")
    device = _check_device(options.device)
    failures_path = options.output.with_name(f"{options.output.stem}-failures.csv")
    _check_tables(Path(options.images), options.output, failures_path)
    catalog = read_galaxies(options.images, images_must_exist=False)
    model, processor = _load_finetuned(options.model)
    table, failures = predict_galaxies(
        model,
        processor,
        catalog,
        batch_size=options.batch_size,
        device=device,
        prevalence=options.prevalence,
        torch_compile=options.torch_compile,
    )
    write_catalog(table, options.output)
    print(f"{len(table)} galaxies: {options.output}")
    if failures.empty:
        failures_path.unlink(missing_ok=True)  # an earlier run's, and no longer true
        return 0
    write_catalog(failures, failures_path)
    _complain(f"{len(failures)} of {len(catalog)} images can't be read; their reasons: {failures_path}")
    return 1


def _merge(options: argparse.Namespace) -> int:
    check_catalog_can_be_written(options.output)
    count = merge_predictions(options.folder, options.output, table=options.table, catalog=options.catalog)
    print(f"{count} galaxies: {options.output}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    if options.clear:
        print(f"{clear_cache() / 1e6:.1f} MB freed in {cache_folder()}")
        return 0
    files = list_cache()
    for file in files:
        print(
            f"{file.size / 1e6:10.1f} MB  {file.images:8} images x {file.views} views  {file.encoder}  {file.path.name}"
        )
    print(f"{sum(file.size for file in files) / 1e6:10.1f} MB in {cache_folder()}")
    return 0


def _push(options: argparse.Namespace) -> int:
    url = push_folder(
        options.folder,
        options.repo_id,
        private=options.private or None,
        revision=options.branch,
        create_pr=options.pull_request,
        commit_message=options.message,
        include_code=options.include_code,
    )
    print(f"pushed to {url}")
    return 0


def _export(options: argparse.Namespace) -> int:
    model, processor = _load_finetuned(options.model)
    beside = Path(options.model) if Path(options.model).is_dir() else Path()
    folder = options.output_dir or beside / options.format
    galaxies = load_rings("simulated", count=COMPARED_GALAXIES, size=DRAWN_PIXELS)["train"]
    pixel_values = processor(galaxies["image"][:])["pixel_values"]
    export = {"transformers": export_to_transformers, "onnx": export_to_onnx}[options.format]
    difference = export(model, processor, folder, pixel_values=pixel_values)
    print(
        f"{options.format}  {folder}\nlogits of {len(pixel_values)} drawn galaxies differ by at most {difference:.1e}"
    )
    return 0


def _check_tables(images: Path, *tables: Path) -> None:
    """Finds out before the predictions, which may take hours, what would stop their tables from being written."""
    catalog_path = find_catalog(images) if images.is_dir() else images
    for path in tables:
        check_catalog_can_be_written(path)
        if catalog_path is not None and path.resolve() == catalog_path.resolve():
            raise ValueError(f"output is {path}, the catalog itself, which would be lost; choose another file.")


def _load_finetuned(name: str) -> tuple[ZoobotForImageClassification, ZoobotImageProcessor]:
    folder = local_copy(name)
    if read_configuration(folder).get("model_type") != ZoobotConfig.model_type:
        # from_pretrained would give it a new head, whose predictions are noise.
        raise ValueError(
            f"model is {name!r}, which zoobot-hf has not finetuned; run zoobot-hf finetune --encoder {name}."
        )
    return ZoobotForImageClassification.from_pretrained(name), ZoobotImageProcessor.from_pretrained(folder)


def _load_classifier(name: str) -> tuple[Classifier, ZoobotImageProcessor]:
    folder = local_copy(name)
    if read_configuration(folder).get("decision_tree"):
        return ZoobotForGalaxyZoo.from_pretrained(name), ZoobotImageProcessor.from_pretrained(folder)
    return _load_finetuned(name)


def _load(options: argparse.Namespace) -> Dataset | DatasetDict:
    if options.dataset == "simulated":
        return load_rings("simulated", seed=options.seed)
    return load_galaxy_dataset(
        options.dataset,
        label_column=options.label_column,
        configuration=options.configuration,
        revision=options.revision,
    )


def _stage_arguments(options: argparse.Namespace) -> tuple[FrozenStageArguments, UnfrozenStageArguments]:
    common = {"seed": options.seed, "use_cpu": options.device == "cpu"}
    return FrozenStageArguments(**common), UnfrozenStageArguments(**common)


def _check_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "device is 'cuda', and this machine has no CUDA device that torch can use; choose cpu or auto."
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _report(finetuned: Finetuned) -> None:
    names = ("accuracy", "roc_auc", "completeness", "purity", "log_loss")
    print("\non the test split" + "".join(f"{name.replace('_', ' '):>14}" for name in names))
    for stage in finetuned.stages:
        kept = " (kept)" if stage.name == finetuned.kept_stage else ""
        values = [finetuned.test_metrics[stage.name][name] for name in names]
        print(f"{stage.name + kept:17}" + "".join(f"{value:14.3f}" for value in values))
    folder = finetuned.output_dir
    print(f"\nmodel    {folder}\ncard     {folder / 'README.md'}\ntable    {folder / 'predictions.parquet'}")
    print(f"figures  {', '.join(str(path) for path in sorted((folder / 'figures').glob('*.png')))}")


if __name__ == "__main__":
    sys.exit(main())
