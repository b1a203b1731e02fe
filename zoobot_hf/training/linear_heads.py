"""Many linear heads at once, each the one best head for its galaxies and its regularisation.

A head minimises the weighted mean cross-entropy plus penalty / 2 times the squared norm of its weight; the bias is not
penalised. That is scikit-learn's `LogisticRegression` with C = 1 / (penalty * sum of weights), for two classes twice
that, because it has one weight vector there and a head two. The problem is convex, so that neither a start nor a
learning rate has a part in the result, and heads of many draws, folds and penalties are a few products of matrices.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import helmert
from torch import Tensor
from torch.nn import functional

INNER_FOLDS = 5
PENALTIES = tuple(float(penalty) for penalty in np.geomspace(3e-4, 1, 8))
# Dimensions that vary less than this share of the embeddings' mean size say nothing.
SMALLEST_SPREAD = 1e-4
MOST_STEPS = 3000
STEPS_BETWEEN_CHECKS = 20
# A head's distance from the best is at most its gradient over the penalty; float32 gets no further than the second.
TOLERANCE = 1e-2
SMALLEST_GRADIENT = 1e-6
SMALLEST_EIGENVALUE = 1e-7  # of the largest; what is below is rounding


class LinearHeads(NamedTuple):
    """Heads of several sets of galaxies.

    Attributes:
        weight: (sets, heads, penalties, embedding_size, classes), for the inputs that the heads were fitted to.
        bias: (sets, heads, penalties, classes).
    """

    weight: Tensor
    bias: Tensor


class ChosenHeads(NamedTuple):
    """The best head of each of several sets of galaxies.

    Attributes:
        weight: (sets, embedding_size, classes), for the inputs that the heads were fitted to.
        bias: (sets, classes).
        penalty: (sets,), chosen by cross-validation.
    """

    weight: Tensor
    bias: Tensor
    penalty: Tensor


def standardise(embeddings: Tensor, *others: Tensor) -> list[Tensor]:
    """Embeddings with mean 0, equal spread in every dimension and a mean squared length of 1, and others likewise.

    Args:
        embeddings: Of the training galaxies, (n, embedding_size), which set mean and spread.
        *others: Embeddings that get the same mean and spread subtracted and divided, (m, embedding_size).
    """
    values = embeddings.double()
    mean, spread = values.mean(0), values.std(0, correction=0)
    smallest = SMALLEST_SPREAD * values.square().mean().sqrt()
    # A dimension that hardly varies here says nothing, and could be large elsewhere.
    scale = torch.where(spread > smallest, 1 / spread, 0.0) / values.shape[1] ** 0.5
    return [((each.double() - mean) * scale).float() for each in (embeddings, *others)]


def choose_linear_heads(
    inputs: Tensor,
    labels: Tensor,
    folds: Tensor,
    *,
    num_labels: int,
    held_out: Tensor | None = None,
    weights: Tensor | None = None,
) -> ChosenHeads:
    """The best head of each set of galaxies, with the penalty that is best for galaxies that a head has not seen.

    Args:
        inputs: From `standardise`, (sets, n, views, embedding_size), float32.
        labels: Class numbers, (sets, n).
        folds: The fold of each galaxy, 0 to folds - 1, in all sets; (n,).
        num_labels: How many classes there are.
        held_out: What a galaxy that was held out is judged by, likewise; `inputs` when absent.
        weights: Of each galaxy, (sets, n); all alike when absent.
    """
    held_out = inputs if held_out is None else held_out
    weights = torch.ones(labels.shape) if weights is None else weights
    is_held_out = folds == torch.arange(int(folds.max()) + 1)[:, None]
    # A head for each fold, without its galaxies, and a last one with all of them.
    used = torch.cat([~is_held_out, torch.ones(1, len(folds), dtype=torch.bool)])
    views = inputs.shape[2]
    penalties = torch.tensor(PENALTIES)
    heads = fit_linear_heads(
        inputs.flatten(1, 2),
        labels.repeat_interleave(views, dim=1),
        (used * weights[:, None]).repeat_interleave(views, dim=2),
        penalties,
        num_labels=num_labels,
    )
    losses = torch.zeros(len(inputs), len(penalties))
    for fold, rows in enumerate(is_held_out):
        logits = torch.einsum("snvd,spdc->spnvc", held_out[:, rows], heads.weight[:, fold])
        logits += heads.bias[:, fold, :, None, None]
        truth = labels[:, None, rows, None].expand(logits.shape[:4])
        own = functional.cross_entropy(logits.flatten(0, 3), truth.flatten(), reduction="none").view(truth.shape)
        losses += (own * weights[:, None, rows, None]).sum((2, 3))
    best, sets = losses.argmin(1), torch.arange(len(inputs))
    return ChosenHeads(heads.weight[sets, -1, best], heads.bias[sets, -1, best], penalties[best])


def fit_linear_heads(
    inputs: Tensor, labels: Tensor, weights: Tensor, penalties: Tensor, *, num_labels: int
) -> LinearHeads:
    """The best heads for several sets of galaxies, for each set several choices of galaxies, and several penalties.

    Args:
        inputs: From `standardise`, (sets, n, embedding_size), float32.
        labels: Class numbers, (sets, n).
        weights: Of each galaxy in each head, 0 or more, (sets, heads, n).
        penalties: Above 0, (penalties,).
        num_labels: How many classes there are.
    """
    axes, largest = _principal_axes(inputs)
    # The bias' column is as large as the largest other one, so that one step suits both.
    column = (largest / inputs.shape[1]).sqrt()[:, None, None].expand(-1, inputs.shape[1], 1)
    reduced = torch.cat([inputs @ axes, column], dim=2)
    shares = weights / weights.sum(2, keepdim=True)
    # The curvature of the cross-entropy in the logits is at most 1/2 (Boehning 1992).
    curvature = 0.5 * largest[:, None] / weights.sum(2) * weights.amax(2)
    solution = _minimise(reduced, labels, shares, penalties, curvature, num_labels=num_labels)
    heads = solution @ _contrast(num_labels)
    weight = torch.einsum("sdr,srhpc->shpdc", axes, heads[:, :-1])
    return LinearHeads(weight, heads[:, -1] * column[:, 0, :, None, None])


def _principal_axes(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Axes that hold all of a set's galaxies, (sets, embedding_size, axes), and the largest eigenvalue, (sets,).

    A penalised weight lies in the span of its galaxies, which are fewer than the dimensions of most encoders.
    """
    axes, largest = [], []
    for values in inputs.double():
        if len(values) >= values.shape[1]:
            axes.append(torch.eye(values.shape[1]))
            largest.append(torch.linalg.eigvalsh(values.T @ values)[-1])
            continue
        eigenvalues, vectors = torch.linalg.eigh(values @ values.T)
        is_there = eigenvalues > SMALLEST_EIGENVALUE * eigenvalues[-1]
        factors = torch.where(is_there, eigenvalues.clamp(min=1e-300).rsqrt(), 0.0)
        axes.append((values.T @ (vectors * factors)).float())
        largest.append(eigenvalues[-1])
    return torch.stack(axes), torch.stack(largest).float().clamp(min=1e-6)


