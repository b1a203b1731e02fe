"""As many galaxies of each class in the training split, and what the sky's shares were before.

A model learns the prevalence that it is trained on. Balancing changes it, so the prevalence of the sky is measured
first and handed on with the balanced split: predictions are corrected with it later.
"""

from typing import Literal, NamedTuple, get_args

import datasets
import numpy as np

from zoobot_hf.data.catalog import quote

Strategy = Literal["oversample", "undersample"]


class BalancedSplit(NamedTuple):
    """A balanced training split with the shares of its classes before and after, each by class name, summing to 1."""

    dataset: datasets.Dataset
    sky_prevalence: dict[str, float]
    training_prevalence: dict[str, float]


def measure_prevalence(split: datasets.Dataset) -> dict[str, float]:
    """The share of each class in a split.

    Args:
        split: One split, whose `label` is a `ClassLabel`.

    Returns:
        A share between 0 and 1 for each class name, in the order of the class numbers; they sum to 1. A class that is
        not in the split has the share 0.

    Raises:
        ValueError: The split is a DatasetDict or has no rows, its `label` is no `ClassLabel`, or a label is missing.
    """
    counts = _count_classes(split)
    names = split.features["label"].names
    return {name: float(count / counts.sum()) for name, count in zip(names, counts, strict=True)}


def balance_classes(split: datasets.Dataset, *, seed: int, strategy: Strategy) -> BalancedSplit:
    """A training split with as many rows of each class, shuffled.

    Args:
        split: The training split, whose `label` is a `ClassLabel`. Validation and test splits stay as the sky has them.
        seed: Decides which rows are taken and in what order.
        strategy: "oversample" repeats the rows of the smaller classes until they are as many as those of the largest:
            each row the same number of times, give or take one. "undersample" keeps as many rows of each class as the
            smallest has.

    Returns:
        The balanced split and the prevalence before (`sky_prevalence`) and after (`training_prevalence`). Classes
        without a row stay without.

    Raises:
        ValueError: `strategy` is unknown; all rows are of one class; or what `measure_prevalence` refuses.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy is {strategy!r}; it must be one of {quote(get_args(Strategy))}.")
    sky_prevalence = measure_prevalence(split)
    labels = np.asarray(split["label"][:])
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) == 1:
        name = split.features["label"].names[classes[0]]
        raise ValueError(f"split has only galaxies of the class {name!r}; there is nothing to balance it with.")
    generator = np.random.default_rng(seed)
    size = counts.max() if strategy == "oversample" else counts.min()
    rows = [_take_rows(np.flatnonzero(labels == number), size=size, generator=generator) for number in classes]
    balanced = split.select(generator.permutation(np.concatenate(rows)))
    return BalancedSplit(balanced, sky_prevalence, measure_prevalence(balanced))


def _count_classes(split: datasets.Dataset) -> np.ndarray:
    if isinstance(split, datasets.DatasetDict):
        raise ValueError(
            f"split is a DatasetDict with {quote(split)}; balance the training split only: pass split['train']."
        )
    feature = split.features.get("label")
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"the column 'label' is {feature or 'not there'} and no ClassLabel; the columns are "
            f"{quote(split.column_names)}. Load the galaxies with a label_column of classes."
        )
    if len(split) == 0:
        raise ValueError("split has no rows, so no class has a share; give a split with galaxies.")
    labels = np.asarray(split["label"][:], dtype="float64")  # None becomes NaN
    missing = np.count_nonzero(~(labels >= 0))
    if missing:
        raise ValueError(f"{missing} of {len(split)} rows of split have no label; add them or leave these rows out.")
    return np.bincount(labels.astype("int64"), minlength=feature.num_classes)


def _take_rows(rows: np.ndarray, *, size: int, generator: np.random.Generator) -> np.ndarray:
    repeats, rest = divmod(size, len(rows))
    return np.concatenate([np.tile(rows, repeats), generator.choice(rows, size=rest, replace=False)])
