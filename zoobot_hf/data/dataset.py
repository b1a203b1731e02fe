"""From a catalog, a folder or a Hub dataset to a `datasets.Dataset` with labels, and from there to its splits.

A dataset has the columns `id_str` and `image`, and `label` where labels were asked for: one value or, of votes, one
for each vote column of a decision tree. Images are decoded when a row is read and not before. Pillow decodes them; for
FITS images take the column without decoding, `dataset.cast_column("image", datasets.Image(decode=False))`, and hand
`open_image(row["image"]["path"])` to the image processor.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from zoobot_hf.data.catalog import (
    CATALOG_FORMATS,
    IMAGE_SUFFIXES,
    CatalogError,
    check_columns,
    check_labels_exist,
    describe,
    find_catalog,
    quote,
    read_galaxies,
    read_galaxy_names,
    read_image_folder,
    read_names,
)
from zoobot_hf.data.decision_tree import DecisionTree

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

# Zoobot 2.9.0 (galaxy-datasets 0.0.25, CatalogDataModule) splits 0.7, 0.1 and 0.2 for train, validation and test.
VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2

_SPLITS = ("train", "validation", "test")
# What the subfolders of a folder of images may be called, in any case: as `datasets` has it (SPLIT_KEYWORDS).
_SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# What catalogs of Galaxy Zoo add to the names of questions and of vote columns.
_DERIVED_FROM_VOTES = ("_fraction", "_debiased", "_total-votes", "_90pc-lower", "_90pc-upper", "_proportion-asked")
# As the Hub names the files of splits: train.parquet or train-00000-of-00001.parquet, but not test-predictions.parquet.
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLIT_OF_FOLDER)})(-\d.*)?\.parquet")
HUB_IDENTIFIER = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def catalog_to_dataset(
    catalog: pd.DataFrame,
    *,
    label_column: str | Sequence[str] | None,
    label_names: Sequence[str] | None = None,
    keep_columns: Sequence[str] = (),
    problem_type: ProblemType = "single_label_classification",
) -> datasets.Dataset:
    """A dataset with a row for each row of a catalog, in the same order.

    Args:
        catalog: A table as `read_catalog` returns it.
        label_column: Where the labels are, or None for a dataset without. Regression and multi-label classification
            take several columns, one for each output.
        label_names: The classes' names in the order of their numbers. Without them, a column X of 0 and 1 has the
            classes "not X" and "X", and any other has its values as names, sorted. Labels are matched to names by
            text, and else, if they are whole numbers, by position.
        keep_columns: Further columns to keep.
        problem_type: What the labels are: one class per galaxy; 0 or 1 for each of several columns; or numbers.

    Returns:
        A dataset with `id_str`, `image` (path only, decoded on access), the kept columns, and `label`: a `ClassLabel`,
        or for the other two problem types a list of float32 with a value per column, NaN where it is missing.

    Raises:
        CatalogError: It is no table of pandas; a column is not in it, or is kept that the dataset has anyway; a name is
            missing or floating-point; an image is of two galaxies; or a label is missing, not among `label_names`, or
            not a finite number where it has to be one.
        ValueError: `problem_type` is unknown, or asks for one label column and got several; or one is there twice.
    """
    columns = _list_columns(label_column, problem_type=problem_type)
    names = read_galaxy_names(catalog, source="the catalog")
    check_columns(catalog.columns, needed=[*columns, *keep_columns], source="the catalog", labels=columns)
    _check_kept(keep_columns, taken=["id_str", "file_loc", "image"])
    _check_images_are_of_one_galaxy(names)
    table = catalog[list(keep_columns)].assign(id_str=names["id_str"], image=names["file_loc"])
    table = table[["id_str", "image", *keep_columns]]
    features = datasets.Features.from_arrow_schema(pa.Schema.from_pandas(table, preserve_index=False))
    features |= {"id_str": datasets.Value("string"), "image": datasets.Image()}
    dataset = datasets.Dataset.from_pandas(table, features=datasets.Features(features), preserve_index=False)
    if not columns:
        return dataset
    # Of categories the values count, as in any other column, and neither their order nor those without a row.
    labels = catalog[columns].astype({name: object for name in columns if catalog[name].dtype == "category"})
    return _add_labels(dataset, labels=labels, label_names=label_names, problem_type=problem_type)


def load_galaxy_dataset(
    source: str | Path,
    *,
    label_column: str | Sequence[str] | None,
    label_names: Sequence[str] | None = None,
    keep_columns: Sequence[str] = (),
    problem_type: ProblemType = "single_label_classification",
    id_column: str | None = "id_str",
    image_column: str = "image",
    configuration: str | None = None,
    revision: str | None = None,
) -> datasets.Dataset | datasets.DatasetDict:
    """A dataset of galaxies from a catalog, a folder or the Hub.

    Args:
        source: A catalog file; a folder with a catalog; a folder of Parquet files as the Hub lays them out; a folder
            of images, perhaps with `train`, `validation` and `test` below it (or as `datasets` has it, such as `val`
            and `testing`, in any case); or the id of a dataset on the Hub.
        label_column: As in `catalog_to_dataset`. In a folder of images the subfolders name the classes.
        label_names: As in `catalog_to_dataset`. A Hub dataset's own class names are kept if this is None.
        keep_columns: Further columns to keep.
        problem_type: As in `catalog_to_dataset`.
        id_column: The galaxies' names in a Hub dataset; None numbers its rows.
        image_column: The images in a Hub dataset.
        configuration: Which configuration of a Hub dataset.
        revision: Which branch, tag or commit of a Hub dataset.

    Returns:
        A `Dataset` from a catalog or plain folder, and a `DatasetDict` where the source comes in splits; columns as in
        `catalog_to_dataset`.

    Raises:
        CatalogError: There is nothing at `source`, here or on the Hub; a column is missing, with the columns there
            are; a folder has no `train` among its splits, or other subfolders beside them; it has a table that may hold
            the labels and isn't called catalog; or what `read_galaxies` and `catalog_to_dataset` refuse.
    """
    columns = _list_columns(label_column, problem_type=problem_type)
    layout = find_layout(source)
    if columns and layout != "hub":
        _check_labels_are_in_no_other_table(Path(source))
    if layout == "galaxies":
        names_classes = columns and problem_type == "single_label_classification"
        return catalog_to_dataset(
            read_galaxies(source, label_column=columns[0] if names_classes else None),
            label_column=label_column,
            label_names=label_names,
            keep_columns=keep_columns,
            problem_type=problem_type,
        )
    if layout == "image splits":
        splits, labels = _read_image_splits(Path(source), columns=columns, keep_columns=keep_columns)
    else:
        hub_splits = _load_hub_dataset(str(source), configuration=configuration, revision=revision)
        labels = {name: _read_labels(split, columns=columns) for name, split in hub_splits.items()}
        splits = {
            name: _rename_columns(
                split, split_name=name, id_column=id_column, image_column=image_column, keep_columns=keep_columns
            )
            for name, split in hub_splits.items()
        }
    if columns:
        splits = _add_labels_to_splits(splits, labels=labels, label_names=label_names, problem_type=problem_type)
    return datasets.DatasetDict(splits)


def find_layout(source: str | Path) -> Literal["galaxies", "image splits", "hub"]:
    """How a source of galaxies is laid out.

    Args:
        source: As in `load_galaxy_dataset`.

    Returns:
        "galaxies" for a catalog or a plain folder of images; "image splits" for a folder of images whose subfolders
        are splits: one of them is `train`, or all are called like splits; "hub" for a Hub dataset, or a folder of
        Parquet files as the Hub lays them out.

    Raises:
        CatalogError: There is nothing at `source`, and it can't be on the Hub.
    """
    path = Path(source)
    if not path.exists():
        if not HUB_IDENTIFIER.fullmatch(str(source)):
            raise CatalogError(
                f"source {str(source)!r} is neither a file or folder that is there nor the id of a Hub dataset, which "
                "reads user/name; check the path."
            )
        return "hub"
    if path.is_file() or find_catalog(path):
        return "galaxies"
    if _holds_hub_dataset(path):
        return "hub"
    splits = [_SPLIT_OF_FOLDER.get(name.lower()) for name in _list_subfolders(path)]
    # A folder that is called test among those of classes is a class too.
    return "image splits" if "train" in splits or (splits and all(splits)) else "galaxies"


def votes_to_dataset(
    catalog: pd.DataFrame, tree: DecisionTree, *, keep_columns: Sequence[str] = ()
) -> datasets.Dataset:
    """A dataset with the votes on each row of a catalog, in the same order.

    Args:
        catalog: A table as `read_catalog` returns it, with the tree's vote columns: counts, 0 where a question was not
            asked, and empty where the votes are missing.
        tree: The survey's questions.
        keep_columns: Further columns to keep.

    Returns:
        A dataset with `id_str`, `image`, the kept columns and `label`: the votes by column, float32, in the tree's
        order; NaN where they are missing.

    Raises:
        CatalogError: A vote column is missing, or the tree doesn't have it; votes are negative, fractional or no
            numbers; a question has votes for some of its answers and misses others.
    """
    dataset = catalog_to_dataset(catalog, label_column=None, keep_columns=keep_columns)
    _check_vote_columns(catalog.columns, tree)
    return _add_votes(dataset, votes=catalog[tree.vote_columns], tree=tree)


def load_galaxy_votes(
    source: str | Path,
    tree: DecisionTree,
    *,
    keep_columns: Sequence[str] = (),
    id_column: str | None = "id_str",
    image_column: str = "image",
    configuration: str | None = None,
    revision: str | None = None,
) -> datasets.Dataset | datasets.DatasetDict:
    """A dataset of galaxies with volunteers' votes, from a catalog or the Hub.

    Args:
        source: A catalog file; a folder with a catalog; a folder of Parquet files as the Hub lays them out; or the id
            of a dataset on the Hub.
        tree: The survey's questions.
        keep_columns: Further columns to keep.
        id_column: The galaxies' names in a Hub dataset; None numbers its rows.
        image_column: The images in a Hub dataset.
        configuration: Which configuration of a Hub dataset.
        revision: Which branch, tag or commit of a Hub dataset.

    Returns:
        A `Dataset` from a catalog, and a `DatasetDict` where the source comes in splits; columns as in
        `votes_to_dataset`.

    Raises:
        CatalogError: There is nothing at `source`; it is a folder of images, without votes; or what `read_galaxies` and
            `votes_to_dataset` refuse.
    """
    layout = find_layout(source)
    if layout == "image splits" or (Path(source).is_dir() and layout == "galaxies" and not find_catalog(Path(source))):
        raise CatalogError(f"source {str(source)!r} is a folder of images without votes; add a catalog with them.")
    if layout == "galaxies":
        return votes_to_dataset(read_galaxies(source), tree, keep_columns=keep_columns)
    splits = {}
    for name, split in _load_hub_dataset(str(source), configuration=configuration, revision=revision).items():
        _check_vote_columns(split.column_names, tree)
        votes = split.select_columns(tree.vote_columns).to_pandas()
        dataset = _rename_columns(
            split, split_name=name, id_column=id_column, image_column=image_column, keep_columns=keep_columns
        )
        splits[name] = _add_votes(dataset, votes=votes, tree=tree)
    return datasets.DatasetDict(splits)


def read_votes(dataset: datasets.Dataset, tree: DecisionTree) -> np.ndarray:
    """The votes of a dataset, without decoding an image.

    Args:
        dataset: From `votes_to_dataset` or `load_galaxy_votes`.
        tree: The tree that it was made with.

    Returns:
        float32, (galaxies, answers), in the order of the dataset and of `tree.vote_columns`; NaN where missing.

    Raises:
        ValueError: The dataset has no votes, or those of another tree.
    """
    feature = dataset.features.get("label")
    columns = list(feature) if isinstance(feature, dict) else []
    if columns != tree.vote_columns:
        raise ValueError(
            f"the dataset's votes are {quote(columns[:5]) or 'not there'}, those of the decision tree {tree.name!r} "
            f"{quote(tree.vote_columns[:5])}, ...; load it with this tree, or use the one it was loaded with."
        )
    table = dataset.select_columns(["label"]).flatten().to_pandas()
    return np.asarray(table[[f"label.{column}" for column in columns]].to_numpy(dtype="float32"))


def split_dataset(
    dataset: datasets.Dataset | datasets.DatasetDict,
    *,
    seed: int,
    validation_fraction: float = VALIDATION_FRACTION,
    test_fraction: float = TEST_FRACTION,
    group_column: str = "id_str",
) -> datasets.DatasetDict:
    """Train, validation and test splits that share no galaxy and have the same share of every class.

    The defaults are Zoobot's. Of a few hundred galaxies they leave a validation split of a few dozen, whose loss is
    noisy; a larger fraction steadies it.

    Args:
        dataset: The galaxies, in one dataset or in splits. Splits that are there stay as they are; a missing validation
            or test split is cut from `train`. If `label` is a `ClassLabel`, the cut is stratified by it.
        seed: Decides, together with the groups' names, which galaxy goes where. The order of the rows does not matter.
        validation_fraction: The share of what is cut that goes to validation, between 0 and 1.
        test_fraction: The same for test. The two together are below 1.
        group_column: Rows with the same value here are the same galaxy and stay together.

    Returns:
        A `DatasetDict` with `train`, `validation` and `test`; rows in the order of `dataset`.

    Raises:
        ValueError: A fraction is out of range, a column or a label is missing, there is no `train` split to cut from, a
            galaxy is in two of the splits there are, all galaxies are of one class, or fewer of them than splits are
            there or of a class.
    """
    _check_fractions(validation_fraction=validation_fraction, test_fraction=test_fraction)
    splits = dict(dataset) if isinstance(dataset, datasets.DatasetDict) else {"train": dataset}
    if "train" not in splits:
        raise ValueError(f"dataset has the splits {quote(splits)} and no 'train'; rename the one to train on.")
    groups = {name: _read_groups(split, group_column=group_column) for name, split in splits.items()}
    _check_groups_are_disjoint(groups)
    fractions = {"validation": validation_fraction, "test": test_fraction}
    missing = {name: fraction for name, fraction in fractions.items() if name not in splits}
    if missing:
        rows = _assign_rows(splits["train"], groups=groups["train"], fractions=missing, seed=seed)
        splits |= {name: splits["train"].select(indices) for name, indices in rows.items()}
    others = [name for name in splits if name not in _SPLITS]
    return datasets.DatasetDict({name: splits[name] for name in [*_SPLITS, *others]})


def _list_columns(label_column: str | Sequence[str] | None, *, problem_type: ProblemType) -> list[str]:
    if problem_type not in get_args(ProblemType):
        raise ValueError(f"problem_type is {problem_type!r}; it must be one of {quote(get_args(ProblemType))}.")
    if label_column is None:
        return []
    columns = [label_column] if isinstance(label_column, str) else list(label_column)
    if len(set(columns)) < len(columns):
        raise ValueError(f"label_column is {columns}; name each column once.")
    if problem_type == "single_label_classification" and len(columns) != 1:
        raise ValueError(
            f"label_column is {columns}, but problem_type 'single_label_classification' takes one column; "
            "name one, or choose another problem_type."
        )
    return columns


def _check_labels_are_in_no_other_table(source: Path) -> None:
    """Refuses a folder whose subfolders would name the classes, while a table beside them is left unread."""
    if source.is_file() or find_catalog(source):
        return
    suffixes = tuple(suffix for suffix in CATALOG_FORMATS if suffix not in IMAGE_SUFFIXES)
    there = sorted(path.name for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    tables = [name for name in there if name.lower().removesuffix(".gz").endswith(suffixes)]
    if tables:
        raise CatalogError(
            f"folder {source} holds {quote(tables[:5])}{', ...' if len(tables) > 5 else ''} and no catalog.csv; if a "
            "table has the labels, give it instead of the folder or call it catalog, and if the subfolders are the "
            "classes, move tables away."
        )


def _holds_hub_dataset(folder: Path) -> bool:
    if any(folder.glob("data/*.parquet")) or any(_SPLIT_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return True
    # Configurations have folders of their own, and are in the card. Among images a Parquet file is something else, such
    # as predictions.
    card = folder / "README.md"
    if card.is_file() and re.search("^(configs|dataset_info):", card.read_text(encoding="utf-8"), re.MULTILINE):
        return True
    is_image = (file.name.lower().endswith(IMAGE_SUFFIXES) for file in folder.rglob("*"))
    return any(folder.rglob("*.parquet")) and not any(is_image)


def _read_image_splits(
    folder: Path, *, columns: list[str], keep_columns: Sequence[str]
) -> tuple[dict[str, datasets.Dataset], dict[str, pd.DataFrame]]:
    label_column = columns[0] if columns else None
    catalogs = {
        name: read_image_folder(path, label_column=label_column) for name, path in _find_split_folders(folder).items()
    }
    splits = {
        name: catalog_to_dataset(catalog, label_column=None, keep_columns=keep_columns)
        for name, catalog in catalogs.items()
    }
    return splits, {name: catalog[columns] for name, catalog in catalogs.items()}


def _list_subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find_split_folders(folder: Path) -> dict[str, Path]:
    names = _list_subfolders(folder)
    split_of = {name: _SPLIT_OF_FOLDER.get(name.lower()) for name in names}
    found = {split: folder / name for split in _SPLITS for name in names if split_of[name] == split}
    if len(found) < len(names) or "train" not in found:
        raise CatalogError(
            f"folder {folder} has splits, in the subfolders {quote(names)}; there has to be 'train', and beside it "
            "there may be one 'validation' and one 'test' and no others, so rename or move the subfolders."
        )
    return found


def _load_hub_dataset(source: str, *, configuration: str | None, revision: str | None) -> dict[str, datasets.Dataset]:
    try:
        return dict(datasets.load_dataset(source, name=configuration, revision=revision))
    except (OSError, ValueError) as error:
        what = "this folder" if Path(source).exists() else "nothing is at this path, and as a Hub dataset it"
        raise CatalogError(
            f"source {source!r}: {what} can't be loaded: {str(error).rstrip('.')}. "
            "Check the name, the configuration, the revision and the network."
        ) from error


def _read_labels(split: datasets.Dataset, *, columns: list[str]) -> pd.DataFrame:
    check_columns(split.column_names, needed=columns, source="the dataset", labels=columns)
    table: pd.DataFrame = split.select_columns(columns).to_pandas() if columns else pd.DataFrame()
    for column in columns:
        if isinstance(split.features[column], datasets.ClassLabel):
            # Categories keep the order of the names; the code -1 is a missing label in both worlds.
            codes = table[column].fillna(-1).astype("int64")
            names = pd.Index(split.features[column].names).str.strip()
            table[column] = pd.Categorical.from_codes(codes, categories=names)
    return table


def _rename_columns(
    split: datasets.Dataset, *, split_name: str, id_column: str | None, image_column: str, keep_columns: Sequence[str]
) -> datasets.Dataset:
    needed = [image_column, *keep_columns] if id_column is None else [id_column, image_column, *keep_columns]
    check_columns(split.column_names, needed=needed, source="the dataset")
    _check_kept(keep_columns, taken=["id_str", "image", id_column, image_column])
    if id_column is None:
        names = [f"{split_name}-{row}" for row in range(len(split))]
    else:
        names = read_names(split.select_columns([id_column]).to_pandas()[id_column], source=f"split {split_name!r}")
    dataset = split.select_columns([image_column, *keep_columns])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    if not isinstance(dataset.features["image"], datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image())
    features = datasets.Features(id_str=datasets.Value("string"))
    # Not add_column and then select_columns, whose order is lost with the next column that is added.
    named = datasets.Dataset.from_dict({"id_str": names}, features=features)
    return datasets.concatenate_datasets([named, dataset], split=split.split, axis=1)


def _add_labels_to_splits(
    splits: dict[str, datasets.Dataset],
    *,
    labels: dict[str, pd.DataFrame],
    label_names: Sequence[str] | None,
    problem_type: ProblemType,
) -> dict[str, datasets.Dataset]:
    if label_names is None and problem_type == "single_label_classification":
        # Named over all splits together: a rare class may be absent from one of them.
        label_names = _name_classes(pd.concat([table.iloc[:, 0] for table in labels.values()]))
    return {
        name: _add_labels(split, labels=labels[name], label_names=label_names, problem_type=problem_type)
        for name, split in splits.items()
    }


def _add_labels(
    dataset: datasets.Dataset,
    *,
    labels: pd.DataFrame,
    label_names: Sequence[str] | None,
    problem_type: ProblemType,
) -> datasets.Dataset:
    _check_kept(dataset.column_names, taken=["label"])
    identifiers = pd.Series(dataset["id_str"][:])
    if problem_type != "single_label_classification":
        numbers = _encode_numbers(identifiers, labels, zero_or_one=problem_type == "multi_label_classification")
        return dataset.add_column("label", list(numbers), feature=datasets.List(datasets.Value("float32")))
    column = labels.iloc[:, 0]
    check_labels_exist(identifiers, labels=column, column=str(column.name))
    names = _name_classes(column) if label_names is None else list(label_names)
    return dataset.add_column("label", _encode_classes(column, names=names), feature=datasets.ClassLabel(names=names))


def _check_vote_columns(there: Sequence[str] | pd.Index, tree: DecisionTree) -> None:
    missing = [column for column in tree.vote_columns if column not in there]
    if missing:
        raise CatalogError(
            f"no vote column {quote(missing[:10])}, {len(missing)} in all, of the decision tree {tree.name!r}; the "
            f"columns are {quote(there)}. Rename them, or choose the tree that they belong to."
        )
    # A column of the tree may itself begin with a question's name and "_", when that is another question's too.
    prefixes = tuple(f"{question.name}_" for question in tree.questions)
    known = set(tree.vote_columns)
    unknown = [
        name
        for name in map(str, there)
        if name.startswith(prefixes) and name not in known and not name.endswith(_DERIVED_FROM_VOTES)
    ]
    if unknown:
        raise CatalogError(
            f"the decision tree {tree.name!r} doesn't have the vote column {quote(unknown)}; add these answers to "
            "the tree, or, if they are none, rename or leave out these columns."
        )


def _add_votes(dataset: datasets.Dataset, *, votes: pd.DataFrame, tree: DecisionTree) -> datasets.Dataset:
    _check_kept(dataset.column_names, taken=["label"])
    counts = votes.apply(pd.to_numeric, errors="coerce").astype("float64")
    is_wrong = (counts.isna() & votes.notna()) | (counts < 0) | (counts % 1 != 0) & counts.notna()
    if is_wrong.to_numpy().any():
        names = is_wrong.columns[is_wrong.any()].tolist()
        galaxies = np.flatnonzero(is_wrong.any(axis=1))
        raise CatalogError(
            f"votes hold {votes[names[0]][is_wrong[names[0]]].tolist()[0]!r} in the column {quote(names[:5])}"
            f"{', ...' if len(names) > 5 else ''} for {describe(dataset.select(galaxies)['id_str'][:])}; give counts "
            "of volunteers, whole and not negative, and no fractions."
        )
    _check_questions_are_whole(dataset, counts=counts, tree=tree)
    feature = {column: datasets.Value("float32") for column in tree.vote_columns}
    table = pa.StructArray.from_arrays(
        [pa.array(counts[column].to_numpy(dtype="float32")) for column in tree.vote_columns], names=tree.vote_columns
    )
    labels = datasets.Dataset(
        pa.table({"label": table}), info=datasets.DatasetInfo(features=datasets.Features(label=feature))
    )
    return datasets.concatenate_datasets([dataset, labels], axis=1)


def _check_questions_are_whole(dataset: datasets.Dataset, *, counts: pd.DataFrame, tree: DecisionTree) -> None:
    for question in tree.questions:
        is_missing = counts[[answer.vote_column for answer in question.answers]].isna()
        is_partial = (is_missing.any(axis=1) & ~is_missing.all(axis=1)).to_numpy()
        if is_partial.any():
            raise CatalogError(
                f"the question {question.name!r} misses the votes in "
                f"{quote(is_missing.columns[is_missing[is_partial].any()])} and has others, for "
                f"{describe(dataset.select(np.flatnonzero(is_partial))['id_str'][:])}; give 0 where nobody chose an "
                "answer, and leave all of a question's votes out where they are not known."
            )


def _labels_as_text(labels: pd.Series) -> pd.Series:
    labels = labels.infer_objects()  # True and False, where rows with gaps among them were left out
    if pd.api.types.is_bool_dtype(labels):
        labels = labels.astype("int64")
    if pd.api.types.is_float_dtype(labels):
        if (labels % 1 != 0).any():
            raise CatalogError(
                f"column {labels.name!r} holds numbers such as {labels[labels % 1 != 0].iloc[0]}, which name no class; "
                "choose a column of classes, or problem_type 'regression'."
            )
        labels = labels.astype("int64")
    return labels.astype(str).str.strip()


def _name_classes(labels: pd.Series) -> list[str]:
    if isinstance(labels.dtype, pd.CategoricalDtype):  # a ClassLabel of the Hub
        return [str(name) for name in labels.cat.categories]
    values = set(_labels_as_text(labels.dropna()))
    if values <= {"0", "1"}:
        return [f"not {labels.name}", str(labels.name)]
    if all(value.isdecimal() for value in values):
        return sorted(values, key=int)
    return sorted(values)


def _encode_classes(labels: pd.Series, *, names: Sequence[str]) -> list[int]:
    texts = _labels_as_text(labels)
    numbers = {name: number for number, name in enumerate(names)}
    if not set(texts) <= set(numbers):
        by_position = {str(number): number for number in range(len(names))}
        numbers = by_position if set(texts) <= set(by_position) else numbers
    unknown = sorted(set(texts) - set(numbers))
    if unknown:
        raise CatalogError(
            f"column {labels.name!r} has the labels {quote(unknown[:5])}, {len(unknown)} in all, which are not among "
            f"label_names {quote(names)}; correct the labels or pass other label_names."
        )
    return [numbers[text] for text in texts]


def _encode_numbers(identifiers: pd.Series, labels: pd.DataFrame, *, zero_or_one: bool) -> np.ndarray:
    numbers = labels.astype(object).apply(pd.to_numeric, errors="coerce")  # of dates alone it would make numbers
    with np.errstate(over="ignore"):  # what doesn't fit becomes infinite, and is refused
        values = np.asarray(numbers.to_numpy(dtype="float32", na_value=np.nan))
    for place, column in enumerate(labels.columns):
        wrong = (numbers[column].isna() & labels[column].notna()).to_numpy() | np.isinf(values[:, place])
        if zero_or_one:
            wrong |= ~(numbers[column].isin([0, 1]) | numbers[column].isna()).to_numpy()
        if wrong.any():
            raise CatalogError(
                f"column {column!r} has the label {labels[column][wrong].tolist()[0]!r} for "
                f"{describe(identifiers[wrong])}; labels here must be "
                f"{'0 or 1' if zero_or_one else 'finite numbers of float32'}, or missing."
            )
    return values


def _check_images_are_of_one_galaxy(names: pd.DataFrame) -> None:
    # The same path may be written in several ways.
    pairs = names.assign(file_loc=names["file_loc"].map(os.path.normpath)).drop_duplicates()
    shared = pairs[pairs["file_loc"].duplicated(keep=False)].sort_values("file_loc", kind="stable")
    if len(shared):
        raise CatalogError(
            f"the catalog has the same 'file_loc' for {describe(shared['id_str'])}; a model would be tested on "
            "images that it was trained on, so keep one row for each image."
        )


def _check_kept(names: Sequence[str], *, taken: Sequence[str | None]) -> None:
    twice = [name for name in names if name in taken]
    if twice:
        raise CatalogError(
            f"keep_columns names {quote(twice)}, and the dataset has names, images and labels anyway, as 'id_str', "
            "'image' and 'label'; leave it out, or rename the column."
        )


def _check_fractions(**fractions: float) -> None:
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise ValueError(f"{name} is {fraction}; it must be between 0 and 1.")
    if sum(fractions.values()) >= 1:
        raise ValueError(f"{' and '.join(fractions)} add up to {sum(fractions.values())}; leave some for training.")


def _read_groups(split: datasets.Dataset, *, group_column: str) -> pd.Series:
    check_columns(split.column_names, needed=[group_column], source="the dataset")
    groups: pd.Series = split.select_columns([group_column]).to_pandas()[group_column]
    if groups.isna().any():
        raise ValueError(
            f"column {group_column!r} is empty in {groups.isna().sum()} of {len(groups)} rows, so that nothing says "
            "which of them are the same galaxy; fill it."
        )
    return groups.astype(str)


def _check_groups_are_disjoint(groups: Mapping[str, pd.Series]) -> None:
    names = list(groups)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            shared = sorted(set(groups[first]) & set(groups[second]))
            if shared:
                raise ValueError(
                    f"the splits {first!r} and {second!r} share {describe(shared)}; a model tested on what it was "
                    "trained on looks better than it is, so leave these out of one of the two."
                )


def _assign_rows(
    dataset: datasets.Dataset, *, groups: pd.Series, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    # One row per group, in the order of their names, so that the order of the dataset's rows plays no part.
    stratum_of_group = pd.Series(_read_strata(dataset, groups=groups), index=groups.to_numpy()).groupby(level=0).min()
    _check_strata(stratum_of_group, number_of_splits=len(fractions) + 1)
    generator = np.random.default_rng(seed)
    split_of_group = pd.Series("train", index=stratum_of_group.index)
    for _, members in stratum_of_group.groupby(stratum_of_group):
        names = generator.permutation(members.index.to_numpy(dtype=object))
        start = 0
        for split, stop in _find_stops(len(names), fractions=fractions).items():
            split_of_group[names[start:stop]] = split
            start = stop
    split_of_row = split_of_group[groups].to_numpy()
    return {split: np.flatnonzero(split_of_row == split) for split in ["train", *fractions]}


def _find_stops(count: int, *, fractions: Mapping[str, float]) -> dict[str, int]:
    stops = {}
    stop = 0
    for position, (split, fraction) in enumerate(fractions.items()):
        # At least one for this split, and one for each split after it and for train.
        largest = count - stop - (len(fractions) - position)
        stop += min(max(1, round(fraction * count)), largest)
        stops[split] = stop
    return stops


def _read_strata(dataset: datasets.Dataset, *, groups: pd.Series) -> list[str]:
    feature = dataset.features.get("label")
    if not isinstance(feature, datasets.ClassLabel):
        return ["" for _ in range(len(dataset))]
    labels = pd.Series(dataset["label"][:], dtype="float64")  # None becomes NaN
    check_labels_exist(groups, labels=labels.mask(labels < 0), column="label")
    return [feature.names[int(number)] for number in labels]


def _check_strata(stratum_of_group: pd.Series, *, number_of_splits: int) -> None:
    if len(stratum_of_group) < number_of_splits:
        raise ValueError(
            f"dataset has {len(stratum_of_group)} {'galaxy' if len(stratum_of_group) == 1 else 'galaxies'}, fewer than "
            f"the {number_of_splits} splits; add galaxies."
        )
    counts = stratum_of_group.value_counts()
    if len(counts) == 1 and counts.index[0] != "":
        raise ValueError(
            f"all {counts.iloc[0]} galaxies have the label {counts.index[0]!r}; add galaxies of another class."
        )
    if counts.min() < number_of_splits:
        raise ValueError(
            f"class {counts.idxmin()!r} has {counts.min()} {'galaxy' if counts.min() == 1 else 'galaxies'}, fewer than "
            f"the {number_of_splits} splits; add galaxies, or leave the class out."
        )
