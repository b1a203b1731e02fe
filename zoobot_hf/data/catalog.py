"""Catalogs: tables with a row per galaxy, read from any format that astronomers keep them in, checked, and written.

A catalog has a column `id_str`, the galaxy's name, and a column `file_loc`, where its image is. These are Galaxy Zoo's
own names. Whatever else is in the table is kept.
"""

import contextlib
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import numpy as np
import numpy.typing as npt
import pandas as pd
from astropy.io import fits
from astropy.table import Column, MaskedColumn, Table

logger = logging.getLogger(__name__)

CATALOG_FORMATS = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".fits": "fits",
    ".fit": "fits",
    ".vot": "votable",
    ".votable": "votable",
    ".xml": "votable",
    ".ecsv": "ascii.ecsv",
}
IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".webp",
    ".bmp",
    ".gif",
    *(fits_suffix + packed for fits_suffix in (".fits", ".fit", ".fts") for packed in ("", ".gz", ".bz2", ".fz")),
)
# What pandas, pyarrow and astropy raise for files that are damaged or not what their suffix says.
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    SyntaxError,
    ExpatError,
    fits.VerifyError,
    zlib.error,
)
# Where a column of a CSV file is text. Pandas has "None" as well, which a class may be called.
MISSING_TEXTS = ["", "#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"]
# VOTable has only some types of numbers, and astropy writes int8 to FITS as logicals.
_WIDER_TYPES = {
    "int8": "int16",
    "uint8": "int16",
    "uint16": "int32",
    "uint32": "int64",
    "uint64": "int64",
    "float16": "float32",
}
# How the names of files begin that are being written.
PARTIAL = ".partial-"
# The FITS Standard 4.0, sections 7.3.1 (TFIELDS) and 4.2.1 (text in a header, where a quote is written twice).
_MOST_FITS_COLUMNS, _LONGEST_FITS_NAME = 999, 68


class CatalogError(ValueError):
    """A catalog, a folder of images or its labels are not what they have to be; the message names what and where."""


def read_catalog(
    path: str | Path,
    *,
    label_column: str | None = None,
    images_must_exist: bool = True,
    needs_locations: bool = True,
) -> pd.DataFrame:
    """A checked catalog from a CSV, Parquet, FITS, VOTable or ECSV file.

    Args:
        path: The file. Its suffix says the format; `.gz` may follow it, except for Parquet.
        label_column: The column that has to have a label in every row, if labels are needed.
        images_must_exist: Whether an image that is not there is an error. A survey that lists its failures says no.
        needs_locations: Whether images are needed: a table without `file_loc` is an error. Otherwise `file_loc` is a
            column like any other.

    Returns:
        The file's rows in their order. `id_str` and `file_loc` are text; `file_loc` is absolute, and what was relative
        in the file is relative to the file's folder. The other columns are as they were, except that columns with
        several values per row, which some FITS tables have, and astropy's coordinates and times are left out. Whole
        numbers with missing ones among them are Int64. The index of a Parquet file is a column if it has a name. In a
        CSV file a class may be called "None", but not "NA", "NaN", "NULL" or "N/A", which are missing.

    Raises:
        CatalogError: The file is not there, has an unknown suffix or can't be read; a column is missing; there are no
            rows; an `id_str` is missing, floating-point or there twice; an image is not there; a label is missing.
    """
    path = Path(path).absolute()
    table = _read_table(path)
    names = ["id_str", "file_loc"] if needs_locations else ["id_str"]
    needed = [*names, *([label_column] if label_column else [])]
    check_columns(table.columns, needed=needed, source=f"catalog {path}", labels=[label_column])
    if table.empty:
        raise CatalogError(f"catalog {path} has no rows; it needs one for each galaxy.")
    table = table.reset_index(drop=True)
    table = table.assign(**{name: read_names(table[name], source=f"catalog {path}") for name in names})
    if needs_locations:
        table["file_loc"] = [os.path.join(path.parent, location) for location in table["file_loc"]]
    _check_identifiers_are_unique(table["id_str"], path=path)
    if images_must_exist and needs_locations:
        _check_images_exist(table, path=path)
    if label_column:
        check_labels_exist(table["id_str"], labels=table[label_column], column=label_column)
    return table


