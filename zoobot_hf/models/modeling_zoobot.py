"""An encoder as transformers knows it, and an encoder with a classification head."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .checkpoint import Checkpoint
from .configuration_zoobot import ZoobotConfig
from .conversion import (
    DEFAULT_PIXELS,
    build_encoder,
    check_that_shapes_fit,
    check_that_weights_fit,
    read_weight_shapes,
)
from .heads import apply_unit_interval, build_head, calibrate_logits, head_loss
from .image_processing_zoobot import LARGEST_SIZE

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
        logits: (batch, num_labels), before softmax or sigmoid; a regression's values as they are. In evaluation mode
            with the configuration's calibration.
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
            ValueError: The encoder hasn't that many blocks, or the model isn't in float32.
        """
        if self.dtype != torch.float32:
            raise ValueError(
                f"the model is in {self.dtype}, and an encoder is trained in float32; load it with dtype=torch.float32."
            )
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
        if _is_timm(encoder):
            return _timm_blocks(encoder.timm_model)
        return _listed_blocks(encoder)

    def load_weights(self, folder: str | Path) -> None:
        """Takes the weights of a saved model with the same encoder and head.

        transformers writes some encoders, ViT and Swin among them, under the names that an earlier version gave to
        their weights. `from_pretrained` translates them, and `load_state_dict` doesn't.

        Args:
            folder: Where `save_pretrained` wrote it.

        Raises:
            RuntimeError: The saved model has other weights.
            ValueError: It is no zoobot_hf model, or damaged.
        """
        saved = self._from_own_repository(Checkpoint.find(folder, {"dtype": self.dtype}))
        self.load_state_dict(saved.state_dict())

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
        # The head's, each layer in its own way; the encoder is a PreTrainedModel of its own.
        if isinstance(module, nn.Linear) and not getattr(module.weight, "_is_hf_initialized", False):
            module.reset_parameters()

    @classmethod
    def _around(cls, encoder: PreTrainedModel, config: ZoobotConfig) -> Self:
        """A model with this encoder in it; everything else is new."""
        _find_embedding(encoder, config)
        with torch.device("meta"):
            model = cls(config)
        model.base_model.encoder = encoder
        return model.eval()

    @classmethod
    def _from_own_repository(cls, source: Checkpoint) -> Self:
        """A model with all of its weights from a zoobot_hf repository."""
        config = source.wanted_config()
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        check_that_shapes_fit(read_weight_shapes(source.folder), expected, source.name)
        keywords = {**source.other_arguments, "config": config, "use_safetensors": True}
        # transformers would take the type that the model was saved in, and an encoder is trained in float32.
        keywords["dtype"] = keywords.get("dtype") or keywords.pop("torch_dtype", None) or torch.float32
        # What doesn't fit is in the report, and refused below.
        keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(str(source.folder), **keywords)
        check_that_weights_fit(report, source.name)
        model.name_or_path = source.repository  # and not the folder of its copy
        _find_embedding(model.base_model.encoder, model.config)
        return cast(Self, model)


