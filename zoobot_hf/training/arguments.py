"""The arguments of the two stages: TrainingArguments with a few fields more and other defaults."""

import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .machine import trains_in_bf16, uses_bf16

logger = logging.getLogger(__name__)

MOST_WORKERS = 8

# What the model card says of a stage.
SHOWN_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "layer_decay",
    "last_blocks",
    "average_weights",
    "num_train_epochs",
    "per_device_train_batch_size",
    "augment",
    "views",
    "seed",
)

# Arguments that say where and how a run works, not what comes out of it.
MACHINE_ARGUMENTS = (
    "output_dir",
    "logging_dir",
    "report_to",
    "run_name",
    "disable_tqdm",
    "use_cpu",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "hub_token",
    "embedding_cache_dir",
)

# Arguments of Trainer's that a stage takes in one way alone, and why.
FIXED_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "hub_strategy": ("end", "a stage is pushed in one commit"),
    "label_smoothing_factor": (
        0.0,
        "it would smooth the validation loss too, which chooses checkpoints and stages, and the model's configuration "
        "has label_smoothing",
    ),
    "remove_unused_columns": (False, "the batches are made of columns that the model doesn't take"),
    "save_only_model": (False, "a stage that was killed goes on with the state of its optimizer"),
}


@dataclass
class _StageArguments(TrainingArguments):
    """What both stages share.

    Changed defaults: evaluates, saves and logs once an epoch; keeps the checkpoint of lowest validation loss and the
    last one, and ends with the former; leaves the dataset's columns alone; on a GPU computes in bfloat16 and decodes in
    processes of their own. With `push_to_hub`, training alone pushes nothing: the trainer's `save_model` does, in one
    commit.
    """

    augment: bool = field(default=True, metadata={"help": "Turn, mirror, zoom and shift the training images."})
    zoom_range: float = field(
        default=0.15, metadata={"help": "Largest zoom in and out of a training image: 0.15 is 0.85 to 1.15."}
    )
    max_shift: float = field(
        default=0.05, metadata={"help": "Largest shift of a training image, as a share of its width."}
    )
    early_stopping_patience: int | None = field(
        default=10,  # Zoobot 2.9.0, `get_trainer(patience=10)`
        metadata={"help": "Evaluations, one an epoch, without a better result after which the stage ends."},
    )

    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16; where absent, on a GPU that has it in hardware."}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that decode images; where absent, up to 8 on a GPU and none on a CPU."},
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={
            "help": "Keep these processes between epochs; where absent, if there are any. Those that read stored "
            "embeddings are never kept."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is an accelerator."})
    dataloader_pin_memory: bool = field(default=True, metadata={"help": "Pin memory where there is a device."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str = field(default="eval_loss", metadata={"help": "What makes a checkpoint the best."})
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether more of it is better; where absent, unless its name ends with loss or error."},
    )
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints kept beside the best."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model doesn't take."})
    report_to: str | list[str] = field(default="none", metadata={"help": "Trackers that Trainer knows."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push: with save_model alone, in one commit."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Go on counting towards early stopping after a resume."}
    )

    @property
    def uses_embedding_cache(self) -> bool:
        """Whether the encoder runs once and its embeddings are kept."""
        return False

    @property
    def takes_bf16_steps(self) -> bool:
        """Whether training steps are in bfloat16 where evaluations are in float32."""
        return False

    @property
    def shown(self) -> dict[str, Any]:
        """The arguments that a reader of the model card wants to know, by name."""
        values = {name: getattr(self, name, None) for name in SHOWN_ARGUMENTS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def decisive(self) -> dict[str, Any]:
        """The arguments that decide what comes out of a run, by name, as plain values."""
        values = {name: value for name, value in self.to_dict().items() if name not in MACHINE_ARGUMENTS}
        return dict(json.loads(json.dumps(values, default=str)))

    def _workers_for_images(self) -> int:
        return 0 if self.uses_embedding_cache else min(MOST_WORKERS, (os.cpu_count() or 1) - 1)

    def __post_init__(self) -> None:
        # Left alone, several processes on a machine without an accelerator would not find each other.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = not self.fp16 and uses_bf16(torch.device("cuda" if on_gpu else "cpu"))
        if self.dataloader_num_workers is None:
            # A CPU that trains has no cores to spare; stored embeddings need no decoding.
            self.dataloader_num_workers = self._workers_for_images() if on_gpu else 0
        if self.dataloader_persistent_workers is None or self.uses_embedding_cache:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0 and not self.uses_embedding_cache
        # Trainer takes more of all but a loss for better.
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("error"):
            self.greater_is_better = False
        super().__post_init__()
        # That of accelerate's configuration would round evaluations too, and also where float32 was asked for.
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked not in ("no", self.mixed_precision) and self.should_log:
            logger.warning(
                "Accelerate's mixed precision %s is passed over: the stage's own is %s. Choose it with bf16 or fp16.",
                asked,
                self.mixed_precision,
            )
        # Pinning needs a device to copy to; without one PyTorch warns at every start of a loader.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        for name, (value, reason) in FIXED_ARGUMENTS.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!s}; {reason}: choose {value!r}.")
        if not 0 <= self.zoom_range < 1:
            raise ValueError(f"zoom_range is {self.zoom_range}; give at least 0 and less than 1.")
        if not 0 <= self.max_shift < 1:
            raise ValueError(f"max_shift is {self.max_shift}; give at least 0 and less than 1.")


@dataclass
class FrozenStageArguments(_StageArguments):
    """Arguments of the frozen stage: only the head is trained.

    Changed defaults: learning rate 1e-3, weight decay 0.05, 20 epochs, batches of 32, no clipping of gradients, which
    would let one head of the grid slow the others.
    """

    embedding_cache: bool = field(
        default=True,
        metadata={
            "help": "Run the encoder once and train heads on what it said, at 0.03, 0.1, 0.3 and 1 times "
            "the learning rate, for votes at 0.3, 1, 3, 10 and 30 times; the best on validation is kept, for classes "
            "averaged with a logistic regression. Otherwise the encoder runs in every epoch, and the head has the "
            "learning rate itself."
        },
    )
    # 470 real rings (MobileNetV2, five folds, two seeds), held-out log loss and ROC AUC: 1 view 0.651, 0.713; 2 views
    # 0.636, 0.715; 4 views 0.643, 0.709; 8 views 0.648, 0.710.
    views: int = field(default=2, metadata={"help": "Augmented views of each training galaxy that the encoder sees."})
    embedding_dtype: str = field(default="float32", metadata={"help": "How embeddings are kept: float32 or float16."})
    embedding_cache_dir: str | None = field(
        default=None, metadata={"help": "Where embeddings are kept; below the Hugging Face home when absent."}
    )
    # A step over stored embeddings costs next to nothing but Trainer's own 2 ms: 20 epochs over 100,000 of them took
    # 168 s in batches of 32, 61 s in 500 steps an epoch, 49 s in 300.
    embedding_steps: int = field(
        default=300,
        metadata={"help": "Most steps an epoch over stored embeddings; batches grow where there would be more."},
    )

    # Zoobot 0.0.2 has it for rings. On 470 real rings (ImageNet MobileNetV2, five folds) 1e-3 and 3e-3, 20 and 60
    # epochs all ended at a ROC AUC of 0.73 to 0.74.
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the head."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of the head, Zoobot 2.9.0's."})
    num_train_epochs: float = field(default=20, metadata={"help": "Most epochs to train for."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Largest norm of the gradient; 0 for no limit."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Galaxies a step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Galaxies a step and device."})

    @property
    def uses_embedding_cache(self) -> bool:
        """Whether the encoder runs once and its embeddings are kept."""
        return self.embedding_cache

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 1:
            raise ValueError(f"views is {self.views}; give at least 1.")
        if self.embedding_steps < 1:
            raise ValueError(f"embedding_steps is {self.embedding_steps}; give at least 1.")


