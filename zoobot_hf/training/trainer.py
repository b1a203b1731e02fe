"""The two stages as Trainer subclasses."""

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import CONFIG_NAME

from zoobot_hf.models.heads import loss_weight, set_initial_bias
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_galaxy_zoo import ZoobotForGalaxyZoo
from zoobot_hf.models.modeling_zoobot import ModelWithHead
from zoobot_hf.publishing.hub import push_folder
from zoobot_hf.publishing.model_card import StageFacts
from zoobot_hf.publishing.run_folder import save_stage

from .arguments import FrozenStageArguments, UnfrozenStageArguments
from .augmentation import augment_galaxies, margin_of_turns
from .depthwise import fast_depthwise_convolutions, safe_strided_convolutions
from .embedding_cache import StoredEmbeddings, Views, store_embeddings
from .head_grid import HeadGrid
from .layer_fusion import folded_batch_norms, probe_image
from .machine import tune_memory_allocator
from .reading import read_wide_fields, undecoded
from .weight_averaging import WeightAverage, averaging

logger = logging.getLogger(__name__)

# The grid of heads: factors of the learning rate, and of the weight decay.
GRID = tuple((rate, decay) for rate in (0.03, 0.1, 0.3, 1.0) for decay in (1.0,))
# Concentrations have further to go than the logits of classes: on 540 drawn galaxies and an encoder trained on them, 20
# epochs came to a validation loss of 43.5, and with the rates above to 51.0.
GRID_OF_VOTES = tuple((rate, 1.0) for rate in (0.3, 1.0, 3.0, 10.0, 30.0))


