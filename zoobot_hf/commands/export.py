"""`zoobot-hf export`: a finetuned model as plain transformers or ONNX."""

import argparse
from pathlib import Path

from ..data.rings import load_rings
from ..models.export import FORMATS, export_to_onnx, export_to_transformers
from ..models.modeling_zoobot import ZoobotForImageClassification
from .inputs import load_finetuned

DRAWN_PIXELS = 128
COMPARED_GALAXIES = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT", help="folder or Hub id of a finetuned model")
    parser.add_argument("--format", choices=FORMATS, required=True, help="'onnx' needs the extra zoobot-hf[onnx]")
    parser.add_argument("--output_dir", type=Path, help="a new folder (default: OUT/FORMAT, or FORMAT for a Hub id)")


def run(options: argparse.Namespace) -> int:
    model, processor = load_finetuned(options.model)
    if not isinstance(model, ZoobotForImageClassification):
        raise ValueError(
            f"model is {options.model!r}, which answers a decision tree, and only models of labels are exported; share "
            "it as it is (zoobot-hf push) with those who have zoobot_hf."
        )
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
