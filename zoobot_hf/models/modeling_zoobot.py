"""An encoder as transformers knows it, and an encoder with a classification head."""

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_zoobot import ZoobotConfig
from .conversion import (
    HUB_ARGUMENTS,
    build_encoder,
    check_that_shapes_fit,
    check_that_weights_fit,
    load_encoder,
    local_copy,
    read_configuration,
    read_weight_shapes,
)
from .heads import apply_unit_interval, build_head, head_loss

try:
    from timm.models import group_parameters
except ImportError:  # this file also travels in repositories, and encoders that are not timm's do without it
    group_parameters = None

logger = logging.getLogger(__name__)


@dataclass
class ZoobotModelOutput(ModelOutput):
    """What the encoder says.

    Attributes:
        embeddings: The encoder's pooled output (batch, embedding_size).
    """

    embeddings: Tensor | None = None


@dataclass
class ZoobotClassifierOutput(ModelOutput):
    """What the head says.

    Attributes:
        loss: The batch's mean loss, where labels were given.
        logits: (batch, num_labels), before softmax or sigmoid; a regression's values as they are.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class ZoobotPreTrainedModel(PreTrainedModel):
    """What the models share: freezing, the mode of what is frozen, checkpointing."""

    config_class = ZoobotConfig
    base_model_prefix = "zoobot"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Trainer would pass `num_items_in_batch`, which counts tokens.
    accepts_loss_kwargs = False
    keep_batch_norm_statistics = False

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether no weight of the encoder is trained."""
        return not any(parameter.requires_grad for parameter in self.base_model.encoder.parameters())

    def freeze_encoder(self) -> None:
        """Freezes the encoder: no gradients, and no buffer or dropout moves either, whatever mode the model is in."""
        self.base_model.encoder.requires_grad_(False)
        self.train(self.training)

    def unfreeze_encoder(self, last_blocks: int | None = None, *, keep_batch_norm_statistics: bool = True) -> None:
        """Lets the encoder be trained, all of it or its last blocks; everything before them is frozen.

        Args:
            last_blocks: How many of the last blocks to train; all of the encoder when absent. What follows the last
                block, a final norm for example, belongs to it.
            keep_batch_norm_statistics: Whether BatchNorm layers keep their running mean and variance. A few hundred
                galaxies can't improve on them.

        Raises:
            ValueError: The encoder hasn't that many blocks.
        """
        blocks = self.encoder_blocks()
        count = len(blocks) if last_blocks is None else last_blocks
        if not 0 < count <= len(blocks):
            raise ValueError(f"last_blocks is {last_blocks}; this encoder has {len(blocks)} blocks: give 1 to that.")
        chosen = set().union(*blocks[-count:])
        for name, parameter in self.base_model.encoder.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.keep_batch_norm_statistics = keep_batch_norm_statistics
        self.train(self.training)

    def encoder_blocks(self) -> list[set[str]]:
        """The names of the encoder's parameters, block by block, from the input upwards.

        Blocks are timm's coarse layer groups, or the entries of the encoder's longest list of layers; what comes
        before them is the first block, and what follows belongs to the last.

        Raises:
            ValueError: The encoder isn't built of blocks.
        """
        encoder = self.base_model.encoder
        if encoder.config.model_type == "timm_wrapper":
            return _timm_blocks(encoder.timm_model)
        return _listed_blocks(encoder)

    def train(self, mode: bool = True) -> Self:
        """Sets training mode, but what is frozen stays in evaluation mode.

        Trainer calls this before every step; without it, BatchNorm buffers and stochastic depth of a frozen encoder
        would move.

        Args:
            mode: Whether to train.
        """
        super().train(mode)
        if mode:
            _keep_frozen_parts_in_evaluation(self.base_model.encoder, self.keep_batch_norm_statistics)
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, **keywords: Any) -> None:
        self.base_model.encoder._set_gradient_checkpointing(enable=enable, **keywords)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The head's, as PyTorch and Zoobot have it; the encoder is a PreTrainedModel of its own.
        if isinstance(module, nn.Linear) and not getattr(module.weight, "_is_hf_initialized", False):
            module.reset_parameters()

    @classmethod
    def _around(cls, encoder: PreTrainedModel, config: ZoobotConfig) -> Self:
        """A model with this encoder in it; everything else is new."""
        with torch.device("meta"):
            model = cls(config)
        model.base_model.encoder = encoder
        return model.eval()

    @classmethod
    def _from_own_repository(cls, source: "_Checkpoint") -> Self:
        """A model with all of its weights from a zoobot_hf repository."""
        config = source.wanted_config()
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        check_that_shapes_fit(read_weight_shapes(source.folder), expected, source.name)
        keywords = {**source.other_arguments, "config": config, "use_safetensors": True}
        # What doesn't fit is in the report, and refused below.
        keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(str(source.folder), **keywords)
        check_that_weights_fit(report, source.name)
        return cast(Self, model)