class GalaxyCollator:
    """Examples to a batch: `image` and `label` of a dataset to `pixel_values` and `labels`.

    Args:
        processor: The model's image processor.
        vote_columns: Where the labels are votes, their columns in the order of the model's outputs.
    """

    def __init__(self, processor: ZoobotImageProcessor, *, vote_columns: list[str] | None = None) -> None:
        self.processor = processor
        self.vote_columns = vote_columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of pixel values, or of wide uint8 fields where the examples were prepared for augmentation.

        Args:
            examples: With `image` (of a column that isn't decoded, or PIL), `wide_field` (uint8 tensor) or
                `embeddings`, and `label` where it is known: a number, a list of numbers, or votes by column.
        """
        if "embeddings" in examples[0]:
            batch = {"embeddings": torch.stack([example["embeddings"] for example in examples])}
        elif "wide_field" in examples[0]:
            batch = {"pixel_values": torch.stack([example["wide_field"] for example in examples])}
        else:
            images = [example["image"] for example in examples]
            fields = torch.stack(read_wide_fields(images, self.processor, margin=1.0, name="an image"))
            batch = {"pixel_values": self.processor.rescale_and_normalize(fields)}
        if "label" in examples[0]:
            batch["labels"] = torch.stack([self._label(example["label"]) for example in examples])
        return batch

    def _label(self, label: Any) -> Tensor:
        if isinstance(label, dict):
            label = [label[column] for column in self.vote_columns or label]
        # A value that is None, as a table has what is missing, becomes NaN.
        return torch.as_tensor(np.array(label, dtype=np.float32) if isinstance(label, list) else label)


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
            columns: With `image` (path or bytes, not decoded) and `label`.
        """
        name = "an image of the training split"
        fields = read_wide_fields(columns["image"], self.processor, margin=self.margin, name=name)
        return {"wide_field": fields, "label": columns["label"]}


class _StageTrainer(Trainer):
    """What both stages share: galaxies in, turned and mirrored in training; early stopping.

    Many methods of `Trainer` are overridden, because each of these has a place of its own there: images are turned on
    the device and read by the package's own reader, an evaluation's loss is that of all its galaxies, and checkpoints
    are loaded whole.
    """

    args: FrozenStageArguments | UnfrozenStageArguments
    arguments_class: type[FrozenStageArguments | UnfrozenStageArguments]
    stage_name: str

    def __init__(
        self,
        model: ModelWithHead,
        args: FrozenStageArguments | UnfrozenStageArguments | None = None,
        *,
        processing_class: ZoobotImageProcessor,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.arguments_class("tmp_trainer") if args is None else args  # Trainer's own name
        check_kinds(model, processing_class, name="processing_class")
        if not isinstance(args, self.arguments_class):
            wanted = self.arguments_class.__name__
            raise ValueError(f"args is of the type {type(args).__name__}; give {wanted}, or leave it out.")
        self._choose_weights(model, args)
        for split in _list_splits(kwargs.get("eval_dataset")):
            check_labels(split, model)
        if train_dataset is not None:
            check_labels(train_dataset, model)
            if args.augment and not args.uses_embedding_cache:
                margin = margin_of_turns(zoom_range=args.zoom_range, max_shift=args.max_shift)
                train_dataset = undecoded(train_dataset).with_transform(WideFields(processing_class, margin))
            else:
                train_dataset = _through_own_reader(train_dataset)
        kwargs["eval_dataset"] = _through_own_reader(kwargs.get("eval_dataset"))
        kwargs.setdefault("data_collator", GalaxyCollator(processing_class, vote_columns=_vote_columns(model)))
        super().__init__(model, args, processing_class=processing_class, train_dataset=train_dataset, **kwargs)
        if args.early_stopping_patience is not None and args.eval_strategy != "no":
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        # Of the evaluation that runs: each batch's loss times its weight, and the weight.
        self._weighted_losses: list[Tensor] = []

    def _choose_weights(self, model: ModelWithHead, args: Any) -> None:
        """Freezes what the stage doesn't train, before `Trainer` looks at the model."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """What `Trainer.train` returns.

        Args:
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        tune_memory_allocator()
        # What was fitted to the head as it was is wrong for the head as it will be.
        self.model.config.forget_calibration()
        return super().train(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        include_code: bool = False,
    ) -> str:
        """The URL of the model's repository, after one commit with model, processor, card and scores.

        The repository is `args.hub_model_id`, or has the name of `args.output_dir`, where the files lie afterwards.

        Args:
            commit_message: As in `push_folder`.
            token: As in `push_folder`; that of the arguments when absent.
            revision: As in `push_folder`; that of the arguments when absent.
            private: As in `push_folder`; that of the arguments when absent.
            create_pr: As in `push_folder`.
            include_code: As in `push_folder`.

        Returns:
            The URL; empty in all processes but the first, which alone pushes.

        Raises:
            HubPushError: As in `push_folder`.
        """
        url = ""
        if self.is_world_process_zero():
            arguments, folder = self.args, Path(self.args.output_dir)
            stage = StageFacts(name=self.stage_name, hyperparameters=arguments.shown)
            model = self.accelerator.unwrap_model(self.model)
            save_stage(folder, model, self.processing_class, stage=stage, history=self.state.log_history)
            url = push_folder(
                folder,
                arguments.hub_model_id or folder.resolve().name,
                private=arguments.hub_private_repo if private is None else private,
                revision=revision or arguments.hub_revision,
                create_pr=create_pr,
                commit_message=commit_message,
                include_code=include_code,
                token=token or arguments.hub_token,
            )
        self.accelerator.wait_for_everyone()
        return url

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
        fields = inputs.get("pixel_values")
        if fields is not None and fields.dtype == torch.uint8:
            turned = augment_galaxies(
                fields,
                pixels=self.processing_class.pixels,
                zoom_range=self.args.zoom_range,
                max_shift=self.args.max_shift,
            )
            scaled = self.processing_class.rescale_and_normalize(turned)
            inputs = {**inputs, "pixel_values": scaled.contiguous(memory_format=torch.channels_last)}
        # The augmentation stays in float32.
        is_bf16 = self.args.takes_bf16_steps and model.training
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=is_bf16):
            loss: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, *args, **kwargs)
        return loss

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        """Batches for an evaluation.

        `Trainer` keeps a loader whose workers persist, and takes it for any other dataset without a name as well.

        Args:
            eval_dataset: As in `Trainer`.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader[Any]:
        """Batches for predictions.

        Args:
            test_dataset: As in `Trainer`.
        """
        return super().get_test_dataloader(_through_own_reader(test_dataset))

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader[Any]:
        # Trainer would leave the last galaxies out of evaluations and predictions too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The outputs; the loss is that of all galaxies together, whatever the size of the batches.

        `Trainer` gives the mean of the batches' losses by their numbers of galaxies, and leaves batches out whose loss
        is NaN. That is another number where labels have gaps or classes have weights.

        Args:
            *args: As in `Trainer`.
            metric_key_prefix: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        self._weighted_losses.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._weighted_losses and output.metrics is not None:
            loss, weight = torch.stack(self._weighted_losses).cpu().double().sum(0).tolist()
            # Without a single known label there is no loss rather than a NaN one.
            output.metrics[f"{metric_key_prefix}_loss"] = loss / weight if weight else loss
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What `Trainer.prediction_step` returns.

        Args:
            model: The model, wrapped or not.
            inputs: A batch.
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        step = functools.partial(super().prediction_step, model)
        loss, *rest = step(inputs, *args, **kwargs)
        # A loss of the user's own has weights of its own.
        if loss is not None and self.compute_loss_func is None:
            labels = inputs["labels"]
            losses = [(loss, labels)]
            if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader:
                # Each galaxy on its own, because some are there twice, to fill the last batch up.
                galaxies = [{name: tensor[row, None] for name, tensor in inputs.items()} for row in range(len(labels))]
                losses = [(step(galaxy, prediction_loss_only=True)[0], galaxy["labels"]) for galaxy in galaxies]
            rows = torch.cat([self._weigh(loss, labels) for loss, labels in losses])
            self._weighted_losses.append(self.gather_function(rows).sum(0))
        return loss, *rest

    def _weigh(self, loss: Tensor, labels: Tensor) -> Tensor:
        """A batch's loss times its weight, and the weight, dealt out to a row for each galaxy: (batch, 2)."""
        weight = loss_weight(labels, self.model.config).to(loss.device) / len(labels)
        return torch.stack([loss * weight, weight]).repeat(len(labels), 1)

    def _load_best_model(self) -> None:
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_weights(self, checkpoint: str | None) -> bool:
        """Loads a checkpoint by `load_weights`; False where it is none of a whole model, which `Trainer` then loads.

        `Trainer` takes what it finds under the model's own names and leaves the other weights as they are.
        """
        is_whole = checkpoint is not None and (Path(checkpoint) / CONFIG_NAME).is_file()
        if not is_whole or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        self.model.load_weights(checkpoint)
        return True


