"""The command `zoobot-hf`: each subcommand is one call into the library."""

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import set_seed

from .data.balance import Strategy
from .data.catalog import read_galaxies, write_catalog
from .data.dataset import load_galaxy_dataset, split_dataset
from .data.rings import load_rings
from .models.configuration_zoobot import HEAD_TYPES, small_encoder_config
from .models.conversion import NORMALIZATIONS, image_processor_for
from .models.image_processing_zoobot import ZoobotImageProcessor
from .models.modeling_zoobot import ZoobotForImageClassification
from .prediction.survey import predict_galaxies
from .publishing.hub import push_folder
from .training.arguments import FrozenStageArguments, UnfrozenStageArguments
from .training.finetuning import Finetuned, finetune

DEMO_GALAXIES = 1500
DEMO_PIXELS = 96


def main(arguments: list[str] | None = None) -> int:
    """The exit status of a command line: 0 when all went well.

    Args:
        arguments: The command line without the program's name; the process's own when absent.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return int(options.command(options))
    except (ValueError, OSError, RuntimeError) as error:
        if options.debug:
            raise
        print(f"zoobot-hf: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoobot-hf", description="Finetune a galaxy encoder, publish it, predict a survey."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="finetune an encoder to drawn ring galaxies, with no network")
    demo.add_argument("--output_dir", default="demo", type=Path, help="where the results go (default: %(default)s)")
    demo.set_defaults(command=_demo)

    tune = commands.add_parser("finetune", help="train a new head on an encoder, then both")
    tune.add_argument("--encoder", required=True, help="folder or Hub id of an encoder or a finetuned model")
    tune.add_argument("--dataset", required=True, help="catalog, folder, Hub id, or 'simulated' for drawn rings")
    tune.add_argument("--label_column", default="label", help="column with the labels (default: %(default)s)")
    tune.add_argument("--configuration", help="configuration of a Hub dataset")
    tune.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    tune.add_argument("--validation_fraction", type=float, default=0.2, help="(default: %(default)s)")
    tune.add_argument("--test_fraction", type=float, default=0.2, help="(default: %(default)s)")
    tune.add_argument("--zoom", type=float, help="magnify the centre of each image by this (default: 1.4)")
    tune.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="auto",
        help="'encoder' applies the mean and standard deviation that the encoder's repository states; 'none' gives "
        "RGB in 0-1, as Galaxy Zoo's encoders take it (default: %(default)s)",
    )
    tune.add_argument("--head_type", choices=HEAD_TYPES, default="linear", help="(default: %(default)s)")
    tune.add_argument("--balance", choices=get_args(Strategy), help="balance the classes of the training split")
    tune.add_argument("--frozen_epochs", type=float, help="most epochs with the encoder frozen")
    tune.add_argument("--unfrozen_epochs", type=float, help="most epochs after that; 0 leaves the stage out")
    tune.add_argument("--last_blocks", type=int, help="unfreeze only this many of the encoder's last blocks")
    tune.add_argument("--push_to_hub", metavar="USER/NAME", help="push the finetuned model to this repository")
    tune.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    tune.add_argument("--overwrite", action="store_true", help="delete the run in output_dir and start anew")
    tune.set_defaults(command=_finetune)

    predict = commands.add_parser("predict", help="write a table of predictions for a catalog or a folder of images")
    predict.add_argument("--model", required=True, help="folder or Hub id of a finetuned model")
    predict.add_argument("--images", required=True, help="catalog, or folder with a catalog or images")
    predict.add_argument("--output", required=True, type=Path, help="the table: .csv, .parquet, .fits, .vot or .ecsv")
    predict.add_argument("--batch_size", type=int, default=32, help="(default: %(default)s)")
    predict.set_defaults(command=_predict)

    for command in (demo, tune):
        command.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    tune.add_argument("--output_dir", required=True, type=Path, help="where model, card, table and figures go")
    for command in (demo, tune, predict):
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def _demo(options: argparse.Namespace) -> int:
    _check_device(options.device)
    set_seed(options.seed)
    dataset = load_rings("simulated", seed=options.seed, count=DEMO_GALAXIES, size=DEMO_PIXELS)
    model = ZoobotForImageClassification(
        small_encoder_config(dataset["train"].features["label"].names, pixels=DEMO_PIXELS)
    )
    processor = ZoobotImageProcessor(DEMO_PIXELS)
    frozen, unfrozen = _stage_arguments(options)
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
    fractions = {"validation_fraction": options.validation_fraction, "test_fraction": options.test_fraction}
    dataset = split_dataset(_load(options), seed=options.seed, **fractions)
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
    )
    if PartialState().is_main_process:
        _report(finetuned)
        if options.push_to_hub:
            print(f"pushed to {push_folder(finetuned.output_dir, options.push_to_hub)}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    device = _check_device(options.device)
    catalog = read_galaxies(options.images, images_must_exist=False)
    model = ZoobotForImageClassification.from_pretrained(options.model)
    processor = ZoobotImageProcessor.from_pretrained(options.model)
    table, failures = predict_galaxies(model, processor, catalog, batch_size=options.batch_size, device=device)
    write_catalog(table, options.output)
    print(f"{len(table)} galaxies: {options.output}")
    if failures.empty:
        return 0
    path = options.output.with_name(f"{options.output.stem}-failures.csv")
    write_catalog(failures, path)
    print(f"zoobot-hf: {len(failures)} of {len(catalog)} images can't be read; their reasons: {path}", file=sys.stderr)
    return 1


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
        print(f"{stage.name + kept:17}" + "".join(f"{stage.test[name]:14.3f}" for name in names))
    folder = finetuned.output_dir
    print(f"\nmodel    {folder}\ncard     {folder / 'README.md'}\ntable    {folder / 'predictions.parquet'}")
    print(f"figures  {', '.join(str(path) for path in sorted((folder / 'figures').glob('*.png')))}")


if __name__ == "__main__":
    sys.exit(main())
