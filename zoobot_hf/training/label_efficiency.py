"""How many labels are enough: what the frozen stage reaches with a few labelled galaxies of each class.

For each seed a part of the galaxies is the test set, and the labelled ones are drawn from the others: first five of
each class, then ten that include these five, and so on. Compared are

- the frozen stage: its logistic regression on the embeddings of augmented views, the penalty chosen by cross-validation
  among the labelled galaxies; its grid of heads, which takes validation galaxies besides, has no part here;
- logistic regression, scikit-learn's, on standardised plain embeddings, with C = 1 / embedding_size;
- an untrained encoder: the frozen stage on an encoder of the same configuration with random weights.

The heads learn from equal numbers of each class. Their scores are for the classes' own shares among the test galaxies,
to which what they say is converted.

An interval holds 90% of the seeds: it is what one set of so many labels gives, measured on one test set. The seeds
share their galaxies, so that the mean over more of them is not that much surer.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import EvalPrediction

from zoobot_hf.data.catalog import write_catalog
from zoobot_hf.evaluation.intervals import interval_of_draws
from zoobot_hf.evaluation.label_audit import find_near_duplicates
from zoobot_hf.evaluation.metrics import SINGLE_LABEL, metrics_for_trainer
from zoobot_hf.evaluation.power_law import FEWEST_POINTS, Extrapolation, extrapolate
from zoobot_hf.evaluation.probability_plots import plot_label_curves
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotForImageClassification
from zoobot_hf.publishing.run_folder import write_json

from .embedding_cache import Views, store_embeddings
from .folds import assign_folds, check_classes, group_near_duplicates
from .linear_heads import INNER_FOLDS, choose_linear_heads, standardise

logger = logging.getLogger(__name__)

SMALLEST_PROBABILITY = 1e-300  # of a float64, so that its logarithm is a number
NUMBERS = (5, 10, 20, 40, 80, 160)
SEEDS = 20
FACTS = "label_curve.json"
FOLDS = 5  # a fifth of the galaxies is the test set
VIEWS = Views(2)
NUMBERS_AT_ONCE = 2**26  # embeddings that are in memory for one fit
FROZEN, LOGISTIC, UNTRAINED = "Frozen stage", "Logistic regression", "Untrained encoder"
SCORES = {"accuracy": "Accuracy", "roc_auc": "ROC AUC", "log_loss": "Log loss"}

Integers = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]


class LabelCurve(NamedTuple):
    """How scores grow with the number of labels.

    Attributes:
        table: A row for each series, score and number of labels: `series`, `score`, `labels` (galaxies of each class),
            `value` (the mean over the seeds), `low` and `high` (90% of the seeds) and `seeds`.
        runs: A row for each series, number of labels and seed: `series`, `labels`, `seed`, `test_galaxies`, and the
            scores `accuracy`, `roc_auc` and `log_loss` on the test galaxies, for the classes' own shares there.
        extrapolation: What more labels would bring to the frozen stage; None with too few points to fit a law to.
        seconds: By series, without the encoder.
    """

    table: pd.DataFrame
    runs: pd.DataFrame
    extrapolation: Extrapolation | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Draw:
    """One seed's galaxies: the test set, and of each class the order in which the others get labels."""

    seed: int
    test: Integers
    orders: list[Integers]

    def labelled(self, number: int) -> Integers:
        """Rows, class by class in turn: every stretch of them has all classes."""
        return np.stack([order[:number] for order in self.orders], axis=1).ravel()


class _Embedded(NamedTuple):
    """Embeddings of all galaxies: as evaluation sees them (n, size), and augmented (n, views, size)."""

    plain: Tensor
    seen: Tensor


