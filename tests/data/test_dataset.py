"""Datasets are labelled, loaded from anywhere, and split without leaks."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_trees import make_question

from zoobot_hf.data import dataset as dataset_module
from zoobot_hf.data.catalog import CatalogError, read_galaxies, write_catalog
from zoobot_hf.data.dataset import (
    catalog_to_dataset,
    load_galaxy_dataset,
    load_galaxy_votes,
    read_votes,
    split_dataset,
    votes_to_dataset,
)
from zoobot_hf.data.decision_tree import load_survey, load_tree

RINGS = Path(__file__).resolve().parents[2] / "../shared/data/rings"
CLASS_NAMES = ["not ring", "ring"]


def save_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def make_catalog(folder, count=6, **columns):
    for number in range(count):
        save_image(folder / f"{number}.png", value=number)
    return pd.DataFrame(
        {
            "id_str": [f"g{number}" for number in range(count)],
            "file_loc": [str(folder / f"{number}.png") for number in range(count)],
            **columns,
        }
    )


def make_dataset(labels, *, names=CLASS_NAMES, identifiers=None):
    features = {"id_str": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    identifiers = identifiers or [f"g{number:04}" for number in range(len(labels))]
    return datasets.Dataset.from_dict({"id_str": identifiers, "label": labels}, features=datasets.Features(features))


def identifiers_of(splits):
    return {name: list(split["id_str"]) for name, split in splits.items()}


# From a catalog


def test_zero_and_one_become_not_x_and_x(tmp_path):
    catalog = make_catalog(tmp_path, 3, ring=[1, 0, 1], mag=[17.0, 18.0, 19.0], ra=0.0)

    galaxies = catalog_to_dataset(catalog, label_column="ring", keep_columns=["mag"])

    assert galaxies.column_names == ["id_str", "image", "mag", "label"]
    assert galaxies.features["label"] == datasets.ClassLabel(names=CLASS_NAMES)
    assert galaxies.features["id_str"] == datasets.Value("string")
    assert galaxies["id_str"][:] == ["g0", "g1", "g2"]
    assert galaxies["label"][:] == [1, 0, 1]
    assert galaxies["mag"][:] == [17.0, 18.0, 19.0]


def test_names_of_an_unchecked_table_are_read_as_text(tmp_path):
    catalog = make_catalog(tmp_path, 2)
    paths = [Path(location) for location in catalog["file_loc"]]
    for names in ([1237648720693755918, 7], [b"1237648720693755918", b" 7"]):
        galaxies = catalog_to_dataset(catalog.assign(id_str=names, file_loc=paths), label_column=None)
        assert galaxies["id_str"][:] == ["1237648720693755918", "7"]
        assert [image.size for image in galaxies["image"]] == [(4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id_str": [1.237648720693756e18, 7.0]}, "the catalog has floating-point numbers in 'id_str'"),
        ({"id_str": ["a", None]}, "the catalog has no 'id_str' in 1 of 2 rows"),
        ({"file_loc": [None, "a.png"]}, "the catalog has no 'file_loc' in 1 of 2 rows"),
        ({"file_loc": ["a.png", "./a.png"]}, "the same 'file_loc' for 2 galaxies: 'g0', 'g1'; .* keep one row"),
    ],
)
def test_names_and_images_that_tell_no_galaxies_apart_are_refused(change, message, tmp_path):
    catalog = make_catalog(tmp_path, 2, **{name: [0, 0] for name in TREE.vote_columns}).assign(**change)
    with pytest.raises(CatalogError, match=message):
        catalog_to_dataset(catalog, label_column=None)
    with pytest.raises(CatalogError, match=message):
        votes_to_dataset(catalog, TREE)


def test_a_galaxy_may_have_several_rows_of_one_image(tmp_path):
    catalog = make_catalog(tmp_path, 2)
    assert catalog_to_dataset(pd.concat([catalog, catalog]), label_column=None)["id_str"][:] == ["g0", "g1"] * 2


def test_a_row_stays_one_whatever_the_index_of_the_table(tmp_path):
    catalog = make_catalog(tmp_path, 3, ring=[1, 0, 0], mag=[17.0, 18.0, 19.0])[::-1]
    galaxies = catalog_to_dataset(catalog, label_column="ring", keep_columns=["mag"])
    paths = [image["path"] for image in galaxies.cast_column("image", datasets.Image(decode=False))["image"]]
    assert [galaxies[name][:] for name in ("id_str", "mag", "label")] == [["g2", "g1", "g0"], [19, 18, 17], [0, 0, 1]]
    assert paths == catalog["file_loc"].tolist()


def test_what_is_no_table_is_refused():
    with pytest.raises(CatalogError, match="the catalog is a str and no table of pandas; read it with read_galaxies"):
        catalog_to_dataset("rings.csv", label_column="ring")


def test_images_are_decoded_only_when_they_are_read(tmp_path):
    catalog = make_catalog(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"not an image")

    galaxies = catalog_to_dataset(catalog, label_column=None)

    assert galaxies.column_names == ["id_str", "image"]
    assert galaxies[0]["image"].size == (4, 4)
    undecoded = galaxies.cast_column("image", datasets.Image(decode=False))
    assert undecoded[1]["image"] == {"bytes": None, "path": str(tmp_path / "1.png")}


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        ([True, False, True], CLASS_NAMES, [1, 0, 1]),
        ([1.0, 0.0, 1.0], CLASS_NAMES, [1, 0, 1]),
        (["1", "0", "1"], CLASS_NAMES, [1, 0, 1]),
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),
        (["spiral", "bar", "spiral"], ["bar", "spiral"], [1, 0, 1]),
        (pd.Series([True, False, True], dtype=object), ["not ring", "ring"], [1, 0, 1]),
        (pd.Categorical(["b ", "a", "b "], categories=["b ", "a", "c"]), ["a", "b"], [1, 0, 1]),
        (pd.Categorical([1, 0, 1]), CLASS_NAMES, [1, 0, 1]),
        (pd.Categorical([True, False, True]), CLASS_NAMES, [1, 0, 1]),
    ],
)
def test_labels_get_names(values, names, labels, tmp_path):
    galaxies = catalog_to_dataset(make_catalog(tmp_path, 3, ring=values), label_column="ring")

    assert galaxies.features["label"].names == names
    assert galaxies["label"][:] == labels


@pytest.mark.parametrize(("values", "labels"), [(["ring", "not ring"], [0, 1]), ([0, 1], [0, 1])])
def test_label_names_fix_names_and_order(values, labels, tmp_path):
    catalog = make_catalog(tmp_path, 2, kind=values)

    galaxies = catalog_to_dataset(catalog, label_column="kind", label_names=["ring", "not ring", "artifact"])

    assert galaxies.features["label"].names == ["ring", "not ring", "artifact"]
    assert galaxies["label"][:] == labels


def test_an_unknown_label_is_named_with_those_allowed(tmp_path):
    catalog = make_catalog(tmp_path, 3, kind=["ring", "rong", "not ring"])

    with pytest.raises(CatalogError, match=r"'kind' has the labels 'rong', 1 in all, .* 'not ring', 'ring'"):
        catalog_to_dataset(catalog, label_column="kind", label_names=CLASS_NAMES)


def test_a_missing_label_is_named(tmp_path):
    with pytest.raises(CatalogError, match="column 'ring' has no label for 1 galaxy: 'g1'"):
        catalog_to_dataset(make_catalog(tmp_path, 3, ring=[1, None, 0]), label_column="ring")


def test_fractions_are_no_classes(tmp_path):
    with pytest.raises(CatalogError, match=r"'bar' holds numbers such as 0\.25, .*'regression'"):
        catalog_to_dataset(make_catalog(tmp_path, 2, bar=[0.25, 1.0]), label_column="bar")


def test_regression_has_a_number_per_column_and_nan_where_it_is_missing(tmp_path):
    catalog = make_catalog(tmp_path, 2, bar=[0.25, None], arms=[2, 3])

    galaxies = catalog_to_dataset(catalog, label_column=["bar", "arms"], problem_type="regression")

    assert galaxies.features["label"] == datasets.List(datasets.Value("float32"))
    np.testing.assert_array_equal(galaxies["label"][:], [[0.25, 2], [np.nan, 3]])


def test_one_regression_column_is_a_list_of_one(tmp_path):
    galaxies = catalog_to_dataset(
        make_catalog(tmp_path, 2, bar=[0.25, 0.5]), label_column="bar", problem_type="regression"
    )

    assert galaxies["label"][:] == [[0.25], [0.5]]


def test_multi_label_classification_has_zero_one_or_nan_per_column(tmp_path):
    catalog = make_catalog(tmp_path, 3, bar=[1, 0, None], ring=[True, True, False])

    galaxies = catalog_to_dataset(catalog, label_column=["bar", "ring"], problem_type="multi_label_classification")

    np.testing.assert_array_equal(galaxies["label"][:], [[1, 1], [0, 1], [np.nan, 0]])


def test_numbers_that_are_none_are_named(tmp_path):
    catalog = make_catalog(tmp_path, 2, bar=["0.1", "many"], arms=[1, 2])

    with pytest.raises(
        CatalogError, match="column 'bar' has the label 'many' for 1 galaxy: 'g1'; labels here must be fin"
    ):
        catalog_to_dataset(catalog, label_column="bar", problem_type="regression")
    dated = catalog.assign(bar=pd.to_datetime(["2020-01-01", "2020-01-02"]))
    with pytest.raises(CatalogError, match=r"'bar' has the label .*2020.* for 2 galaxies: 'g0', 'g1'"):
        catalog_to_dataset(dated, label_column="bar", problem_type="regression")
    with pytest.raises(CatalogError, match="'arms' has the label 2 for 1 galaxy: 'g1'; labels here must be 0 or 1, or"):
        catalog_to_dataset(catalog, label_column="arms", problem_type="multi_label_classification")


@pytest.mark.parametrize("value", [-np.inf, 1e39, "inf"])
def test_numbers_that_are_not_finite_are_named_with_their_galaxies(value, tmp_path):
    catalog = make_catalog(tmp_path, 3, mass=pd.Series([10.5, None, value]))
    with pytest.raises(
        CatalogError, match=r"'mass' has the label .* for 1 galaxy: 'g2'; labels here must be finite num"
    ):
        catalog_to_dataset(catalog, label_column="mass", problem_type="regression")


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    with pytest.raises(CatalogError, match="no column 'ring', 'mag'; its columns are 'id_str', 'file_loc', 'bar'"):
        catalog_to_dataset(make_catalog(tmp_path, 1, bar=[1]), label_column="ring", keep_columns=["mag"])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    catalog = make_catalog(tmp_path, 2, bar=[0, 1])
    with pytest.raises(CatalogError, match="the catalog has more than one column 'bar'; keep one of each name"):
        catalog_to_dataset(pd.concat([catalog, catalog[["bar"]]], axis=1), label_column="bar")


@pytest.mark.parametrize("name", ["id_str", "file_loc", "label"])
def test_columns_that_the_dataset_has_anyway_are_not_kept(name, tmp_path):
    catalog = make_catalog(tmp_path, 2, label=[0, 1])
    with pytest.raises(
        CatalogError, match=f"keep_columns names '{name}', and the dataset has .*; leave it out, or ren"
    ):
        catalog_to_dataset(catalog, label_column="label", keep_columns=[name])
    assert catalog_to_dataset(catalog, label_column=None, keep_columns=["label"])["label"][:] == [0, 1]


def test_problem_types_are_checked(tmp_path):
    catalog = make_catalog(tmp_path, 1, bar=[1], ring=[1])

    with pytest.raises(ValueError, match=r"label_column is \['bar', 'bar'\]; name each column once"):
        catalog_to_dataset(catalog, label_column=["bar", "bar"], problem_type="regression")
    with pytest.raises(ValueError, match="problem_type is 'votes'; it must be one of 'single_label_classification'"):
        catalog_to_dataset(catalog, label_column="bar", problem_type="votes")
    with pytest.raises(ValueError, match=r"label_column is \['bar', 'ring'\], .* takes one column"):
        catalog_to_dataset(catalog, label_column=["bar", "ring"])


# Splitting


def test_splits_are_stratified_disjoint_and_complete():
    galaxies = make_dataset([0] * 200 + [1] * 50)

    splits = split_dataset(galaxies, seed=1)

    assert list(splits) == ["train", "validation", "test"]
    counts = {name: np.bincount(split["label"]).tolist() for name, split in splits.items()}
    assert counts == {"train": [140, 35], "validation": [20, 5], "test": [40, 10]}
    names = identifiers_of(splits)
    assert sorted(names["train"] + names["validation"] + names["test"]) == galaxies["id_str"][:]


def test_the_same_seed_gives_the_same_split_whatever_the_order_of_the_rows():
    galaxies = make_dataset([0] * 30 + [1] * 30)
    shuffled = galaxies.shuffle(seed=5)

    first = identifiers_of(split_dataset(galaxies, seed=1))
    again = identifiers_of(split_dataset(shuffled, seed=1))
    other = identifiers_of(split_dataset(galaxies, seed=2))

    assert {name: sorted(rows) for name, rows in again.items()} == first
    assert other["test"] != first["test"]


def test_rows_of_one_galaxy_stay_together():
    galaxies = make_dataset([0, 0, 0, 1, 1, 1] * 20, identifiers=[f"g{row // 3}" for row in range(120)])

    splits = split_dataset(galaxies, seed=1, validation_fraction=0.25, test_fraction=0.25)

    names = {name: set(rows) for name, rows in identifiers_of(splits).items()}
    assert {name: len(rows) for name, rows in names.items()} == {"train": 20, "validation": 10, "test": 10}
    assert len(set.union(*names.values())) == 40
    assert [len(splits[name]) for name in splits] == [60, 30, 30]


def test_another_column_can_group():
    galaxies = make_dataset([0, 1] * 30).add_column("field", [f"field {row // 10}" for row in range(60)])

    splits = split_dataset(galaxies.remove_columns("label"), seed=1, group_column="field")

    fields = [set(split["field"]) for split in splits.values()]
    assert [len(names) for names in fields] == [4, 1, 1]
    assert len(set.union(*fields)) == 6


def test_numbers_are_split_without_strata():
    galaxies = datasets.Dataset.from_dict({"id_str": [str(row) for row in range(10)], "label": [[0.5]] * 10})

    assert [len(split) for split in split_dataset(galaxies, seed=1).values()] == [7, 1, 2]


@pytest.mark.parametrize("test_fraction", [0.2, 0.85])
def test_a_class_of_three_has_one_galaxy_in_each_split(test_fraction):
    splits = split_dataset(make_dataset([0] * 60 + [1] * 3), seed=1, test_fraction=test_fraction)

    assert [split["label"][:].count(1) for split in splits.values()] == [1, 1, 1]


def test_existing_splits_are_respected():
    rows = make_dataset([0, 1] * 30)
    existing = {name: rows.select(range(start, start + 20)) for name, start in [("train", 0), ("test", 20)]}
    validation = rows.select(range(40, 60))

    whole = split_dataset(datasets.DatasetDict(existing | {"validation": validation}), seed=1)
    without_validation = split_dataset(datasets.DatasetDict(existing), seed=1)
    only_train = split_dataset(datasets.DatasetDict(train=rows), seed=1)

    assert identifiers_of(whole) == identifiers_of(existing | {"validation": validation})
    assert without_validation["test"]["id_str"][:] == existing["test"]["id_str"][:]
    cut = without_validation["train"]["id_str"][:] + without_validation["validation"]["id_str"][:]
    assert sorted(cut) == existing["train"]["id_str"][:]
    assert len(without_validation["validation"]) == 2
    assert identifiers_of(only_train) == identifiers_of(split_dataset(rows, seed=1))


def test_a_leak_between_existing_splits_is_named():
    rows = make_dataset([0, 1] * 10)

    with pytest.raises(ValueError, match=r"'train' and 'test' share 7 galaxies: 'g0003', 'g0004', .*, 'g0007', "):
        split_dataset(datasets.DatasetDict(train=rows.select(range(10)), test=rows.select(range(3, 20))), seed=1)


def test_splits_without_train_are_refused():
    with pytest.raises(ValueError, match="has the splits 'test' and no 'train'"):
        split_dataset(datasets.DatasetDict(test=make_dataset([0, 1])), seed=1)


@pytest.mark.parametrize("missing", [-1, None])
def test_labels_that_are_missing_are_no_class(missing):
    with pytest.raises(CatalogError, match="column 'label' has no label for 2 galaxies: 'g0000', 'g0003'"):
        split_dataset(make_dataset([missing, 0, 1] * 2), seed=1)


def test_one_class_only_is_refused():
    with pytest.raises(ValueError, match="all 9 galaxies have the label 'ring'; add galaxies of another class"):
        split_dataset(make_dataset([1] * 9), seed=1)


@pytest.mark.parametrize(("count", "said"), [(1, "1 galaxy"), (2, "2 galaxies")])
def test_a_class_with_fewer_galaxies_than_splits_is_named(count, said):
    with pytest.raises(ValueError, match=f"class 'ring' has {said}, fewer than the 3 splits"):
        split_dataset(make_dataset([0] * 20 + [1] * count), seed=1)


@pytest.mark.parametrize(("count", "said"), [(0, "0 galaxies"), (1, "1 galaxy"), (2, "2 galaxies")])
def test_fewer_galaxies_than_splits_are_refused(count, said):
    with pytest.raises(ValueError, match=f"dataset has {said}, fewer than the 3 splits; add galaxies."):
        split_dataset(make_dataset([0] * count).remove_columns("label"), seed=1)


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (0.0, 0.2, "validation_fraction is 0.0; it must be between 0 and 1"),
        (0.1, 1.5, "test_fraction is 1.5"),
        (0.5, 0.5, "add up to 1.0; leave some for training"),
    ],
)
def test_fractions_out_of_range_are_refused(validation, test, message):
    with pytest.raises(ValueError, match=message):
        split_dataset(make_dataset([0, 1] * 9), seed=1, validation_fraction=validation, test_fraction=test)


def test_a_missing_group_column_lists_the_columns():
    with pytest.raises(CatalogError, match="no column 'field'; its columns are 'id_str', 'label'"):
        split_dataset(make_dataset([0, 1] * 9), seed=1, group_column="field")


# Loading


def make_hub_split(labels, *, feature=None, first=0, **columns):
    pixels = np.zeros((4, 4, 3), np.uint8)
    features = {
        "iauname": datasets.Value("string"),
        "picture": datasets.Image(),
        "target": feature or datasets.Value("int64"),
    }
    values = {
        "iauname": [f"g{first + row}" for row in range(len(labels))],
        "picture": [pixels] * len(labels),
        "target": labels,
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch):
    """A function that puts a dataset on a pretended Hub, and returns the list of what was asked of it."""

    def serve(answer):
        asked = []

        def load_dataset(path, *, name, revision):
            asked.append((path, name, revision))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(dataset_module.datasets, "load_dataset", load_dataset)
        return asked

    return serve


HUB_COLUMNS = {"label_column": "target", "id_column": "iauname", "image_column": "picture"}


def test_a_hub_dataset_is_renamed_and_labelled(hub):
    asked = hub(datasets.DatasetDict(train=make_hub_split([0, 1, 1]), test=make_hub_split([0], first=3)))

    splits = load_galaxy_dataset(
        "user/rings", **HUB_COLUMNS, label_names=CLASS_NAMES, configuration="classification", revision="v1"
    )

    assert asked == [("user/rings", "classification", "v1")]
    assert splits["train"].column_names == ["id_str", "image", "label"]
    assert splits["train"].features["label"].names == splits["test"].features["label"].names == CLASS_NAMES
    assert splits["train"]["label"][:] == [0, 1, 1]
    assert splits["test"]["id_str"][:] == ["g3"]
    assert splits["train"][0]["image"].size == (4, 4)


@pytest.mark.parametrize("name", ["iauname", "picture"])
def test_columns_of_the_hub_that_are_renamed_are_not_kept(name, hub):
    hub(datasets.DatasetDict(train=make_hub_split([0, 1])))
    with pytest.raises(CatalogError, match=f"keep_columns names '{name}', and the dataset has"):
        load_galaxy_dataset("user/rings", **HUB_COLUMNS, keep_columns=[name])


def test_names_of_the_hub_have_no_blanks_around_them_as_in_predictions(hub):
    split = make_hub_split([0, 1]).remove_columns("iauname").add_column("iauname", ["g0 ", " g1"])
    hub(datasets.DatasetDict(train=split))
    assert load_galaxy_dataset("user/rings", **HUB_COLUMNS)["train"]["id_str"][:] == ["g0", "g1"]


def test_class_names_of_the_hub_are_kept_in_their_order(hub):
    feature = datasets.ClassLabel(names=["ring ", "not ring"])
    hub(datasets.DatasetDict(train=make_hub_split([0, 1], feature=feature)))

    kept = load_galaxy_dataset("user/rings", **HUB_COLUMNS)["train"]
    reordered = load_galaxy_dataset("user/rings", **HUB_COLUMNS, label_names=CLASS_NAMES)["train"]

    assert kept.features["label"].names == ["ring", "not ring"]
    assert kept["label"][:] == [0, 1]
    assert reordered.features["label"].names == CLASS_NAMES
    assert reordered["label"][:] == [1, 0]


def test_classes_are_named_over_all_splits_together(hub):
    hub(datasets.DatasetDict(train=make_hub_split([0, 2]), test=make_hub_split([5, 2], first=2)))

    splits = load_galaxy_dataset("user/kinds", **HUB_COLUMNS)

    assert splits["test"].features["label"].names == ["0", "2", "5"]
    assert splits["test"]["label"][:] == [2, 1]


@pytest.mark.parametrize("missing", [-1, None])
def test_a_hub_label_that_is_missing_is_named(missing, hub):
    feature = datasets.ClassLabel(names=CLASS_NAMES)
    hub(datasets.DatasetDict(train=make_hub_split([0, missing, 1], feature=feature)))

    with pytest.raises(CatalogError, match="column 'target' has no label for 1 galaxy: 'g1'"):
        load_galaxy_dataset("user/rings", **HUB_COLUMNS)


def test_a_column_that_the_hub_does_not_have_lists_what_is_there(hub):
    hub(datasets.DatasetDict(train=make_hub_split([0, 1])))

    with pytest.raises(CatalogError, match="no column 'label'; its columns are 'iauname', 'picture', 'target'"):
        load_galaxy_dataset("user/rings", label_column="label")
    with pytest.raises(CatalogError, match="no column 'id_str', 'image'; its columns are 'iauname', 'picture'"):
        load_galaxy_dataset("user/rings", label_column="target")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([588017703996096547.0, 588017703996096554.0], "split 'train' has floating-point numbers in 'iauname'"),
        (["g0", None], "split 'train' has no 'iauname' in 1 of 2 rows, the first of them row 2"),
    ],
)
def test_names_that_tell_no_galaxies_apart_are_refused(names, message, hub):
    split = make_hub_split([0, 1]).remove_columns("iauname").add_column("iauname", names)
    hub(datasets.DatasetDict(train=split))
    with pytest.raises(CatalogError, match=message):
        load_galaxy_dataset("user/rings", **HUB_COLUMNS)


def test_a_group_that_is_missing_is_refused():
    dataset = datasets.Dataset.from_dict({"id_str": ["a", "b"], "label": [0, 1], "plate": ["p", None]})
    with pytest.raises(ValueError, match="column 'plate' is empty in 1 of 2 rows"):
        split_dataset(dataset, group_column="plate", seed=0)


def test_rows_without_names_are_numbered(hub):
    split = make_hub_split([0, 1])
    hub(datasets.DatasetDict(train=split, test=split))

    splits = load_galaxy_dataset("user/rings", label_column=None, id_column=None, image_column="picture")

    assert identifiers_of(splits) == {"train": ["train-0", "train-1"], "test": ["test-0", "test-1"]}


def test_a_hub_dataset_that_cannot_be_loaded_says_both_readings(hub):
    hub(ConnectionError("Couldn't reach 'user/rings' on the Hub"))

    with pytest.raises(
        CatalogError, match=r"'user/rings': .*nothing is at this path, and as a Hub dataset it .*Couldn't"
    ):
        load_galaxy_dataset("user/rings", label_column="label")


@pytest.mark.parametrize("source", ["/nowhere/rings", "../rings", "rings", "a/b/c"])
def test_what_is_neither_a_path_nor_an_id_is_refused(source):
    with pytest.raises(CatalogError, match=rf"'{source}' is neither a file or folder .* reads user/name"):
        load_galaxy_dataset(source, label_column="label")


def test_a_folder_in_the_layout_of_the_hub_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rings/data").mkdir(parents=True)
    make_hub_split([0, 1, 1]).to_parquet(tmp_path / "rings/data/train-00000-of-00001.parquet")
    make_hub_split([0], first=3).to_parquet(tmp_path / "rings/data/test-00000-of-00001.parquet")

    splits = load_galaxy_dataset(tmp_path / "rings", **HUB_COLUMNS)

    assert identifiers_of(splits) == {"train": ["g0", "g1", "g2"], "test": ["g3"]}
    assert splits["train"].features["label"].names == ["not target", "target"]
    assert splits["train"][0]["image"].size == (4, 4)
    with pytest.raises(CatalogError, match=r"folder can't be loaded: .*'classification' not found.*'default'"):
        load_galaxy_dataset(tmp_path / "rings", **HUB_COLUMNS, configuration="classification")


# On disk, where `datasets` keeps columns that are added apart from the others.
@pytest.mark.parametrize("names", [{}, {"iauname": "id_str"}, {"iauname": "id_str", "picture": "image"}])
def test_the_columns_of_a_hub_dataset_have_one_order(names, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    split = make_hub_split([0, 1]).add_column("mag", [17.0, 18.0]).rename_columns(names)
    (tmp_path / "rings").mkdir()
    split.to_parquet(tmp_path / "rings/train.parquet")
    columns = {"id_column": names.get("iauname", "iauname"), "image_column": names.get("picture", "picture")}
    unlabelled = load_galaxy_dataset(tmp_path / "rings", label_column=None, **columns)
    labelled = load_galaxy_dataset(tmp_path / "rings", label_column="target", **columns, keep_columns=["mag"])
    assert unlabelled["train"].column_names == ["id_str", "image"]
    assert labelled["train"].column_names == list(labelled["train"].features) == ["id_str", "image", "mag", "label"]


def test_a_configuration_of_the_hub_may_have_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rings/small").mkdir(parents=True)
    make_hub_split([0, 1, 1]).to_parquet(tmp_path / "rings/small/train-00000-of-00001.parquet")
    assert identifiers_of(load_galaxy_dataset(tmp_path / "rings", **HUB_COLUMNS)) == {"train": ["g0", "g1", "g2"]}


def test_a_folder_with_a_catalog_is_loaded(tmp_path):
    write_catalog(make_catalog(tmp_path, 3, ring=[1, 0, 1], mag=[1.0, 2.0, 3.0]), tmp_path / "catalog.csv")

    galaxies = load_galaxy_dataset(tmp_path, label_column="ring", keep_columns=["mag"])
    numbers = load_galaxy_dataset(tmp_path, label_column=["mag"], problem_type="regression")

    assert galaxies.features["label"].names == CLASS_NAMES
    assert galaxies["label"][:] == [1, 0, 1]
    assert numbers["label"][:] == [[1.0], [2.0], [3.0]]


def test_a_folder_of_classes_is_loaded(tmp_path):
    save_image(tmp_path / "ring/1.png")
    save_image(tmp_path / "no ring/2.png")
    (tmp_path / "run.csv").mkdir()
    (tmp_path / "run.csv/predictions.parquet").touch()

    galaxies = load_galaxy_dataset(tmp_path, label_column="class")

    assert galaxies.features["label"].names == ["no ring", "ring"]
    assert galaxies["id_str"][:] == ["2", "1"]
    assert galaxies["label"][:] == [0, 1]


@pytest.mark.parametrize("name", ["galaxies.csv", "Galaxies.CSV.gz", "test-predictions.parquet"])
@pytest.mark.parametrize("folder", [".", "train"])
def test_subfolders_are_no_classes_beside_a_table_that_may_hold_the_labels(folder, name, tmp_path):
    save_image(tmp_path / folder / "north/1.png")
    save_image(tmp_path / folder / "south/2.png")
    (tmp_path / name).touch()
    message = f"holds '{name}' and no catalog.csv; if a table has the labels, give it .* classes, move tables away"
    with pytest.raises(CatalogError, match=message):
        load_galaxy_dataset(tmp_path, label_column="ring")
    load_galaxy_dataset(tmp_path, label_column=None)


def test_a_copy_of_a_hub_dataset_may_have_a_picture_in_it(tmp_path):
    save_image(tmp_path / "assets/example.png")
    save_image(tmp_path / "1.png")
    row = {"id_str": "a", "image": {"bytes": (tmp_path / "1.png").read_bytes(), "path": None}, "label": 1}
    features = datasets.Features(
        {"id_str": datasets.Value("string"), "image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)}
    )
    (tmp_path / "classification").mkdir()
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "classification/train-0.parquet")
    card = "---\nconfigs:\n- config_name: classification\n  data_files: classification/*\n---\n"
    (tmp_path / "README.md").write_text(card)
    galaxies = load_galaxy_dataset(tmp_path, label_column="label", configuration="classification")
    assert galaxies["train"]["id_str"][:] == ["a"]


@pytest.mark.parametrize("name", ["train.parquet", "train-00000-of-00001.parquet"])
def test_a_copy_of_a_hub_dataset_may_have_its_files_beside_a_picture(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_image(tmp_path / "rings/thumbnail.png")
    make_hub_split([0, 1]).to_parquet(tmp_path / "rings" / name)
    assert identifiers_of(load_galaxy_dataset(tmp_path / "rings", **HUB_COLUMNS)) == {"train": ["g0", "g1"]}


@pytest.mark.parametrize("name", ["test", "Val", "dev", "eval"])
def test_a_class_may_be_called_like_a_split(name, tmp_path):
    save_image(tmp_path / "ring/1.png")
    save_image(tmp_path / name / "2.png")
    assert set(load_galaxy_dataset(tmp_path, label_column="class").features["label"].names) == {"ring", name}
    assert load_galaxy_dataset(tmp_path, label_column=None).num_rows == 2


def test_a_folder_of_splits_keeps_them(tmp_path):
    for name in ["train/ring/1.png", "train/bar/2.png", "train/arms/3.png", "test/ring/4.png"]:
        save_image(tmp_path / name)

    splits = load_galaxy_dataset(tmp_path, label_column="class")
    unlabelled = load_galaxy_dataset(tmp_path, label_column=None)

    assert identifiers_of(splits) == {"train": ["3", "2", "1"], "test": ["4"]}
    assert splits["test"].features["label"].names == ["arms", "bar", "ring"]
    assert splits["test"]["label"][:] == [2]
    assert unlabelled["test"].column_names == ["id_str", "image"]


@pytest.mark.parametrize(
    "names", [("train", name, "test") for name in ("validation", "val", "valid", "dev")] + [("Training", "Val", "EVAL")]
)
def test_splits_have_several_names(names, tmp_path):
    for place, folder in enumerate(names):
        save_image(tmp_path / folder / f"ring/{place}.png")
    splits = load_galaxy_dataset(tmp_path, label_column="class")
    assert list(splits) == ["train", "validation", "test"]
    assert identifiers_of(splits) == {"train": ["0"], "validation": ["1"], "test": ["2"]}


@pytest.mark.parametrize("names", [["train", "val", "valid"], ["holdout", "train"], ["Test", "val"]])
def test_folders_that_are_no_splits_are_refused(names, tmp_path):
    for place, name in enumerate([*names, ".hidden"]):
        save_image(tmp_path / name / f"ring/{place}.png")
    with pytest.raises(CatalogError, match=f"the subfolders {', '.join(map(repr, names))}; there has to be 'train'"):
        load_galaxy_dataset(tmp_path, label_column="class")


@pytest.mark.skipif(not RINGS.exists(), reason="needs ../shared/data/rings, which is not part of the project")
def test_the_ring_galaxies_are_split():
    catalog = read_galaxies(RINGS, label_column="ring")

    splits = split_dataset(catalog_to_dataset(catalog, label_column="ring"), seed=42)

    assert [np.bincount(split["label"]).tolist() for split in splits.values()] == [[164, 164], [24, 24], [47, 47]]
    assert splits["test"][0]["image"].size == (424, 424)


# Votes ----------------------------------------------------------------------------------------------------------

TREE = load_tree(
    {
        "name": "small",
        "questions": [
            make_question("shape", "smooth", "disk"),
            make_question("bar", "yes", "no", asked_after=["shape_disk"]),
        ],
    }
)
VOTES = {"bar_no": [3, 0, 0], "bar_yes": [1, 0, 0], "shape_smooth": [5, 8, 2], "shape_disk": [4, 0, 0]}
IN_ORDER = [[5, 4, 1, 3], [8, 0, 0, 0], [2, 0, 0, 0]]


def catalog_of_votes(folder, **changes):
    return make_catalog(folder, 3, **{**VOTES, **changes})


def test_votes_become_a_label_by_column_in_the_trees_order(tmp_path):
    catalog = catalog_of_votes(tmp_path, redshift=[0.1, 0.2, 0.3], bar_yes_fraction=[0.25, 0.0, 0.0])
    dataset = votes_to_dataset(catalog, TREE, keep_columns=["redshift"])
    assert dataset.column_names == ["id_str", "image", "redshift", "label"]
    assert list(dataset.features["label"]) == TREE.vote_columns
    assert dataset.features["label"]["bar_no"] == datasets.Value("float32")
    assert [list(votes.values()) for votes in dataset["label"][:]] == IN_ORDER
    assert list(dataset[0]["label"]) == TREE.vote_columns
    votes = read_votes(dataset, TREE)
    assert votes.dtype == np.float32
    assert votes.tolist() == IN_ORDER


def test_votes_are_split_with_their_galaxies(tmp_path):
    catalog = make_catalog(tmp_path, 30, **{name: range(30) for name in VOTES})
    splits = split_dataset(votes_to_dataset(catalog, TREE), seed=0)
    for split in splits.values():
        assert read_votes(split, TREE)[:, 0].astype(int).tolist() == [int(name[1:]) for name in split["id_str"]]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_question_may_be_missing(missing, tmp_path):
    catalog = catalog_of_votes(tmp_path, bar_yes=[1, missing, 0], bar_no=[3, missing, 0])
    votes = read_votes(votes_to_dataset(catalog, TREE), TREE)
    assert np.isnan(votes).tolist() == [[False] * 4, [False, False, True, True], [False] * 4]


def test_integers_that_can_be_missing_are_read(tmp_path):
    catalog = catalog_of_votes(tmp_path)
    catalog["bar_yes"] = catalog["bar_no"] = pd.array([1, None, 0], dtype="Int64")
    assert np.isnan(read_votes(votes_to_dataset(catalog, TREE), TREE)).sum() == 2


def test_a_question_is_missing_as_a_whole(tmp_path):
    message = r"question 'bar' misses the votes in 'bar_yes' and has others, for 1 galaxy: 'g1'; give 0 where"
    with pytest.raises(CatalogError, match=message):
        votes_to_dataset(catalog_of_votes(tmp_path, bar_yes=[1, None, 0]), TREE)


@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), (0.25, "0.25"), ("many", "'many'")])
def test_votes_that_are_no_counts_are_named(value, shown, tmp_path):
    message = rf"votes hold .*{shown}.* in the column 'bar_yes' for 1 galaxy: 'g1'; give counts of volunteers"
    with pytest.raises(CatalogError, match=message):
        votes_to_dataset(catalog_of_votes(tmp_path, bar_yes=[1, value, 0]), TREE)


def test_a_missing_vote_column_is_named(tmp_path):
    catalog = catalog_of_votes(tmp_path).drop(columns="bar_no")
    with pytest.raises(CatalogError, match=r"no vote column 'bar_no', 1 in all, of the decision tree 'small'; the col"):
        votes_to_dataset(catalog, TREE)


def test_a_vote_column_that_the_tree_does_not_have_is_named(tmp_path):
    with pytest.raises(CatalogError, match="decision tree 'small' doesn't have the vote column 'bar_perhaps'; add"):
        votes_to_dataset(catalog_of_votes(tmp_path, bar_perhaps=[0, 0, 1]), TREE)


@pytest.mark.parametrize("column", ["bar_total-votes", "bar_yes_fraction", "bar_yes_debiased", "barred"])
def test_columns_that_are_derived_from_votes_are_none(column, tmp_path):
    dataset = votes_to_dataset(catalog_of_votes(tmp_path, **{column: [0.5, 0.5, 0.5]}), TREE)
    assert read_votes(dataset, TREE).tolist() == IN_ORDER


def test_votes_of_another_tree_are_not_read(tmp_path):
    dataset = votes_to_dataset(catalog_of_votes(tmp_path), TREE)
    with pytest.raises(
        ValueError, match=r"the dataset's votes are 'shape_smooth', .* those of the decision tree 'rings"
    ):
        read_votes(dataset, load_survey("rings"))
    with pytest.raises(ValueError, match="the dataset's votes are not there, those of the decision tree 'rings'"):
        read_votes(dataset.remove_columns("label"), load_survey("rings"))


def test_a_catalog_file_with_votes_is_loaded(tmp_path):
    catalog_of_votes(tmp_path).to_csv(tmp_path / "catalog.csv", index=False)
    for source in (tmp_path, tmp_path / "catalog.csv"):
        assert read_votes(load_galaxy_votes(source, TREE), TREE).tolist() == IN_ORDER


def test_a_folder_of_images_has_no_votes(tmp_path):
    save_image(tmp_path / "galaxy.png")
    with pytest.raises(CatalogError, match="is a folder of images without votes; add a catalog with them"):
        load_galaxy_votes(tmp_path, TREE)


def test_a_hub_dataset_with_votes_is_loaded(hub):
    split = make_hub_split([0, 0, 0])
    for name, votes in VOTES.items():
        split = split.add_column(name, votes)
    hub(datasets.DatasetDict(train=split, test=split))
    splits = load_galaxy_votes("user/votes", TREE, id_column="iauname", image_column="picture")
    assert set(splits) == {"train", "test"}
    assert splits["train"].column_names == ["id_str", "image", "label"]
    assert read_votes(splits["test"], TREE).tolist() == IN_ORDER
    with pytest.raises(CatalogError, match="no vote column 'ring_yes', 'ring_no', 2 in all"):
        load_galaxy_votes("user/votes", load_survey("rings"))
