"""Balancing makes classes equal in training and remembers what they were in the sky."""

import datasets
import numpy as np
import pytest

from zoobot_hf.data.balance import balance_classes, measure_prevalence


def make_split(labels, *, names=("not ring", "ring")):
    features = {"id_str": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))}
    values = {"id_str": [f"g{row}" for row in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def test_prevalence_is_the_share_of_each_class():
    split = make_split([0, 0, 0, 1, 0], names=["not ring", "ring", "artifact"])

    assert measure_prevalence(split) == {"not ring": 0.8, "ring": 0.2, "artifact": 0.0}


def test_oversampling_repeats_the_smaller_class_evenly_and_keeps_every_galaxy():
    split = make_split([0] * 17 + [1] * 9)

    balanced, sky_prevalence, training_prevalence = balance_classes(split, seed=1, strategy="oversample")

    assert np.bincount(balanced["label"]).tolist() == [17, 17]
    names, counts = np.unique(balanced["id_str"], return_counts=True)
    assert set(names) == set(split["id_str"])
    assert sorted(counts) == [1] * 18 + [2] * 8
    assert sky_prevalence == {"not ring": 17 / 26, "ring": 9 / 26}
    assert training_prevalence == {"not ring": 0.5, "ring": 0.5}


def test_undersampling_keeps_as_many_as_the_smallest_class_has():
    split = make_split([0] * 10 + [1] * 4)

    balanced = balance_classes(split, seed=1, strategy="undersample")

    assert np.bincount(balanced.dataset["label"]).tolist() == [4, 4]
    assert len(set(balanced.dataset["id_str"])) == 8
    assert balanced.sky_prevalence["ring"] == 4 / 14
    assert balanced.training_prevalence["ring"] == 0.5


def test_an_absent_class_stays_absent():
    balanced = balance_classes(make_split([0, 0, 2], names=["a", "b", "c"]), seed=1, strategy="oversample")

    assert balanced.training_prevalence == {"a": 0.5, "b": 0.0, "c": 0.5}


def test_rows_are_shuffled_the_same_way_for_the_same_seed():
    split = make_split([0] * 30 + [1] * 10)

    first, again, other = (
        balance_classes(split, seed=seed, strategy="oversample").dataset["id_str"][:] for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other
    assert 0 < sum(balance_classes(split, seed=1, strategy="oversample").dataset["label"][:30]) < 30


def test_several_splits_are_refused():
    with pytest.raises(ValueError, match=r"DatasetDict with 'train'; balance the training split only: .*'train'"):
        balance_classes(datasets.DatasetDict(train=make_split([0, 1])), seed=1, strategy="oversample")


def test_an_unknown_strategy_lists_the_known():
    with pytest.raises(ValueError, match="strategy is 'smote'; it must be one of 'oversample', 'undersample'"):
        balance_classes(make_split([0, 1]), seed=1, strategy="smote")


def test_one_class_only_is_refused():
    with pytest.raises(ValueError, match="only galaxies of the class 'ring'"):
        balance_classes(make_split([1, 1]), seed=1, strategy="oversample")


@pytest.mark.parametrize(("column", "said"), [("label", "Value.*"), ("kind", "not there")])
def test_a_column_without_classes_is_refused(column, said):
    split = datasets.Dataset.from_dict({column: [0.5]})
    with pytest.raises(ValueError, match=f"'label' is {said} and no ClassLabel; the columns are '{column}'"):
        measure_prevalence(split)


def test_a_split_without_rows_is_refused():
    with pytest.raises(ValueError, match="split has no rows"):
        measure_prevalence(make_split([]))


@pytest.mark.parametrize("missing", [-1, None])
def test_labels_that_are_missing_have_no_share(missing):
    with pytest.raises(ValueError, match="1 of 3 rows of split have no label; add them or leave these rows out"):
        measure_prevalence(make_split([0, missing, 1]))
