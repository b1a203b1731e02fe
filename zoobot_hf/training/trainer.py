"""The two stages as Trainer subclasses."""

from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer

from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification

from .arguments import FrozenStageArguments, UnfrozenStageArguments
from .augmentation import TURNED_MARGIN, augment_galaxies


class GalaxyCollator:
    """Examples to a batch: `image` and `label` of a dataset to `pixel_values` and `labels`.

    Args:
        processor: The model's image processor.
    """

    def __init__(self, processor: ZoobotImageProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of pixel values, or of wide uint8 fields where the examples were prepared for augmentation.

        Args:
            examples: With `image` (PIL) or `wide_field` (uint8 tensor), and `label` where it is known.
        """
        if "wide_field" in examples[0]:
            batch = {"pixel_values": torch.stack([example["wide_field"] for example in examples])}
        else:
            batch = dict(self.processor([example["image"] for example in examples]))
        if "label" in examples[0]:
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        return batch


class WideFields:
    """A dataset's transform: each image as a wide field, from which the augmentation cuts a turned crop.

    Args:
        processor: The model's image processor.
        margin: Factor by which the field is wider than the processor's crop.
    """

    def __init__(self, processor: ZoobotImageProcessor, margin: float) -> None:
        self.processor = processor
        self.margin = margin

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns `wide_field` and `label` of a batch of rows.

        Args:
            columns: With `image` (PIL) and `label`.
        """
        fields = [self.processor.crop_and_resize(image, margin=self.margin) for image in columns["image"]]
        return {"wide_field": fields, "label": columns["label"]}


class _StageTrainer(Trainer):
    """What both stages share: galaxies in, turned and mirrored in training; early stopping."""

    args: FrozenStageArguments | UnfrozenStageArguments

    def __init__(
        self,
        model: ZoobotForImageClassification,
        args: FrozenStageArguments | UnfrozenStageArguments,
        *,
        processing_class: ZoobotImageProcessor,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is not None:
            check_labels(train_dataset, model)
            if args.augment:
                # Zooming out and shifting widen the field that a turned crop may reach.
                margin = TURNED_MARGIN / (1 - args.zoom_range) + 2 * args.max_shift
                train_dataset = train_dataset.with_transform(WideFields(processing_class, margin))
        kwargs.setdefault("data_collator", GalaxyCollator(processing_class))
        super().__init__(model, args, processing_class=processing_class, train_dataset=train_dataset, **kwargs)
        if args.early_stopping_patience is not None and args.eval_strategy != "no":
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch; wide uint8 fields are augmented and scaled first, on the device.

        Args:
            model: The model, wrapped or not.
            inputs: `pixel_values`, and `labels` where known.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        fields = inputs["pixel_values"]
        if fields.dtype == torch.uint8:
            turned = augment_galaxies(
                fields,
                pixels=self.processing_class.pixels,
                zoom_range=self.args.zoom_range,
                max_shift=self.args.max_shift,
            )
            inputs = {**inputs, "pixel_values": self.processing_class.rescale_and_normalize(turned)}
        loss: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, *args, **kwargs)
        return loss


class FrozenStageTrainer(_StageTrainer):
    """Trains the head while the encoder stays frozen: parameters, buffers and dropout.

    Args:
        model: The model; its encoder is frozen here.
        args: The stage's arguments.
        processing_class: The model's image processor.
        train_dataset: With `image` and `label`.
        **kwargs: What `Trainer` takes: `eval_dataset`, `compute_metrics`, `callbacks`, ...

    Raises:
        ValueError: The dataset's labels aren't the model's.
    """

    def __init__(self, model: ZoobotForImageClassification, args: FrozenStageArguments, **kwargs: Any) -> None:
        model.freeze_encoder()
        super().__init__(model, args, **kwargs)


class UnfrozenStageTrainer(_StageTrainer):
    """Trains head and encoder, each block of it at a lower learning rate than the one above.

    Args:
        model: The model, its head already trained; its encoder, or the last blocks of it, is unfrozen here.
        args: The stage's arguments.
        processing_class: The model's image processor.
        train_dataset: With `image` and `label`.
        **kwargs: What `Trainer` takes: `eval_dataset`, `compute_metrics`, `callbacks`, ...

    Raises:
        ValueError: The dataset's labels aren't the model's, or the encoder hasn't that many blocks.
    """

    args: UnfrozenStageArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(self, model: ZoobotForImageClassification, args: UnfrozenStageArguments, **kwargs: Any) -> None:
        model.unfreeze_encoder(args.last_blocks, keep_batch_norm_statistics=args.keep_batch_norm_statistics)
        super().__init__(model, args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with layer-wise learning rate decay.

        Args:
            model: Not used; the trainer's own model is.
        """
        if self.optimizer is None:
            groups = layer_decay_groups(
                self.model,
                learning_rate=self.args.learning_rate,
                layer_decay=self.args.layer_decay,
                weight_decay=self.args.weight_decay,
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **settings)
        assert self.optimizer is not None
        return self.optimizer


def layer_decay_groups(
    model: ZoobotForImageClassification, *, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The optimizer's groups: the head and the last block at the full rate, each block below at a lower one.

    The rate of the i-th block from the top is `learning_rate * layer_decay ** i`, as in Zoobot 2.0. Biases and norms
    have no weight decay.

    Args:
        model: The model, frozen parameters already marked.
        learning_rate: Of the head and the last block.
        layer_decay: Factor from each block to the one below, above 0 and at most 1.
        weight_decay: Of matrices and kernels, the head's too.
    """
    encoder = dict(model.encoder.named_parameters())
    layers = [(list(model.head.parameters()), learning_rate)]
    for index, names in enumerate(reversed(model.encoder_blocks())):
        layers.append(([encoder[name] for name in sorted(names)], learning_rate * layer_decay**index))
    groups = []
    for parameters, rate in layers:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1]
        groups += [
            {"params": chosen, "lr": rate, "weight_decay": decay}
            for chosen, decay in ((matrices, weight_decay), (vectors, 0.0))
            if chosen
        ]
    return groups


def check_labels(dataset: Dataset, model: ZoobotForImageClassification) -> None:
    """Checks that a dataset's labels are the model's, in the same order.

    Args:
        dataset: With `label`.
        model: The model.

    Raises:
        ValueError: There is no `label`, or its names are others than the model's.
    """
    if "label" not in dataset.features:
        raise ValueError(f"the dataset has no column label; it has {', '.join(dataset.column_names)}.")
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and feature.names != model.config.label_names:
        raise ValueError(
            f"the dataset has the labels {', '.join(feature.names)}; the model {', '.join(model.config.label_names)}; "
            "give the model a new head with label_names=dataset.features['label'].names in from_pretrained."
        )
