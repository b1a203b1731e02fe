"""Labels that are likely wrong, and galaxies that are in the data twice.

The labels are judged by confident learning (Northcutt, Jiang & Chuang 2021, Journal of Artificial Intelligence Research
70, 1373), which is a few lines. The package that its authors publish is under the AGPL, which would bind every user of
this one, and most of it is about other kinds of data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from .metrics import SINGLE_LABEL, checked_labels

CHUNK = 1024  # rows of the table of similarities that are in memory at once
DUPLICATE_RATIO = 0.2

Floats = npt.NDArray[np.floating[Any]]


def find_doubtful_labels(
    identifiers: Sequence[str],
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    label_names: Sequence[str],
) -> pd.DataFrame:
    """The galaxies whose labels are most likely wrong, the likeliest first.

    A galaxy counts as mislabelled when its probability of another class reaches what galaxies labelled with that class
    have on average, and no other class that reaches its own average has a higher one: so a class of which a model is
    never sure is not blamed for it.

    Args:
        identifiers: The galaxies' `id_str`.
        probabilities: Out of fold: of galaxies that the model was not trained on, after softmax, 0-1, (n, classes). A
            model has learned the wrong labels that it was trained on. For the training prevalence, or else a rare
            class never looks right.
        labels: Class numbers, (n,).
        label_names: In the order of the classes.

    Returns:
        A row for each galaxy, sorted: `id_str`, `label` (the one given), `predicted_label` (the one suggested),
        `probability_of_label` (of the one given), `margin` (by which the suggested one is more probable) and
        `is_doubtful`. First the doubtful ones, by falling margin, then the others likewise.

    Raises:
        ValueError: Predictions, labels and identifiers that don't fit, or a class that no galaxy has.
    """
    given = np.asarray(probabilities, dtype=np.float64)
    classes = checked_labels(labels, given, SINGLE_LABEL)
    counts = np.bincount(classes, minlength=given.shape[1])
    if len(identifiers) != len(given) or len(label_names) != given.shape[1] or (counts == 0).any():
        raise ValueError(
            f"there are {len(identifiers)} identifiers for {len(given)} galaxies, {len(label_names)} label_names for "
            f"{given.shape[1]} classes, and {counts.tolist()} galaxies of each class; give one of each, and some of "
            "every class."
        )
    own = given[np.arange(len(given)), classes]
    usual = np.bincount(classes, weights=own, minlength=given.shape[1]) / counts
    confident = np.where(given >= usual - 1e-12, given, -1.0).argmax(axis=1)
    is_doubtful = (given >= usual - 1e-12).any(axis=1) & (confident != classes)
    others = given.copy()
    others[np.arange(len(given)), classes] = -1
    suggested = np.where(is_doubtful, confident, others.argmax(axis=1))
    names = np.asarray(label_names, dtype=object)
    table = pd.DataFrame(
        {
            "id_str": list(identifiers),
            "label": names[classes],
            "predicted_label": names[suggested],
            "probability_of_label": own,
            "margin": given[np.arange(len(given)), suggested] - own,
            "is_doubtful": is_doubtful,
        }
    )
    return table.sort_values(["is_doubtful", "margin"], ascending=False, kind="stable").reset_index(drop=True)


def find_near_duplicates(
    identifiers: Sequence[str],
    embeddings: npt.ArrayLike,
    splits: Sequence[str],
    *,
    ratio: float = DUPLICATE_RATIO,
) -> pd.DataFrame:
    """Pairs of galaxies that are all but the same picture, the closest first.

    Embeddings are standardised, column by column, and compared by their distance. Two galaxies are near-duplicates when
    they are closer than `ratio` times the usual distance of a galaxy to its nearest neighbour, the median over all:
    that distance depends on the encoder and on the galaxies, and so no fixed number would do. Where half of the
    galaxies or more have a twin it would be that of the twins: it is at least half the median distance to the third
    nearest.

    Args:
        identifiers: The galaxies' `id_str`.
        embeddings: From one encoder, (n, embedding_size).
        splits: The split that each galaxy is in: "train", "validation", "test".
        ratio: Above 0; 1 finds half of all galaxies.

    Returns:
        A row for each pair: `id_str`, `split`, `other_id_str`, `other_split`, `distance` (1 is the usual one) and
        `leaks`, whether the two are in different splits.

    Raises:
        ValueError: Numbers of galaxies that differ, fewer than two, embeddings that are not finite, or a ratio of 0 or
            less.
    """
    vectors = np.asarray(embeddings, dtype=np.float64)
    if vectors.ndim != 2 or not len(identifiers) == len(splits) == len(vectors) or len(vectors) < 2:
        raise ValueError(
            f"there are {len(identifiers)} identifiers, {len(splits)} splits and embeddings of the shape "
            f"{vectors.shape}; give one of each for every galaxy, and at least two galaxies."
        )
    if not np.isfinite(vectors).all() or not ratio > 0:
        raise ValueError(f"ratio is {ratio!r}, or embeddings are not finite; give a ratio above 0 and finite numbers.")
    spread = vectors.std(axis=0)
    vectors = (vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1)
    ends = [0, min(2, len(vectors) - 2)]  # the nearest, and the third nearest where there are so many
    neighbours = np.concatenate(
        [np.partition(_distances(vectors, start), ends, axis=1)[:, ends] for start in range(0, len(vectors), CHUNK)]
    )
    usual = max(_median_above_zero(neighbours[:, 0]), _median_above_zero(neighbours[:, 1]) / 2) or 1.0
    pairs = []
    for start in range(0, len(vectors), CHUNK):
        distances = _distances(vectors, start)
        for row, other in np.argwhere(distances < ratio * usual):
            if start + row < other:
                pairs.append((start + row, other, distances[row, other] / usual))
    table = pd.DataFrame(
        {
            "id_str": [identifiers[first] for first, _, _ in pairs],
            "split": [splits[first] for first, _, _ in pairs],
            "other_id_str": [identifiers[second] for _, second, _ in pairs],
            "other_split": [splits[second] for _, second, _ in pairs],
            "distance": [float(distance) for _, _, distance in pairs],
        }
    )
    table["leaks"] = table["split"] != table["other_split"]
    return table.sort_values("distance", kind="stable").reset_index(drop=True)


def _median_above_zero(distances: Floats) -> float:
    return float(np.median(distances[distances > 0])) if (distances > 0).any() else 0.0


def _distances(vectors: Floats, start: int) -> Floats:
    """From some rows to all, (rows, n); from a row to itself infinite."""
    rows = vectors[start : start + CHUNK]
    squares = (rows**2).sum(axis=1)[:, None] + (vectors**2).sum(axis=1) - 2 * rows @ vectors.T
    distances = np.sqrt(np.clip(squares, 0, None))
    # What is left of a subtraction of equal numbers is no distance.
    distances[distances < 1e-6 * np.sqrt(vectors.shape[1])] = 0
    distances[np.arange(len(rows)), start + np.arange(len(rows))] = np.inf
    return np.asarray(distances)
