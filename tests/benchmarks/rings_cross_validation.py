"""Five-fold cross-validated scores on a ring catalog: of both stages, and of the one that validation keeps.

    python tests/benchmarks/rings_cross_validation.py --encoder FOLDER_OR_ID --dataset CATALOG

Each fold is the test split once; a fifth of the rest is the validation split that chooses epoch and stage. Repeats have
other folds. The standard errors are those of one repeat, because the repeats share their galaxies.
"""

import argparse
import logging
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from prepare import split_folds
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from transformers import set_seed

from zoobot_hf import (
    FrozenStageArguments,
    UnfrozenStageArguments,
    ZoobotForImageClassification,
    finetune,
    image_processor_for,
    load_galaxy_dataset,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--label_column", default="ring")
    parser.add_argument("--normalization", default="auto")
    parser.add_argument("--zoom", type=float)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="folds at a time; set OMP_NUM_THREADS to share cores")
    parser.add_argument("--untrained", action="store_true", help="the encoder's architecture with new weights")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()

    runs = list(product(range(options.repeats), range(options.folds)))
    scores = {}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for (repeat, fold), found in zip(runs, pool.map(partial(run_fold, options), runs), strict=True):
            for name, row in found.items():
                scores.setdefault(name, []).append(row)
                print(
                    f"repeat {repeat} fold {fold} {name:8} accuracy {row[0]:.3f} ROC AUC {row[1]:.3f}",
                    flush=True,
                )

    print(f"\n{options.repeats} x {options.folds} folds: mean and its standard error")
    print(f"{'stage':10}{'accuracy':>16}{'ROC AUC':>16}{'log loss':>16}{'seconds':>10}")
    for name, rows in scores.items():
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(options.folds)
        cells = "".join(f"{m:8.3f} +- {e:.3f}" for m, e in zip(mean[:3], error[:3], strict=True))
        print(f"{name:10}{cells}{mean[3]:10.0f}")


def run_fold(options, run):
    """The scores of both stages by name."""
    repeat, fold = run
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    galaxies = load_galaxy_dataset(options.dataset, label_column=options.label_column)
    processor = image_processor_for(options.encoder, normalization=options.normalization, zoom=options.zoom)
    splits = split_folds(galaxies, folds=options.folds, seed=options.seed + repeat)[fold]
    finetuned = finetune_on(splits, processor, options, seed=options.seed + options.folds * repeat + fold)
    scores = {stage.name: score(stage, splits["test"]["label"]) for stage in finetuned.stages}
    return {**scores, "kept": scores[finetuned.kept_stage]}


def finetune_on(splits, processor, options, *, seed):
    """Both stages of one fold."""
    set_seed(seed)
    label_names = splits["test"].features["label"].names
    model = ZoobotForImageClassification.from_pretrained(options.encoder, label_names=label_names)
    if options.untrained:
        model = ZoobotForImageClassification(model.config)
    stage_arguments = {"seed": options.seed, "disable_tqdm": True}
    if options.processes > 1:
        stage_arguments["dataloader_num_workers"] = 0
    with tempfile.TemporaryDirectory() as folder:
        return finetune(
            model,
            processor,
            splits,
            Path(folder) / "run",
            frozen=FrozenStageArguments(**stage_arguments),
            unfrozen=UnfrozenStageArguments(**stage_arguments),
        )


def score(stage, labels):
    """Accuracy, ROC AUC, log loss and seconds."""
    logits = np.asarray(stage.test_outputs)
    labels = np.asarray(labels)
    chances = softmax(logits, axis=1)[:, 1]
    return (
        accuracy_score(labels, chances > 0.5),
        roc_auc_score(labels, chances),
        log_loss(labels, chances),
        stage.seconds,
    )


if __name__ == "__main__":
    main()
