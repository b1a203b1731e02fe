"""`zoobot-hf demo`: the main job on drawn ring galaxies, with no network."""

import argparse
from pathlib import Path

from transformers import set_seed

from ..data.rings import load_rings
from ..models.configuration_zoobot import small_encoder_config
from ..models.conversion import DEFAULT_ZOOM
from ..models.image_processing_zoobot import ZoobotImageProcessor
from ..models.modeling_zoobot import ZoobotForImageClassification
from ..training.arguments import unfrozen_arguments_from_scratch
from ..training.finetuning import finetune
from .finetune import print_report
from .inputs import choose_device, stage_arguments
from .options import add_device, add_seed

DEMO_GALAXIES = 1500
DRAWN_PIXELS = 128
DEMO_PIXELS = 96


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="demo", type=Path, help="where the results go (default: %(default)s)")
    add_seed(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    choose_device(options.device)
    set_seed(options.seed)
    dataset = load_rings("simulated", seed=options.seed, count=DEMO_GALAXIES, size=DRAWN_PIXELS)
    # Until a trained encoder comes with the package, the demo's is new, and the unfrozen stage trains it from scratch.
    model = ZoobotForImageClassification(small_encoder_config(dataset["train"].features["label"].names))
    processor = ZoobotImageProcessor(DEMO_PIXELS, zoom=DEFAULT_ZOOM)
    frozen, _ = stage_arguments(options)
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
    print_report(finetuned)
    return 0
