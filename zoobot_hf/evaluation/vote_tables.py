"""The tables of what a model says about the answers to a decision tree."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from zoobot_hf.models.configuration_zoobot import ZoobotConfig
from zoobot_hf.models.votes import (
    TreeLayout,
    expected_share_asked,
    expected_vote_fractions,
    tree_layout,
    vote_fraction_intervals,
)

CONCENTRATION = "_concentration"
# Galaxy Zoo's published catalogs leave a fraction empty where fewer than half of the volunteers would be asked.
LEAST_SHARE_ASKED = 0.5


def concentration_table(
    identifiers: Sequence[str], concentrations: npt.ArrayLike, vote_columns: Sequence[str]
) -> pd.DataFrame:
    """A row for each galaxy, in the order given: `id_str`, and a `..._concentration` for each vote column.

    Args:
        identifiers: The galaxies' `id_str`.
        concentrations: (galaxies, answers), above 0.
        vote_columns: The decision tree's, in the order of the concentrations.
    """
    values = np.asarray(concentrations, dtype=np.float32)
    columns = {f"{name}{CONCENTRATION}": values[:, i] for i, name in enumerate(vote_columns)}
    return pd.DataFrame({"id_str": list(identifiers), **columns})


def friendly_table(concentrations: pd.DataFrame, config: ZoobotConfig) -> pd.DataFrame:
    """The expected vote fractions of each galaxy, as in Galaxy Zoo's friendly catalogs.

    Args:
        concentrations: As `concentration_table` makes it; other columns are passed over.
        config: The model's configuration, with `decision_tree`.

    Returns:
        `id_str` and a `..._fraction` for each vote column, 0-1, in the same order of rows; NaN where fewer than half
        of the volunteers would be asked the question.

    Raises:
        ValueError: No decision tree, or a table without its concentrations.
    """
    values, layout = _concentrations(concentrations, config)
    fractions = expected_vote_fractions(values, layout)
    shares = expected_share_asked(values, layout)[:, layout.question_of_answer]
    fractions = np.where(shares < LEAST_SHARE_ASKED, np.nan, fractions).astype(np.float32)
    columns = {f"{name}_fraction": fractions[:, i] for i, name in enumerate(layout.vote_columns)}
    return pd.DataFrame({"id_str": concentrations["id_str"].to_numpy(), **columns})


def advanced_table(concentrations: pd.DataFrame, config: ZoobotConfig) -> pd.DataFrame:
    """What the model says of every answer of each galaxy, as in Galaxy Zoo's advanced catalogs.

    Args:
        concentrations: As `concentration_table` makes it; other columns are passed over.
        config: The model's configuration, with `decision_tree`.

    Returns:
        `id_str` and for each vote column `..._fraction` (expected), `..._90pc-lower` and `..._90pc-upper` (ends of the
        90% interval) and `..._proportion-asked` (of the volunteers, for its question), all 0-1, in the same order of
        rows.

    Raises:
        ValueError: No decision tree, or a table without its concentrations.
    """
    values, layout = _concentrations(concentrations, config)
    lower, upper = vote_fraction_intervals(values, layout)
    parts = {
        "fraction": expected_vote_fractions(values, layout),
        "90pc-lower": lower,
        "90pc-upper": upper,
        "proportion-asked": expected_share_asked(values, layout)[:, layout.question_of_answer],
    }
    columns = {
        f"{name}_{part}": numbers[:, i].astype(np.float32)
        for i, name in enumerate(layout.vote_columns)
        for part, numbers in parts.items()
    }
    return pd.DataFrame({"id_str": concentrations["id_str"].to_numpy(), **columns})


def _concentrations(table: pd.DataFrame, config: ZoobotConfig) -> tuple[npt.NDArray[np.float64], TreeLayout]:
    if config.decision_tree is None:
        raise ValueError("the model has no decision tree; its table of predictions is the only one.")
    layout = tree_layout(config.decision_tree)
    columns = [f"{name}{CONCENTRATION}" for name in layout.vote_columns]
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; give the predictions of this model.")
    return table[columns].to_numpy(dtype=np.float64), layout