def read_image_folder(folder: str | Path, *, label_column: str | None = None) -> pd.DataFrame:
    """A catalog of every image below a folder.

    Args:
        folder: The folder. Hidden files and folders in it are passed over.
        label_column: The name of the column that says each image's class, if labels are needed. The class is the name
            of the subfolder of `folder` that the image is in.

    Returns:
        A row per image, sorted by path: `id_str` is the file's name without its suffix, `file_loc` the absolute path.

    Raises:
        CatalogError: There is no such folder or no image in it; two images have the same name; labels are needed and
            an image is in no subfolder.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CatalogError(f"folder {folder} does not exist; give a folder of images.")
    locations = sorted(_find_images(folder))
    if not locations:
        advice = ""
        if any(any(folder.rglob(f"*{suffix}")) for suffix in (".arrow", ".parquet")):
            advice = " If it is a saved dataset, push that to the Hub and give its id, or save its images as files."
        raise CatalogError(
            f"folder {folder} holds no images; their suffixes may be {', '.join(IMAGE_SUFFIXES)}.{advice}"
        )
    table = pd.DataFrame({"id_str": [_image_stem(location) for location in locations], "file_loc": locations})
    _check_identifiers_are_unique(table["id_str"], path=folder)
    if label_column:
        table[label_column] = _name_classes_after_subfolders(folder, locations=locations)
    return table


def read_galaxies(
    source: str | Path, *, label_column: str | None = None, images_must_exist: bool = True
) -> pd.DataFrame:
    """A catalog from whatever holds galaxies: a catalog file, a folder with a catalog, or a folder of images.

    Args:
        source: A catalog file; a folder that holds a file `catalog.csv`, `catalog.parquet`, `catalog.fits` (or another
            suffix that `read_catalog` knows; the one that `find_catalog` gives is read); or any other folder, which is
            every image in it.
        label_column: The column with the labels, if labels are needed; without a catalog, the name of the column that
            the subfolders' names go to.
        images_must_exist: As in `read_catalog`.

    Returns:
        What `read_catalog` or `read_image_folder` returns.

    Raises:
        CatalogError: There is nothing at `source`, or what `read_catalog` and `read_image_folder` refuse.
    """
    source = Path(source)
    if not source.exists():
        raise CatalogError(f"{source} does not exist; give a catalog file or a folder of images.")
    catalog_file = find_catalog(source) if source.is_dir() else source
    if catalog_file is None:
        return read_image_folder(source, label_column=label_column)
    return read_catalog(catalog_file, label_column=label_column, images_must_exist=images_must_exist)


def find_catalog(folder: Path) -> Path | None:
    """The catalog file in a folder, or None.

    Args:
        folder: Where to look; not below it.

    Returns:
        The first of `catalog.csv`, `catalog.parquet`, `catalog.fits` and so on, in the order of `CATALOG_FORMATS`;
        where there is none, one in any case, and after those one with `.gz`, which Parquet can't have.
    """
    plain = [f"catalog{suffix}" for suffix in CATALOG_FORMATS]
    known = [*plain, *(f"{name}.gz" for name in plain if name != "catalog.parquet")]
    there = [name for name in sorted(os.listdir(folder)) if name.lower() in known and (folder / name).is_file()]
    there.sort(key=lambda name: (name not in plain, known.index(name.lower())))
    return folder / there[0] if there else None


def write_catalog(table: pd.DataFrame, path: str | Path) -> None:
    """A table written to a file whole or not at all: a run that is killed leaves the old file.

    Args:
        table: Any table; its index is not written.
        path: Where to. The suffix says the format: those of `read_catalog`, not compressed.

    Raises:
        CatalogError: The suffix is unknown or says compressed; or what `check_columns_fit` refuses.
    """
    path = Path(path)
    file_format = _find_format_to_write(path)
    check_columns_fit(table.columns, path=path)
    with whole_file(path) as partial:
        if file_format == "csv":
            table.to_csv(partial, index=False, compression=None)  # whatever a link points to is called
        elif file_format == "parquet":
            table.to_parquet(partial, index=False)
        else:
            columns = {name: column_for_astropy(table[name], file_format=file_format) for name in table.columns}
            Table(columns).write(partial, format=file_format, overwrite=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes the file once all is written, and is gone where writing fails.

    Args:
        path: The file, or a link to it, which stays.
    """
    partial = _partial(path)
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path.resolve())  # where this fails, the error names the whole file, which stays