class FrozenStageTrainer(_StageTrainer):
    """Trains the head while the encoder stays frozen: parameters, buffers and dropout.

    With `embedding_cache`, the encoder runs once over each galaxy's views, and every epoch after that trains heads
    alone: a grid of them with several learning rates, of which the one of lowest validation loss is the model's head in
    the end; a new linear head for classes is its mean with a logistic regression, as in `HeadGrid`. The training loss
    in the log is the mean over the grid. More of `Trainer` is overridden for that than elsewhere, because the module
    that is trained, its data and its optimizer are all others than those that the user gave.

    Args:
        model: The model; its encoder is frozen here.
        args: The stage's arguments; the usual ones when absent.
        processing_class: The model's image processor.
        train_dataset: With `image` and `label`.
        **kwargs: What `Trainer` takes: `eval_dataset`, `compute_metrics`, `callbacks`, ...

    Raises:
        ValueError: A model, a processor or arguments of another class; the dataset's labels aren't the model's; or what
            the grid of heads can't use was given, such as an optimizer.
    """

    args: FrozenStageArguments
    arguments_class = FrozenStageArguments
    stage_name = "frozen"
    optimizer: torch.optim.Optimizer | None
    train_dataset: Any

    def __init__(self, model: ModelWithHead, args: FrozenStageArguments | None = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        of_grid = {
            "optimizers": kwargs.get("optimizers", (None, None)) != (None, None),
            "optimizer_cls_and_kwargs": kwargs.get("optimizer_cls_and_kwargs") is not None,
            "compute_loss_func": kwargs.get("compute_loss_func") is not None,
            "gradient_checkpointing": self.args.gradient_checkpointing,
            "inputs in include_for_metrics": "inputs" in self.args.include_for_metrics,
        }
        given = [name for name, is_given in of_grid.items() if is_given]
        if self.args.embedding_cache and given:
            raise ValueError(
                f"{', '.join(given)} given, but the grid of heads has its own optimizer and loss, no images, and no "
                "encoder to train; leave it out, or set embedding_cache=False."
            )
        self.whole_model = model
        # By the datasets' identities, with the datasets, so that none of them passes its identity on.
        self._stored_while_training: dict[int, tuple[Dataset, StoredEmbeddings]] = {}

    def _choose_weights(self, model: ModelWithHead, args: FrozenStageArguments) -> None:
        model.freeze_encoder()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """What `Trainer.train` returns; the model has its new head.

        Args:
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        model = self.whole_model
        if self.train_dataset is not None and model.config.decision_tree is None:
            set_initial_bias(model.head, torch.from_numpy(_read_numbers(self.train_dataset, model)), model.config)
        if not self.args.embedding_cache:
            return super().train(*args, **kwargs)
        embeddings = self._embeddings(self.train_dataset, views=self._views())
        self._enlarge_batches(len(embeddings))
        # Without evaluations nothing could choose between heads.
        grid_settings = GRID_OF_VOTES if isinstance(self.whole_model, ZoobotForGalaxyZoo) else GRID
        is_judged = self.eval_dataset is not None and self.args.eval_strategy != "no"
        self.grid_settings = grid_settings if is_judged else ((1.0, 1.0),)
        grid = HeadGrid(self.whole_model, embeddings, count=len(self.grid_settings))
        with self._heads_in_place_of_the_model(grid, embeddings):
            output = super().train(*args, **kwargs)
        self.whole_model.head.load_state_dict(grid.winner().state_dict())
        rate, decay = self.grid_settings[int(grid.winning_head)]
        logger.info(
            "Of %d heads the one with learning rate %.2g and weight decay %.2g had the lowest validation loss.",
            len(self.grid_settings),
            rate * self.args.learning_rate,
            decay * self.args.weight_decay,
        )
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics; in training those of the head of lowest validation loss.

        Args:
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        if isinstance(self.model, HeadGrid):
            self.model.choose_winner([self._embeddings(split) for split in _list_splits(self.eval_dataset)])
        return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        """Batches for an evaluation: embeddings where they are kept.

        Args:
            eval_dataset: As in `Trainer`.
        """
        if not self.args.embedding_cache or (self.eval_dataset is None and eval_dataset is None):
            return super().get_eval_dataloader(eval_dataset)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.get_test_dataloader(self.eval_dataset[dataset] if isinstance(dataset, str) else dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader[Any]:
        """Batches for predictions: embeddings where they are kept.

        Args:
            test_dataset: As in `Trainer`.
        """
        return super().get_test_dataloader(self._stored(test_dataset))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer; each head of a grid has its own learning rate and weight decay.

        Args:
            model: As in `Trainer`.
        """
        if self.optimizer is None and isinstance(self.model, HeadGrid):
            groups = []
            for (rate, decay), head in zip(self.grid_settings, self.model.heads, strict=True):
                layer = {"lr": rate * self.args.learning_rate, "weight_decay": decay * self.args.weight_decay}
                groups += _split_by_weight_decay(list(head.parameters()), **layer)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **settings)
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    @contextmanager
    def _heads_in_place_of_the_model(self, grid: HeadGrid, embeddings: StoredEmbeddings) -> Iterator[None]:
        """Inside, what `Trainer` trains is the grid, on the embeddings and with an optimizer of its own."""
        images = self.train_dataset
        self.optimizer = self.lr_scheduler = None
        self.train_dataset, self.model, self.model_wrapped = embeddings, grid, grid
        try:
            yield
        finally:
            self.train_dataset, self.model, self.model_wrapped = images, self.whole_model, self.whole_model
            self._stored_while_training.clear()

    def _enlarge_batches(self, count: int) -> None:
        needed = math.ceil(count / (self.args.embedding_steps * self.args.world_size))
        if needed > self.args.per_device_train_batch_size:
            logger.info("%d embeddings an epoch are taken in batches of %d.", count, needed)
            self.args.per_device_train_batch_size = needed
            self._train_batch_size = self.args.train_batch_size

    def _views(self) -> Views | None:
        arguments = self.args
        if not arguments.augment:
            return None
        return Views(
            arguments.views, seed=arguments.seed, zoom_range=arguments.zoom_range, max_shift=arguments.max_shift
        )

    def _stored(self, dataset: Any) -> Any:
        """A dataset of images as embeddings, where the cache is used; any other dataset as it is."""
        is_images = isinstance(dataset, Dataset) and "image" in dataset.column_names
        return self._embeddings(dataset) if self.args.embedding_cache and is_images else dataset

    def _embeddings(self, dataset: Dataset, *, views: Views | None = None) -> StoredEmbeddings:
        """A dataset's embeddings; in training, when the encoder can't change, what an earlier epoch opened."""
        if id(dataset) in self._stored_while_training:
            return self._stored_while_training[id(dataset)][1]
        stored = store_embeddings(
            self.whole_model,
            dataset,
            self.processing_class,
            views=views,
            dtype=self.args.embedding_dtype,
            cache_dir=self.args.embedding_cache_dir,
            torch_compile=self.args.torch_compile,
            bf16=self.args.bf16,
        )
        embeddings = StoredEmbeddings(stored, read_labels(dataset, self.whole_model))
        if isinstance(self.model, HeadGrid):
            self._stored_while_training[id(dataset)] = dataset, embeddings
        return embeddings


