"""Heads, the losses that belong to them, and the way from a head's logits to probabilities.

A head's logits are those of its training: as sure of themselves as training left them, and for galaxies with the
prevalence of the training set. The loss is always that of these logits. What a model gives out in evaluation mode is

    logits / calibration_temperature + calibration_shift + shift from the training prevalence to the sky's,

each term where the configuration has it, so that softmax or sigmoid of the outputs, which is all that
`pipeline("image-classification")` does, are probabilities for the sky. In training mode the outputs are the head's own.
The configuration gets these fields after the last stage of training: metrics that `Trainer` takes in between are for
the training prevalence.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration_zoobot import PREVALENCES, ZoobotConfig

# Where a new head starts in the range of concentrations: of 1 to 101 at 4, a guess that is not sure of itself. From the
# middle, 51, a frozen stage of 20 epochs on 540 drawn galaxies came to a validation loss of 71.5, from here to 51.0.
INITIAL_CONCENTRATION = 0.03
SMALLEST_MEAN = 1e-3  # of values in 0-1, for a bias to start from
SUM_TOLERANCE = 2e-3  # shares written with three digits


def build_head(config: ZoobotConfig) -> nn.Sequential:
    """A new head, from embeddings (batch, embedding_size) to logits (batch, num_labels).

    Args:
        config: The configuration, with `embedding_size` known.

    Returns:
        The head; its last layer is always an `nn.Linear` whose weights are 0: it starts out undecided, as any logistic
        regression does, and what few galaxies say is not drowned by chance. For votes it starts out with low
        concentrations.

    Raises:
        ValueError: The embedding size is not known.
    """
    if config.embedding_size is None:
        raise ValueError(
            "embedding_size is None and is found on a device, not on meta; give pooling and embedding_size."
        )
    layers: list[nn.Module] = [nn.Dropout(config.head_dropout)]
    inputs = config.embedding_size
    if config.head_type == "mlp":
        layers += [_HeadLayer(inputs, config.head_hidden_size), nn.ReLU(), nn.Dropout(config.head_dropout)]
        inputs = config.head_hidden_size
    initial_bias = 0.0 if config.decision_tree is None else _logit(INITIAL_CONCENTRATION)
    return nn.Sequential(*layers, _LastLayer(inputs, config.num_labels, initial_bias=initial_bias))


class _HeadLayer(nn.Linear):
    """A linear layer that mixed precision leaves in its weights' own type.

    In bfloat16 470 galaxies came to 405 different probabilities, and a head costs next to nothing.
    """

    def forward(self, embeddings: Tensor) -> Tensor:
        """The layer's output.

        Args:
            embeddings: (batch, inputs).
        """
        if not torch.is_autocast_enabled(embeddings.device.type):
            return super().forward(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            return super().forward(embeddings.to(self.weight.dtype))


class _LastLayer(_HeadLayer):
    """A linear layer whose initial weights are 0 and whose biases are all the same.

    Random weights, however small, see the embeddings' common mean, and have an opinion on all galaxies: on a ConvNeXt
    nano with new weights and 470 galaxies, half of either label, heads of a spread of 0.01 that learned slowly ended at
    a mean probability of 0.3 and a held-out log loss of 0.711, and these at 0.683.
    """

    def __init__(self, inputs: int, outputs: int, *, initial_bias: float) -> None:
        self.initial_bias = initial_bias
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


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
    _check_labels(labels, config, outputs=tuple(logits.shape))
    if config.problem_type == "single_label_classification":
        if weights is not None and not weights[labels.long()].any():
            # Classes of weight 0 alone have no loss rather than a NaN one.
            return logits.sum() * 0
        return functional.cross_entropy(logits, labels.long(), weight=weights, label_smoothing=smoothing)
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


def loss_weight(labels: Tensor, config: ZoobotConfig) -> Tensor:
    """What a batch's `head_loss` counts beside another batch's.

    The loss is a mean over what is known, and for a single label over the class weights. The loss of many batches
    together is therefore the mean of theirs by these weights, and not by their numbers of galaxies.

    Args:
        labels: As in `head_loss`, or votes, of whose loss every galaxy is the same share.
        config: The configuration that the head was built from.

    Returns:
        A scalar, 0 or more; in units of a galaxy, of a known value or of a class weight.
    """
    if config.problem_type in ("multi_label_classification", "regression"):
        return (~torch.isnan(labels)).sum().float()
    if config.problem_type == "single_label_classification" and config.class_weights is not None:
        return torch.tensor(config.class_weights, device=labels.device)[labels.long()].sum()
    return torch.tensor(float(len(labels)), device=labels.device)


def _check_labels(labels: Tensor, config: ZoobotConfig, *, outputs: tuple[int, ...]) -> None:
    if config.problem_type == "single_label_classification":
        _check_class_indices(labels, config)
    elif labels.shape != outputs:
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)} and the model's outputs {outputs}; give each galaxy a value "
            "for each output, NaN where it is unknown."
        )


def _check_class_indices(labels: Tensor, config: ZoobotConfig) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}; give each galaxy one class index: (batch,).")
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise ValueError("labels are no whole numbers; give each galaxy one class index, or use regression.")
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


def prevalence_shift(old: Sequence[float], new: Sequence[float], *, problem_type: str) -> list[float]:
    """What is added to each label's logit when classes become rarer or commoner and keep their looks.

    By Bayes' theorem the odds of a label change by the factor by which its prior odds change. For a single label that
    is log(new / old) for each, for several labels the change of log(share / (1 - share)). Saerens, Latinne &
    Decaestecker 2002, Neural Computation 14, 21.

    Args:
        old: The share of each label where the logits are right, 0-1, both ends excluded.
        new: The share of each label where they are wanted, likewise.
        problem_type: "single_label_classification", where the shares sum to 1, or "multi_label_classification".

    Returns:
        A number for each label; adding the shift from new to old takes it back.

    Raises:
        ValueError: A share of 0 or 1, shares of a single label that don't add up to 1, or not as many old as new ones.
    """
    if len(old) != len(new):
        raise ValueError(f"old has {len(old)} shares and new {len(new)}; give one for each label.")
    before, after = (_checked_shares(shares, problem_type) for shares in (old, new))
    if problem_type == "single_label_classification":
        return [math.log(b / a) for a, b in zip(before, after, strict=True)]
    return [math.log(b / (1 - b)) - math.log(a / (1 - a)) for a, b in zip(before, after, strict=True)]


def logit_correction(config: ZoobotConfig) -> tuple[list[float], list[float]] | None:
    """The scale and the shift of each label that turn a head's logits into the model's outputs.

    Args:
        config: The model's configuration.

    Returns:
        Outputs are logits * scale + shift, both in the order of the labels; None where nothing is changed.

    Raises:
        ValueError: The configuration's temperature, shift or prevalences don't fit its labels, or lack.
    """
    is_for_sky = config.predictions_for == "sky"
    is_calibrated = config.calibration_temperature is not None or config.calibration_shift is not None
    if config.problem_type == "regression" or not (is_for_sky or is_calibrated):
        return None
    temperature = 1.0 if config.calibration_temperature is None else config.calibration_temperature
    temperatures = temperature if isinstance(temperature, (list, tuple)) else [temperature] * config.num_labels
    shift = config.calibration_shift or [0.0] * config.num_labels
    for name, values in (("calibration_temperature", temperatures), ("calibration_shift", shift)):
        if len(values) != config.num_labels:
            raise ValueError(f"{name} has {len(values)} values for {config.num_labels} labels; give one for each.")
    if is_for_sky:
        shift = [own + added for own, added in zip(shift, _shift_to_sky(config), strict=True)]
    return [1 / temperature for temperature in temperatures], list(shift)


def calibrate_logits(logits: Tensor, config: ZoobotConfig) -> Tensor:
    """The outputs of a model from its head's logits: calibrated, for the prevalence that the configuration names.

    Args:
        logits: The head's own (batch, num_labels). A model's outputs in evaluation mode are calibrated already.
        config: The model's configuration.

    Returns:
        (batch, num_labels), before softmax or sigmoid: float32, or the logits themselves where nothing is to be done.

    Raises:
        ValueError: As `logit_correction`.
    """
    correction = logit_correction(config)
    if correction is None:
        return logits
    scale, shift = correction
    return logits.float() * _like(logits, scale) + _like(logits, shift)


def fold_calibration(weight: Tensor, bias: Tensor, config: ZoobotConfig) -> tuple[Tensor, Tensor]:
    """The weight and bias of a head's last linear layer with the calibration in them, for other programs to run.

    A model with this layer needs no calibration: call `forget_calibration` on its configuration, or it is applied
    twice.

    Args:
        weight: Of the head's last layer, (num_labels, inputs).
        bias: Of the head's last layer, (num_labels,).
        config: The model's configuration.

    Returns:
        New tensors of the same shapes and types; the old ones where nothing is to be done.

    Raises:
        ValueError: As `logit_correction`.
    """
    correction = logit_correction(config)
    if correction is None:
        return weight, bias
    scale, shift = (torch.tensor(values, dtype=torch.float64, device=weight.device) for values in correction)
    return (weight.double() * scale[:, None]).to(weight.dtype), (bias.double() * scale + shift).to(bias.dtype)


def probabilities_from_logits(logits: Tensor, config: ZoobotConfig, *, prevalence: str | None = None) -> Tensor:
    """What a model's outputs say: probabilities (softmax, or sigmoid for several labels), or a regression's values.

    Args:
        logits: A model's output in evaluation mode (batch, num_labels), before softmax; for regression its values as
            they are. A head's own logits go through `calibrate_logits` first.
        config: The model's configuration.
        prevalence: "sky" or "training": for galaxies with that prevalence. When absent, what the model's outputs are
            for, the configuration's `predictions_for`.

    Returns:
        (batch, num_labels) in float32; rows sum to 1 for a single label.

    Raises:
        ValueError: Another prevalence, or one that the configuration lacks.
    """
    outputs = logits.float()
    if prevalence not in (None, config.predictions_for) and config.problem_type != "regression":
        if prevalence not in PREVALENCES:
            raise ValueError(f"prevalence is {prevalence!r}; choose one of {', '.join(PREVALENCES)}.")
        shift = _like(outputs, _shift_to_sky(config))
        outputs = outputs + shift if prevalence == "sky" else outputs - shift
    if config.problem_type == "single_label_classification":
        return outputs.softmax(dim=-1)
    if config.problem_type == "multi_label_classification":
        return outputs.sigmoid()
    return outputs


def effective_training_prevalence(config: ZoobotConfig) -> list[float]:
    """The share of each label that a model's head believes in, in the order of the labels.

    For a single label a class weight counts like that many galaxies. Of several labels each has its own loss, and its
    weight changes nothing. Label smoothing is none of it: it draws all probabilities to the middle, by as much as the
    images tell of each galaxy, and a calibration takes it back.

    Args:
        config: The model's configuration, with `training_prevalence`.

    Raises:
        ValueError: The configuration has no training prevalence, or not one for each label.
    """
    return _weighted_shares(_shares_by_label(config, "training_prevalence"), config)


def set_initial_bias(head: nn.Sequential, labels: Tensor, config: ZoobotConfig) -> None:
    """Lets a new head start from what is best to say of all training galaxies alike; other heads are left as they are.

    Biases that start at 0 are far from the shares of rare labels, and a short training ends before they are there. Of
    261 real galaxies with 10% rings (MobileNetV2, four splits), the held-out mean probability of a ring was 0.24 with
    one label, and 0.50 with several or smoothed ones, at log losses of 0.40 and 0.70; from here on it is 0.12 (0.17
    with smoothed ones), at 0.37 to 0.39.

    Args:
        head: From `build_head`; its last layer is changed where its weights are all 0.
        labels: Of all training galaxies, as in `head_loss`.
        config: The configuration that the head was built from; not one for votes.

    Raises:
        ValueError: As `head_loss`.
    """
    _check_labels(labels, config, outputs=(len(labels), config.num_labels))
    last = head[-1]
    assert isinstance(last, nn.Linear)
    if not last.weight.any():
        with torch.no_grad():
            last.bias.copy_(_best_constant(labels, config))


def _best_constant(labels: Tensor, config: ZoobotConfig) -> Tensor:
    """The logits, the same for all galaxies, of lowest training loss; finite for a label that none has."""
    smoothing = config.label_smoothing
    if config.problem_type == "single_label_classification":
        shares = torch.bincount(labels.long(), minlength=config.num_labels).double() / len(labels)
        smoothed = shares * (1 - smoothing) + smoothing / config.num_labels
        weighted = torch.tensor(_weighted_shares(smoothed.tolist(), config))
        logarithms = weighted.clamp(min=0.5 / len(labels)).log()
        return logarithms - logarithms.mean()
    known = (~labels.isnan()).sum(0)
    means = torch.where(known > 0, labels.double().nansum(0) / known, 0.5)
    if config.problem_type == "regression":
        return means.logit(SMALLEST_MEAN) if config.unit_interval else torch.where(known > 0, means, 0.0)
    smallest = 0.5 / known.clamp(min=1)
    return (means * (1 - smoothing) + smoothing / 2).clamp(smallest, 1 - smallest).logit()


def _weighted_shares(shares: list[float], config: ZoobotConfig) -> list[float]:
    if config.class_weights is None or config.problem_type != "single_label_classification":
        return shares
    weighted = [share * weight for share, weight in zip(shares, config.class_weights, strict=True)]
    return [share / sum(weighted) for share in weighted] if sum(weighted) else weighted


def _shift_to_sky(config: ZoobotConfig) -> list[float]:
    sky = _shares_by_label(config, "sky_prevalence")
    return prevalence_shift(effective_training_prevalence(config), sky, problem_type=config.problem_type)


def _shares_by_label(config: ZoobotConfig, name: str) -> list[float]:
    shares = getattr(config, name) or {}
    if set(shares) != set(config.label_names):
        raise ValueError(
            f"{name} has shares for {', '.join(shares) or 'no label'}; predictions for the sky need one for each of "
            f"{', '.join(config.label_names)}."
        )
    return [shares[label] for label in config.label_names]


def _checked_shares(shares: Sequence[float], problem_type: str) -> list[float]:
    # Plain numbers and no tensors: the shift is a constant of the model's graph, which exporters trace.
    values = [float(share) for share in shares]
    if not all(0 < value < 1 for value in values):
        raise ValueError(
            f"a prevalence is {values}; each label's share lies between 0 and 1, both excluded: leave out a class "
            "that is never there, or give it a small share."
        )
    if problem_type == "single_label_classification" and abs(sum(values) - 1) > SUM_TOLERANCE:
        raise ValueError(
            f"a prevalence is {values}, which adds up to {sum(values):.4g}; the shares of one label for each galaxy "
            "add up to 1."
        )
    return values


def _like(logits: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=logits.device)
