"""A model trained on one survey's votes starts on another's: python new_survey.py [GALAXIES].

The package's encoder and its head, trained on drawn galaxies with GZ DECaLS's questions, are finetuned to Euclid's, on
drawn galaxies that it has not seen. Beside it the same encoder with a new head. Printed is the validation loss after
one epoch of the frozen stage, and after one more of the unfrozen stage. Drawn volunteers don't know Euclid's questions
about clumps and problems: these votes are missing.
"""

import logging
import sys
import tempfile
from pathlib import Path

import pandas as pd
from datasets import Dataset
from transformers import set_seed

from zoobot_hf import (
    DecisionTree,
    FrozenStageArguments,
    FrozenStageTrainer,
    UnfrozenStageArguments,
    UnfrozenStageTrainer,
    ZoobotForGalaxyZoo,
    image_processor_for,
    load_survey,
)
from zoobot_hf.data.volunteers import simulate_votes_dataset
from zoobot_hf.models.conversion import EMBEDDED_ENCODER

DECALS, EUCLID = load_survey("decals_dr5"), load_survey("euclid")
# What Euclid calls a problem is DECaLS's artifact.
RENAMED = {"smooth-or-featured-euclid_problem": "smooth-or-featured-dr5_artifact"}
# The encoder was trained on the galaxies before this one.
FIRST = 1_000_000
SEED = 42


def draw_euclid_galaxies(count: int, *, first: int) -> Dataset:
    galaxies = simulate_votes_dataset(count, DECALS, seed=SEED, size=212, frame=212, first=first)

    def rename(galaxy: dict) -> dict:
        votes = galaxy["label"]
        sources = {column: RENAMED.get(column, column.replace("-euclid_", "-dr5_")) for column in EUCLID.vote_columns}
        return {"label": {column: votes.get(source, float("nan")) for column, source in sources.items()}}

    return galaxies.remove_columns("probability").map(rename, load_from_cache_file=False)


def load_model(tree: DecisionTree, *, has_new_head: bool) -> ZoobotForGalaxyZoo:
    set_seed(SEED)
    model = ZoobotForGalaxyZoo.from_pretrained(EMBEDDED_ENCODER, decision_tree=tree.to_dict())
    if has_new_head:
        new = ZoobotForGalaxyZoo(model.config)
        new.zoobot.load_state_dict(model.zoobot.state_dict())
        return new
    return model


def losses_of(model: ZoobotForGalaxyZoo, splits: dict[str, Dataset], folder: str) -> list[float]:
    """After each of the two stages."""
    common = {"num_train_epochs": 1, "disable_tqdm": True, "seed": SEED}
    stages = (
        (FrozenStageTrainer, FrozenStageArguments(output_dir=f"{folder}/frozen", **common)),
        (UnfrozenStageTrainer, UnfrozenStageArguments(output_dir=f"{folder}/unfrozen", **common)),
    )
    losses = []
    for trainer_class, arguments in stages:
        trainer = trainer_class(
            model,
            arguments,
            # Drawn frames of 212 survey pixels are what the encoder was trained to look at.
            processing_class=image_processor_for(EMBEDDED_ENCODER, zoom=1.0),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    return losses


def main(count: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    splits = {
        "train": draw_euclid_galaxies(count, first=FIRST),
        "validation": draw_euclid_galaxies(count // 2, first=FIRST + count),
    }
    table = {}
    for name, has_new_head in (("DECaLS's head", False), ("a new head", True)):
        with tempfile.TemporaryDirectory() as folder:
            table[name] = losses_of(load_model(EUCLID, has_new_head=has_new_head), splits, str(Path(folder)))
    print(pd.DataFrame(table, index=["frozen", "unfrozen"]).T.round(2).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["600"]))
