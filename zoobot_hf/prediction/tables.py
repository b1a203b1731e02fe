"""What the tables of a survey's predictions look like."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from zoobot_hf.evaluation.tables import prediction_table
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


def survey_table(
    identifiers: Sequence[str], outputs: npt.ArrayLike, *, config: ZoobotConfig, prevalence: str | None = None
) -> pd.DataFrame:
    """A row for each galaxy, in the order given: what the shards of a survey hold.

    For a decision tree: `id_str` and a `..._concentration` for each vote column, from which `friendly_table` and
    `advanced_table` follow. Otherwise what `prediction_table` makes, and where the configuration has a
    `decision_threshold` for these probabilities, whether it is reached: `selected`, or where several labels have one
    `selected_...` for each.

    Args:
        identifiers: The galaxies' `id_str`.
        outputs: (galaxies, labels): probabilities, a regression's values, or concentrations.
        config: The model's configuration.
        prevalence: Whose prevalence the probabilities have, "training" or "sky"; the configuration's
            `predictions_for` when absent. A threshold belongs to that one alone.
    """
    values = np.asarray(outputs, dtype=np.float32)
    if config.problem_type == "votes":
        columns = {f"{name}{CONCENTRATION}": values[:, i] for i, name in enumerate(config.label_names)}
        return pd.DataFrame({"id_str": list(identifiers), **columns})
    names = config.label_names
    table = prediction_table(identifiers, values, label_names=names, problem_type=config.problem_type)
    if prevalence not in (None, config.predictions_for):
        return table
    thresholds = config.decision_threshold or {}
    unknown = sorted(set(thresholds) - set(names))
    if unknown:
        raise ValueError(f"decision_threshold names {', '.join(unknown)}; the labels are {', '.join(names)}.")
    columns_of_labels = table.columns[-len(names) :]
    for name, threshold in thresholds.items():
        column = columns_of_labels[names.index(name)]
        selected = "selected" if len(thresholds) == 1 else column.replace("probability", "selected", 1)
        table[selected] = values[:, names.index(name)] >= threshold
    return table


def friendly_table(concentrations: pd.DataFrame, config: ZoobotConfig) -> pd.DataFrame:
    """The expected vote fractions of each galaxy, as in Galaxy Zoo's friendly catalogs.

    Args:
        concentrations: As `survey_table` makes it for a decision tree.
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
        concentrations: As `survey_table` makes it for a decision tree.
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


def describe_column(name: str) -> str:
    """What a column of a table of predictions holds, in one sentence; empty for columns of other tables.

    Args:
        name: The column's name.
    """
    beginnings = {
        "id_str": "Name of the galaxy",
        "predicted_label": "Most probable label",
        "probability_": "Probability of the label, 0-1",
        "predicted_": "Predicted value",
        "selected": "Whether the probability reaches the model's decision threshold",
    }
    endings = {
        CONCENTRATION: "Concentration of the answer in its question's Dirichlet distribution",
        "_fraction": "Expected fraction of the question's votes for this answer, 0-1",
        "_90pc-lower": "Lower end of the 90% interval of the answer's probability",
        "_90pc-upper": "Upper end of the 90% interval of the answer's probability",
        "_proportion-asked": "Expected share of the volunteers who are asked the question, 0-1",
    }
    found = [text for ending, text in endings.items() if name.endswith(ending)]
    found += [text for beginning, text in beginnings.items() if name.startswith(beginning)]
    return found[0] if found else ""


def _concentrations(table: pd.DataFrame, config: ZoobotConfig) -> tuple[npt.NDArray[np.float64], TreeLayout]:
    if config.decision_tree is None:
        raise ValueError("the model has no decision tree; its table of predictions is the only one.")
    layout = tree_layout(config.decision_tree)
    columns = [f"{name}{CONCENTRATION}" for name in layout.vote_columns]
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; give the predictions of this model.")
    return table[columns].to_numpy(dtype=np.float64), layout
