"""Heads and the losses that belong to them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_zoobot import ZoobotConfig


def build_head(config: ZoobotConfig) -> nn.Sequential:
    """A new head, from embeddings (batch, embedding_size) to logits (batch, num_labels).

    Args:
        config: The configuration, with `embedding_size` known.

    Returns:
        The head; its last layer is always `nn.Linear`.
    """
    assert config.embedding_size is not None
    dropout = nn.Dropout(config.head_dropout)
    if config.head_type == "linear":
        return nn.Sequential(dropout, nn.Linear(config.embedding_size, config.num_labels))
    return nn.Sequential(
        dropout,
        nn.Linear(config.embedding_size, config.head_hidden_size),
        nn.ReLU(),
        nn.Dropout(config.head_dropout),
        nn.Linear(config.head_hidden_size, config.num_labels),
    )


def head_loss(logits: Tensor, labels: Tensor, config: ZoobotConfig, *, training: bool) -> Tensor:
    """The mean loss of a batch for the configuration's problem type, in float32.

    Args:
        logits: The head's output (batch, num_labels).
        labels: Class indices (batch,) for a single label; 0 or 1 (batch, num_labels) for several, NaN where unknown;
            values (batch, num_labels) for regression, NaN where unknown.
        config: The configuration that the head was built from.
        training: Whether label smoothing applies. Class weights always do, so that training and validation loss
            can be compared.

    Returns:
        A scalar: cross-entropy, binary cross-entropy or mean squared error.

    Raises:
        ValueError: Labels of another shape, or that the model doesn't have.
    """
    logits = logits.float()
    weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
    smoothing = config.label_smoothing if training else 0.0
    if config.problem_type == "single_label_classification":
        _check_class_indices(labels, config)
        return functional.cross_entropy(logits, labels.long(), weight=weights, label_smoothing=smoothing)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)} and the model's outputs {tuple(logits.shape)}; give each "
            "galaxy a value for each output, NaN where it is unknown."
        )
    known = ~torch.isnan(labels)
    targets = torch.where(known, labels, 0).float()
    if config.problem_type == "multi_label_classification":
        targets = targets * (1 - smoothing) + smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, targets, weight=weights, reduction="none")
    else:
        losses = (apply_unit_interval(logits, config) - targets).square()
        losses = losses if weights is None else losses * weights
    # A batch without a single known label has no loss rather than a NaN one.
    return losses[known].sum() / known.sum().clamp(min=1)


def _check_class_indices(labels: Tensor, config: ZoobotConfig) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}; give each galaxy one class index: (batch,).")
    # On a GPU an index out of range would end the whole process' CUDA context, with a message about an assertion.
    lowest, highest = labels.min().item(), labels.max().item()
    if not 0 <= lowest <= highest < config.num_labels:
        raise ValueError(
            f"labels run from {lowest} to {highest}; the model has {config.num_labels}, from 0 to "
            f"{config.num_labels - 1}: {', '.join(config.label_names)}."
        )


def apply_unit_interval(logits: Tensor, config: ZoobotConfig) -> Tensor:
    """The outputs of a regression: through a sigmoid, in 0-1, where the configuration says so.

    Args:
        logits: The head's output (batch, num_labels).
        config: The configuration that the head was built from.
    """
    return logits.sigmoid() if config.unit_interval else logits


def probabilities_from_logits(logits: Tensor, config: ZoobotConfig) -> Tensor:
    """What the logits say: probabilities (softmax, or sigmoid for several labels), or a regression's values.

    Args:
        logits: A model's output (batch, num_labels), before softmax; for regression its values as they are.
        config: The model's configuration.

    Returns:
        (batch, num_labels) in float32; rows sum to 1 for a single label.
    """
    if config.problem_type == "single_label_classification":
        return logits.float().softmax(dim=-1)
    if config.problem_type == "multi_label_classification":
        return logits.float().sigmoid()
    return logits.float()
