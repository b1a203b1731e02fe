"""What the tables of a survey's predictions look like."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from zoobot_hf.evaluation.tables import prediction_table
from zoobot_hf.evaluation.vote_tables import CONCENTRATION, concentration_table
from zoobot_hf.models.configuration_zoobot import ZoobotConfig


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
        return concentration_table(identifiers, values, config.label_names)
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
        # In float64, as the threshold was chosen: rounded to float32 it may be the next probability below.
        table[selected] = values[:, names.index(name)].astype(np.float64) >= threshold
    return table


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
    # A label's own name may end as a column of votes does.
    found = [text for beginning, text in beginnings.items() if name.startswith(beginning)]
    found += [text for ending, text in endings.items() if name.endswith(ending)]
    return found[0] if found else ""
