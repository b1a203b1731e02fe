import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from zoobot_hf.evaluation.label_audit import find_doubtful_labels, find_near_duplicates


def test_confident_learning_by_hand():
    # Galaxies labelled 0 are called 0 with 0.7 on average, those labelled 1 are called 1 with 0.6.
    probability = np.array([0.1, 0.2, 0.6, 0.5, 0.8, 0.5])
    labels = np.array([0, 0, 0, 1, 1, 1])
    table = find_doubtful_labels(
        list("abcdef"), np.stack([1 - probability, probability], axis=1), labels, label_names=["no", "yes"]
    )
    # c is called 1 with 0.6, which reaches their average; d and f are below 0.7 for 0.
    assert table[table["is_doubtful"]]["id_str"].tolist() == ["c"]
    assert table.iloc[0][["label", "predicted_label"]].tolist() == ["no", "yes"]
    assert table.iloc[0][["probability_of_label", "margin"]].tolist() == pytest.approx([0.4, 0.2])
    assert table["id_str"].tolist() == ["c", "d", "f", "b", "e", "a"]


def test_swapped_labels_are_found():
    generator = np.random.default_rng(0)
    true = generator.integers(3, size=600)
    probabilities = softmax(generator.normal(size=(600, 3)) + 4 * np.eye(3)[true], axis=1)
    swapped = generator.choice(600, size=40, replace=False)
    labels = true.copy()
    labels[swapped] = (labels[swapped] + 1) % 3
    table = find_doubtful_labels(list(map(str, range(600))), probabilities, labels, label_names=["a", "b", "c"])
    first = set(table["id_str"].head(40))
    assert len(first & set(map(str, swapped))) >= 34
    assert table["is_doubtful"].sum() < 60


def test_an_audit_needs_what_belongs_together():
    with pytest.raises(ValueError, match=r"1 identifiers for 2 galaxies, 2 label_names for 2 classes, and \[2, 0\]"):
        find_doubtful_labels(["a"], [[0.5, 0.5], [0.5, 0.5]], [0, 0], label_names=["no", "yes"])


@pytest.fixture
def embeddings():
    """300 different galaxies, and two that are all but the same as the first two."""
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(300, 16)) * np.linspace(0.1, 10, 16) + 5
    return np.concatenate([vectors, vectors[:2] + 0.001 * np.array([[1], [2]])])


def test_near_duplicates_and_leaks_are_found(embeddings):
    splits = ["train"] * 300 + ["test", "train"]
    pairs = find_near_duplicates([f"g{i}" for i in range(302)], embeddings, splits)
    assert pairs[["id_str", "other_id_str"]].to_numpy().tolist() == [["g0", "g300"], ["g1", "g301"]]
    assert pairs["leaks"].tolist() == [True, False]
    assert pairs["distance"].is_monotonic_increasing
    assert pairs["distance"].max() < 0.05


def test_the_distance_is_in_units_of_the_usual_one(embeddings):
    columns = (embeddings - embeddings.mean(axis=0)) / embeddings.std(axis=0)
    distances = np.linalg.norm(columns[:, None] - columns, axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(axis=1)
    pairs = find_near_duplicates(range(302), embeddings, ["train"] * 302, ratio=0.9)
    assert pairs["distance"].iloc[0] == pytest.approx(distances[0, 300] / np.median(nearest), rel=1e-4)
    assert len(pairs) == (np.triu(distances)[np.triu_indices(302, 1)] < 0.9 * np.median(nearest)).sum()


def test_twins_are_found_where_every_galaxy_has_one():
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(100, 16))
    twice = np.concatenate([vectors, vectors + 0.02 * generator.normal(size=(100, 16))])
    pairs = find_near_duplicates(range(200), twice, ["train"] * 200)
    assert len(pairs) == 100
    assert (pairs["other_id_str"] - pairs["id_str"] == 100).all()


def test_rows_beyond_one_chunk_are_compared(embeddings, monkeypatch):
    splits = ["train"] * 302
    whole = find_near_duplicates(range(302), embeddings, splits)
    monkeypatch.setattr("zoobot_hf.evaluation.label_audit.CHUNK", 7)
    pd.testing.assert_frame_equal(find_near_duplicates(range(302), embeddings, splits), whole)


def test_identical_embeddings_are_duplicates():
    pairs = find_near_duplicates(["a", "b", "c"], [[1.0, 2.0], [1.0, 2.0], [3.0, 5.0]], ["train", "test", "train"])
    assert pairs[["id_str", "other_id_str", "distance"]].to_numpy().tolist() == [["a", "b", 0.0]]


def test_copies_have_no_distance_and_no_say_in_the_usual_one():
    vectors = np.random.default_rng(3).normal(size=(10, 16))
    twice = np.concatenate([vectors, vectors[:8]])
    columns = (twice - twice.mean(axis=0)) / twice.std(axis=0)
    distances = np.linalg.norm(columns[:, None] - columns, axis=2)
    others = np.sort(np.where(distances < 1e-9, np.inf, distances), axis=1)
    usual = np.median(others[8:10, 0])  # of the two without a copy
    pairs = find_near_duplicates(range(18), twice, ["train"] * 18, ratio=2)
    assert (pairs["distance"] == 0).sum() == 8
    assert pairs["distance"].iloc[8] == pytest.approx(others.min() / usual)


@pytest.mark.parametrize(
    ("embeddings", "ratio", "message"),
    [
        ([[1.0]], 0.2, "at least two galaxies"),
        ([[1.0], [np.nan]], 0.2, "embeddings are not finite"),
        ([[1.0], [2.0]], 0, "ratio is 0"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embeddings, ratio, message):
    with pytest.raises(ValueError, match=message):
        find_near_duplicates(["a"] * len(embeddings), embeddings, ["train"] * len(embeddings), ratio=ratio)