def measure_label_curve(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    dataset: Dataset | DatasetDict,
    *,
    numbers: Sequence[int] = NUMBERS,
    seeds: int = SEEDS,
    with_untrained: bool = True,
    views: Views = VIEWS,
    seed: int = 42,
    cache_dir: str | Path | None = None,
) -> LabelCurve:
    """The scores with few labels and more, from stored embeddings: the encoder sees each galaxy and view once.

    Args:
        model: From `from_pretrained`; its encoder is used, and not its head.
        processor: The image processor that suits the encoder.
        dataset: With `id_str`, `image` and `label`. Of a dataset without a `test` split, a fifth of the galaxies,
            another one for each seed, is the test set; near-duplicates of a galaxy are on the same side.
        numbers: How many labelled galaxies of each class; those that are not there are left out.
        seeds: How many draws of labelled galaxies.
        with_untrained: Whether to run an encoder with random weights as well.
        views: Augmented views of each labelled galaxy.
        seed: Decides the draws.
        cache_dir: Where embeddings are kept; below the Hugging Face home when absent.

    Raises:
        ValueError: A number below 2; none of them is there; fewer than two seeds; what folds need is not there; a test
            set has no galaxy of a class.
    """
    galaxies, is_test = _join(dataset)
    labels = check_classes(galaxies, folds=2 if is_test.any() else FOLDS)
    if is_test.any():
        _check_classes_of_test(labels[is_test], names=galaxies.features["label"].names, is_given=True)
    embedded = {FROZEN: _embed(model, processor, galaxies, views=views, cache_dir=cache_dir)}
    if with_untrained:
        untrained = make_untrained(model, seed=seed)
        embedded[UNTRAINED] = _embed(untrained, processor, galaxies, views=views, cache_dir=cache_dir)
    draws = _plan_draws(galaxies, labels, is_test, embedded[FROZEN].plain, seeds=seeds, seed=seed)
    possible = _possible_numbers(numbers, draws, names=galaxies.features["label"].names)
    predictors: dict[str, Callable[[int], list[Floats]]] = {
        FROZEN: lambda number: predict_from_few(embedded[FROZEN], labels, draws, number),
        LOGISTIC: lambda number: _predict_by_logistic_regression(embedded[FROZEN].plain.numpy(), labels, draws, number),
    }
    if with_untrained:
        predictors[UNTRAINED] = lambda number: predict_from_few(embedded[UNTRAINED], labels, draws, number)
    runs, seconds = [], {}
    for series, predict in predictors.items():
        started = time.monotonic()
        for number in possible:
            runs += _score(series, number, draws, predict(number), labels)
        seconds[series] = time.monotonic() - started
        logger.info("%s: %d heads in %.1f s.", series, len(possible) * len(draws), seconds[series])
    return summarise_runs(pd.DataFrame(runs), classes=labels.max() + 1, seconds=seconds)


def summarise_runs(runs: pd.DataFrame, *, classes: int, seconds: dict[str, float]) -> LabelCurve:
    """Means over the seeds with their intervals, and what more labels would bring to the frozen stage.

    Args:
        runs: As in `LabelCurve`.
        classes: How many classes there are.
        seconds: As in `LabelCurve`.
    """
    rows = []
    for series, of_series in runs.groupby("series", sort=False):
        for score in SCORES:
            for number, group in of_series.groupby("labels"):
                estimate = interval_of_draws(group[score].mean(), group[score])
                rows.append([series, score, number, *estimate, len(group)])
    table = pd.DataFrame(rows, columns=["series", "score", "labels", "value", "low", "high", "seeds"])
    accuracies = runs[runs["series"] == FROZEN].pivot_table(index="seed", columns="labels", values="accuracy")
    law = None
    if len(accuracies.columns) >= FEWEST_POINTS:
        law = extrapolate(accuracies.columns, 1 - accuracies.to_numpy(), classes=int(classes))
    return LabelCurve(table, runs, law, seconds)


def make_curve_folder(output_dir: str | Path) -> Path:
    """The folder for a new curve, made where it isn't there.

    Args:
        output_dir: The folder.

    Raises:
        FileExistsError: It holds a curve.
        NotADirectoryError: It is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir is {folder}, which is a file; choose a folder.")
    if (folder / FACTS).exists():
        raise FileExistsError(f"output_dir {folder} already holds a curve; choose another one, or delete the folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_label_curve(curve: LabelCurve, output_dir: str | Path) -> list[Path]:
    """The files that were written: two tables, a figure twice, and the extrapolation.

    Args:
        curve: From `measure_label_curve`.
        output_dir: Made where it isn't there; gets `label_curve.csv`, `label_curve_runs.csv`, `label_curve.json`,
            `label_curve.png` and `label_curve.pdf`, in place of those of an earlier curve.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("label_curve.csv", "label_curve_runs.csv", FACTS, "label_curve.png", "label_curve.pdf")
    paths = [folder / name for name in names]
    write_catalog(curve.table, paths[0])
    write_catalog(curve.runs, paths[1])
    law = curve.extrapolation
    facts = {"law": law.law._asdict(), "more_labels": law.more._asdict(), "in_words": law.describe()} if law else None
    plot_label_curves(curve.table, paths[3], scores=SCORES, extrapolation=law)
    write_json(paths[2], {"extrapolation": facts, "seconds": curve.seconds})  # last: it says that all is there
    return paths