class ZoobotModel(ZoobotPreTrainedModel):
    """An encoder, image to embedding.

    Args:
        config: The configuration, with `encoder_config`.

    Raises:
        ValueError: The configuration has no encoder, or not all of what is needed to read its embedding.
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012  transformers declares it so

    def __init__(self, config: ZoobotConfig) -> None:
        super().__init__(config)
        if config.encoder_config is None:
            raise ValueError("the configuration has no encoder_config; give the encoder's, or use from_pretrained.")
        self.encoder = build_encoder(config.encoder_config, config.pooling)
        _find_embedding(self.encoder, config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """A trained encoder: a zoobot_hf repository's, one in timm's layout, or any vision model of `AutoModel`.

        Args:
            pretrained_model_name_or_path: A local folder, a `.ckpt` file of Zoobot's, or a Hub id.
            **kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `dtype`,
                float32 when absent; fields of `ZoobotConfig`; for a zoobot_hf repository whatever else transformers
                takes, but `output_loading_info`.

        Raises:
            OSError: No such folder or repository, or no network.
            ValueError: The checkpoint doesn't fit its configuration.
        """
        source = Checkpoint.find(pretrained_model_name_or_path, kwargs)
        return cls._from_own_repository(source) if source.is_ours else cls._around(*source.load_foreign_encoder())

    def forward(self, pixel_values: Tensor) -> ZoobotModelOutput:
        """The embeddings of a batch of images.

        Args:
            pixel_values: From `ZoobotImageProcessor`: float, (batch, channels, height, width).
        """
        # The processor gives float32, and only timm's encoders turn it into the type of their weights themselves.
        output = self.encoder(pixel_values.to(self.encoder.dtype))
        return ZoobotModelOutput(_pool(output, self.encoder, self.config.pooling))


class ModelWithHead(ZoobotPreTrainedModel):
    """What `ZoobotForImageClassification` and `ZoobotForGalaxyZoo` share: an encoder and a head.

    Args:
        config: The configuration, with `encoder_config`.

    Raises:
        ValueError: The configuration has no encoder.
    """

    def __init__(self, config: ZoobotConfig) -> None:
        super().__init__(config)
        self.zoobot = ZoobotModel(config)
        self.head = build_head(config)

    @property
    def encoder(self) -> PreTrainedModel:
        """The pretrained network."""
        return self.zoobot.encoder

    @classmethod
    def _with_new_head(cls, encoder: PreTrainedModel, config: ZoobotConfig, source: Checkpoint) -> Self:
        """A model with this encoder and a new head, or that of a `.ckpt` file of Zoobot's."""
        model = cls._around(encoder, config)
        model.head = build_head(config).to(encoder.device, encoder.dtype).eval()
        if source.keeps_zoobot_head():
            source.copy_zoobot_head(model.head, config)
        elif source.zoobot_model is not None:
            logger.info("The old head of %s was left out.", source.name)
        return model

    def _run_head(self, pixel_values: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """The head's own logits, (batch, num_labels)."""
        if (pixel_values is None) == (embeddings is None):
            raise ValueError("give either pixel_values or embeddings.")
        if embeddings is None:
            embeddings = self.zoobot(pixel_values).embeddings
        logits: Tensor = self.head(embeddings.to(self.dtype))  # stored embeddings have a type of their own
        return logits


class ZoobotForImageClassification(ModelWithHead):
    """An encoder with a head: one label, several labels or values, by the configuration's `problem_type`.

    Args:
        config: The configuration, with `encoder_config` and the labels.

    Raises:
        ValueError: The configuration has no encoder, or has a decision tree.
    """

    def __init__(self, config: ZoobotConfig) -> None:
        if config.decision_tree is not None:
            raise ValueError(
                f"the model answers the decision tree {config.decision_tree['name']!r}; load it with "
                "ZoobotForGalaxyZoo, or give label_names for a new head."
            )
        super().__init__(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """A finetuned model as it is, or a trained encoder with a new head; the log says which.

        A zoobot_hf repository is taken as it is, unless another head is asked for: other labels, another problem, head
        type or pooling. So is a `.ckpt` file of Zoobot's, or a repository that holds one, where its outputs are as many
        as the labels, whose names it doesn't have: the log says which output is taken for which label. Any other
        repository is an encoder and gets a new head.

        Args:
            pretrained_model_name_or_path: A local folder, a `.ckpt` file of Zoobot's, or a Hub id.
            **kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; `dtype`,
                float32 when absent; `label_names` (or transformers' `id2label` or `num_labels`) and other fields of
                `ZoobotConfig`; for a zoobot_hf repository whatever else transformers takes, but `output_loading_info`.

        Raises:
            OSError: No such folder or repository, or no network.
            ValueError: The checkpoint doesn't fit its configuration, or is of a decision tree, and no labels are given.
        """
        source = Checkpoint.find(pretrained_model_name_or_path, kwargs)
        if source.zoobot_model is not None and source.zoobot_model.answers_a_tree and "id2label" not in source.fields:
            raise ValueError(
                f"{source.name} answers a decision tree; load it with ZoobotForGalaxyZoo, or give label_names for a "
                "new head."
            )
        if source.is_ours and not source.asks_for_new_head():
            model = cls._from_own_repository(source)
            logger.info("Loaded %s with its head: %s.", source.name, ", ".join(source.wanted_config().label_names))
            return model
        if source.is_ours:
            encoder, config = ZoobotModel._from_own_repository(source).encoder, source.wanted_config()
            logger.info("Loaded the encoder of %s; its old head was left out.", source.name)
        else:
            encoder, config = source.load_foreign_encoder()
        model = cls._with_new_head(encoder, config, source)
        if not source.keeps_zoobot_head():
            logger.info("The %s head is new, to be trained: %s.", config.head_type, ", ".join(config.label_names))
        return model

    def forward(
        self, pixel_values: Tensor | None = None, embeddings: Tensor | None = None, labels: Tensor | None = None
    ) -> ZoobotClassifierOutput:
        """The logits of a batch of images, or of embeddings where the encoder was already run.

        In training mode they are the head's own; in evaluation mode calibrated and for the sky, where the configuration
        says so. The loss is that of the head's own logits in either.

        Args:
            pixel_values: From `ZoobotImageProcessor`: float, (batch, channels, height, width).
            embeddings: From `ZoobotModel`: float, (batch, embedding_size).
            labels: As in `heads.head_loss`.

        Raises:
            ValueError: Neither images nor embeddings, or both.
        """
        logits = self._run_head(pixel_values, embeddings)
        loss = None if labels is None else head_loss(logits, labels, self.config, training=self.training)
        if self.config.problem_type == "regression":
            logits = apply_unit_interval(logits, self.config)
        return ZoobotClassifierOutput(loss, logits if self.training else calibrate_logits(logits, self.config))


def _keep_frozen_parts_in_evaluation(module: nn.Module, batch_norm_too: bool) -> set[bool]:
    """Puts every part without a trained parameter into evaluation mode, and says which kinds a module has."""
    kinds = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
    for child in module.children():
        kinds |= _keep_frozen_parts_in_evaluation(child, batch_norm_too)
    if kinds == {False} or (batch_norm_too and isinstance(module, _BatchNorm)):
        module.eval()
    return kinds


def _pool(output: ModelOutput, encoder: PreTrainedModel, pooling: str) -> Tensor:
    if pooling == "pooler":
        # ConvNeXt and ResNet pool to (batch, size, 1, 1).
        return output.pooler_output.flatten(1)
    tokens = output.last_hidden_state
    if pooling == "first_token":
        return tokens[:, 0]
    # Tokens are (batch, tokens, size), a convolutional encoder's pixels (batch, size, height, width).
    if tokens.ndim == 3:
        return tokens.mean(1)
    return tokens.mean((1, 2) if _is_channels_last(encoder) else (2, 3))


@torch.no_grad()  # in inference mode, what some encoders keep for later could not be trained with
def _find_embedding(encoder: PreTrainedModel, config: ZoobotConfig) -> None:
    """Puts `pooling` and `embedding_size`, where one is absent, into the configuration, by a dry run with one image.

    Nothing is run on meta: what BEiT works out once, it keeps for all models of the process, and from positions on meta
    each of them would read whatever lies in memory.
    """
    if (config.pooling and config.embedding_size) or encoder.device.type == "meta":
        return
    is_training = encoder.training
    try:
        image = torch.zeros(1, *_image_shape(encoder), dtype=encoder.dtype, device=encoder.device)
        output = encoder.eval()(image)
        if config.pooling is None and output.get("pooler_output") is None:
            logger.info("The encoder has no pooled output: its embedding is the mean of its tokens or pixels.")
            config.pooling = "mean"
        config.pooling = config.pooling or "pooler"
        _, config.embedding_size = _pool(output, encoder, config.pooling).shape
    except Exception as error:  # an encoder raises whatever its layers do
        raise ValueError(
            f"a dry run of the {encoder.config.model_type!r} encoder gave no embedding with pooling "
            f"{config.pooling!r}; give another (pooler, first_token or mean), or both pooling and embedding_size."
        ) from error
    encoder.train(is_training)


def _is_timm(encoder: PreTrainedModel) -> bool:
    return encoder.config.model_type == "timm_wrapper"


def _is_channels_last(encoder: PreTrainedModel) -> bool:
    """Whether the pixels are (batch, height, width, size), as those of timm's Swin are."""
    return _is_timm(encoder) and getattr(encoder.timm_model, "output_fmt", None) == "NHWC"


def _image_shape(encoder: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images that an encoder was made for."""
    config = encoder.config
    if _is_timm(encoder):
        arguments = config.model_args or {}
        channels, *size = encoder.timm_model.pretrained_cfg.get("input_size", (3, DEFAULT_PIXELS, DEFAULT_PIXELS))
        channels, size = arguments.get("in_chans", channels), arguments.get("img_size", size)
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", DEFAULT_PIXELS)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if max(height, width) > LARGEST_SIZE:
        raise ValueError(f"the encoder's images are {height} x {width} pixels; no more than {LARGEST_SIZE} are tried.")
    return channels, height, width


def _timm_blocks(timm_model: nn.Module) -> list[set[str]]:
    groups = group_parameters(timm_model, cast(Any, timm_model).group_matcher(coarse=True))
    blocks = [set(names) for _, names in sorted(groups.items())]
    parameters = dict(timm_model.named_parameters())
    if len(blocks) > 1 and all(parameters[name].ndim == 1 for name in blocks[-1]):
        final_norm = blocks.pop()  # alone it is no block
        blocks[-1] |= final_norm
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
