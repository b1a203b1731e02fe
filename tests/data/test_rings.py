"""Rings come from four sources, and the two cuts of the advanced rule count what they remove."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from zoobot_hf.data import dataset as dataset_module
from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.data.rings import (
    FACE_ON_COLUMN,
    FEATURED_COLUMN,
    RING_FRACTION_COLUMN,
    keep_featured_face_on,
    label_rings_by_votes,
    load_rings,
    load_rings_by_votes,
)

RINGS = Path(__file__).resolve().parents[2] / "../shared/data/rings"
NAN = float("nan")


def make_votes(**columns):
    count = len(next(iter(columns.values())))
    return datasets.Dataset.from_dict({"id_str": [f"g{row}" for row in range(count)], **columns})


def make_vote_catalog(folder, count):
    """Every fourth galaxy is a ring, every fourth is undecided, and the last two are cut."""
    for row in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{row}.png")
    featured = np.full(count, 0.9)
    featured[-2:] = 0.1
    table = pd.DataFrame(
        {
            "id_str": [f"g{row}" for row in range(count)],
            "file_loc": [f"{row}.png" for row in range(count)],
            FEATURED_COLUMN: featured,
            FACE_ON_COLUMN: 0.9,
            RING_FRACTION_COLUMN: np.tile([0.5, 0.1, 0.0, 0.0], count // 4),
        }
    )
    table.to_csv(folder / "catalog.csv", index=False)


def test_the_default_is_drawn_and_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    splits = load_rings(count=20, size=32, seed=3)

    assert list(splits) == ["train", "validation", "test"]
    assert sum(len(split) for split in splits.values()) == 20
    assert splits["train"].features["label"].names == ["not ring", "ring"]
    assert splits["test"][0]["image"].size == (32, 32)


def test_a_catalog_is_labelled_by_its_column_ring(tmp_path):
    make_vote_catalog(tmp_path, 40)
    catalog = pd.read_csv(tmp_path / "catalog.csv")
    catalog.assign(ring=[0, 1] * 20).to_csv(tmp_path / "catalog.csv", index=False)

    splits = load_rings(tmp_path, seed=3, keep_columns=[FEATURED_COLUMN])

    assert [np.bincount(split["label"]).tolist() for split in splits.values()] == [[14, 14], [2, 2], [4, 4]]
    assert splits["test"].column_names == ["id_str", "image", FEATURED_COLUMN, "label"]
    assert splits["test"].features["label"].names == ["not ring", "ring"]


def test_the_hub_is_asked_for_the_labelled_configuration(monkeypatch):
    asked = {}
    rows = datasets.Dataset.from_dict(
        {"id_str": [f"g{row}" for row in range(20)], "image": [None] * 20, "label": [0, 1] * 10}
    ).cast_column("image", datasets.Image())

    def load_dataset(path, **options):
        asked.update(options, path=path)
        return datasets.DatasetDict(train=rows)

    monkeypatch.setattr(dataset_module.datasets, "load_dataset", load_dataset)
    splits = load_rings("mwalmsley/gz_rings", revision="abc")

    assert asked == {"path": "mwalmsley/gz_rings", "name": "classification", "revision": "abc"}
    assert splits["train"].features["label"].names == ["not ring", "ring"]
    assert [np.bincount(split["label"]).tolist() for split in splits.values()] == [[7, 7], [1, 1], [2, 2]]


def test_featured_face_on_galaxies_are_kept_and_the_others_counted(caplog):
    galaxies = make_votes(
        **{FEATURED_COLUMN: [0.26, 0.25, 0.9, 0.9, NAN, None], FACE_ON_COLUMN: [0.76, 0.9, 0.75, 0.8, 0.9, 0.9]}
    )

    with caplog.at_level(logging.INFO, logger="zoobot_hf.data.rings"):
        kept, removed = keep_featured_face_on(galaxies)

    assert kept["id_str"][:] == ["g0", "g3"]
    assert removed == 4
    assert "Kept the galaxies featured and face-on: 2 of 6; 4 removed." in caplog.messages


def test_volunteers_who_agree_make_labels_and_the_others_are_counted(caplog):
    galaxies = make_votes(**{RING_FRACTION_COLUMN: [0.26, 0.25, 0.05, 0.04, 0.0, NAN, None]})

    with caplog.at_level(logging.INFO, logger="zoobot_hf.data.rings"):
        labelled, removed = label_rings_by_votes(galaxies)

    assert labelled["id_str"][:] == ["g0", "g3", "g4"]
    assert labelled["label"][:] == [1, 0, 0]
    assert labelled.features["label"].names == ["not ring", "ring"]
    assert removed == 4
    assert "Kept the galaxies clearly with or without a ring: 3 of 7; 4 removed." in caplog.messages


def test_columns_can_have_other_names_and_a_miss_lists_what_is_there():
    galaxies = make_votes(featured=[0.5], face_on=[0.8], ring=[0.5])

    assert keep_featured_face_on(galaxies, featured_column="featured", face_on_column="face_on").removed == 0
    assert label_rings_by_votes(galaxies, ring_fraction_column="ring").removed == 0
    with pytest.raises(CatalogError, match=r"no column 'smooth.*'; its columns are 'id_str', 'featured', 'face_on'"):
        keep_featured_face_on(galaxies)
    with pytest.raises(CatalogError, match="no column 'rare-features_ring_fraction'; its columns are 'id_str'"):
        label_rings_by_votes(galaxies)


def test_the_whole_rule_labels_cuts_and_splits(tmp_path):
    make_vote_catalog(tmp_path, 80)

    splits = load_rings_by_votes(tmp_path, seed=3)

    # 20 rings, 20 undecided; of the 40 without a ring the last two are not featured.
    assert [np.bincount(split["label"]).tolist() for split in splits.values()] == [[26, 14], [4, 2], [8, 4]]
    assert splits["test"][0]["image"].size == (4, 4)


def test_the_whole_rule_respects_the_splits_of_the_hub(monkeypatch):
    def make_split(first):
        votes = {FEATURED_COLUMN: [0.9] * 40, FACE_ON_COLUMN: [0.9] * 40, RING_FRACTION_COLUMN: [0.5, 0.0] * 20}
        names = [f"g{first + row}" for row in range(40)]
        split = datasets.Dataset.from_dict({"id_str": names, "image": [None] * 40, **votes})
        return split.cast_column("image", datasets.Image())

    asked = []

    def load_dataset(path, *, name, revision):
        asked.append(name)
        return datasets.DatasetDict(train=make_split(0), test=make_split(40))

    monkeypatch.setattr(dataset_module.datasets, "load_dataset", load_dataset)
    splits = load_rings_by_votes("mwalmsley/gz_rings")

    assert asked == ["regression"]
    assert splits["test"]["id_str"][:] == [f"g{row}" for row in range(40, 80)]
    assert [np.bincount(split["label"]).tolist() for split in splits.values()] == [[18, 18], [2, 2], [20, 20]]


@pytest.mark.skipif(not RINGS.exists(), reason="needs ../shared/data/rings, which is not part of the project")
def test_the_ring_galaxies_pass_the_cut_and_are_split():
    splits = load_rings(RINGS, keep_columns=[FEATURED_COLUMN, FACE_ON_COLUMN])

    assert [np.bincount(split["label"]).tolist() for split in splits.values()] == [[164, 164], [24, 24], [47, 47]]
    assert keep_featured_face_on(splits["train"]).removed == 0
