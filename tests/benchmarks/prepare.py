"""Writes what every competitor reads, so that all have the same: galaxies in folds, and encoders. Measures nothing.

Galaxies: the real rings where they are (`../shared/data/rings`), drawn ones otherwise. Each fold is a catalog with the
columns `id_str`, `file_loc`, `label` (1 is a ring) and `split`. Encoders: folders in timm's Hub layout are taken as
they are; a timm name gets random weights from a fixed seed, written once in that layout.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import timm
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from sklearn.model_selection import StratifiedKFold
from timm.models import save_for_hf

from zoobot_hf import read_galaxies, simulate_galaxies, split_dataset

REAL_RINGS = Path("../shared/data/rings").resolve()
SURVEY_PIXELS = 424
JPEG_QUALITY = 90


def split_folds(galaxies: Dataset, *, folds: int, seed: int) -> list[DatasetDict]:
    """The galaxies' train, validation and test splits, once for each fold.

    Each fold is the test split once; a fifth of the rest is the validation split.

    Args:
        galaxies: With `id_str` and a class `label`.
        folds: How many.
        seed: Of the split into folds, and of the validation splits.
    """
    labels = galaxies["label"][:]
    chosen = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    return [
        split_dataset(
            DatasetDict(train=galaxies.select(rest), test=galaxies.select(test)), seed=seed, validation_fraction=0.2
        )
        for rest, test in chosen
    ]


def find_galaxies(folder, count):
    """A catalog with `id_str`, `file_loc` and `label`."""
    if REAL_RINGS.is_dir():
        return read_galaxies(REAL_RINGS, label_column="ring").rename(columns={"ring": "label"})
    return draw_galaxies(folder / "simulated", count)


def draw_galaxies(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    drawn = simulate_galaxies(count, seed=1, size=SURVEY_PIXELS)
    catalog = drawn.parameters[["id_str", "ring"]].rename(columns={"ring": "label"})
    catalog["file_loc"] = [str((folder / f"{name}.jpg").resolve()) for name in catalog["id_str"]]
    for path, image in zip(catalog["file_loc"], drawn.images, strict=True):
        Image.fromarray(image).save(path, quality=JPEG_QUALITY)
    return catalog


def write_folds(catalog, folder, *, folds, seed):
    columns = catalog[["id_str", "file_loc", "label"]]
    dataset = Dataset.from_pandas(columns, preserve_index=False).class_encode_column("label")
    for number, splits in enumerate(split_folds(dataset, folds=folds, seed=seed)):
        parts = [split.to_pandas().assign(split=name) for name, split in splits.items()]
        pd.concat(parts).to_csv(folder / f"fold-{number}.csv", index=False)


def write_encoder(name, folder):
    if Path(name).is_dir() or (folder / name / "config.json").is_file():
        return
    torch.manual_seed(0)
    save_for_hf(timm.create_model(name, num_classes=0), folder / name, safe_serialization=True)
    path = folder / name / "config.json"
    settings = json.loads(path.read_text())
    # Zoobot's own repositories don't have them, and transformers would be given num_classes twice.
    settings.pop("model_args", None)
    path.write_text(json.dumps(settings, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--encoders", nargs="+", required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--simulated_galaxies", type=int, default=470)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.output / f"fold-{options.folds - 1}.csv").is_file():
        catalog = find_galaxies(options.output, options.simulated_galaxies)
        write_folds(catalog, options.output, folds=options.folds, seed=options.seed)
    for name in options.encoders:
        write_encoder(name, options.output / "encoders")


if __name__ == "__main__":
    main()