def make_untrained(model: ZoobotForImageClassification, *, seed: int) -> ZoobotForImageClassification:
    """A model of the same configuration with random weights.

    Args:
        model: The trained one.
        seed: Decides the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = ZoobotForImageClassification(copy.deepcopy(model.config))
        if untrained.encoder.config.model_type == "timm_wrapper":
            # The wrapper starts timm's kernels so small that deep networks say the same of every image. These are for
            # ReLU networks (He et al. 2015, arXiv:1502.01852).
            for parameter in untrained.encoder.parameters():
                if parameter.ndim == 4:
                    torch.nn.init.kaiming_normal_(parameter)
    return untrained.to(model.device).eval()


def predict_from_few(embedded: _Embedded, labels: Integers, draws: Sequence[_Draw], number: int) -> list[Floats]:
    """Logits of each draw's test galaxies, (test galaxies, classes), from heads on its first labelled galaxies.

    Args:
        embedded: Of all galaxies.
        labels: Of all galaxies, (n,).
        draws: Test and labelled galaxies of each seed.
        number: How many labelled galaxies of each class.
    """
    rows, size = number * len(draws[0].orders), embedded.plain.shape[1]
    at_once = max(1, NUMBERS_AT_ONCE // (rows * embedded.seen.shape[1] * size))
    logits = []
    for start in range(0, len(draws), at_once):
        logits += _fit_and_predict(embedded, labels, draws[start : start + at_once], number)
    return logits


def _join(dataset: Dataset | DatasetDict) -> tuple[Dataset, npt.NDArray[np.bool_]]:
    """All galaxies, and which of them are in the test split that the dataset came with."""
    if isinstance(dataset, Dataset):
        return dataset, np.zeros(len(dataset), dtype=bool)
    names = [name for name in ("train", "validation", "test") if name in dataset]
    columns = ["id_str", "image", "label"]
    joined = concatenate_datasets([dataset[name].select_columns(columns) for name in names])
    return joined, np.concatenate([np.full(len(dataset[name]), name == "test") for name in names])


def _check_classes_of_test(labels: Integers, *, names: Sequence[str], is_given: bool) -> None:
    # The heads are told the shares of the test galaxies, and would never say a class that isn't among them.
    missing = [name for number, name in enumerate(names) if number not in labels]
    if missing:
        advice = (
            "add galaxies of this class to it, or leave the split out, so that a fifth of the others is the test set."
            if is_given
            else "many of them are near-duplicates of each other, which stay together; label more, or give a split."
        )
        raise ValueError(
            f"the test {'split' if is_given else 'set'} has no galaxy of class {', '.join(missing)}, and its scores "
            f"would look too good; {advice}"
        )


def _embed(
    model: ZoobotForImageClassification,
    processor: ZoobotImageProcessor,
    galaxies: Dataset,
    *,
    views: Views,
    cache_dir: str | Path | None,
) -> _Embedded:
    kept = (store_embeddings(model, galaxies, processor, views=each, cache_dir=cache_dir) for each in (None, views))
    plain, seen = (values[rows].float() for values, rows, _ in kept)
    return _Embedded(plain[:, 0], seen)


def _plan_draws(
    galaxies: Dataset,
    labels: Integers,
    is_test: npt.NDArray[np.bool_],
    embeddings: Tensor,
    *,
    seeds: int,
    seed: int,
) -> list[_Draw]:
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}; an interval over seeds needs at least 2.")
    identifiers = galaxies["id_str"][:]
    splits = np.where(is_test, "test", "others").tolist()
    pairs = find_near_duplicates(identifiers, embeddings.numpy(), splits)
    if pairs["leaks"].any():
        logger.warning("%d near-duplicates of test galaxies are among the others.", pairs["leaks"].sum())
    groups = group_near_duplicates(identifiers, pairs)
    draws, folds = [], labels
    for number in range(seeds):
        if not is_test.any() and number % FOLDS == 0:
            folds = assign_folds(identifiers, labels, folds=FOLDS, seed=seed + number // FOLDS, groups=groups)
        held_out = is_test if is_test.any() else folds == number % FOLDS
        if not is_test.any():  # a given split was looked at before the encoder ran
            _check_classes_of_test(labels[held_out], names=galaxies.features["label"].names, is_given=False)
        order = np.random.default_rng([seed, number]).permutation(np.flatnonzero(~held_out))
        orders = [order[labels[order] == label] for label in range(labels.max() + 1)]
        draws.append(_Draw(number, np.flatnonzero(held_out), orders))
    return draws


def _possible_numbers(numbers: Sequence[int], draws: Sequence[_Draw], *, names: Sequence[str]) -> list[int]:
    if min(numbers) < 2:
        raise ValueError(f"numbers are {list(numbers)}; give at least 2 galaxies of each class, to validate on one.")
    there = [min(len(draw.orders[label]) for draw in draws) for label in range(len(names))]
    possible = sorted({number for number in numbers if number <= min(there)})
    rarest = names[int(np.argmin(there))]
    if not possible:
        raise ValueError(
            f"numbers start at {min(numbers)}, and outside the test set there are {min(there)} galaxies of the class "
            f"{rarest!r}; give smaller numbers, or label more."
        )
    left_out = sorted(set(numbers) - set(possible))
    if left_out:
        logger.warning(
            "%s labelled galaxies of each class are left out: %r has %d outside the test set.",
            ", ".join(map(str, left_out)),
            rarest,
            min(there),
        )
    return possible


def _fit_and_predict(embedded: _Embedded, labels: Integers, draws: Sequence[_Draw], number: int) -> list[Floats]:
    views, classes = embedded.seen.shape[1], len(draws[0].orders)
    chosen = [torch.from_numpy(draw.labelled(number)) for draw in draws]
    prepared = [
        standardise(embedded.seen[rows].flatten(0, 1), embedded.plain[rows], embedded.plain[draw.test])
        for rows, draw in zip(chosen, draws, strict=True)
    ]
    inputs, validated = (torch.stack([each[place] for each in prepared]) for place in (0, 1))
    heads = choose_linear_heads(
        inputs.view(len(draws), len(chosen[0]), views, -1),
        torch.stack([torch.from_numpy(labels[rows]) for rows in chosen]),
        torch.arange(number * classes) // classes % min(INNER_FOLDS, number),
        num_labels=classes,
        held_out=validated[:, :, None],
    )
    return [
        (inputs_of_test @ weight + bias).double().numpy()
        for (_, _, inputs_of_test), weight, bias in zip(prepared, heads.weight, heads.bias, strict=True)
    ]


def _predict_by_logistic_regression(
    embeddings: Floats, labels: Integers, draws: Sequence[_Draw], number: int
) -> list[Floats]:
    logits = []
    for draw in draws:
        rows = draw.labelled(number)
        # With C = 1, scikit-learn's default, a weight of every dimension would be all but free.
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=1 / embeddings.shape[1], max_iter=1000))
        regression.fit(embeddings[rows], labels[rows])
        probabilities = regression.predict_proba(embeddings[draw.test])
        logits.append(np.log(np.maximum(probabilities, SMALLEST_PROBABILITY)))
    return logits


def _score(
    series: str, number: int, draws: Sequence[_Draw], logits: Sequence[Floats], labels: Integers
) -> list[dict[str, Any]]:
    compute = metrics_for_trainer(SINGLE_LABEL)
    rows = []
    for draw, outputs in zip(draws, logits, strict=True):
        truth = labels[draw.test]
        shares = np.bincount(truth, minlength=outputs.shape[1]) / len(truth)
        # Trained on equal numbers of each class, the heads take all for equally common.
        outputs = outputs + np.log(np.maximum(shares, SMALLEST_PROBABILITY))
        scores = compute(EvalPrediction(np.maximum(outputs, -1e3), truth))
        row = {"series": series, "labels": number, "seed": draw.seed, "test_galaxies": len(draw.test)}
        rows.append({**row, **{name: scores[name] for name in SCORES}})
    return rows