def check_catalog_can_be_written(path: str | Path) -> None:
    """Nothing, if `write_catalog` can write to a file: known before a long run, not at its end.

    Args:
        path: Where a table shall go. Nothing is left there.

    Raises:
        CatalogError: The suffix is unknown or says compressed; a folder has this name; the name is too long; or the
            file's folder is not there or can't be written to.
    """
    path = Path(path)
    _find_format_to_write(path)
    if path.is_dir():
        raise CatalogError(f"table {path} is a folder; give the name of a file.")
    partial = _partial(path)
    try:
        partial.touch()
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise CatalogError(
            f"table {path} can't be written to the folder {partial.parent}: {error.strerror}; make the folder, or "
            "choose one that you may write to, or a shorter name."
        ) from error


def check_columns_fit(names: Iterable[str], *, path: str | Path) -> None:
    """Nothing, if a file's format can hold columns of these names, which FITS can't always.

    Args:
        names: All of the table's columns.
        path: Where it shall go. The suffix says the format.

    Raises:
        CatalogError: It is FITS, and there are over 999 columns, or a name isn't ASCII or has over 68 characters.
    """
    columns = list(map(str, names))
    if CATALOG_FORMATS.get(Path(path).suffix.lower()) != "fits":
        return
    if len(columns) > _MOST_FITS_COLUMNS:
        raise CatalogError(
            f"table {path} has {len(columns)} columns, and FITS holds at most {_MOST_FITS_COLUMNS}; choose Parquet or "
            "VOTable."
        )
    for name in columns:
        if not name.isascii() or not name.isprintable() or len(name.replace("'", "''")) > _LONGEST_FITS_NAME:
            raise CatalogError(
                f"table {path} has a column {name!r}, and in FITS a name has at most {_LONGEST_FITS_NAME} characters, "
                "all of them ASCII; choose Parquet or VOTable, or rename it."
            )


def check_columns(
    names: Iterable[str], *, needed: Sequence[str], source: str, labels: Sequence[str | None] = ()
) -> None:
    """Nothing, if the columns that are needed are among those there are, once each.

    Args:
        names: The columns there are.
        needed: Those that have to be.
        source: What has the columns, for the message: "catalog galaxies.csv".
        labels: Which of them a label_column names; the message says so where one is missing.

    Raises:
        CatalogError: One is missing, or there twice.
    """
    there = list(names)
    twice = [name for name in needed if there.count(name) > 1]
    if twice:
        raise CatalogError(f"{source} has more than one column {quote(twice)}; keep one of each name.")
    missing = [name for name in needed if name not in there]
    if missing:
        advice = ", or say which it is: that of the labels is label_column" if set(missing) & set(labels) else ""
        raise CatalogError(
            f"{source} has no column {quote(missing)}; its columns are {quote(there)}. Rename a column{advice}."
        )


def check_labels_exist(identifiers: pd.Series, *, labels: pd.Series, column: str) -> None:
    """Nothing, if every galaxy has a label.

    Args:
        identifiers: The galaxies' `id_str`.
        labels: Their labels, in the same order. NaN, None, masked and empty text are missing.
        column: Where the labels come from, for the message.

    Raises:
        CatalogError: A label is missing.
    """
    missing = labels.isna() | (labels.astype(str).str.strip() == "")
    if missing.any():
        raise CatalogError(
            f"column {column!r} has no label for {describe(identifiers[missing.to_numpy()])}; "
            "add the labels or leave these galaxies out."
        )


