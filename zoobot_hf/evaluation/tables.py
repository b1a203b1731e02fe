"""What the tables of predictions look like."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


def prediction_table(
    identifiers: Sequence[str], predictions: ArrayLike, *, label_names: Sequence[str], problem_type: str
) -> pd.DataFrame:
    """A row for each galaxy, in the order given.

    For a single label the columns are `id_str`, `predicted_label` (the most probable one) and a `probability_...` for
    each label; for several labels `id_str` and the probabilities; for a regression `id_str` and a `predicted_...` for
    each output. In column names anything but letters, digits and `_` becomes `_`; two names that are the same after
    that get their label's number at the end.

    Args:
        identifiers: The galaxies' `id_str`.
        predictions: (galaxies, labels): probabilities, after softmax or sigmoid, or a regression's values.
        label_names: In the order of the predictions' columns.
        problem_type: As in `ZoobotConfig`.
    """
    values = np.asarray(predictions, dtype=np.float32)
    prefix = "predicted" if problem_type == "regression" else "probability"
    names = _column_names(label_names, prefix=prefix)
    table = pd.DataFrame({"id_str": list(identifiers), **{name: values[:, i] for i, name in enumerate(names)}})
    if problem_type == "single_label_classification":
        table.insert(1, "predicted_label", [label_names[index] for index in values.argmax(axis=1)])
    return table


def judged_table(
    identifiers: Sequence[str], probabilities: ArrayLike, labels: ArrayLike, *, label_names: Sequence[str]
) -> pd.DataFrame:
    """The prediction table of a single label, with the true `label` and the `probability_of_label` that it was given.

    Args:
        identifiers: As in `prediction_table`.
        probabilities: After softmax, (galaxies, labels).
        labels: Class numbers, (galaxies,).
        label_names: As in `prediction_table`.
    """
    values, classes = np.asarray(probabilities), np.asarray(labels)
    table = prediction_table(identifiers, values, label_names=label_names, problem_type="single_label_classification")
    table.insert(1, "label", [label_names[index] for index in classes])
    table["probability_of_label"] = values[np.arange(len(classes)), classes]
    return table


def probability_columns(label_names: Sequence[str]) -> list[str]:
    """The columns of a prediction table that hold probabilities, in the order of the labels.

    Args:
        label_names: As in `prediction_table`.
    """
    return _column_names(label_names, prefix="probability")


def _column_names(label_names: Sequence[str], *, prefix: str) -> list[str]:
    names = [f"{prefix}_{re.sub(r'[^0-9A-Za-z_]', '_', name)}" for name in label_names]
    return number_repeats(names)


def number_repeats(names: list[str]) -> list[str]:
    """Names without repeats: "z_1", "z_1" become "z_1_0", "z_1_1".

    Args:
        names: What labels become where only letters, digits and underscores are allowed.
    """
    while len(set(names)) < len(names):  # a number may lead to a name that another label has already
        names = [f"{name}_{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]
    return names
