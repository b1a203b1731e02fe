"""Rings in a hundred drawn skies where they are rare: python simulated_sky.py ENCODER_FOLDER.

For each sky 2,000 random galaxies are labelled: of 60% of them a head is trained, on as many galaxies with rings as
without, another 20% are for validation. Then the catalog, 4,000 other galaxies, is predicted and counted. The skies are
drawn from the same 12,000 galaxies, and those that were labelled are never in the catalog.
"""

import sys
import warnings

import numpy as np
import torch
from tqdm.auto import tqdm

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification, image_processor_for
from zoobot_hf.data.simulation import simulate_ring_dataset
from zoobot_hf.evaluation.calibration import (
    conformal_sets,
    estimate_prevalence,
    expected_counts,
    fit_conformal_thresholds,
    prevalence_from_counts,
)
from zoobot_hf.evaluation.judgement import judge
from zoobot_hf.evaluation.metrics import softmax
from zoobot_hf.evaluation.reliability import calibration_error_by_chance, expected_calibration_error
from zoobot_hf.models.heads import calibrate_logits, probabilities_from_logits
from zoobot_hf.training.embedding_cache import compute_embeddings
from zoobot_hf.training.linear_heads import fit_linear_heads, standardise

SKIES = 100
RINGS = 0.05
POOL, POOL_RINGS = 12_000, 0.15
LABELLED, CATALOG = 2_000, 4_000
PENALTY = 0.03
COVERAGE = 0.9


def embed_pool(encoder: str) -> tuple[torch.Tensor, np.ndarray, ZoobotConfig]:
    """Embeddings of the galaxies, (n, embedding_size), whether each has a ring, and the configuration of a head."""
    galaxies = simulate_ring_dataset(POOL, seed=0, ring_fraction=POOL_RINGS)
    model = ZoobotForImageClassification.from_pretrained(encoder, label_names=["not ring", "ring"])
    rows = compute_embeddings(model, galaxies, image_processor_for(encoder, zoom=1)).with_format("torch")
    return rows["embeddings"][:].float(), np.asarray(rows["label"][:]), model.config


def draw_sky(is_ring: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the labelled galaxies and of the catalog, each a random sample of a sky."""
    rings, others = (generator.permutation(np.flatnonzero(is_ring == value)) for value in (1, 0))
    count, in_catalog = generator.binomial(LABELLED, RINGS), generator.binomial(CATALOG, RINGS)
    labelled = np.concatenate([rings[:count], others[: LABELLED - count]])
    catalog = np.concatenate(
        [rings[count : count + in_catalog], others[LABELLED - count :][: CATALOG - in_catalog]],
    )
    return generator.permutation(labelled), catalog


def train_balanced(
    embeddings: torch.Tensor, is_ring: np.ndarray, rows: np.ndarray, *others: np.ndarray
) -> list[np.ndarray]:
    """Logits of `others`, (n, 2), by a head that saw as many of `rows` with rings as without."""
    rings = rows[is_ring[rows] == 1]
    balanced = np.concatenate([rings, rows[is_ring[rows] == 0][: len(rings)]])
    inputs, *seen = standardise(embeddings[balanced], *(embeddings[each] for each in others))
    labels = torch.tensor(is_ring[balanced])
    heads = fit_linear_heads(
        inputs[None], labels[None], torch.ones(1, 1, len(labels)), torch.tensor([PENALTY]), num_labels=2
    )
    return [(each @ heads.weight[0, 0, 0] + heads.bias[0, 0, 0]).numpy() for each in seen]


def judge_sky(embeddings: torch.Tensor, is_ring: np.ndarray, config: ZoobotConfig, seed: int) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    labelled, catalog = draw_sky(is_ring, generator)
    train, validation, test = np.split(labelled, [round(0.6 * LABELLED), round(0.8 * LABELLED)])
    logits = train_balanced(embeddings, is_ring, train, validation, test, catalog)
    share = float(is_ring[train].mean())
    config.training_prevalence = {"not ring": 0.5, "ring": 0.5}
    config.sky_prevalence = {"not ring": 1 - share, "ring": share}
    judgement = judge(
        config,
        validation_logits=logits[0],
        validation_labels=is_ring[validation],
        test_logits=logits[1],
        test_labels=is_ring[test],
    )
    for name, value in judgement.fields.items():
        setattr(config, name, value)
    on_validation, sky = (config_probabilities(each, config) for each in (logits[0], logits[2]))
    known = {
        "assumed_prevalence": [1 - share, share],
        "validation_probabilities": on_validation,
        "validation_labels": is_ring[validation],
    }
    truth = is_ring[catalog]
    from_sample = expected_counts(sky, prevalence_from_counts(np.bincount(is_ring[labelled]).tolist(), **known))[1]
    from_catalog = expected_counts(sky, estimate_prevalence(sky, **known))[1]
    uncorrected = softmax(logits[2])[:, 1]
    sets = conformal_sets(sky, fit_conformal_thresholds(on_validation, is_ring[validation], coverage=COVERAGE))
    held = sets[np.arange(len(truth)), truth]
    return {
        "rings": truth.sum(),
        "count, prevalence from labels": from_sample.value,
        "rings in its 90% interval": from_sample.low <= truth.sum() <= from_sample.high,
        "count, prevalence from catalog": from_catalog.value,
        "rings in this 90% interval": from_catalog.low <= truth.sum() <= from_catalog.high,
        "count, uncorrected": uncorrected.sum(),
        "calibration error": expected_calibration_error(sky[:, 1], truth),
        "calibration error by chance": calibration_error_by_chance(sky[:, 1]),
        "calibration error, uncorrected": expected_calibration_error(uncorrected, truth),
        "conformal coverage of not ring": held[truth == 0].mean(),
        "conformal coverage of ring": held[truth == 1].mean(),
    }


def config_probabilities(logits: np.ndarray, config: ZoobotConfig) -> np.ndarray:
    """Probabilities as the model gives them: calibrated, for the sky."""
    return probabilities_from_logits(calibrate_logits(torch.tensor(logits), config), config).double().numpy()


def main(encoder: str) -> None:
    warnings.simplefilter("ignore")
    embeddings, is_ring, config = embed_pool(encoder)
    results = [judge_sky(embeddings, is_ring, config, seed) for seed in tqdm(range(SKIES), desc="skies")]
    print(f"{encoder}, {SKIES} skies, rings are {RINGS:.0%}")
    for name in results[0]:
        values = np.array([result[name] for result in results], dtype=float)
        print(f"{name:34}  mean {values.mean():8.3f}  median {np.median(values):8.3f}  s.d. {values.std():8.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
