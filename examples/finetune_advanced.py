"""Find ring galaxies in four steps: filter, balance, train the head, then train on with the encoder unfrozen.

python examples/finetune_advanced.py --output_dir rings
python examples/finetune_advanced.py --output_dir rings --dataset FOLDER --encoder FOLDER_OR_HUB_ID
python examples/finetune_advanced.py --output_dir rings --dataset mwalmsley/gz_rings --labels votes
accelerate launch --num_processes 4 examples/finetune_advanced.py --output_dir rings --push_to_hub USER/NAME
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

from accelerate import PartialState
from datasets import DatasetDict
from transformers import HfArgumentParser, set_seed

from zoobot_hf import (
    EMBEDDED_ENCODER,
    FrozenStageArguments,
    UnfrozenStageArguments,
    ZoobotForImageClassification,
    finetune,
    image_processor_for,
    keep_featured_face_on,
    load_rings,
    load_rings_by_votes,
    push_folder,
)
from zoobot_hf.data.rings import FACE_ON_COLUMN, FEATURED_COLUMN


@dataclass
class Options:
    """What the command line takes."""

    output_dir: str = field(metadata={"help": "Where model, card, table and figures go."})
    encoder: str = field(default=EMBEDDED_ENCODER, metadata={"help": "Folder or Hub id; the package's own if absent."})
    dataset: str = field(default="simulated", metadata={"help": "Folder with a catalog, Hub id, or 'simulated'."})
    labels: Literal["column", "cut", "votes"] = field(
        default="column",
        metadata={
            "help": "Take the labels of all galaxies from their column; only of the featured and face-on ones (cut); "
            "or make labels of those from the volunteers' votes (votes)."
        },
    )
    balance: Literal["oversample", "undersample"] = field(
        default="oversample", metadata={"help": "How the training split gets as many galaxies of each class."}
    )
    frozen_epochs: float = field(default=20, metadata={"help": "Most passes with the encoder frozen."})
    unfrozen_epochs: float = field(default=15, metadata={"help": "Most passes after that."})
    last_blocks: int | None = field(default=None, metadata={"help": "Unfreeze only the encoder's last blocks."})
    layer_decay: float = field(default=0.9, metadata={"help": "Learning rate factor from block to block, downwards."})
    seed: int = field(default=42, metadata={"help": "Decides splits, new weights and augmentation."})
    resume: bool = field(default=False, metadata={"help": "Go on with a run that was stopped."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to push to: USER/NAME."})


def load(options: Options) -> tuple[DatasetDict, dict[str, int]]:
    """The splits, and how many galaxies each cut removed."""
    if options.labels == "votes":
        return load_rings_by_votes(options.dataset, seed=options.seed), {}
    columns = [FEATURED_COLUMN, FACE_ON_COLUMN] if options.labels == "cut" else []
    rings = load_rings(options.dataset, seed=options.seed, keep_columns=columns)
    if options.labels == "column":
        return rings, {}
    cuts = {name: keep_featured_face_on(split) for name, split in rings.items()}
    removed = sum(cut.removed for cut in cuts.values())
    return DatasetDict({name: cut.dataset for name, cut in cuts.items()}), {"not featured and face-on": removed}


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("zoobot_hf").setLevel(logging.INFO)
    set_seed(options.seed)
    rings, cuts = load(options)
    labels = rings["train"].features["label"].names
    finetuned = finetune(
        ZoobotForImageClassification.from_pretrained(options.encoder, label_names=labels),
        image_processor_for(options.encoder),
        rings,
        options.output_dir,
        frozen=FrozenStageArguments(num_train_epochs=options.frozen_epochs, seed=options.seed),
        unfrozen=UnfrozenStageArguments(
            num_train_epochs=options.unfrozen_epochs,
            last_blocks=options.last_blocks,
            layer_decay=options.layer_decay,
            seed=options.seed,
        ),
        balance=options.balance,
        resume=options.resume,
        dataset_name=options.dataset,
        cuts=cuts,
    )

    if PartialState().is_main_process:
        for stage in finetuned.stages:
            print(
                stage.name,
                {name: value for name, value in finetuned.test_metrics[stage.name].items() if name != "confusion"},
            )
        print(f"kept: the {finetuned.kept_stage} stage, in {finetuned.output_dir}")
        if options.push_to_hub:
            print(push_folder(options.output_dir, options.push_to_hub))


if __name__ == "__main__":
    main()
