"""Finetuned models of Zoobot 2.9.0, as PyTorch Lightning saves them: `.ckpt` files, of which nothing is unpickled."""

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import timm
except ImportError:  # this file also travels in repositories, and encoders that are not timm's do without it
    timm = None

TREE_HEAD = "head.1.0"  # FinetuneableZoobotTree; the others' heads are LinearHead, "head.linear"
HUB_PREFIX = re.compile(r"(hf_hub:|hf-hub:)?([^/]+/)?(zoobot-encoder-)?(greyscale-)?")
PICKLED_CLASS = re.compile(r"GLOBAL ([\w.]+)")


class ZoobotCheckpoint(NamedTuple):
    """The weights of a finetuned Zoobot model and what its file says about them.

    Attributes:
        name: The file's name.
        encoder: The encoder's tensors by their names in timm.
        head_weight: (outputs, embedding_size).
        head_bias: (outputs,).
        answers_a_tree: Whether the outputs are a decision tree's, and not labels or values.
        settings: The arguments that the model was made with, where they were saved.
    """

    name: str
    encoder: dict[str, Tensor]
    head_weight: Tensor
    head_bias: Tensor
    answers_a_tree: bool
    settings: dict[str, Any]

    @property
    def architecture(self) -> str | None:
        """The encoder's name in timm; None where the file doesn't say it, or says one that timm doesn't have."""
        name = HUB_PREFIX.sub("", self.settings.get("name") or "", count=1)
        return name if timm is not None and timm.is_model(name) else None

    def config_fields(self) -> dict[str, Any]:
        """What the file says about the head, as fields of `ZoobotConfig`."""
        fields: dict[str, Any] = {"head_type": "linear"}
        if "head_dropout_prob" in self.settings:
            fields["head_dropout"] = self.settings["head_dropout_prob"]
        if "unit_interval" in self.settings:  # an argument of FinetuneableZoobotRegressor alone
            fields |= {"problem_type": "regression", "unit_interval": self.settings["unit_interval"]}
        return fields


def find_zoobot_file(location: Path) -> Path | None:
    """The `.ckpt` file that is meant by a path; None where it is the folder of another kind of model.

    Args:
        location: A file, or a folder without config.json that holds one.

    Raises:
        OSError: The folder holds several.
    """
    if location.is_file():
        return location
    files = [] if (location / "config.json").is_file() else sorted(location.glob("*.ckpt"))
    if len(files) > 1:
        raise OSError(f"{location} holds {', '.join(file.name for file in files)}; give the path of one of them.")
    return files[0] if files else None


def read_zoobot_file(path: Path) -> ZoobotCheckpoint:
    """The tensors and plain values of a Lightning checkpoint.

    Args:
        path: The `.ckpt` file.

    Raises:
        ValueError: It holds other objects, whose code is never run; it is damaged; or it is no Zoobot model.
    """
    content = _load_plainly(path)
    tensors = content.get("state_dict")
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path.name} has no state_dict of tensors; give a checkpoint that Zoobot's trainer saved.")
    heads = [name.removesuffix(".weight") for name in tensors if name.startswith("head.") and name.endswith(".weight")]
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    if len(heads) != 1 or not encoder or tensors[f"{heads[0]}.weight"].ndim != 2 or f"{heads[0]}.bias" not in tensors:
        raise ValueError(
            f"{path.name} is no finetuned Zoobot model: its tensors are not an encoder's and those of one linear head, "
            f"but {', '.join(sorted({name.split('.')[0] for name in tensors}))}."
        )
    settings = content.get("hyper_parameters") or {}
    weight, bias = tensors[f"{heads[0]}.weight"], tensors[f"{heads[0]}.bias"]
    return ZoobotCheckpoint(path.name, encoder, weight, bias, heads[0] == TREE_HEAD, dict(settings))


def _load_plainly(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        pickled = PICKLED_CLASS.search(str(error))
        if pickled is None:
            raise ValueError(f"{path.name} is damaged or not a checkpoint; copy or download it again.") from error
        raise ValueError(
            f"{path.name} holds a pickled {pickled[1]}, whose code is never run. Where Zoobot is installed and the "
            "file is trusted, load it with torch.load, take the object out of its hyper_parameters, and torch.save it."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path.name} is damaged or not a checkpoint; copy or download it again.") from error
    return content if isinstance(content, dict) else {}
