"""Ring galaxies: the fact sheet, and the ways to get them.

What is asked: does the galaxy have a ring? A ring is any that volunteers saw: inner, outer, collisional; no two sources
agree on the borderline, and labels are noisy on both sides.

Four sources:

- Simulated. Drawn galaxies of `zoobot_hf.data.simulation`, half of them with a ring; needs no network.
- Zoobot's basic ring catalog (`finetune_minimal.py`, v0.0.2; github.com/mwalmsley/zoobot): 470 galaxies of Galaxy Zoo
  DECaLS, 235 tagged "#ring" on the forum and as many others drawn at random. Cut at featured > 0.6, edge-on no > 0.75,
  spiral arms no > 0.5. Labels in the column `ring`, 0 or 1. Zoobot documents a loss of about 0.54 and an accuracy of
  75 to 80% on its validation split, with a frozen encoder trained on Galaxy Zoo DECaLS.
- Zoobot's advanced ring catalog (`finetune_advanced.py`): 253,286 galaxies with the fraction of volunteers who saw
  a ring. The rule of `load_rings_by_votes` leaves 60,802: 9,947 with a ring and 50,855 without. Zoobot documents about
  86% accuracy on class-balanced galaxies (pull request 24).
- The Hub dataset `mwalmsley/gz_rings`: configurations `classification` with an integer column `label`, and `regression`
  with vote fractions; about 183,000 rows with both counted. Pin a `revision`.

Imagery: DESI Legacy Imaging Surveys (Dey et al. 2019, AJ 157, 168), public. Votes: Galaxy Zoo DECaLS (Walmsley et al.
2022, MNRAS 509, 3966). Rings: Walmsley et al. 2022, MNRAS 513, 1581. Licence of the Galaxy Zoo datasets on the Hub:
CC BY-NC-SA 4.0; they ask that models trained on them be released as source code by publication.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from zoobot_hf.data.catalog import check_columns
from zoobot_hf.data.dataset import load_galaxy_dataset, split_dataset
from zoobot_hf.data.simulation import RING_CLASS_NAMES, simulate_ring_dataset

logger = logging.getLogger(__name__)

# The columns of Zoobot's ring catalogs, with the names that Galaxy Zoo DECaLS gives to answers.
FEATURED_COLUMN = "smooth-or-featured_featured-or-disk_fraction"
FACE_ON_COLUMN = "disk-edge-on_no_fraction"
RING_FRACTION_COLUMN = "rare-features_ring_fraction"

# Zoobot v0.0.2, zoobot/datasets/rings.py, as finetune_advanced.py uses it. All four are exclusive.
FEATURED_ABOVE = 0.25
FACE_ON_ABOVE = 0.75
RING_ABOVE = 0.25
NOT_RING_BELOW = 0.05


class Cut(NamedTuple):
    """The galaxies that a cut keeps, and how many it removed."""

    dataset: datasets.Dataset
    removed: int


def load_rings(
    source: str | Path = "simulated",
    *,
    seed: int = 42,
    count: int = 1000,
    size: int = 128,
    label_names: Sequence[str] | None = RING_CLASS_NAMES,
    keep_columns: Sequence[str] = (),
    id_column: str | None = "id_str",
    image_column: str = "image",
    configuration: str | None = "classification",
    revision: str | None = None,
) -> datasets.DatasetDict:
    """Train, validation and test splits of galaxies with and without rings, as the source labels them.

    For labels in another column, or splits of other sizes, there are `load_galaxy_dataset` and `split_dataset`.

    Args:
        source: "simulated", a catalog or folder with labels in the column `ring`, or the id of a Hub dataset with
            labels in the column `label`.
        seed: Decides the split, and which galaxies are drawn.
        count: How many galaxies are drawn; other sources give all they have.
        size: Height and width of drawn galaxies in pixels.
        label_names: The names of the labels 0 and 1; None takes them from the source.
        keep_columns: Further columns to keep; drawn galaxies keep all their true parameters.
        id_column: The galaxies' names in a Hub dataset; None numbers its rows.
        image_column: The images in a Hub dataset.
        configuration: Which configuration of a Hub dataset.
        revision: Which branch, tag or commit of a Hub dataset.

    Returns:
        `train`, `validation` and `test`, each with `id_str`, `image` and `label`, a `ClassLabel`.

    Raises:
        CatalogError: What `load_galaxy_dataset` refuses.
        ValueError: What `split_dataset` and `simulate_ring_dataset` refuse.
    """
    if source == "simulated":
        galaxies = simulate_ring_dataset(count, seed=seed, size=size)
    else:
        galaxies = load_galaxy_dataset(
            source,
            label_column="ring" if Path(source).exists() else "label",
            label_names=label_names,
            keep_columns=keep_columns,
            id_column=id_column,
            image_column=image_column,
            configuration=configuration,
            revision=revision,
        )
    return split_dataset(galaxies, seed=seed)


def load_rings_by_votes(
    source: str | Path,
    *,
    seed: int = 42,
    featured_column: str = FEATURED_COLUMN,
    face_on_column: str = FACE_ON_COLUMN,
    ring_fraction_column: str = RING_FRACTION_COLUMN,
    id_column: str | None = "id_str",
    image_column: str = "image",
    configuration: str | None = "regression",
    revision: str | None = None,
) -> datasets.DatasetDict:
    """Train, validation and test splits of featured, face-on galaxies, labelled by how many volunteers saw a ring.

    Args:
        source: A catalog, a folder with one, or the id of a Hub dataset, with the three columns of vote fractions.
        seed: Decides the split.
        featured_column: As in `keep_featured_face_on`.
        face_on_column: As in `keep_featured_face_on`.
        ring_fraction_column: As in `label_rings_by_votes`.
        id_column: The galaxies' names in a Hub dataset; None numbers its rows.
        image_column: The images in a Hub dataset.
        configuration: Which configuration of a Hub dataset.
        revision: Which branch, tag or commit of a Hub dataset.

    Returns:
        `train`, `validation` and `test`, each with `id_str`, `image`, `label` and the three columns. The log says how
        many galaxies each cut removed.

    Raises:
        CatalogError: What `load_galaxy_dataset` refuses; among it, a column is not there.
        ValueError: What `split_dataset` refuses.
    """
    galaxies = load_galaxy_dataset(
        source,
        label_column=None,
        keep_columns=(featured_column, face_on_column, ring_fraction_column),
        id_column=id_column,
        image_column=image_column,
        configuration=configuration,
        revision=revision,
    )
    splits = galaxies if isinstance(galaxies, datasets.DatasetDict) else {"train": galaxies}
    kept = datasets.DatasetDict()
    for name, split in splits.items():
        # Labelled before the other cut: a column added to a selection copies every image of it.
        labelled = label_rings_by_votes(split, ring_fraction_column=ring_fraction_column).dataset
        kept[name] = keep_featured_face_on(
            labelled, featured_column=featured_column, face_on_column=face_on_column
        ).dataset
    return split_dataset(kept, seed=seed)


def keep_featured_face_on(
    galaxies: datasets.Dataset, *, featured_column: str = FEATURED_COLUMN, face_on_column: str = FACE_ON_COLUMN
) -> Cut:
    """The galaxies in which a ring could be seen: not smooth, and not edge-on.

    Args:
        galaxies: One dataset or split.
        featured_column: The fraction, 0 to 1, that sees features or a disk; kept above `FEATURED_ABOVE`.
        face_on_column: The fraction, 0 to 1, that sees no edge-on disk; kept above `FACE_ON_ABOVE`.

    Returns:
        The galaxies above both, in their order, and how many were removed. A missing fraction is not above.

    Raises:
        CatalogError: A column is not there.
    """
    featured = _read_fractions(galaxies, column=featured_column)
    face_on = _read_fractions(galaxies, column=face_on_column)
    return _cut(galaxies, keep=(featured > FEATURED_ABOVE) & (face_on > FACE_ON_ABOVE), what="featured and face-on")


def label_rings_by_votes(galaxies: datasets.Dataset, *, ring_fraction_column: str = RING_FRACTION_COLUMN) -> Cut:
    """The galaxies on which the volunteers agree, with a column `label` that says whether there is a ring.

    Args:
        galaxies: One dataset or split, without a column `label`.
        ring_fraction_column: The fraction, 0 to 1, that sees a ring. Above `RING_ABOVE` is "ring", below
            `NOT_RING_BELOW` is "not ring".

    Returns:
        The labelled galaxies, in their order, and how many were removed: those between the two, or without a fraction.

    Raises:
        CatalogError: The column is not there.
    """
    ring_fraction = _read_fractions(galaxies, column=ring_fraction_column)
    has_ring = ring_fraction > RING_ABOVE
    labelled = galaxies.add_column(
        "label", has_ring.astype("int64").tolist(), feature=datasets.ClassLabel(names=list(RING_CLASS_NAMES))
    )
    return _cut(labelled, keep=has_ring | (ring_fraction < NOT_RING_BELOW), what="clearly with or without a ring")


def _read_fractions(galaxies: datasets.Dataset, *, column: str) -> np.ndarray:
    check_columns(galaxies.column_names, needed=[column], source="the dataset")
    return np.asarray(galaxies[column][:], dtype="float64")


def _cut(galaxies: datasets.Dataset, *, keep: np.ndarray, what: str) -> Cut:
    removed = int(np.count_nonzero(~keep))
    logger.info("Kept the galaxies %s: %d of %d; %d removed.", what, len(keep) - removed, len(keep), removed)
    return Cut(galaxies.select(np.flatnonzero(keep)), removed)
