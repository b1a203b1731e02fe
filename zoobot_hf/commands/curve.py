"""`zoobot-hf curve`: how many labels are enough."""

import argparse
from pathlib import Path

from accelerate import PartialState
from datasets import DatasetDict

from ..models.modeling_zoobot import ZoobotForImageClassification
from ..training.label_efficiency import (
    NUMBERS,
    SEEDS,
    LabelCurve,
    make_curve_folder,
    measure_label_curve,
    write_label_curve,
)
from .inputs import choose_device, load_dataset, load_processor
from .options import add_device, add_encoder_and_dataset, add_seed, number


def add_options(parser: argparse.ArgumentParser) -> None:
    add_encoder_and_dataset(parser)
    parser.add_argument("--output_dir", required=True, type=Path, help="where the tables and the figure go")
    parser.add_argument(
        "--numbers",
        nargs="+",
        type=number(int, 2),
        default=list(NUMBERS),
        help="labelled galaxies of each class, equally many; the scores are for the classes' own shares among the test "
        "galaxies (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=number(int, 2), default=SEEDS, help="draws of labelled galaxies (default: %(default)s)"
    )
    parser.add_argument("--skip_untrained", action="store_true", help="leave out the encoder with random weights")
    add_seed(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    make_curve_folder(options.output_dir)  # known before the measurement, which takes long
    device = choose_device(options.device)
    dataset = load_dataset(options)
    features = (next(iter(dataset.values())) if isinstance(dataset, DatasetDict) else dataset).features
    processor = load_processor(options.encoder, options)
    model = ZoobotForImageClassification.from_pretrained(
        options.encoder, label_names=features["label"].names, problem_type="single_label_classification"
    )
    curve = measure_label_curve(
        model.to(device),
        processor,
        dataset,
        numbers=options.numbers,
        seeds=options.seeds,
        with_untrained=not options.skip_untrained,
        seed=options.seed,
    )
    if PartialState().is_main_process:
        _report(curve, options)
    return 0


def _report(curve: LabelCurve, options: argparse.Namespace) -> None:
    paths = write_label_curve(curve, options.output_dir)
    wide = curve.table.pivot_table(index=["score", "series"], columns="labels", values="value", sort=False)
    print(
        f"\nmean over {options.seeds} seeds, by labelled galaxies of each class\n{wide.to_string(float_format='%.3f')}"
    )
    if curve.extrapolation is not None:
        print(f"\n{curve.extrapolation.describe()}")
    print("\n" + "\n".join(map(str, paths)))