def quote(names: Iterable[object]) -> str:
    """Names for an error message: `'a', 'b'`.

    Args:
        names: What to list.
    """
    return ", ".join(repr(name) for name in names)


def describe(values: Iterable[str]) -> str:
    """A list for an error message: the first five values, and how many there are.

    Args:
        values: What to list; at least one.

    Returns:
        For example `7 galaxies: 'a', 'b', 'c', 'd', 'e', ...`.
    """
    names = list(values)
    noun = "galaxy" if len(names) == 1 else "galaxies"
    return f"{len(names)} {noun}: {quote(names[:5])}{', ...' if len(names) > 5 else ''}"


def read_names(column: pd.Series, *, source: str) -> list[str]:
    """A column of names as text without blanks around it.

    Args:
        column: Text, bytes, paths or integers.
        source: What the column is of, for the message: "catalog galaxies.csv".

    Raises:
        CatalogError: It holds floating-point numbers, or a name is missing.
    """
    if pd.api.types.is_float_dtype(column) and column.notna().all() and len(column):
        raise CatalogError(
            f"{source} has floating-point numbers in {column.name!r}, for example {column.iloc[0]}, "
            "which lose the last digits of a long name; save the column as text or integers."
        )
    values = zip(column.tolist(), column.isna().tolist(), strict=True)
    text = ["" if is_missing else _decode(value).strip() for value, is_missing in values]
    if "" in text:
        raise CatalogError(
            f"{source} has no {column.name!r} in {text.count('')} of {len(text)} rows, the first of them row "
            f"{text.index('') + 1}; fill the column or leave these rows out."
        )
    return text


