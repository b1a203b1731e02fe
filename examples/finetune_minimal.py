"""Find ring galaxies with a trained encoder: load it, replace the head, train only the new head.

python examples/finetune_minimal.py --output_dir rings
python examples/finetune_minimal.py --output_dir rings --dataset FOLDER --encoder mwalmsley/zoobot-encoder-convnext_nano
accelerate launch --num_processes 4 examples/finetune_minimal.py --output_dir rings --push_to_hub USER/NAME
"""

import logging
from dataclasses import dataclass, field

from accelerate import PartialState
from transformers import HfArgumentParser, set_seed

from zoobot_hf import (
    EMBEDDED_ENCODER,
    FrozenStageArguments,
    ZoobotForImageClassification,
    finetune,
    image_processor_for,
    load_rings,
    push_folder,
)


@dataclass
class Options:
    """What the command line takes."""

    output_dir: str = field(metadata={"help": "Where model, card, table and figures go."})
    encoder: str = field(default=EMBEDDED_ENCODER, metadata={"help": "Folder or Hub id; the package's own if absent."})
    dataset: str = field(default="simulated", metadata={"help": "Folder with a catalog, Hub id, or 'simulated'."})
    epochs: float = field(default=20, metadata={"help": "Most passes over the training galaxies."})
    seed: int = field(default=42, metadata={"help": "Decides splits, new weights and augmentation."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to push to: USER/NAME."})


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("zoobot_hf").setLevel(logging.INFO)
    set_seed(options.seed)
    rings = load_rings(options.dataset, seed=options.seed)
    labels = rings["train"].features["label"].names

    # 1. Load the trained encoder and replace the head.
    model = ZoobotForImageClassification.from_pretrained(options.encoder, label_names=labels)

    # 2. Train only the new head; the encoder stays frozen.
    finetuned = finetune(
        model,
        image_processor_for(options.encoder),
        rings,
        options.output_dir,
        frozen=FrozenStageArguments(num_train_epochs=options.epochs, seed=options.seed),
        skip_unfrozen=True,
        dataset_name=options.dataset,
    )

    if PartialState().is_main_process:
        print({name: value for name, value in finetuned.test_metrics["frozen"].items() if name != "confusion"})
        if options.push_to_hub:
            print(push_folder(options.output_dir, options.push_to_hub))


if __name__ == "__main__":
    main()
