"""What from_pretrained was given, sorted: whose repository it is, and what was asked for on top of it."""

import inspect
import logging
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_zoobot import ZoobotConfig, labels_of_votes
from .conversion import HUB_ARGUMENTS, load_encoder, load_zoobot_encoder, local_copy, read_configuration
from .lightning_checkpoint import ZoobotCheckpoint, find_zoobot_file, read_zoobot_file

logger = logging.getLogger(__name__)

CONFIG_FIELDS = {*inspect.signature(ZoobotConfig.__init__).parameters, "id2label", "label2id", "problem_type"} - {
    "self",
    "kwargs",
}
HEAD_FIELDS = ("id2label", "problem_type", "head_type", "pooling")
# What a dry run of the encoder finds where it isn't given.
FOUND_FIELDS = ("pooling", "embedding_size")
# What is known of an old head's classes, values and training says nothing about a new head.
FIELDS_OF_OLD_HEAD = {
    "class_weights": None,
    "sky_prevalence": None,
    "training_prevalence": None,
    "predictions_for": "training",
    "calibration_temperature": None,
    "calibration_shift": None,
    "decision_threshold": None,
    "decision_aim": None,
}
# Choices that other labels make anew.
FIELDS_OF_OLD_LABELS = {"unit_interval": False, "label_smoothing": 0.0}