def read_galaxy_names(table: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """The columns `id_str` and `file_loc` of a table that nothing has checked, as text; its index is kept.

    Args:
        table: From anywhere.
        source: What it is, for the message.

    Raises:
        CatalogError: It is no table of pandas, has no such column, or what `read_names` refuses.
    """
    if not isinstance(table, pd.DataFrame):
        raise CatalogError(f"{source} is a {type(table).__name__} and no table of pandas; read it with read_galaxies.")
    check_columns(table.columns, needed=["id_str", "file_loc"], source=source)
    columns = {name: read_names(table[name], source=source) for name in ("id_str", "file_loc")}
    return pd.DataFrame(columns, index=table.index, dtype=object)


def check_catalog_is_kept(catalog: Path, *, output: Path) -> None:
    """Nothing, if an output is another file than the catalog that it is made from.

    Args:
        catalog: The catalog's path.
        output: The output's.

    Raises:
        CatalogError: They are the same file.
    """
    if output.resolve() == catalog.resolve():
        raise CatalogError(f"output is {output}, the catalog itself, which would be lost; choose another file.")


def read_csv_header(path: Path) -> list[str]:
    """The names of a CSV file's columns.

    Args:
        path: The file.

    Raises:
        ValueError: The first row has more values than there are names. A comma at its end is no value.
    """
    beginning = pd.read_csv(path, nrows=1, dtype=str)
    # Of a value too many, pandas makes an index.
    if not isinstance(beginning.index, pd.RangeIndex) and beginning.iloc[:, -1].notna().any():
        raise ValueError("its first row has more values than it has names of columns; name every column")
    return list(beginning.columns)


def column_for_astropy(column: pd.Series, *, file_format: str) -> MaskedColumn | npt.NDArray[np.generic]:
    """A column as FITS and VOTable take it, with the same values.

    Numbers of a type that one of them lacks get a wider type, or are text where there is none. Missing whole numbers
    are masked. Booleans of which some are missing are text, because astropy writes a missing one to FITS as true.

    Args:
        column: Anything; what is neither a number nor a boolean becomes text.
        file_format: As in `CATALOG_FORMATS`.
    """
    missing = column.isna()
    if not pd.api.types.is_numeric_dtype(column) or (pd.api.types.is_bool_dtype(column) and missing.any()):
        return _text_for_astropy(column, file_format=file_format)
    if column.dtype in ("uint64", "UInt64") and column.max() > np.iinfo(np.int64).max:
        return _text_for_astropy(column, file_format=file_format)
    name = getattr(column.dtype, "numpy_dtype", column.dtype).name
    dtype: Any = np.dtype(_WIDER_TYPES.get(name, name))
    if missing.any() and dtype.kind == "i":
        # FITS writes the masked ones as the fill value. Astropy's own, 999999, may be another galaxy's number.
        return MaskedColumn(column.fillna(0).to_numpy(dtype), mask=missing, fill_value=np.iinfo(dtype).min)
    return np.asarray(column.to_numpy(dtype, na_value=np.nan) if dtype.kind == "f" else column.to_numpy(dtype))


def _partial(path: Path) -> Path:
    path = path.resolve()  # a link stays, and what it points to is written
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def _find_format(path: Path) -> str:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in CATALOG_FORMATS:
        raise CatalogError(
            f"catalog {path} has the suffix {suffix!r}; known are {', '.join(CATALOG_FORMATS)}. Rename the file after "
            "its format, or save it in one of these; of images give the folder, and a folder to write to has no dot."
        )
    return CATALOG_FORMATS[suffix]


def _find_format_to_write(path: Path) -> str:
    if path.suffix.lower() == ".gz":
        raise CatalogError(f"path {path} ends in .gz; catalogs are written uncompressed, so leave .gz away.")
    return _find_format(path)


def _read_table(path: Path) -> pd.DataFrame:
    file_format = _find_format(path)
    if not path.is_file():
        raise CatalogError(f"catalog {path} does not exist; give the path of a catalog file.")
    try:
        if file_format == "csv":
            return _read_csv(path)
        if file_format == "parquet":
            return _read_parquet(path)
        return _read_with_astropy(path, file_format=file_format)
    except _READ_ERRORS as error:
        raise CatalogError(
            f"catalog {path} can't be read as {file_format}: {str(error).rstrip('.') or type(error).__name__}. "
            "Check that the file is whole, that text is in UTF-8, that the catalog is the only table in it and that "
            "its suffix names its format."
        ) from error


def _read_csv(path: Path) -> pd.DataFrame:
    read_csv_header(path)
    # Without index_col=False, a comma at the end of every row makes an index of the first column.
    table = pd.read_csv(path, low_memory=False, index_col=False)
    # Read again, as they are written: a galaxy may be called "007" or "NA", and a class "None". Whole numbers with a
    # gap were read as floating-point ones, which lose the last digits of a long number.
    names = {"id_str", "file_loc"}
    text = {name for name in table.columns if pd.api.types.infer_dtype(table[name], skipna=True) == "string"} | names
    whole = {name for name in table.columns if _is_whole_with_gaps(table[name])} - names
    places = [place for place, name in enumerate(table.columns) if name in text | whole]
    missing = {name: [""] if name in names else MISSING_TEXTS for name in text | whole}
    written = pd.read_csv(path, usecols=places, dtype=str, keep_default_na=False, na_values=missing, index_col=False)
    written.columns = table.columns[places]
    for name in written.columns:
        table[name] = _read_whole_numbers(written[name], table[name]) if name in whole else written[name]
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path)
    # Here too pandas makes floating-point numbers of whole ones with a gap.
    suspects = [name for name in table.columns if _is_whole_with_gaps(table[name])]
    exact = pd.read_parquet(path, columns=suspects, dtype_backend="numpy_nullable")
    table = table.assign(**{name: exact[name].array for name in suspects if pd.api.types.is_integer_dtype(exact[name])})
    return table.reset_index([name for name in table.index.names if name not in (None, *table.columns)])


def _is_whole_with_gaps(column: pd.Series) -> bool:
    numbers = column.dropna()
    return pd.api.types.is_float_dtype(column) and 0 < len(numbers) < len(column) and bool((numbers % 1 == 0).all())


