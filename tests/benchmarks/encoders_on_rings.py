"""The package's encoder on real ring galaxies: python encoders_on_rings.py RINGS_FOLDER OTHER_ENCODER.

Beside it its twin with new weights and another encoder. Each gets what suits it best on these very galaxies: the zoom,
the normalisation and the penalty of a logistic regression on its frozen embeddings, five folds and three repeats. The
intervals (90%) are from drawing galaxies again, the same ones for all.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from zoobot_hf import ZoobotConfig, ZoobotForGalaxyZoo, ZoobotModel, image_processor_for
from zoobot_hf.data.dataset import load_galaxy_dataset
from zoobot_hf.models.conversion import EMBEDDED_ENCODER
from zoobot_hf.training.embedding_cache import compute_embeddings

ZOOMS = (2.0, 2.5, 3.0)
INVERSE_PENALTIES = (1e-3, 3e-3, 1e-2)
REPEATS, FOLDS, DRAWS = 3, 5, 1000


def predict_out_of_fold(embeddings: np.ndarray, labels: np.ndarray, inverse_penalty: float) -> np.ndarray:
    """Probabilities of a ring, (repeats, n)."""
    out = np.zeros((REPEATS, len(labels)))
    for repeat in range(REPEATS):
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat).split(embeddings, labels)
        for train, test in folds:
            head = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=3000))
            out[repeat, test] = head.fit(embeddings[train], labels[train]).predict_proba(embeddings[test])[:, 1]
    return out


def score(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean ROC AUC and accuracy over the repeats."""
    return (
        float(np.mean([roc_auc_score(labels, each) for each in probabilities])),
        float(np.mean([accuracy_score(labels, each > 0.5) for each in probabilities])),
    )


def best_predictions(
    model: ZoobotModel, encoder: str, galaxies: Dataset, normalizations: tuple[str, ...]
) -> np.ndarray:
    labels, best = np.asarray(galaxies["label"][:]), []
    for zoom, normalization in product(ZOOMS, normalizations):
        processor = image_processor_for(encoder, zoom=zoom, normalization=normalization)
        rows = compute_embeddings(model, galaxies, processor).with_format("numpy")
        embeddings = np.asarray(rows["embeddings"][:])
        best += [predict_out_of_fold(embeddings, labels, each) for each in INVERSE_PENALTIES]
    return max(best, key=lambda each: score(each, labels)[0])


def main(rings: str, other: str) -> None:
    galaxies = load_galaxy_dataset(rings, label_column="ring")
    labels = np.asarray(galaxies["label"][:])
    torch.manual_seed(42)
    twin = ZoobotForGalaxyZoo(ZoobotConfig.from_pretrained(EMBEDDED_ENCODER)).zoobot
    predictions = {
        "embedded": best_predictions(
            ZoobotModel.from_pretrained(EMBEDDED_ENCODER), EMBEDDED_ENCODER, galaxies, ("none",)
        ),
        "its twin with new weights": best_predictions(twin, EMBEDDED_ENCODER, galaxies, ("none",)),
        Path(other).name: best_predictions(ZoobotModel.from_pretrained(other), other, galaxies, ("none", "encoder")),
    }
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(labels), (DRAWS, len(labels)))
    drawn = {
        name: np.array([score(each[:, rows], labels[rows]) for rows in draws]) for name, each in predictions.items()
    }
    table = {name: describe(score(each, labels), drawn[name]) for name, each in predictions.items()}
    first = next(iter(predictions))
    for name in list(predictions)[1:]:
        difference = np.subtract(score(predictions[first], labels), score(predictions[name], labels))
        table[f"{first} - {name}"] = describe(difference, drawn[first] - drawn[name])
    print(pd.DataFrame(table, index=["ROC AUC", "accuracy"]).T.to_string())


def describe(values: np.ndarray | tuple[float, float], drawn: np.ndarray) -> list[str]:
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    return [f"{value:.3f} ({a:.3f} to {b:.3f})" for value, a, b in zip(values, low, high, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
