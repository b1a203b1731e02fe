"""What a run on volunteers' votes reports: its tables, and what could not be learned or measured."""

import numpy as np
import numpy.typing as npt
import pandas as pd
from datasets import Dataset, DatasetDict

from zoobot_hf.evaluation.vote_metrics import CONFIDENT_VOTES, were_asked
from zoobot_hf.evaluation.vote_tables import advanced_table, concentration_table, friendly_table
from zoobot_hf.models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from zoobot_hf.publishing.hub import ADVANCED, FRIENDLY, PREDICTIONS
from zoobot_hf.publishing.run_folder import JudgedVotes

from .trainer import read_labels

Floats = npt.NDArray[np.float64]


def read_observed_votes(dataset: Dataset, model: ZoobotForGalaxyZoo) -> Floats:
    """The votes of a split: counts (galaxies, answers) in the order of the model's outputs, NaN where missing.

    Args:
        dataset: With votes as `label`.
        model: The model.
    """
    votes = read_labels(dataset, model)
    assert votes is not None
    return votes.double().numpy()


def vote_tables(concentrations: npt.ArrayLike, dataset: Dataset, model: ZoobotForGalaxyZoo) -> dict[str, pd.DataFrame]:
    """By the name of its file, each table of the test galaxies, in their order.

    Beside the friendly and the advanced table there is one from which both can be made again, and all metrics: the
    concentrations, and under the names of the vote columns what volunteers said.

    Args:
        concentrations: What the model predicts, (galaxies, answers).
        dataset: The test galaxies.
        model: The model.
    """
    columns = model.layout.vote_columns
    predicted = concentration_table(dataset["id_str"][:], concentrations, columns)
    votes = pd.DataFrame(read_observed_votes(dataset, model), columns=columns)
    return {
        PREDICTIONS: pd.concat([predicted, votes], axis=1),
        FRIENDLY: friendly_table(predicted, model.config),
        ADVANCED: advanced_table(predicted, model.config),
    }


def judged_votes(concentrations: npt.ArrayLike, dataset: Dataset, model: ZoobotForGalaxyZoo) -> JudgedVotes | None:
    """What the figure of vote fractions needs; None where no galaxy has enough votes to be drawn.

    Args:
        concentrations: What the model predicts, (galaxies, answers).
        dataset: The test galaxies.
        model: The model.
    """
    votes = read_observed_votes(dataset, model)
    if not were_asked(votes, model.layout, least_votes=CONFIDENT_VOTES).any():
        return None
    return JudgedVotes(np.asarray(concentrations), votes, model.config.decision_tree, CONFIDENT_VOTES)


def remarks_on_votes(dataset: DatasetDict, model: ZoobotForGalaxyZoo) -> list[str]:
    """What could not be learned, or not be measured, for want of votes, a sentence each.

    Args:
        dataset: With `train` and `test`.
        model: The model.
    """
    layout, remarks = model.layout, []
    votes = {name: read_observed_votes(dataset[name], model) for name in ("train", "test")}
    consequences = {
        "train": "training galaxy has votes on {}: what the model says about it was not learned here",
        "test": "test galaxy has votes on {}: what the model says about it was not measured",
    }
    for name, words in consequences.items():
        is_asked = were_asked(votes[name], layout).any(axis=0)
        missing = [layout.question_names[number] for number in np.flatnonzero(~is_asked)]
        if missing:
            remarks.append(f"No {words.format(', '.join(missing))}.")
    if not were_asked(votes["test"], layout, least_votes=CONFIDENT_VOTES).any():
        remarks.append(f"No test galaxy has {CONFIDENT_VOTES} votes on a question: vote fractions were not drawn.")
    return remarks