class UnfrozenStageTrainer(_StageTrainer):
    """Trains head and encoder, each block of it at a lower learning rate than the one above.

    With `average_weights`, an evaluation in training is made twice, with the last step's weights and with their mean
    over all steps (`WeightAverage`); the one of lower loss goes into log and checkpoint. Training goes on from the last
    step's weights.

    Args:
        model: The model, its head already trained; its encoder, or the last blocks of it, is unfrozen here.
        args: The stage's arguments; the usual ones when absent.
        processing_class: The model's image processor.
        train_dataset: With `image` and `label`.
        **kwargs: What `Trainer` takes: `eval_dataset`, `compute_metrics`, `callbacks`, ...

    Raises:
        ValueError: A model, a processor or arguments of another class; the dataset's labels aren't the model's; or what
            `unfreeze_encoder` refuses.
    """

    args: UnfrozenStageArguments
    arguments_class = UnfrozenStageArguments
    stage_name = "unfrozen"
    optimizer: torch.optim.Optimizer | None

    def __init__(self, model: ModelWithHead, args: UnfrozenStageArguments | None = None, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self._average: WeightAverage | None = None
        self._compared_at: int | None = None

    def _choose_weights(self, model: ModelWithHead, args: UnfrozenStageArguments) -> None:
        model.unfreeze_encoder(args.last_blocks, keep_batch_norm_statistics=args.keep_batch_norm_statistics)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """What `Trainer.train` returns; the model is trained where it is.

        Args:
            *args: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        if self._average is not None:
            # An earlier call's mean is not this one's.
            self.optimizer = self.lr_scheduler = self._average = self._compared_at = None
        # MobileNetV2 on two cores: 35 images/s where the ordinary order gives 28.
        self.model.to(memory_format=torch.channels_last)
        try:
            with (
                fast_depthwise_convolutions(self.model),
                safe_strided_convolutions(self.model),
                self._folded_batch_norms(),
            ):
                return super().train(*args, **kwargs)
        finally:
            self.model.to(memory_format=torch.contiguous_format)  # safetensors saves no other

    def _folded_batch_norms(self) -> AbstractContextManager[None]:
        """After the contexts of convolutions, which would not see what this one makes of them."""
        if self.model.device.type != "cpu" or self.args.torch_compile:
            return nullcontext()
        processor = self.processing_class
        image = probe_image(processor.num_channels, processor.pixels, processor.pixels)
        return folded_batch_norms(self.model.base_model, image)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The outputs; in training those of the weights of lower loss, by the first evaluation after a step.

        Args:
            *args: As in `Trainer`.
            metric_key_prefix: As in `Trainer`.
            **kwargs: As in `Trainer`.
        """
        loop = functools.partial(super().evaluation_loop, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        step = self.state.global_step
        if self._average is None or not self.is_in_train or self._compared_at == step:
            return loop()
        self._compared_at = step
        outputs, losses = [], []
        for is_mean in (False, True):
            self._average.put(mean=is_mean)
            outputs.append(loop())
            losses.append((outputs[-1].metrics or {}).get(f"{metric_key_prefix}_loss", math.nan))
            # Ends the progress bar, which knows of one loop alone.
            self.callback_handler.on_predict(self.args, self.state, self.control, {})
        logger.info("Step %d: loss %.4f with its weights and %.4f with their mean.", step, *losses)
        is_mean = losses[1] < losses[0]
        self._average.put(mean=is_mean)
        return outputs[is_mean]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with layer-wise learning rate decay.

        Args:
            model: Not used; the trainer's own model is.
        """
        if self.optimizer is None:
            given = self.optimizer_cls_and_kwargs
            optimizer_class, settings = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = layer_decay_groups(
                self.model,
                learning_rate=settings.get("lr", self.args.learning_rate),
                layer_decay=self.args.layer_decay,
                weight_decay=self.args.weight_decay,
            )
            # Schedule-free optimizers, which Trainer puts into modes of their own, have a mean already.
            if self.args.average_weights and not hasattr(optimizer_class, "train"):
                self._average = averaging(optimizer_class)(groups, **settings)
                self.optimizer = self._average
            else:
                self.optimizer = optimizer_class(groups, **settings)
        assert self.optimizer is not None
        return self.optimizer


def layer_decay_groups(
    model: ModelWithHead, *, learning_rate: float, layer_decay: float, weight_decay: float
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
        groups += _split_by_weight_decay(trained, lr=rate, weight_decay=weight_decay)
    return groups


def _split_by_weight_decay(parameters: list[nn.Parameter], *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices and kernels with weight decay, biases and norms without."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [
        {"params": chosen, "lr": lr, "weight_decay": decay}
        for chosen, decay in ((matrices, weight_decay), (vectors, 0.0))
        if chosen
    ]


def check_kinds(model: ModelWithHead, processor: ZoobotImageProcessor, *, name: str = "processor") -> None:
    """Checks that a model and its image processor are of this package.

    Args:
        model: The model.
        processor: Its image processor.
        name: What an error calls the processor.

    Raises:
        ValueError: They are of another class.
    """
    if not isinstance(model, ModelWithHead):
        raise ValueError(
            f"model is of the type {type(model).__name__}; give a ZoobotForImageClassification or ZoobotForGalaxyZoo, "
            "whose from_pretrained takes any encoder."
        )
    if not isinstance(processor, ZoobotImageProcessor):
        raise ValueError(
            f"{name} is of the type {type(processor).__name__}; give a ZoobotImageProcessor, which image_processor_for "
            "makes for any encoder."
        )


def check_labels(dataset: Dataset, model: ModelWithHead) -> None:
    """Checks that a dataset's labels are the model's: in the same order, or counts of votes with the same columns.

    Args:
        dataset: With `label`.
        model: The model.

    Raises:
        ValueError: It is a stream; there is no `label`, or its names, or its vote columns, are others than the model's;
            it has classes and the model another problem; labels are no numbers, or a class is missing or none of the
            model's; votes are negative or fractional, or there are none.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"the dataset is of the type {type(dataset).__name__}; give a datasets.Dataset, which load_dataset gives "
            "without streaming=True."
        )
    if "label" not in dataset.features:
        raise ValueError(f"the dataset has no column label; it has {', '.join(dataset.column_names)}.")
    feature, columns = dataset.features["label"], _vote_columns(model)
    if isinstance(feature, dict) != (columns is not None):
        raise ValueError(
            f"the dataset's labels are {'votes' if columns is None else 'no votes'}, and the model is a "
            f"{type(model).__name__}; load votes with load_galaxy_votes and train a ZoobotForGalaxyZoo on them, and "
            "other labels with load_galaxy_dataset and a ZoobotForImageClassification."
        )
    if columns is not None:
        _check_vote_columns(list(feature), columns)
        _check_counts(_read_votes(dataset, columns), columns)
        return
    if isinstance(feature, ClassLabel) and feature.names != model.config.label_names:
        raise ValueError(
            f"the dataset has the labels {', '.join(feature.names)}; the model {', '.join(model.config.label_names)}; "
            "give the model a new head with label_names=dataset.features['label'].names in from_pretrained."
        )
    if isinstance(feature, ClassLabel) and model.config.problem_type != "single_label_classification":
        raise ValueError(
            f"the dataset's labels are classes, and the model's problem_type is {model.config.problem_type!r}; load it "
            "with problem_type='single_label_classification' in from_pretrained."
        )
    _read_numbers(dataset, model)


def _check_vote_columns(there: list[str], wanted: list[str]) -> None:
    missing = [column for column in wanted if column not in there]
    unknown = [column for column in there if column not in wanted]
    if missing or unknown:
        raise ValueError(
            f"the dataset misses the vote columns {', '.join(missing) or 'none'}, and has "
            f"{', '.join(unknown) or 'none'} that the model's decision tree doesn't have; load it with the model's "
            "tree, or give the model a new head with decision_tree=tree.to_dict() in from_pretrained."
        )


def _check_counts(votes: npt.NDArray[np.float32], columns: list[str]) -> None:
    # Known before the encoder runs, which may take hours; NaN compares as neither.
    is_wrong = (votes < 0) | (votes % 1 > 0)
    if is_wrong.any():
        names = [columns[number] for number in np.flatnonzero(is_wrong.any(axis=0))]
        row = int(is_wrong.any(axis=1).argmax())
        raise ValueError(
            f"votes hold {votes[is_wrong][0]:g} in row {row}; no counts are in the columns {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}: give counts of volunteers, whole and not negative, and no fractions."
        )
    if not np.nansum(votes) > 0:
        raise ValueError(
            f"none of the dataset's {len(votes)} galaxies has a vote in the columns {', '.join(columns[:5])}, ...; "
            "leave out galaxies that nobody was asked about, and give each split some with votes."
        )


def _vote_columns(model: ModelWithHead) -> list[str] | None:
    return model.layout.vote_columns if isinstance(model, ZoobotForGalaxyZoo) else None


def _through_own_reader(dataset: Any) -> Any:
    """Datasets of images, so that the collator reads them; all others as they are."""
    if isinstance(dataset, dict):
        return {name: _through_own_reader(split) for name, split in dataset.items()}
    is_images = isinstance(dataset, Dataset) and isinstance(dataset.features.get("image"), ImageFeature)
    return undecoded(dataset) if is_images else dataset


def _list_splits(datasets: Dataset | dict[str, Dataset] | None) -> list[Dataset]:
    if datasets is None:
        return []
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]