@dataclass
class UnfrozenStageArguments(_StageArguments):
    """Arguments of the unfrozen stage: the encoder is trained as well, gently.

    Changed defaults: learning rate 1e-4 with cosine decay after a tenth of warm-up, weight decay 0.05, 15 epochs,
    batches of 16; on a CPU with AMX or AVX512_BF16 training steps are in bfloat16.
    """

    last_blocks: int | None = field(
        default=None, metadata={"help": "How many of the encoder's last blocks to train; all of them when absent."}
    )
    # Zoobot 2.0's is 0.75, which leaves the first of MobileNetV2's eight blocks 0.13 of the rate; 0.9 leaves it 0.48.
    layer_decay: float = field(
        default=0.9, metadata={"help": "Factor of the learning rate from each block to the one below it."}
    )
    keep_batch_norm_statistics: bool = field(
        default=True, metadata={"help": "Keep the running mean and variance of BatchNorm layers."}
    )
    # 470 real rings, five folds, held-out log loss and ROC AUC of the stage that validation chooses: MobileNetV2 0.645,
    # 0.729 without and 0.619, 0.735 with; the embedded encoder 0.549, 0.783 without and 0.548, 0.789 with.
    average_weights: bool | None = field(
        default=None,
        metadata={
            "help": "Evaluate the mean of the weights over all steps beside the last step's weights, and keep the one "
            "of lower validation loss; where absent, if BatchNorm statistics are kept, which would not fit a mean."
        },
    )
    bf16_steps: bool | None = field(
        default=None,
        metadata={
            "help": "Training steps in bfloat16 where evaluations are in float32, as predictions on a CPU are; where "
            "absent, on a CPU with AMX or AVX512_BF16, if bf16 is absent as well."
        },
    )

    learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the head and the last block, Zoobot 2.9.0's."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or a share of all below 1."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of head and encoder, Zoobot 2.9.0's."})
    num_train_epochs: float = field(default=15, metadata={"help": "Most epochs to train for."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Galaxies a step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Galaxies a step and device."})

    @property
    def takes_bf16_steps(self) -> bool:
        """Whether training steps are in bfloat16 where evaluations are in float32."""
        return bool(self.bf16_steps)

    def __post_init__(self) -> None:
        chooses_precision = self.bf16 is None and not self.fp16
        super().__post_init__()
        if self.bf16_steps is None:
            self.bf16_steps = chooses_precision and trains_in_bf16(self.device)
        if self.average_weights is None:
            self.average_weights = self.keep_batch_norm_statistics
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; give more than 0 and at most 1.")


def unfrozen_arguments_from_scratch(**changes: Any) -> UnfrozenStageArguments:
    """Arguments for an encoder with new weights, where the unfrozen stage is ordinary training.

    One learning rate for all layers, and BatchNorm statistics that follow the images: what a pretrained encoder has to
    keep, a new one has to find.

    Args:
        **changes: Fields of `UnfrozenStageArguments`.
    """
    settings = {
        "learning_rate": 3e-3,
        "layer_decay": 1.0,
        "keep_batch_norm_statistics": False,
        "num_train_epochs": 12,
        "per_device_train_batch_size": 32,
    }
    return UnfrozenStageArguments(**{**settings, **changes})
