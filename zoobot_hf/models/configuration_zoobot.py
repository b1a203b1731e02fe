"""ZoobotConfig: everything that is needed to rebuild a model and to read its predictions."""

from typing import Any

from transformers import AutoConfig, ConvNextConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEAD_TYPES = ("linear", "mlp")
POOLINGS = ("pooler", "first_token", "mean")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


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
        ValueError: A head type, a problem type or a share that doesn't exist; class weights that don't fit the labels.
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
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share of at least 0 and below 1.")
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} values for {self.num_labels} labels "
                f"({', '.join(self.label_names)}); give one for each, in this order."
            )


def _as_config(encoder_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if encoder_config is None or isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    settings = dict(encoder_config)
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        # An encoder's code is never taken from a repository: only the classes of transformers are built.
        raise ValueError(f"encoder_config has model_type {model_type!r}, which this version of transformers lacks.")
    return CONFIG_MAPPING[model_type].from_dict(settings)


def small_encoder_config(label_names: list[str], *, pixels: int = 96) -> ZoobotConfig:
    """The configuration of a ConvNeXt of 0.5 million parameters, to be trained from scratch in minutes on a CPU.

    Args:
        label_names: In the order of the logits.
        pixels: Height and width of the images.
    """
    encoder = ConvNextConfig(hidden_sizes=[24, 48, 96, 192], depths=[1, 1, 3, 1], image_size=pixels)
    return ZoobotConfig(
        encoder,
        head_dropout=0.1,
        encoder_name="a small ConvNeXt with new weights",
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
