"""Options that several subcommands share, and how their values are read."""

import argparse
import math
from collections.abc import Callable

from ..models.conversion import DEFAULT_ZOOM, EMBEDDED_ENCODER, NORMALIZATIONS

LABEL_COLUMN = "label"
# numpy, which seeds the splits and the augmentation, takes no more.
LARGEST_SEED = 2**32 - 1


def number(
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


def share(text: str) -> tuple[str, float]:
    label, _, share = text.rpartition("=")
    try:
        number = float(share)
    except ValueError:
        number = math.nan
    if not label or math.isnan(number):
        raise argparse.ArgumentTypeError(f"it is {text!r}; give a label and its share, as in ring=0.05")
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; a share lies between 0 and 1, both excluded")
    return label, number


def add_encoder_and_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder",
        default=EMBEDDED_ENCODER,
        help="folder or Hub id of an encoder or a finetuned model (default: the package's own small one, which has "
        "seen drawn galaxies alone)",
    )
    parser.add_argument("--dataset", required=True, help="catalog, folder, Hub id, or 'simulated' for drawn galaxies")
    parser.add_argument("--label_column", help=f"column with the labels (default: {LABEL_COLUMN})")
    parser.add_argument("--configuration", help="configuration of a Hub dataset")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    add_image_processing(parser)


def add_image_processing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--zoom",
        type=number(float, 1),
        help=f"magnify the centre of each image by this (default: {DEFAULT_ZOOM}, or the finetuned model's own)",
    )
    parser.add_argument(
        "--fits_bands",
        nargs="+",
        metavar="PLANE",
        help="of FITS images with several planes the one that is grey, or red, green and blue: extension names, or "
        "0:0, 0:1, ... for the planes of a cube (default: the finetuned model's own)",
    )
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="auto",
        help="'encoder' applies the mean and standard deviation that the encoder's repository states; 'none' gives "
        "RGB in 0-1, as Galaxy Zoo's encoders take it; 'auto' is 'none' for encoders in timm's layout and 'encoder' "
        "for others that state them (default: %(default)s)",
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch_size",
        type=number(int, 1),
        help="galaxies that the encoder sees at once (default: what suits the device)",
    )
    parser.add_argument(
        "--torch_compile", action="store_true", help="compile the model, which pays from some thousand images on"
    )
    add_precision(parser)


def add_precision(parser: argparse.ArgumentParser, *, default: str = "on a GPU that has it in hardware") -> None:
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="let the encoder compute in bfloat16: faster, and probabilities differ by 0.01 or so (default: "
        f"{default})",
    )


def add_survey(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retry_failures", action="store_true", help="try again what an earlier run into the folder couldn't read"
    )
    parser.add_argument(
        "--max_failures", type=number(int, 0), help="stop a run into a folder after more failures than this"
    )


def add_hub_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="split of a Hub dataset (default: its only one)")
    parser.add_argument("--configuration", help="configuration of a Hub dataset")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub dataset")
    parser.add_argument(
        "--id_column",
        help="column with the galaxies' names in a Hub dataset, or 'none' to number them (default: id_str)",
    )
    parser.add_argument("--image_column", help="column with the images in a Hub dataset (default: image)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=number(int, 0, at_most=LARGEST_SEED), default=42, help="(default: %(default)s)")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
