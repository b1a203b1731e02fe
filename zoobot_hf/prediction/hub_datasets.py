"""Datasets on the Hub, read where they are: the galaxies' names first, and each image when its turn comes.

Only Parquet files will do, of which a part can be read without the rest; the Hub keeps every public dataset in such
files too, at the revision "refs/convert/parquet".
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

from zoobot_hf.data.catalog import CatalogError, quote
from zoobot_hf.data.images import UnreadableImageError, read_ahead

from .galaxies import Row


class HubDataset(NamedTuple):
    """Galaxies in a dataset on the Hub, whose images are inside of its Parquet files.

    Attributes:
        name: Its id, "owner/name".
        split: Which split; may be absent where there is only one.
        configuration: Which configuration; may be absent where there is only one, or a default.
        revision: Which branch, tag or commit.
        id_column: The galaxies' names; None numbers the rows.
        image_column: The images.
    """

    name: str
    split: str | None = None
    configuration: str | None = None
    revision: str | None = None
    id_column: str | None = "id_str"
    image_column: str = "image"


def pin_revision(source: HubDataset) -> HubDataset:
    """The dataset at the commit that its revision stands for now, so that a long run sees one state of it.

    Args:
        source: The dataset.

    Raises:
        CatalogError: It isn't there, or the Hub can't be reached.
    """
    with _clear_refusals(source):
        return source._replace(revision=HfApi().dataset_info(source.name, revision=source.revision).sha)


def read_hub_dataset(source: HubDataset) -> Iterator[pd.DataFrame]:
    """The rows of a dataset in order, a piece for each of its files: `id_str`, `file_loc`, and where the image is.

    Of Parquet files only the column of names is read.

    Args:
        source: From `pin_revision`.

    Raises:
        CatalogError: The dataset isn't there or not in Parquet files, or has no such split or column.
    """
    with _clear_refusals(source):
        split, paths = _find_files(source)
        first = 0
        for (piece,) in read_ahead(lambda path: _read_names(path, source), paths, batch_size=1):
            if source.id_column is None:
                piece["id_str"] = [f"{split}-{first + row}" for row in range(len(piece))]
            first += len(piece)
            yield piece


def attach_images(rows: Iterable[Row | None]) -> Iterator[Row | None]:
    """Rows with `read`, which gives the content of the image's file; the next are fetched while some are used.

    Args:
        rows: Of pieces from `read_hub_dataset`, in order; None stays None.

    Raises:
        CatalogError: The Hub can't be reached any more.
    """
    for (group,) in read_ahead(_fetch_images, _group(rows), batch_size=1):
        yield from group


def _find_files(source: HubDataset) -> tuple[str, list[str]]:
    """A split's name, and its files in their order."""
    builder = datasets.load_dataset_builder(source.name, name=source.configuration, revision=source.revision)
    if not isinstance(builder, Parquet):
        raise CatalogError(
            f"the dataset {source.name} is not in Parquet files, of which parts can be read; choose the revision "
            "refs/convert/parquet, where the Hub keeps a copy that is, or download it."
        )
    splits: dict[str, list[str]] = {str(name): list(files) for name, files in builder.config.data_files.items()}
    split = next(iter(splits)) if source.split is None and len(splits) == 1 else source.split
    if split not in splits:
        raise CatalogError(
            f"split is {split!r}, and the dataset {source.name} has {quote(splits)}; choose one of these."
        )
    return split, splits[split]


def _read_names(path: str, source: HubDataset) -> pd.DataFrame:
    with _clear_refusals(source), _open_parquet(path) as file:
        _check_columns(file.schema_arrow, source)
        names = None if source.id_column is None else file.read(columns=[source.id_column]).column(0).to_pandas()
        counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    places = [(group, row) for group, count in enumerate(counts) for row in range(count)]
    piece = pd.DataFrame(places, columns=["row_group", "row"])
    piece.insert(0, "id_str", names)
    piece.insert(1, "file_loc", [f"{path}#{row}" for row in range(len(piece))])
    return piece.assign(parquet_file=path, image_column=source.image_column)


def _check_columns(schema: pa.Schema, source: HubDataset) -> None:
    for name in filter(None, (source.id_column, source.image_column)):
        if name not in schema.names:
            raise CatalogError(
                f"the dataset {source.name} has no column {name!r}; its columns are "
                f"{quote(schema.names)}. Name another one, or number the rows with an id_column of None."
            )
    kind = schema.field(source.image_column).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise CatalogError(
            f"the dataset {source.name} has {kind} in the column {source.image_column!r}, and no files of images; name "
            "another one."
        )


def _group(rows: Iterable[Row | None]) -> Iterator[list[Row | None]]:
    """Consecutive rows that one part of a file holds, and what is empty between them."""
    group: list[Row | None] = []
    place: tuple[str, int] | None = None
    for row in rows:
        own = place if row is None else (row["parquet_file"], row["row_group"])
        if place is not None and own != place:
            yield group
            group = []
        group.append(row)
        place = own
    yield group


def _fetch_images(rows: list[Row | None]) -> list[Row | None]:
    wanted = [row for row in rows if row is not None]
    if not wanted:
        return rows
    path, number, column = (wanted[0][name] for name in ("parquet_file", "row_group", "image_column"))
    with _clear_refusals(path), _open_parquet(path) as file:
        images = file.read_row_group(number, columns=[column]).column(0)
    return [row if row is None else {**row, "read": _Content(images[row["row"]].as_py())} for row in rows]


class _Content:
    """Gives the content of an image's file, which is a row's value, or says why it can't."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> bytes:
        content = self.value["bytes"] if isinstance(self.value, dict) else self.value
        if content is None:
            raise UnreadableImageError("there is no image in this row of the dataset")
        return bytes(content)


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    # Exactly the ranges that are asked for: fsspec's usual cache reads 5 MB for a column of names.
    with HfFileSystem().open(path, "rb", cache_type="none") as stream, pq.ParquetFile(stream, pre_buffer=True) as file:
        yield file


@contextlib.contextmanager
def _clear_refusals(source: HubDataset | str) -> Iterator[None]:
    name = source if isinstance(source, str) else source.name
    try:
        yield
    except CatalogError:
        raise
    except (OSError, ValueError, HTTPError, OfflineModeIsEnabled, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CatalogError(
            f"{name} is not here, and as a dataset on the Hub it can't be read: {reason}. Check the name, the "
            "configuration, the revision and the network; what is finished stays."
        ) from error