def _read_whole_numbers(written: pd.Series, numbers: pd.Series) -> pd.Series:
    """Int64 from what is written, or the numbers as they are where some are written as "3.0"."""
    digits = written.where(numbers.notna())
    if not digits.dropna().str.fullmatch(r"\s*[+-]?\d+\s*").all():
        return numbers
    return pd.to_numeric(digits, dtype_backend="numpy_nullable")


def _read_with_astropy(path: Path, *, file_format: str) -> pd.DataFrame:
    # VOTable identifiers can't hold the hyphens of Galaxy Zoo's column names; the names can.
    options = {"use_names_over_ids": True} if file_format == "votable" else {}
    table = Table.read(path, format=file_format, **options)
    others = [name for name in table.colnames if not _has_one_value_per_row(table[name])]
    if others:
        logger.info(
            "%s: columns of several values per row, coordinates or times are left out: %s", path, ", ".join(others)
        )
        table.remove_columns(others)
    if file_format == "fits":
        _mask_undefined_logicals(table, path)
    table.convert_bytestring_to_unicode()
    # Also turns the big-endian numbers of FITS into the machine's own, which pandas needs.
    catalog: pd.DataFrame = table.to_pandas(index=False)
    return catalog


def _has_one_value_per_row(column: Any) -> bool:
    # Coordinates and times are other classes. Arrays of various lengths are objects, as some texts are.
    if not isinstance(column, Column) or column.ndim > 1:
        return False
    return column.dtype != object or not any(isinstance(value, (np.ndarray, list)) for value in column)


def _mask_undefined_logicals(table: Table, path: Path) -> None:
    """FITS writes a logical value that is not known as a zero byte, which astropy takes for False."""
    logicals = [name for name in table.colnames if table[name].dtype == bool]
    if not logicals:
        return
    with fits.open(path) as extensions:
        stored = next(extension for extension in extensions if isinstance(extension, fits.BinTableHDU))
        letters = stored.data.view(np.ndarray)
        for name in logicals:
            is_undefined = letters[name] == 0
            if is_undefined.any():
                table[name] = MaskedColumn(table[name], mask=is_undefined)


def _decode(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _check_identifiers_are_unique(identifiers: pd.Series, *, path: Path) -> None:
    duplicates = identifiers[identifiers.duplicated()].unique()
    if len(duplicates):
        raise CatalogError(
            f"{path} has the same 'id_str' more than once for {describe(duplicates)}; "
            "every galaxy needs a name of its own."
        )


def _check_images_exist(table: pd.DataFrame, *, path: Path) -> None:
    is_there = table["file_loc"].map(os.path.isfile)
    if not is_there.all():
        raise CatalogError(
            f"catalog {path} names images that are not there, for {describe(table['file_loc'][~is_there])}. "
            "A relative 'file_loc' is relative to the catalog's folder."
        )


def _find_images(folder: Path) -> Iterator[str]:
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        # Hidden ones are a notebook's checkpoints and the "._" files that macOS leaves beside every image.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(directory, name)


def _image_stem(location: str) -> str:
    name = os.path.basename(location)
    suffix = next(suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix))
    return name[: -len(suffix)]


def _name_classes_after_subfolders(folder: Path, *, locations: list[str]) -> list[str]:
    parts = [Path(location).relative_to(folder).parts for location in locations]
    outside = [part[0] for part in parts if len(part) == 1]
    if outside:
        raise CatalogError(
            f"folder {folder} names classes by its subfolders, but these images are in none: {describe(outside)}. "
            "Put every image into the subfolder of its class, or add a catalog.csv with the labels."
        )
    return [part[0] for part in parts]


def _text_for_astropy(column: pd.Series, *, file_format: str) -> npt.NDArray[np.str_] | npt.NDArray[np.bytes_]:
    """Text of a fixed width, as FITS and VOTable don't take Python objects; what is missing becomes empty.

    For FITS, letters outside ASCII are encoded in UTF-8, which astropy reads there and refuses to write.
    """
    text = column.astype(object).where(column.notna(), "").astype(str)
    values = text.to_numpy(dtype=str)
    return np.char.encode(values, "utf-8") if file_format == "fits" and not text.map(str.isascii).all() else values
