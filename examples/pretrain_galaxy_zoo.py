"""Train an encoder and a decision tree's head from volunteers' votes, from scratch.

python examples/pretrain_galaxy_zoo.py --output_dir pretrained
python examples/pretrain_galaxy_zoo.py --output_dir pretrained --dataset catalog.parquet --surveys decals_dr5
accelerate launch --num_processes 8 examples/pretrain_galaxy_zoo.py --output_dir pretrained \
    --dataset mwalmsley/gz_evo --surveys gz_evo_v1_public --encoder_config facebook/convnext-tiny-224 --pixels 224
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import DatasetDict
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, ResNetConfig, set_seed

from zoobot_hf import (
    DecisionTree,
    UnfrozenStageTrainer,
    ZoobotConfig,
    ZoobotForGalaxyZoo,
    ZoobotImageProcessor,
    join_trees,
    load_galaxy_votes,
    load_survey,
    load_tree,
    read_votes,
    split_dataset,
    unfrozen_arguments_from_scratch,
)
from zoobot_hf.data.simulation import SURVEY_SIZE
from zoobot_hf.data.volunteers import read_probabilities, simulate_votes_dataset
from zoobot_hf.evaluation.vote_metrics import (
    coverage_of_probabilities,
    error_of_probabilities,
    vote_metrics_for,
    vote_metrics_for_trainer,
)
from zoobot_hf.evaluation.vote_plots import plot_vote_fractions

# Drawn galaxies are this much wider than what the encoder sees of them, so that they can be turned.
DRAWN_MARGIN = 1.5


@dataclass
class Options:
    """What the command line takes."""

    output_dir: str = field(metadata={"help": "Where model, processor, metrics and figure go."})
    dataset: str = field(
        default="simulated", metadata={"help": "Catalog with vote columns, folder, Hub id, or 'simulated'."}
    )
    surveys: list[str] = field(
        default_factory=lambda: ["decals_dr5", "rings"],
        metadata={"help": "Surveys whose questions are learnt together, or JSON files of decision trees."},
    )
    encoder_config: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of any encoder's configuration; a small ResNet if absent."}
    )
    galaxies: int = field(default=96000, metadata={"help": "How many galaxies are drawn to train on."})
    held_out: int = field(default=4000, metadata={"help": "How many are drawn to test on; half of it to validate."})
    volunteers: int = field(
        default=400,
        metadata={
            "help": "How many look at each drawn galaxy; more than a survey has, so that questions that few are "
            "asked are learnt too."
        },
    )
    drawing_processes: int = field(default=2, metadata={"help": "How many processes draw them."})
    pixels: int = field(default=96, metadata={"help": "Height and width of the encoder's input."})
    zoom: float = field(default=2.0, metadata={"help": "How far the encoder looks into the centre of an image."})
    epochs: float = field(default=6, metadata={"help": "Passes over the galaxies."})
    batch_size: int = field(default=64, metadata={"help": "Galaxies a step and device."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Highest learning rate."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16; the loss stays in float32."})
    seed: int = field(default=42, metadata={"help": "Decides galaxies, splits, new weights and augmentation."})
    resume: bool = field(default=False, metadata={"help": "Go on with a run that was stopped."})


def choose_tree(surveys: list[str]) -> DecisionTree:
    trees = [load_tree(name) if name.endswith(".json") else load_survey(name) for name in surveys]
    return trees[0] if len(trees) == 1 else join_trees(" and ".join(tree.name for tree in trees), trees)


def load(options: Options, tree: DecisionTree) -> DatasetDict:
    """Galaxies with votes: train, validation and test."""
    if options.dataset != "simulated":
        return split_dataset(load_galaxy_votes(options.dataset, tree), seed=options.seed)
    counts = {"train": options.galaxies, "validation": options.held_out // 2, "test": options.held_out}
    splits, first = {}, 0
    for name, count in counts.items():
        splits[name] = simulate_votes_dataset(
            count,
            tree,
            seed=options.seed,
            size=round(DRAWN_MARGIN * options.pixels),
            frame=DRAWN_MARGIN * SURVEY_SIZE / options.zoom,
            volunteers=options.volunteers,
            first=first,
            processes=options.drawing_processes,
        )
        first += count
    return DatasetDict(splits)


def choose_encoder(options: Options) -> PreTrainedConfig:
    if options.encoder_config:
        return AutoConfig.from_pretrained(options.encoder_config)
    # A ResNet-18 of half its width. On two cores it takes 269 images a second where timm's convnext_atto takes 110, and
    # it learns more from each: after 128,000 images the fractions that it expected were 0.110 off the volunteers' true
    # probabilities, the ConvNeXt's after 288,000 images 0.117.
    return ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic")


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("zoobot_hf").setLevel(logging.INFO)
    start = time.monotonic()
    tree = choose_tree(options.surveys)
    with PartialState().main_process_first():
        galaxies = load(options, tree)

    set_seed(options.seed)
    encoder = choose_encoder(options)
    model = ZoobotForGalaxyZoo(ZoobotConfig(encoder, decision_tree=tree.to_dict(), head_dropout=0.2))
    # Survey images show more of the sky than drawn ones, so that the processor to train with is not the one to keep.
    processor = ZoobotImageProcessor(options.pixels, zoom=options.zoom)
    zoom = DRAWN_MARGIN if options.dataset == "simulated" else options.zoom
    arguments = unfrozen_arguments_from_scratch(
        output_dir=str(Path(options.output_dir) / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        zoom_range=0.2,
        bf16=options.bf16,
        seed=options.seed,
        save_total_limit=None,  # which epoch suits other galaxies best can be seen only afterwards
    )
    trainer = UnfrozenStageTrainer(
        model,
        arguments,
        processing_class=ZoobotImageProcessor(options.pixels, zoom=zoom),
        train_dataset=galaxies["train"],
        eval_dataset=galaxies["validation"],
        compute_metrics=vote_metrics_for_trainer(tree.to_dict()),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    concentrations = trainer.predict(galaxies["test"]).predictions

    if PartialState().is_main_process:
        folder, votes = Path(options.output_dir), read_votes(galaxies["test"], tree)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        plot_vote_fractions(concentrations, votes, tree.to_dict(), folder / "vote_fractions.png")
        results = {
            "command": " ".join(sys.argv),
            "seconds": time.monotonic() - start,
            "galaxies": {name: len(split) for name, split in galaxies.items()},
            "history": trainer.state.log_history,
            "test": vote_metrics_for(tree.to_dict()).compute(predictions=concentrations, references=votes),
        }
        if options.dataset == "simulated":
            against_truth = concentrations, read_probabilities(galaxies["test"], tree), tree.to_dict()
            results["error of true probabilities"] = error_of_probabilities(*against_truth)
            results["coverage of true probabilities"] = coverage_of_probabilities(*against_truth)
        (folder / "training.json").write_text(json.dumps(results, indent=2))
        print(json.dumps({name: value for name, value in results.items() if name != "history"}, indent=2))


if __name__ == "__main__":
    main()
