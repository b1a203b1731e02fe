"""`zoobot-hf demo`: the main job on drawn ring galaxies, with no network."""

import argparse
from pathlib import Path

from transformers import set_seed

from ..data.rings import load_rings
from ..models.conversion import EMBEDDED_ENCODER, image_processor_for
from ..models.modeling_zoobot import ZoobotForImageClassification
from ..training.finetuning import check_output, checkpoints_folder, finetune
from .finetune import print_report
from .inputs import choose_device, stage_arguments
from .options import add_device, add_seed

DEMO_GALAXIES = 1500
DRAWN_PIXELS = 128
DEMO_UNFROZEN_EPOCHS = 5
MARK = "demo"  # among the checkpoints, says that a demo made them


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="demo", type=Path, help="where the results go (default: %(default)s)")
    add_seed(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    checkpoints = checkpoints_folder(options.output_dir)
    is_own = (checkpoints / MARK).is_file()
    check_output(options.output_dir, overwrite=is_own)
    choose_device(options.device)
    set_seed(options.seed)
    dataset = load_rings("simulated", seed=options.seed, count=DEMO_GALAXIES, size=DRAWN_PIXELS)
    names = dataset["train"].features["label"].names
    model = ZoobotForImageClassification.from_pretrained(EMBEDDED_ENCODER, label_names=names)
    frozen, unfrozen = stage_arguments(options)
    unfrozen.num_train_epochs = DEMO_UNFROZEN_EPOCHS
    try:
        finetuned = finetune(
            model,
            image_processor_for(EMBEDDED_ENCODER),
            dataset,
            options.output_dir,
            frozen=frozen,
            unfrozen=unfrozen,
            overwrite=is_own,
            dataset_name="simulated",
        )
    finally:
        # What an interrupted demo left is replaced too.
        if checkpoints.is_dir():
            (checkpoints / MARK).touch()
    print_report(finetuned)
    return 0
