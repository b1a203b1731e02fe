"""Catalogs of any size in pieces of their rows: what `read_galaxies` gives, without holding all of it.

Tar archives and Hub datasets are catalogs too, whose pieces say where in them the images are.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from zoobot_hf.data.catalog import (
    CATALOG_FORMATS,
    CatalogError,
    check_columns,
    describe,
    find_catalog,
    read_csv_header,
    read_galaxies,
    read_galaxy_names,
    read_names,
)
from zoobot_hf.data.dataset import HUB_IDENTIFIER

from .archives import attach_member_reader, read_archive
from .galaxies import Row
from .hub_datasets import HubDataset, attach_images, pin_revision, read_hub_dataset

NEEDED = ["id_str", "file_loc"]
ROWS_AT_ONCE = 65536
WILDCARDS = frozenset("*?[")

ARCHIVE = ".tar"

Source = str | Path | pd.DataFrame | HubDataset


class CatalogFacts(NamedTuple):
    """What identifies a catalog.

    Attributes:
        galaxies: How many rows it has.
        fingerprint: A hash of every `id_str` and `file_loc` in their order, and of where in an archive or a Hub dataset
            the images are.
    """

    galaxies: int
    fingerprint: str


def find_source(source: Source) -> Source:
    """The source as the other functions take it: a Hub dataset at a commit, and any other as it is.

    Args:
        source: As in `read_pieces`; also "owner/name" of a Hub dataset, where no file or folder is called so.

    Raises:
        CatalogError: The Hub dataset isn't there, or the Hub can't be reached; or an object of another kind.
    """
    if isinstance(source, HubDataset):
        return pin_revision(source)
    if not isinstance(source, str | Path | pd.DataFrame):
        raise CatalogError(
            f"the catalog is a {type(source).__name__}; give a path, a pandas DataFrame with id_str and file_loc, or a "
            "HubDataset."
        )
    if isinstance(source, str) and names_hub_dataset(source):
        return pin_revision(HubDataset(source))
    return source


def names_hub_dataset(source: str) -> bool:
    """Whether this reads as the id of a Hub dataset, and nothing here is called so.

    Args:
        source: What a user gave as images.
    """
    is_file = source.lower().endswith((*CATALOG_FORMATS, ".gz", ARCHIVE))
    return HUB_IDENTIFIER.fullmatch(source) is not None and not is_file and not Path(source).exists()


def names_archive(source: str) -> bool:
    """Whether this reads as the name of a tar archive, also of a compressed one, which `read_archive` refuses.

    Args:
        source: What a user gave as images.
    """
    return source.lower().removesuffix(".gz").endswith(ARCHIVE)


def read_pieces(source: Source, *, rows: int = ROWS_AT_ONCE) -> Iterator[pd.DataFrame]:
    """The rows of a catalog in order, in pieces: `id_str` and `file_loc`, text, paths absolute.

    CSV and Parquet files are read piece by piece; FITS, VOTable and ECSV tables and the names in a folder of images
    are in memory as a whole. Of tar archives and Hub datasets further columns say where the images are, and
    `attach_readers` makes use of them.

    Args:
        source: A catalog file, a tar archive in WebDataset's layout, a folder with a catalog or images, a table, a
            pattern with `*`, `?` or `[` for many catalog files or archives, which are read in the order of their
            names; or a Hub dataset from `find_source`.
        rows: Most rows in a piece, and as many in each but the last.

    Raises:
        CatalogError: Nothing there, a file that can't be read, a pattern that matches catalogs and archives, a column
            that is missing, a name that is empty or floating-point, or what `read_archive` and `read_hub_dataset`
            refuse.
    """
    buffer: list[pd.DataFrame] = []
    held = 0
    for part in _read_parts(source):
        buffer.append(part)
        held += len(part)
        if held >= rows:
            joined = pd.concat(buffer, ignore_index=True)
            whole = held - held % rows
            for start in range(0, whole, rows):
                yield joined.iloc[start : start + rows].reset_index(drop=True)
            buffer, held = [joined.iloc[whole:]], held - whole
    if held:
        yield pd.concat(buffer, ignore_index=True)


def attach_readers(rows: Iterable[Row | None]) -> Iterator[Row | None]:
    """The rows, those of tar archives and Hub datasets with `read`, which gives the content of the image's file.

    Args:
        rows: Of the pieces of one source, in order; None stays None.

    Raises:
        CatalogError: The Hub can't be reached any more.
    """
    remaining = iter(rows)
    before: list[Row | None] = []
    for row in remaining:
        before.append(row)
        if row is not None:
            break
    first = before[-1] if before else None
    everything = chain(before, remaining)
    if first is not None and "row_group" in first:
        yield from attach_images(everything)
    elif first is not None and "offset" in first:
        yield from (None if row is None else attach_member_reader(row) for row in everything)
    else:
        yield from everything


def check_catalog(source: Source) -> CatalogFacts:
    """What identifies a catalog, once it is known that all of it can be read and that its names are unique.

    Takes 8 bytes of memory for each galaxy.

    Args:
        source: As in `read_pieces`.

    Raises:
        CatalogError: As in `read_pieces`; no rows; or an `id_str` that is there twice.
    """
    digest, names = hashlib.sha256(), []
    for piece in read_pieces(source):
        digest.update(_hash_rows(piece).tobytes())
        names.append(_hash_rows(piece[["id_str"]]))
    if not names:
        raise CatalogError(f"catalog {_name(source)} has no rows; it needs one for each galaxy.")
    hashes = np.concatenate(names)
    _check_names_are_unique(source, hashes)
    return CatalogFacts(len(hashes), digest.hexdigest())


def name_of(source: Source) -> str:
    """What a manifest calls a source.

    Args:
        source: As in `read_pieces`.
    """
    if isinstance(source, pd.DataFrame):
        return "a table"
    if isinstance(source, HubDataset):
        parts = [source.name, source.configuration, source.split]
        return f"{' '.join(part for part in parts if part)} at {source.revision}"
    return str(source)


def fingerprint_rows(piece: pd.DataFrame) -> str:
    """A hash of the rows in their order, as in `CatalogFacts`.

    Args:
        piece: From `read_pieces`.
    """
    return hashlib.sha256(_hash_rows(piece).tobytes()).hexdigest()


def _read_parts(source: Source) -> Iterator[pd.DataFrame]:
    if isinstance(source, pd.DataFrame):
        yield _as_rows(source, path=Path.cwd() / "table")
        return
    if isinstance(source, HubDataset):
        for piece in read_hub_dataset(source):
            yield piece.assign(id_str=read_names(piece["id_str"], source=f"a part of {source.name}"))
        return
    for path in _find_files(source):
        suffix = path.suffix.lower()
        try:
            if path.is_file() and suffix == ".parquet":
                yield from (_as_rows(part, path=path) for part in _parquet_parts(path))
            elif path.is_file() and path.name.lower().removesuffix(".gz").endswith(".csv"):
                yield from (_as_rows(part, path=path) for part in _csv_parts(path))
            elif path.is_file() and names_archive(path.name):
                yield from read_archive(path, rows=ROWS_AT_ONCE)
            else:
                yield read_galaxies(path, images_must_exist=False)[NEEDED]
        except CatalogError:
            raise
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise CatalogError(
                f"catalog {path} can't be read: {reason}. Check that the file is whole, and that text is in UTF-8."
            ) from error


def _find_files(source: str | Path) -> list[Path]:
    path = Path(source).absolute()
    if path.is_dir():
        return [find_catalog(path) or path]
    if path.exists() or not WILDCARDS & set(str(source)):
        return [path]
    # Made absolute afterwards: the working directory may have a bracket in its name.
    found = [Path(name).absolute() for name in sorted(glob.glob(str(source), recursive=True))]
    if not found:
        raise CatalogError(f"no file matches {source}; give a catalog, a folder of images or another pattern.")
    if len({names_archive(path.name) for path in found}) > 1:
        raise CatalogError(f"{source} matches catalogs as well as tar archives; give a pattern that matches one kind.")
    return found


def _parquet_parts(path: Path) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(path) as file:
        check_columns(file.schema_arrow.names, needed=NEEDED, source=f"catalog {path}")
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=NEEDED):
            # What pandas has written says which columns are its index; to a catalog they are columns.
            yield batch.to_pandas(ignore_metadata=True)


def _csv_parts(path: Path) -> Iterator[pd.DataFrame]:
    check_columns(read_csv_header(path), needed=NEEDED, source=f"catalog {path}")
    # As they are written: a galaxy may be called "007", and one called "NA" is not missing. Without index_col=False, a
    # comma at the end of every row makes an index of the first column.
    with pd.read_csv(
        path, usecols=NEEDED, dtype=str, keep_default_na=False, index_col=False, chunksize=ROWS_AT_ONCE
    ) as parts:
        yield from parts


def _as_rows(part: pd.DataFrame, *, path: Path) -> pd.DataFrame:
    rows = read_galaxy_names(part, source=f"a part of catalog {path}").reset_index(drop=True)
    return rows.assign(file_loc=[os.path.join(path.parent, location) for location in rows["file_loc"]])


def _hash_rows(piece: pd.DataFrame) -> npt.NDArray[np.uint64]:
    return np.asarray(pd.util.hash_pandas_object(piece, index=False).to_numpy(), dtype=np.uint64)


def _check_names_are_unique(source: Source, hashes: npt.NDArray[np.uint64]) -> None:
    in_order = np.sort(hashes)
    suspects = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    if not len(suspects):
        return
    # Two names may share a hash; what they really are decides.
    counts: Counter[str] = Counter()
    for piece in read_pieces(source):
        counts.update(piece["id_str"][np.isin(_hash_rows(piece[["id_str"]]), suspects)])
    duplicates = [name for name, count in counts.items() if count > 1]
    if duplicates:
        raise CatalogError(
            f"{_name(source)} has the same 'id_str' more than once for {describe(duplicates)}; "
            "every galaxy needs a name of its own."
        )


def _name(source: Source) -> str:
    return "table" if isinstance(source, pd.DataFrame) else name_of(source)