@dataclass
class Checkpoint:
    """What from_pretrained was given, sorted.

    Attributes:
        repository: The Hub id, or the name of the local folder or file.
        name: The same with the subfolder.
        folder: Its local copy.
        saved_config: None where it isn't a zoobot_hf repository.
        zoobot_model: What a `.ckpt` file holds; None where it isn't one.
        given_config: The argument `config`.
        fields: The arguments that are fields of the configuration.
        other_arguments: The rest.
    """

    repository: str
    name: str
    folder: Path
    saved_config: ZoobotConfig | None
    zoobot_model: ZoobotCheckpoint | None
    given_config: ZoobotConfig | None
    fields: dict[str, Any]
    other_arguments: dict[str, Any]

    @classmethod
    def find(cls, name_or_path: str | Path, arguments: dict[str, Any]) -> Self:
        """What the arguments of from_pretrained mean; downloads what isn't local.

        Args:
            name_or_path: A local folder, a `.ckpt` file or a Hub id.
            arguments: The rest; those that are understood here are taken out.

        Raises:
            OSError: No such folder or repository, or no network.
            ValueError: Labels or a decision tree that don't fit, or a `.ckpt` file that can't be read.
        """
        hub_arguments = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
        config = arguments.pop("config", None)
        names, count = arguments.pop("label_names", None), arguments.pop("num_labels", None)
        if isinstance(names, str):
            raise ValueError(f"label_names is {names!r}; give a list of names, for example ['not ring', 'ring'].")
        if names is not None:
            arguments["id2label"] = dict(enumerate(names))
        fields = {name: arguments.pop(name) for name in CONFIG_FIELDS if name in arguments}
        # Without a value, a dry run finds these, or the saved ones hold.
        fields = {name: value for name, value in fields.items() if value is not None or name not in FOUND_FIELDS}
        fields |= _labels_of(fields)
        if fields.get("decision_tree") is not None:
            fields |= labels_of_votes(fields["decision_tree"], id2label=fields.get("id2label"))
        folder = local_copy(name_or_path, **hub_arguments)
        repository = Path(name_or_path).resolve().name if Path(name_or_path).exists() else str(name_or_path)
        name = str(PurePosixPath(repository, hub_arguments.get("subfolder") or ""))
        zoobot_file = find_zoobot_file(folder)
        zoobot_model = None if zoobot_file is None else read_zoobot_file(zoobot_file)
        is_ours = zoobot_file is None and read_configuration(folder).get("model_type") == ZoobotConfig.model_type
        saved_config = ZoobotConfig.from_pretrained(str(folder)) if is_ours else None
        fields |= _numbered_labels(count, fields, config or saved_config)
        return cls(repository, name, folder, saved_config, zoobot_model, config, fields, arguments)

    @property
    def is_ours(self) -> bool:
        """Whether it is a zoobot_hf repository."""
        return self.saved_config is not None

    @property
    def has_decision_tree(self) -> bool:
        """Whether it is a zoobot_hf repository with a model that answers a decision tree."""
        return self.saved_config is not None and self.saved_config.decision_tree is not None

    def as_saved(self) -> Self:
        """The same without anything that was asked for on top."""
        return replace(self, given_config=None, fields={})

    def wanted_config(self) -> ZoobotConfig:
        """The saved configuration with the fields that were asked for."""
        assert self.saved_config is not None
        saved = self.saved_config
        settings = (self.given_config or saved).to_dict()
        if self.asks_for_new_head():
            old: dict[str, Any] = dict(FIELDS_OF_OLD_HEAD)
            if self.given_config is None and self._asks_for_other("id2label", "problem_type"):
                old |= FIELDS_OF_OLD_LABELS
            if saved.architectures != ["ZoobotModel"]:
                # Training goes on from this repository's encoder, whatever that one started from.
                old["encoder_name"] = self.repository
            settings |= {name: default for name, default in old.items() if settings[name] == getattr(saved, name)}
        settings["pooling"] = settings["pooling"] or saved.pooling
        settings["embedding_size"] = None if self.asks_for_other_embeddings() else saved.embedding_size
        has_old_tree = self.has_decision_tree and settings["decision_tree"] == saved.decision_tree
        if has_old_tree and self._asks_for_other("id2label", "problem_type"):
            settings["decision_tree"] = None
            del settings["problem_type"]  # "votes" goes with the tree
        return ZoobotConfig.from_dict({**settings, **self.fields})

    def asks_for_new_head(self) -> bool:
        """Whether the head that was asked for is another than the saved one."""
        assert self.saved_config is not None
        has_hidden_layer = self.saved_config.head_type == "mlp"
        return self._asks_for_other(*HEAD_FIELDS) or (has_hidden_layer and self._asks_for_other("head_hidden_size"))

    def asks_for_other_embeddings(self) -> bool:
        """Whether the encoder is to be read in another way than the saved head was trained on."""
        return self._asks_for_other("pooling")

    def _asks_for_other(self, *names: str) -> bool:
        # The Auto classes put changed labels into the configuration that they give, so the saved one decides.
        given, saved = self.given_config or self.saved_config, self.saved_config
        wanted = {name: self.fields.get(name, getattr(given, name)) for name in names}
        return any(value not in (None, getattr(saved, name)) for name, value in wanted.items())

    def load_foreign_encoder(self) -> tuple[PreTrainedModel, ZoobotConfig]:
        """The encoder of what isn't a zoobot_hf repository, and the configuration of a model around it.

        Raises:
            ValueError: An argument that an encoder doesn't take, or a checkpoint that doesn't fit its configuration.
        """
        unknown = set(self.other_arguments) - {"dtype"}
        if self.given_config is not None:
            unknown.add("config")
        if unknown:
            raise ValueError(
                f"from_pretrained got {', '.join(sorted(unknown))}; for an encoder it takes dtype, label_names, "
                f"num_labels, {', '.join([*HUB_ARGUMENTS, *sorted(CONFIG_FIELDS)])}."
            )
        dtype, fields = self.other_arguments.get("dtype"), dict(self.fields)
        if self.zoobot_model is None:
            loaded = load_encoder(self.folder, dtype=dtype)
        else:
            loaded = load_zoobot_encoder(self.zoobot_model, fields.pop("encoder_config", None), dtype=dtype)
            old = self.zoobot_model.config_fields()
            if self._asks_for_other_outputs(self.zoobot_model):
                old |= FIELDS_OF_OLD_LABELS
                old.pop("problem_type", None)
            fields = {**old, **fields}
            fields.setdefault("id2label", {i: f"LABEL_{i}" for i in range(len(self.zoobot_model.head_bias))})
        fields = {"pooling": loaded.pooling, "encoder_name": self.repository, **fields}
        config = ZoobotConfig(loaded.model.config, **fields)
        logger.info(
            "Loaded the encoder %s (%s, %.1f million parameters); left out of its checkpoint: %s.",
            self.name,
            loaded.model.config.model_type,
            loaded.model.num_parameters() / 1e6,
            ", ".join(loaded.left_out) or "nothing",
        )
        return loaded.model, config

    def keeps_zoobot_head(self) -> bool:
        """Whether it is a `.ckpt` file whose head is of the kind that was asked for, with the same outputs."""
        if self.zoobot_model is None or self._asks_for_other_outputs(self.zoobot_model):
            return False
        reading = (self.fields.get("pooling", "pooler"), self.fields.get("head_type", "linear"))
        return reading == ("pooler", "linear")

    def _asks_for_other_outputs(self, old: ZoobotCheckpoint) -> bool:
        """Whether another number of outputs than those of a `.ckpt` file was asked for, or another problem."""
        asks_for_tree = self.fields.get("decision_tree") is not None
        count = len(self.fields.get("id2label", old.head_bias))
        otherwise = "votes" if old.answers_a_tree else "single_label_classification"
        problem = old.config_fields().get("problem_type", otherwise)
        wanted = (asks_for_tree, count, self.fields.get("problem_type") or problem)
        return wanted != (old.answers_a_tree, len(old.head_bias), problem)

    def copy_zoobot_head(self, head: nn.Sequential, config: ZoobotConfig) -> None:
        """Copies the weights of a finetuned Zoobot model's head, output by output.

        Args:
            head: The new head.
            config: The new model's configuration.
        """
        old = self.zoobot_model
        assert old is not None
        with torch.no_grad():
            cast(nn.Linear, head[-1]).weight.copy_(old.head_weight)
            cast(nn.Linear, head[-1]).bias.copy_(old.head_bias)
        pairs = ", ".join(f"output {number} for {name}" for number, name in enumerate(config.label_names))
        logger.info("Took the head of %s: %s.", self.name, pairs)


def _labels_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The labels by number and the other way round, from whichever was given."""
    if fields.get("id2label") is not None:
        names = {int(number): name for number, name in fields["id2label"].items()}
    elif fields.get("label2id") is not None:
        names = {int(number): name for name, number in fields["label2id"].items()}
    else:
        return {}
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"the labels are {list(names.values())}; give at least one, and each as text.")
    if len(set(names.values())) < len(names):
        raise ValueError(f"the labels are {', '.join(names.values())}; give each of them once.")
    # Of NumPy's text only the text is kept.
    return {
        "id2label": {number: str(name) for number, name in names.items()},
        "label2id": {str(name): number for number, name in names.items()},
    }


def _numbered_labels(count: int | None, fields: dict[str, Any], saved: ZoobotConfig | None) -> dict[str, Any]:
    """Labels without names, where a number of them was asked for that differs from the saved one."""
    names = fields.get("id2label")
    if count is None or (names is None and saved is not None and saved.num_labels == count):
        return {}
    if names is None:
        return _labels_of({"id2label": {number: f"LABEL_{number}" for number in range(count)}})
    if len(names) != count:
        raise ValueError(
            f"num_labels is {count}, and the labels are {', '.join(names.values())}; leave num_labels out."
        )
    return {}
