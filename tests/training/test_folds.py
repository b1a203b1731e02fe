import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from zoobot_hf.training.folds import assign_folds, check_classes, group_near_duplicates

NAMES = [f"galaxy_{number:03d}" for number in range(103)]
LABELS = np.array([0] * 80 + [1] * 23)


def labelled(labels, names=None):
    features = Features({"id_str": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict({"id_str": names or NAMES[: len(labels)], "label": labels}, features=features)


def test_each_fold_has_the_same_share_of_each_class():
    folds = assign_folds(NAMES, LABELS, folds=5, seed=0)
    assert np.bincount(folds[LABELS == 0]).tolist() == [16] * 5
    assert sorted(np.bincount(folds[LABELS == 1])) == [4, 4, 5, 5, 5]


def test_folds_follow_the_names_and_the_seed_and_not_the_order_of_rows():
    folds = assign_folds(NAMES, LABELS, folds=5, seed=0)
    order = np.random.default_rng(0).permutation(len(NAMES))
    shuffled = assign_folds([NAMES[row] for row in order], LABELS[order], folds=5, seed=0)
    assert shuffled.tolist() == folds[order].tolist()
    assert assign_folds(NAMES, LABELS, folds=5, seed=1).tolist() != folds.tolist()


def test_near_duplicates_stay_in_one_fold():
    pairs = pd.DataFrame({"id_str": [NAMES[0], NAMES[1], NAMES[5]], "other_id_str": [NAMES[1], NAMES[90], NAMES[6]]})
    groups = group_near_duplicates(NAMES, pairs)
    assert groups[0] == groups[1] == groups[90]
    assert len(set(groups)) == len(NAMES) - 3
    folds = assign_folds(NAMES, LABELS, folds=5, seed=0, groups=groups)
    assert folds[0] == folds[1] == folds[90]
    assert folds[5] == folds[6]
    assert np.ptp(np.bincount(folds[LABELS == 1])) <= 1


def test_a_group_as_large_as_a_fold_is_a_fold():
    groups = np.r_[np.zeros(40, dtype=int), np.arange(1, 64)]
    for seed in range(5):
        folds = assign_folds(NAMES, LABELS, folds=2, seed=seed, groups=groups)
        assert np.bincount(folds[LABELS == 0]).tolist() == [40, 40]


@pytest.mark.parametrize(
    ("dataset", "folds", "message"),
    [
        (labelled([0] * 9 + [1] * 3), 5, "class 'yes' has 3 galaxies, fewer than the 5 folds; choose fewer folds"),
        (labelled([0] * 9), 5, "class 'yes' has 0 galaxies, fewer than the 5 folds"),
        (labelled([0, 1]), 1, "folds is 1; give at least 2"),
        (labelled([0, 1], names=["a", "a"]), 2, "id_str 'a' is there twice"),
        (labelled([0, 1]).remove_columns("label"), 2, "label is not there; folds need one class for each galaxy"),
    ],
)
def test_what_can_not_be_cut_into_folds_is_refused(dataset, folds, message):
    with pytest.raises(ValueError, match=message):
        check_classes(dataset, folds=folds)