def read_labels(dataset: Dataset, model: ModelWithHead) -> Tensor | None:
    """The labels of all rows, without decoding an image; None where there are none.

    Args:
        dataset: The galaxies.
        model: The model.

    Returns:
        Class indices, int64 (n,); values, float32 (n, labels), NaN where they are missing; or votes, likewise
        (n, answers) in the order of the model's outputs.

    Raises:
        ValueError: As `check_labels`.
    """
    if "label" not in dataset.column_names:
        return None
    columns = _vote_columns(model)
    if columns is None:
        return torch.from_numpy(_read_numbers(dataset, model))
    check_labels(dataset, model)
    return torch.from_numpy(_read_votes(dataset, columns))


def _read_numbers(dataset: Dataset, model: ModelWithHead) -> npt.NDArray[Any]:
    feature, is_single = dataset.features["label"], model.config.problem_type == "single_label_classification"
    try:
        if getattr(feature, "dtype", None) in ("string", "large_string"):
            raise ValueError("they are text")
        kind: type[np.floating[Any]] = np.float64 if is_single else np.float32
        numbers = np.array(dataset.with_format(None)["label"][:], dtype=kind)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the labels are {feature} and no numbers ({error}); make class names a ClassLabel with "
            "dataset.class_encode_column('label'), and give several labels as lists of one length."
        ) from error
    if not is_single:
        return numbers
    classes = model.config.num_labels
    wrong = np.flatnonzero(~np.isin(numbers, range(classes)))  # of several labels, head_loss tells
    if numbers.ndim == 1 and len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(numbers)} galaxies have no class, which is a whole number from 0 to {classes - 1}: "
            f"row {wrong[0]} has the label {numbers[wrong[0]]:g}; leave out those whose class isn't known or none of "
            "the model's, and learn fractions with problem_type='regression'."
        )
    return numbers.astype(np.int64)


def _read_votes(dataset: Dataset, columns: list[str]) -> npt.NDArray[np.float32]:
    votes = dataset.select_columns("label").flatten().to_pandas()
    return np.array(votes[[f"label.{column}" for column in columns]], dtype=np.float32)
