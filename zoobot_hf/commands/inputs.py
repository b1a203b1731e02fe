"""What several subcommands load: the device, the galaxies, the model, and the stages' arguments."""

import argparse

import torch
from datasets import Dataset, DatasetDict

from ..data.dataset import find_layout, load_galaxy_dataset, load_galaxy_votes
from ..data.decision_tree import DecisionTree
from ..data.rings import load_rings
from ..data.volunteers import simulate_votes_dataset
from ..models.configuration_zoobot import ZoobotConfig
from ..models.conversion import image_processor_for, local_copy, read_configuration
from ..models.image_processing_zoobot import ZoobotImageProcessor
from ..models.lightning_checkpoint import find_zoobot_file
from ..models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from ..models.modeling_zoobot import ModelWithHead, ZoobotForImageClassification
from ..prediction.hub_datasets import HubDataset
from ..prediction.pieces import Source, names_hub_dataset
from ..training.arguments import FrozenStageArguments, UnfrozenStageArguments
from .options import LABEL_COLUMN

SIMULATED_GALAXIES = 1500  # with votes
HUB_OPTIONS = ("split", "configuration", "revision", "id_column", "image_column")


def choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "device is 'cuda', and this machine has no CUDA device that torch can use; choose cpu or auto."
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def load_dataset(options: argparse.Namespace) -> Dataset | DatasetDict:
    _check_hub_options(options)
    if options.dataset == "simulated":
        if options.label_column is not None:
            raise ValueError(f"label_column is {options.label_column!r}, and drawn galaxies have none; leave it out.")
        return load_rings("simulated", seed=options.seed)
    return load_galaxy_dataset(
        options.dataset,
        label_column=options.label_column or LABEL_COLUMN,
        configuration=options.configuration,
        revision=options.revision,
    )


def load_votes(options: argparse.Namespace, tree: DecisionTree) -> Dataset | DatasetDict:
    _check_hub_options(options)
    if options.dataset == "simulated":
        return simulate_votes_dataset(SIMULATED_GALAXIES, tree, seed=options.seed)
    return load_galaxy_votes(options.dataset, tree, configuration=options.configuration, revision=options.revision)


def _check_hub_options(options: argparse.Namespace) -> None:
    given = [name for name in ("configuration", "revision") if getattr(options, name) is not None]
    if given and (options.dataset == "simulated" or find_layout(options.dataset) != "hub"):
        raise ValueError(f"{given[0]} is for a Hub dataset, and dataset is {options.dataset}; leave it out.")


def find_images(options: argparse.Namespace) -> Source:
    given = {name: getattr(options, name) for name in HUB_OPTIONS if getattr(options, name) is not None}
    if names_hub_dataset(options.images):
        return HubDataset(options.images, **{**given, **({"id_column": None} if options.id_column == "none" else {})})
    if given:
        raise ValueError(f"{next(iter(given))} is for a Hub dataset, and images is {options.images}; leave it out.")
    return str(options.images)


def load_processor(encoder: str, options: argparse.Namespace) -> ZoobotImageProcessor:
    return image_processor_for(
        encoder, normalization=options.normalization, zoom=options.zoom, fits_bands=options.fits_bands
    )


def load_finetuned(name: str) -> tuple[ModelWithHead, ZoobotImageProcessor]:
    folder = local_copy(name)
    if find_zoobot_file(folder) is not None:
        raise ValueError(
            f"model is {name!r}, a checkpoint of Zoobot's, which doesn't name its outputs; load it with "
            "ZoobotForImageClassification and its label_names, or ZoobotForGalaxyZoo and its decision_tree, then save "
            f"it and image_processor_for({name!r}) with save_pretrained into one folder."
        )
    configuration = read_configuration(folder)
    if configuration.get("model_type") != ZoobotConfig.model_type:
        # from_pretrained would give it a new head, whose predictions are noise.
        raise ValueError(
            f"model is {name!r}, which zoobot-hf has not finetuned; run zoobot-hf finetune --encoder {name}."
        )
    kind = ZoobotForGalaxyZoo if configuration.get("decision_tree") else ZoobotForImageClassification
    return kind.from_pretrained(name), image_processor_for(folder)


def stage_arguments(
    options: argparse.Namespace, *, bf16: bool | None = None
) -> tuple[FrozenStageArguments, UnfrozenStageArguments]:
    common = {"seed": options.seed, "use_cpu": options.device == "cpu", "bf16": bf16}
    return FrozenStageArguments(**common), UnfrozenStageArguments(**common)