def _contrast(num_labels: int) -> Tensor:
    """(classes - 1, classes): orthonormal, and each row sums to 0, as the best weights do over the classes."""
    return torch.tensor(helmert(num_labels), dtype=torch.float32)


def _minimise(
    inputs: Tensor, labels: Tensor, shares: Tensor, penalties: Tensor, curvature: Tensor, *, num_labels: int
) -> Tensor:
    """The best parameters, (sets, dimensions, heads, penalties, classes - 1), by accelerated gradient descent.

    With restarts where momentum leads uphill, head by head: O'Donoghue & Candes 2015, Foundations of Computational
    Mathematics 15, 715.
    """
    (sets, heads, _), count, dimensions = shares.shape, len(penalties), inputs.shape[2]
    contrast = _contrast(num_labels)
    is_class = functional.one_hot(labels, num_labels).float()[:, :, None, None] @ contrast.T
    by_row = shares.transpose(1, 2)[:, :, :, None, None]
    penalty = penalties[None, None, None, :, None].repeat(1, dimensions, 1, 1, 1)
    penalty[:, -1] = 0
    step = 1 / (curvature[:, None, :, None, None] + penalties[:, None])
    best = torch.zeros(sets, dimensions, heads, count, num_labels - 1)
    ahead, momentum = best, torch.ones(sets, 1, heads, count, 1)
    for number in range(MOST_STEPS):
        logits = (inputs @ ahead.flatten(2)).view(sets, -1, heads, count, num_labels - 1) @ contrast
        excess = (logits.softmax(4) @ contrast.T - is_class) * by_row
        gradient = (inputs.mT @ excess.flatten(2)).view(best.shape) + penalty * ahead
        following = ahead - step * gradient
        is_uphill = (gradient * (following - best)).sum((1, 4), keepdim=True) > 0
        grown = torch.where(is_uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = following + torch.where(is_uphill, 0.0, (momentum - 1) / grown) * (following - best)
        best, momentum = following, grown
        if number % STEPS_BETWEEN_CHECKS == 0:
            sizes = gradient.square().sum((1, 4)).sqrt()
            if ((sizes < TOLERANCE * penalties) | (sizes < SMALLEST_GRADIENT)).all():
                break
    return best
