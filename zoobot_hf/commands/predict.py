"""`zoobot-hf predict`: a table of predictions for a catalog, a folder of images or a survey."""

import argparse
import glob
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from ..data.catalog import (
    check_catalog_can_be_written,
    check_catalog_is_kept,
    check_columns_fit,
    find_catalog,
    read_galaxies,
    write_catalog,
)
from ..evaluation.vote_tables import advanced_table, friendly_table
from ..models.configuration_zoobot import PREVALENCES, ZoobotConfig
from ..prediction.embeddings import predict_embeddings
from ..prediction.galaxies import predict_galaxies, table_of
from ..prediction.pieces import names_archive, names_hub_dataset
from ..prediction.runs import Survey
from ..prediction.survey import predict_survey
from ..publishing.hub import CONFIGURATION, OPTIONAL_FILES
from ..training.machine import prepare_processes
from .inputs import HUB_OPTIONS, choose_device, find_images, load_finetuned
from .messages import complain
from .options import add_batches, add_device, add_hub_dataset, add_survey


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub id of a finetuned model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images",
        help="catalog, or folder with a catalog or images; for an output folder also a WebDataset tar archive, a "
        "pattern for many catalogs or archives, in quotes, or the id of a Hub dataset",
    )
    source.add_argument(
        "--embeddings",
        type=Path,
        help="instead of images, the folder that embed wrote with this model's encoder; the output is a folder too",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="one table: .csv, .parquet, .fits, .vot or .ecsv, and for a decision tree Galaxy Zoo's friendly and "
        "advanced tables beside it; or a folder, for a survey of any size: the same command goes on with a run "
        "that was stopped",
    )
    parser.add_argument(
        "--prevalence", choices=PREVALENCES, help="probabilities for this prevalence (default: the model's own)"
    )
    add_batches(parser)
    add_survey(parser)
    add_hub_dataset(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    if options.embeddings is None and options.output.suffix:
        return _predict_table(options)
    done = _predict_survey(options) if options.embeddings is None else _predict_embeddings(options)
    return report_survey(done, contents="predictions", participle="predicted")


def report_survey(done: Survey, *, contents: str, participle: str) -> int:
    """The exit status of a run into a folder; the main process says what the run left there."""
    state = PartialState()
    if state.is_main_process:
        print(f"{done.galaxies - done.failures} galaxies: {done.folder / contents}")
        if done.failures:
            path = done.folder / "failures.parquet"
            complain(f"{done.failures} of {done.galaxies} galaxies can't be {participle}; their reasons: {path}")
    # A launcher of several processes would take the status for a crash.
    return 1 if done.failures and state.num_processes == 1 else 0


def check_table(path: Path) -> None:
    """Nothing, if a table can be written and is none of those that a finished run has beside its model."""
    check_catalog_can_be_written(path)
    target = path.resolve()  # of a link what it points to is written
    if target.name in OPTIONAL_FILES and (target.parent / CONFIGURATION).is_file():
        raise ValueError(
            f"output is {path}, where a finished run has its own predictions; choose another name or folder."
        )


def _predict_survey(options: argparse.Namespace) -> Survey:
    device = choose_device(options.device)
    model, processor = load_finetuned(options.model)
    return predict_survey(
        model,
        processor,
        find_images(options),
        options.output,
        model_name=options.model,
        batch_size=options.batch_size,
        device=device,
        prevalence=options.prevalence,
        torch_compile=options.torch_compile,
        bf16=options.bf16,
        retry_failures=options.retry_failures,
        max_failures=options.max_failures,
    )


def _predict_embeddings(options: argparse.Namespace) -> Survey:
    if options.output.suffix:
        raise ValueError(
            f"output is {options.output}, one table; embeddings are predicted into a folder, from which zoobot-hf "
            "merge makes one."
        )
    for name in ("batch_size", "torch_compile", "bf16", *HUB_OPTIONS):
        if getattr(options, name):
            raise ValueError(f"{name} is for images, and none are opened for embeddings; leave it out.")
    device = choose_device(options.device)
    model, processor = load_finetuned(options.model)
    return predict_embeddings(
        model,
        processor,
        options.embeddings,
        options.output,
        model_name=options.model,
        device=device,
        prevalence=options.prevalence,
        retry_failures=options.retry_failures,
        max_failures=options.max_failures,
    )


def _predict_table(options: argparse.Namespace) -> int:
    prepare_processes()
    _check_options(options)
    device = choose_device(options.device)
    failures_path = options.output.with_name(f"{options.output.stem}-failures.csv")
    _check_tables(Path(options.images), options.output, failures_path)
    catalog = read_galaxies(options.images, images_must_exist=False)
    model, processor = load_finetuned(options.model)
    for path, empty in _tables(options.output, table_of([], model, prevalence=options.prevalence), model.config):
        _check_tables(Path(options.images), path)
        check_columns_fit(empty.columns, path=path)
    table, failures = predict_galaxies(
        model,
        processor,
        catalog,
        batch_size=options.batch_size,
        device=device,
        prevalence=options.prevalence,
        torch_compile=options.torch_compile,
        bf16=options.bf16,
    )
    if failures.empty:
        failures_path.unlink(missing_ok=True)  # an earlier run's, and no longer true
    else:
        write_catalog(failures, failures_path)
    for path, whole in _tables(options.output, table, model.config):
        write_catalog(whole, path)
        print(f"{len(whole)} galaxies: {path}")
    if failures.empty:
        return 0
    complain(f"{len(failures)} of {len(catalog)} images can't be read; their reasons: {failures_path}")
    return 1


def _check_options(options: argparse.Namespace) -> None:
    """Refuses images, options and processes that are for an output folder."""
    if PartialState().num_processes > 1:
        raise ValueError(
            f"output is {options.output}, one table, and several processes share a folder; choose one, from which "
            "zoobot-hf merge makes a table."
        )
    is_pattern = glob.has_magic(options.images) and not Path(options.images).exists()
    if is_pattern or names_archive(options.images) or names_hub_dataset(options.images):
        raise ValueError(
            f"output is {options.output}, one table, and the images are in an archive, a Hub dataset or several "
            "catalogs; choose a folder, from which zoobot-hf merge makes one table."
        )
    for name in ("retry_failures", "max_failures", *HUB_OPTIONS):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{name} is for an output folder, and {options.output} is one table; leave it out.")


def _tables(output: Path, table: pd.DataFrame, config: ZoobotConfig) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The table of predictions and, of a decision tree, the two that follow from it, each with where it goes."""
    yield output, table
    if config.decision_tree is not None:
        for name, make_table in {"friendly": friendly_table, "advanced": advanced_table}.items():
            yield output.with_name(f"{output.stem}-{name}{output.suffix}"), make_table(table, config)


def _check_tables(images: Path, *tables: Path) -> None:
    """Finds out before the predictions, which may take hours, what would stop their tables from being written."""
    catalog_path = find_catalog(images) if images.is_dir() else images
    for path in tables:
        check_table(path)
        if catalog_path is not None:
            check_catalog_is_kept(catalog_path, output=path)
