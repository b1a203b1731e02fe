"""`zoobot-hf embed`: the encoder's embeddings of a catalog or a folder of images."""

import argparse
from pathlib import Path

from ..data.catalog import CATALOG_FORMATS
from ..models.modeling_zoobot import ZoobotModel
from ..prediction.embeddings import embed_survey
from ..training.embedding_cache import DTYPES
from .inputs import choose_device, find_images, load_processor
from .options import add_batches, add_device, add_hub_dataset, add_image_processing, add_survey
from .predict import report_survey


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub id of an encoder or a finetuned model")
    parser.add_argument(
        "--images",
        required=True,
        help="catalog, folder with a catalog or images, WebDataset tar archive, pattern for many catalogs or archives, "
        "in quotes, or the id of a Hub dataset",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="a folder; the same command goes on with a run that was stopped"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float16", help="type of the numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--pca",
        type=_dimensions_or_path,
        help="reduce them to so many dimensions, or by the PCA of an earlier output folder; not for predict",
    )
    add_image_processing(parser)
    add_batches(parser)
    add_survey(parser)
    add_hub_dataset(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    if options.output.suffix.lower() in CATALOG_FORMATS:
        raise ValueError(f"output is {options.output}, one table, and embeddings go to a folder; choose a folder.")
    device = choose_device(options.device)
    processor = load_processor(options.model, options)
    done = embed_survey(
        ZoobotModel.from_pretrained(options.model),
        processor,
        find_images(options),
        options.output,
        model_name=options.model,
        dtype=options.dtype,
        pca=options.pca,
        batch_size=options.batch_size,
        device=device,
        torch_compile=options.torch_compile,
        bf16=options.bf16,
        retry_failures=options.retry_failures,
        max_failures=options.max_failures,
    )
    return report_survey(done, contents="embeddings", participle="embedded")


def _dimensions_or_path(text: str) -> int | Path:
    return int(text) if text.lstrip("-").isdigit() else Path(text)
