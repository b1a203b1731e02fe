"""Folds: parts of a dataset that share no galaxy, each with the same share of every class."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from datasets import ClassLabel, Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.integer[Any]]


def check_classes(dataset: Dataset, *, folds: int) -> Integers:
    """The class number of each galaxy, of a dataset that can be cut into folds.

    Args:
        dataset: With `id_str` and `label`.
        folds: How many.

    Raises:
        ValueError: `label` is no `ClassLabel`; a galaxy is there twice; fewer than two folds; a class has fewer
            galaxies than there are folds.
    """
    feature = dataset.features.get("label")
    if not isinstance(feature, ClassLabel):
        found = "votes" if isinstance(feature, dict) else feature or "not there"
        raise ValueError(f"label is {found}; folds need one class for each galaxy, a ClassLabel.")
    identifiers = pd.Series(dataset["id_str"][:])
    if identifiers.duplicated().any():
        raise ValueError(
            f"id_str {identifiers[identifiers.duplicated()].iloc[0]!r} is there twice; give each galaxy once, before "
            "balancing."
        )
    if folds < 2:
        raise ValueError(f"folds is {folds}; give at least 2.")
    labels = np.asarray(dataset["label"][:])
    counts = np.bincount(labels, minlength=feature.num_classes)
    if counts.min() < folds:
        rarest, noun = int(counts.argmin()), "galaxy" if counts.min() == 1 else "galaxies"
        raise ValueError(
            f"class {feature.names[rarest]!r} has {counts[rarest]} {noun}, fewer than the {folds} folds; choose fewer "
            "folds, label more galaxies, or leave the class out."
        )
    return labels


def assign_folds(
    identifiers: Sequence[str], labels: npt.ArrayLike, *, folds: int, seed: int, groups: npt.ArrayLike | None = None
) -> Integers:
    """The fold of each galaxy, 0 to folds - 1; the same whatever the order of the rows.

    Args:
        identifiers: The galaxies' `id_str`, each once.
        labels: Class numbers, (n,).
        folds: How many.
        seed: Decides, together with the identifiers, which galaxy goes where.
        groups: A number for each galaxy, (n,); those with the same one stay in one fold, which may cost some evenness.

    Returns:
        (n,). Without groups, folds differ by at most one galaxy of each class.
    """
    classes = np.asarray(labels)
    table = pd.DataFrame({"id": list(identifiers), "class": classes, "row": np.arange(len(classes))})
    table["group"] = table["row"] if groups is None else np.asarray(groups)
    table = table.sort_values("id").sample(frac=1, random_state=np.random.default_rng(seed))
    members = [part for _, part in table.groupby("group", sort=False)]
    counts = np.zeros((folds, classes.max() + 1), dtype=np.int64)
    assigned = np.empty(len(classes), dtype=np.int64)
    for part in sorted(members, key=len, reverse=True):  # large groups first, while every fold has room
        own = counts[:, part["class"].iloc[0]]
        fold = int(np.lexsort((counts.sum(axis=1), own))[0])
        assigned[part["row"]] = fold
        np.add.at(counts[fold], part["class"].to_numpy(), 1)
    return assigned


def group_near_duplicates(identifiers: Sequence[str], pairs: pd.DataFrame) -> Integers:
    """The same number for galaxies that are near-duplicates of each other, directly or by way of others.

    Args:
        identifiers: The galaxies' `id_str`, each once.
        pairs: From `label_audit.find_near_duplicates`.

    Returns:
        (n,), in the order of the identifiers.
    """
    rows = {identifier: row for row, identifier in enumerate(identifiers)}
    first, second = (pairs[name].map(rows).to_numpy(dtype=np.int64) for name in ("id_str", "other_id_str"))
    links = coo_array((np.ones(len(pairs)), (first, second)), shape=(len(rows), len(rows)))
    return np.asarray(connected_components(links, directed=False)[1])