class ZoobotModel(ZoobotPreTrainedModel):
    """An encoder, image to embedding.

    Args:
        config: The configuration, with `encoder_config`.

    Raises:
        ValueError: The configuration has no encoder.
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012  transformers declares it so

    def __init__(self, config: ZoobotConfig) -> None:
        super().__init__(config)
        if config.encoder_config is None:
            raise ValueError("the configuration has no encoder_config; give the encoder's, or use from_pretrained.")
        self.encoder = build_encoder(config.encoder_config, config.pooling)
        config.embedding_size = config.embedding_size or _embedding_size(self.encoder)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Self:
        """A trained encoder: a zoobot_hf repository's, one in timm's layout, or any vision model of `AutoModel`.

        Args:
            pretrained_model_name_or_path: A local folder or a Hub id.
            *model_args: None are taken.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; fields of
                `ZoobotConfig`; for a zoobot_hf repository whatever else transformers takes, but `output_loading_info`.

        Raises:
            OSError: No such folder or repository, or no network.
            ValueError: The checkpoint doesn't fit its configuration.
        """
        source = _Checkpoint.find(pretrained_model_name_or_path, kwargs)
        return cls._from_own_repository(source) if source.is_ours else cls._around(*source.load_foreign_encoder())

    def forward(self, pixel_values: Tensor) -> ZoobotModelOutput:
        """The embeddings of a batch of images.

        Args:
            pixel_values: From `ZoobotImageProcessor`: float, (batch, channels, height, width).
        """
        output = self.encoder(pixel_values)
        if self.config.pooling == "pooler":
            # ConvNeXt and ResNet pool to (batch, size, 1, 1).
            return ZoobotModelOutput(output.pooler_output.flatten(1))
        if self.config.pooling == "first_token":
            return ZoobotModelOutput(output.last_hidden_state[:, 0])
        # Tokens are (batch, tokens, size), a convolutional encoder's pixels (batch, size, height, width).
        tokens = output.last_hidden_state
        return ZoobotModelOutput(tokens.mean(1) if tokens.ndim == 3 else tokens.mean((2, 3)))


class ZoobotForImageClassification(ZoobotPreTrainedModel):
    """An encoder with a head: one label, several labels or values, by the configuration's `problem_type`.

    Args:
        config: The configuration, with `encoder_config` and the labels.
    """

    def __init__(self, config: ZoobotConfig) -> None:
        super().__init__(config)
        self.zoobot = ZoobotModel(config)
        self.head = build_head(config)
        self.post_init()

    @property
    def encoder(self) -> PreTrainedModel:
        """The pretrained network."""
        return self.zoobot.encoder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Self:
        """A finetuned model as it is, or a trained encoder with a new head; the log says which.

        A zoobot_hf repository is taken as it is, unless another head is asked for: other labels, another problem or
        head type. Any other repository is an encoder and gets a new head.

        Args:
            pretrained_model_name_or_path: A local folder or a Hub id.
            *model_args: None are taken.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `label_names` (or
                transformers' `id2label` or `num_labels`) and other fields of `ZoobotConfig`; for a zoobot_hf
                repository whatever else transformers takes, but `output_loading_info`.

        Raises:
            OSError: No such folder or repository, or no network.
            ValueError: The checkpoint doesn't fit its configuration.
        """
        source = _Checkpoint.find(pretrained_model_name_or_path, kwargs)
        if source.is_ours and not source.asks_for_new_head():
            model = cls._from_own_repository(source)
            logger.info("Loaded %s with its head: %s.", source.name, ", ".join(source.wanted_config().label_names))
            return model
        if source.is_ours:
            encoder, config = ZoobotModel._from_own_repository(source).encoder, source.wanted_config()
            logger.info("Loaded the encoder of %s; its old head was left out.", source.name)
        else:
            encoder, config = source.load_foreign_encoder()
        model = cls._around(encoder, config)
        model.head = build_head(config).to(encoder.dtype).eval()
        logger.info("The %s head is new, to be trained: %s.", config.head_type, ", ".join(config.label_names))
        return model

    def forward(
        self, pixel_values: Tensor | None = None, embeddings: Tensor | None = None, labels: Tensor | None = None
    ) -> ZoobotClassifierOutput:
        """The logits of a batch of images, or of embeddings where the encoder was already run.

        Args:
            pixel_values: From `ZoobotImageProcessor`: float, (batch, channels, height, width).
            embeddings: From `ZoobotModel`: float, (batch, embedding_size).
            labels: As in `heads.head_loss`.

        Raises:
            ValueError: Neither images nor embeddings, or both.
        """
        if (pixel_values is None) == (embeddings is None):
            raise ValueError("give either pixel_values or embeddings.")
        if embeddings is None:
            embeddings = self.zoobot(pixel_values).embeddings
        logits = self.head(embeddings)
        loss = None if labels is None else head_loss(logits, labels, self.config, training=self.training)
        if self.config.problem_type == "regression":
            logits = apply_unit_interval(logits, self.config)
        return ZoobotClassifierOutput(loss, logits)


CONFIG_FIELDS = {*inspect.signature(ZoobotConfig.__init__).parameters, "id2label", "label2id", "problem_type"} - {
    "self",
    "kwargs",
}
HEAD_FIELDS = ("id2label", "problem_type", "head_type", "head_hidden_size")
# What is known of an old head's classes and training says nothing about a new head.
FIELDS_OF_OLD_HEAD = ("class_weights", "sky_prevalence", "training_prevalence")


@dataclass
class _Checkpoint:
    """What from_pretrained was given, sorted. `saved_config` is None for an encoder that isn't a zoobot_hf one."""

    name: str
    folder: Path
    saved_config: ZoobotConfig | None
    given_config: ZoobotConfig | None
    fields: dict[str, Any]
    other_arguments: dict[str, Any]

    @classmethod
    def find(cls, name_or_path: str | Path, arguments: dict[str, Any]) -> Self:
        hub_arguments = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
        config = arguments.pop("config", None)
        names = arguments.pop("label_names", None)
        if names is None and arguments.get("num_labels") is not None:
            names = [f"LABEL_{index}" for index in range(arguments.pop("num_labels"))]
        if names is not None:
            arguments["id2label"] = dict(enumerate(names))
        fields = {name: arguments.pop(name) for name in CONFIG_FIELDS if name in arguments}
        if "id2label" in fields:
            fields["id2label"] = {int(index): label for index, label in fields["id2label"].items()}
            fields["label2id"] = {label: index for index, label in fields["id2label"].items()}
        folder = local_copy(name_or_path, **hub_arguments)
        is_ours = read_configuration(folder).get("model_type") == ZoobotConfig.model_type
        saved_config = ZoobotConfig.from_pretrained(str(folder)) if is_ours else None
        name = str(name_or_path) if not Path(name_or_path).is_dir() else Path(name_or_path).resolve().name
        return cls(name, folder, saved_config, config, fields, arguments)

    @property
    def is_ours(self) -> bool:
        return self.saved_config is not None

    def wanted_config(self) -> ZoobotConfig:
        assert self.saved_config is not None
        saved = self.saved_config
        settings = (self.given_config or saved).to_dict()
        if self.asks_for_new_head():
            settings |= {name: None for name in FIELDS_OF_OLD_HEAD if settings[name] == getattr(saved, name)}
        return ZoobotConfig.from_dict({**settings, **self.fields})

    def asks_for_new_head(self) -> bool:
        # The Auto classes put changed labels into the configuration that they give, so the saved one decides.
        given = self.given_config or self.saved_config
        return any(
            self.fields.get(name, getattr(given, name)) != getattr(self.saved_config, name) for name in HEAD_FIELDS
        )

    def load_foreign_encoder(self) -> tuple[PreTrainedModel, ZoobotConfig]:
        unknown = set(self.other_arguments) - {"dtype"}
        if self.given_config is not None:
            unknown.add("config")
        if unknown:
            raise ValueError(
                f"from_pretrained got {', '.join(sorted(unknown))}; for an encoder it takes dtype, label_names, "
                f"num_labels, {', '.join([*HUB_ARGUMENTS, *sorted(CONFIG_FIELDS)])}."
            )
        loaded = load_encoder(self.folder, dtype=self.other_arguments.get("dtype"))
        settings = {"pooling": loaded.pooling, "encoder_name": self.name, **self.fields}
        config = ZoobotConfig(loaded.model.config, **settings)
        logger.info(
            "Loaded the encoder %s (%s, %.1f million parameters); left out of its checkpoint: %s.",
            self.name,
            loaded.model.config.model_type,
            loaded.model.num_parameters() / 1e6,
            ", ".join(loaded.left_out) or "nothing",
        )
        return loaded.model, config


def _keep_frozen_parts_in_evaluation(module: nn.Module, batch_norm_too: bool) -> set[bool]:
    """Puts every part without a trained parameter into evaluation mode, and says which kinds a module has."""
    kinds = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
    for child in module.children():
        kinds |= _keep_frozen_parts_in_evaluation(child, batch_norm_too)
    if kinds == {False} or (batch_norm_too and isinstance(module, _BatchNorm)):
        module.eval()
    return kinds


def _embedding_size(encoder: PreTrainedModel) -> int:
    config = encoder.config
    if config.model_type == "timm_wrapper":
        return int(encoder.timm_model.num_features)
    if getattr(config, "hidden_sizes", None):
        return int(config.hidden_sizes[-1])
    if getattr(config, "hidden_size", None):
        return int(config.hidden_size)
    raise ValueError(f"the embedding size of a {config.model_type!r} encoder is not known; give embedding_size.")


def _timm_blocks(timm_model: nn.Module) -> list[set[str]]:
    groups = group_parameters(timm_model, cast(Any, timm_model).group_matcher(coarse=True))
    blocks = [set(names) for _, names in sorted(groups.items())]
    parameters = dict(timm_model.named_parameters())
    if len(blocks) > 1 and all(parameters[name].ndim == 1 for name in blocks[-1]):
        blocks[-2] |= blocks.pop()  # the final norm alone is no block
    return [{f"timm_model.{name}" for name in names} for names in blocks]


def _listed_blocks(encoder: nn.Module) -> list[set[str]]:
    lists = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    if not sizes:
        raise ValueError(f"{type(encoder).__name__} has no list of blocks; freeze all of it or unfreeze all of it.")
    longest = max(sizes, key=lambda name: sizes[name])
    names = [name for name, _ in encoder.named_parameters()]
    blocks = [{name for name in names if name.startswith(f"{longest}.{i}.")} for i in range(len(lists[longest]))]
    inside = set().union(*blocks)
    first = next(index for index, name in enumerate(names) if name in inside)
    blocks[-1] |= {name for name in names[first:] if name not in inside}
    return [set(names[:first]), *blocks] if first else blocks
