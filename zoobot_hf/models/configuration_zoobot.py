"""ZoobotConfig: everything that is needed to rebuild a model and to read its predictions."""

import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, ResNetConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEAD_TYPES = ("linear", "mlp")
POOLINGS = ("pooler", "first_token", "mean")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# Far above any encoder's; a damaged config.json can't ask for all of the memory.
LARGEST_WIDTH = 65536
MOST_LAYERS = 1024


class ZoobotConfig(PreTrainedConfig):
    """The configuration of an encoder with a head.

    Args:
        encoder_config: The encoder's own transformers configuration, whole, as an object or as its dictionary.
        embedding_size: Length of the encoder's pooled output. Read off the encoder when absent.
        pooling: How the embedding is read: "pooler" (the encoder's own pooled output), "first_token" or "mean".
        head_type: "linear" (dropout and one linear layer) or "mlp" (one hidden layer).
        head_hidden_size: Width of the hidden layer of an "mlp" head.
        head_dropout: Share of the head's inputs that are dropped in training, 0-1. Zoobot 2.9.0 has 0.5.
        label_smoothing: Share of each label that is spread over all classes in training, 0-1.
        class_weights: A weight for each class in the training loss, in the order of the labels.
        unit_interval: Whether regression outputs pass through a sigmoid, so that they lie in 0-1.
        sky_prevalence: Share of each class before balancing, by label name; sums to 1.
        training_prevalence: Share of each class that the model was trained at, by label name; sums to 1.
        encoder_name: Hub id or folder name of the pretrained encoder.
        **kwargs: What every transformers configuration takes: `id2label`, `label2id`, `problem_type`, ...

    Raises:
        ValueError: A head type, a pooling, a problem type, a share or a width that doesn't exist; class weights or
            numbers of labels that don't fit; an encoder that transformers lacks.
    """

    model_type = "zoobot"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012  transformers declares it so

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        embedding_size: int | None = None,
        pooling: str = "pooler",
        head_type: str = "linear",
        head_hidden_size: int = 256,
        head_dropout: float = 0.5,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        unit_interval: bool = False,
        sky_prevalence: dict[str, float] | None = None,
        training_prevalence: dict[str, float] | None = None,
        encoder_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("problem_type", "single_label_classification")
        _check_sizes(kwargs, "the configuration")
        if not isinstance(kwargs.get("id2label") or {}, dict):
            raise ValueError(f"id2label is {kwargs['id2label']!r}; give a dictionary from numbers to names.")
        super().__init__(**kwargs)
        self.encoder_config = _as_config(encoder_config)
        self.embedding_size = embedding_size
        self.pooling = pooling
        self.head_type = head_type
        self.head_hidden_size = head_hidden_size
        self.head_dropout = head_dropout
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.unit_interval = unit_interval
        self.sky_prevalence = sky_prevalence
        self.training_prevalence = training_prevalence
        self.encoder_name = encoder_name
        self._check()

    @property
    def label_names(self) -> list[str]:
        """The labels' names in the order of the logits."""
        return [self.id2label[index] for index in range(self.num_labels)]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, without the paths of the machine that it was made on."""
        output: dict[str, Any] = super().to_dict()
        # transformers keeps in `_name_or_path` where the encoder was loaded from: somebody's home folder.
        for part in (output, output.get("encoder_config") or {}):
            part.pop("_name_or_path", None)
        return output

    def _check(self) -> None:
        for name, choices in (("head_type", HEAD_TYPES), ("pooling", POOLINGS), ("problem_type", PROBLEM_TYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        for name in ("head_dropout", "label_smoothing"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 <= share < 1:
                raise ValueError(f"{name} is {share!r}; give a share of at least 0 and below 1.")
        widths = {"head_hidden_size": self.head_hidden_size, "embedding_size": self.embedding_size or 1}
        for name, width in widths.items():
            if not isinstance(width, int) or not 0 < width <= LARGEST_WIDTH:
                raise ValueError(f"{name} is {width!r}; give a whole number from 1 to {LARGEST_WIDTH}.")
        self._check_labels()
        self._check_prevalences()

    def _check_prevalences(self) -> None:
        for name in ("sky_prevalence", "training_prevalence"):
            shares = getattr(self, name)
            if shares is None:
                continue
            if not isinstance(shares, dict) or not all(_is_number(s) and 0 <= s <= 1 for s in shares.values()):
                raise ValueError(f"{name} is {shares!r}; give each label's share, from 0 to 1, by its name.")

    def _check_labels(self) -> None:
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"id2label has the numbers {sorted(self.id2label)}; number the labels from 0 upwards.")
        if self.class_weights is None:
            return
        weights = self.class_weights
        if not isinstance(weights, (list, tuple)) or not all(_is_number(w) and w >= 0 for w in weights):
            raise ValueError(f"class_weights is {weights!r}; give a list of numbers of at least 0, one for each label.")
        if len(weights) != self.num_labels:
            raise ValueError(
                f"class_weights has {len(weights)} values for {self.num_labels} labels "
                f"({', '.join(self.label_names)}); give one for each, in this order."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _as_config(encoder_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if encoder_config is None or isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    if not isinstance(encoder_config, dict):
        raise ValueError(f"encoder_config is {encoder_config!r}; give a transformers configuration or its dictionary.")
    settings = dict(encoder_config)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or model_type == ZoobotConfig.model_type:
        # An encoder's code is never taken from a repository: only the classes of transformers are built.
        raise ValueError(f"encoder_config has model_type {model_type!r}, but this transformers has no such encoder.")
    _check_sizes(settings, "encoder_config")
    try:
        return CONFIG_MAPPING[model_type].from_dict(settings)
    except StrictDataclassError as error:
        raise ValueError(f"encoder_config is no {model_type} configuration: {error}") from error


def _check_sizes(settings: Any, where: str, *, largest: int = LARGEST_WIDTH) -> None:
    """Refuses whole numbers that no encoder has, before anything is built that large."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            counts_layers = isinstance(name, str) and ("layers" in name or "depth" in name)
            _check_sizes(value, f"{name} of {where}", largest=MOST_LAYERS if counts_layers else largest)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            _check_sizes(value, where, largest=largest)
    elif isinstance(settings, (int, float)) and math.isfinite(settings) and abs(settings) > largest:
        raise ValueError(f"{where} is or holds {settings}; no encoder has more than {largest}.")


def small_encoder_config(label_names: list[str]) -> ZoobotConfig:
    """The configuration of a ResNet of 0.3 million parameters, to be trained from scratch in a minute or two on a CPU.

    Args:
        label_names: In the order of the logits.
    """
    encoder = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic")
    return ZoobotConfig(
        encoder,
        head_dropout=0.1,
        encoder_name="a small ResNet with new weights",
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
