"""A finished survey's shards to one table that says what it holds."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy.io import fits, votable
from astropy.io.votable.tree import Info
from astropy.table import Table

from zoobot_hf.data.catalog import (
    CATALOG_FORMATS,
    CatalogError,
    check_catalog_is_kept,
    check_columns_fit,
    column_for_astropy,
    describe,
    quote,
    read_catalog,
    whole_file,
)
from zoobot_hf.evaluation.vote_tables import advanced_table, friendly_table
from zoobot_hf.models.configuration_zoobot import ZoobotConfig

from .runs import SurveyError, read_finished, read_manifest
from .shards import read_shard, shard_paths
from .tables import describe_column

TABLES = ("predictions", "friendly", "advanced")
FORMATS = ("parquet", "csv", "fits", "votable")


def merge_predictions(
    folder: str | Path, path: str | Path, *, table: str = "predictions", catalog: str | Path | None = None
) -> int:
    """How many galaxies went from a survey's folder to one table, in the catalog's order.

    Every column of a model has a description and, in a VOTable, a unit (FITS has no word for a number without one); the
    table names the model, the hash of its weights and that of the catalog. A CSV file has no room for these. Parquet
    and CSV files are written piece by piece, FITS and VOTable need all of the table in memory.

    Args:
        folder: What `predict_survey` finished.
        path: Where to. The suffix says the format: `.parquet`, `.csv`, `.fits` or `.vot`.
        table: "predictions" as they are; of a decision tree's model also "friendly" or "advanced": see
            `friendly_table` and `advanced_table`.
        catalog: A catalog whose columns are joined by `id_str`, as it has them, `file_loc` too, read whole, without
            their units and descriptions; none when absent.

    Raises:
        SurveyError: The folder holds no finished predictions, or a damaged file of them.
        CatalogError: The suffix is unknown; the catalog lacks a galaxy, or has columns of the same names; the path
            is the catalog's, or the survey's own; or what `check_columns_fit` refuses.
        ValueError: A table that isn't known, or that the model hasn't.
    """
    path, folder = Path(path), Path(folder)
    file_format = CATALOG_FORMATS.get(path.suffix.lower(), "")
    if file_format not in FORMATS:
        raise CatalogError(f"path {path} has the suffix {path.suffix!r}; choose .parquet, .csv, .fits or .vot.")
    if table not in TABLES:
        raise ValueError(f"table is {table!r}; choose one of {', '.join(TABLES)}.")
    if catalog is not None:
        check_catalog_is_kept(Path(catalog), output=path)
    own = {(folder / name).resolve() for name in ("failures.parquet", "predictions")}
    if own & {path.resolve(), path.resolve().parent}:
        raise CatalogError(f"path {path} is among the survey's own files; choose another name or folder.")
    if (read_manifest(folder) or {}).get("contents") == "embeddings":
        raise SurveyError(f"{folder} holds embeddings, which are Parquet files as they are: {folder / 'embeddings'}.")
    manifest = read_finished(folder, contents="predictions")
    joined = None
    if catalog is not None:
        joined = read_catalog(catalog, needs_locations=False).set_index("id_str")
    pieces = _read_pieces(folder, manifest, table=table, joined=joined)
    facts = {
        "MODEL": manifest["model"],
        "WEIGHTS": manifest["weights"],
        "CATALOG": manifest["catalog_fingerprint"],
        "PREVALEN": manifest["prevalence"],
    }
    with whole_file(path) as partial:
        if file_format == "parquet":
            return _write_parquet(pieces, partial, facts, joined=joined)
        if file_format == "csv":
            return _write_csv(pieces, partial)
        whole = pd.concat(list(pieces), ignore_index=True)
        check_columns_fit(whole.columns, path=path)
        _write_with_astropy(whole, partial, facts, joined=joined, file_format=file_format)
        return len(whole)


def _read_pieces(
    folder: Path, manifest: dict[str, Any], *, table: str, joined: pd.DataFrame | None
) -> Iterator[pd.DataFrame]:
    config = ZoobotConfig.from_dict(manifest["config"])
    for path in shard_paths(folder, manifest):
        shard = read_shard(path)
        if shard is None:
            raise SurveyError(f"{path} is damaged or missing; run the same zoobot-hf predict again, which mends it.")
        piece = shard.table.to_pandas()
        if table != "predictions":
            piece = (friendly_table if table == "friendly" else advanced_table)(piece, config)
        yield piece if joined is None else _join(piece, joined)


def _join(piece: pd.DataFrame, catalog: pd.DataFrame) -> pd.DataFrame:
    missing = piece["id_str"][~piece["id_str"].isin(catalog.index)]
    if len(missing):
        raise CatalogError(f"the catalog has no row for {describe(missing)}; give the one that was predicted.")
    twice = [name for name in piece.columns if name in catalog.columns]
    if twice:
        raise CatalogError(f"the catalog and the predictions both have {quote(twice)}; rename the catalog's columns.")
    return piece.join(catalog, on="id_str")


def _write_parquet(
    pieces: Iterator[pd.DataFrame], path: Path, facts: dict[str, str], *, joined: pd.DataFrame | None
) -> int:
    first = next(pieces)
    own = first if joined is None else first.drop(columns=joined.columns)
    fields = [
        field.with_metadata({"description": describe_column(field.name)}) if describe_column(field.name) else field
        for field in pa.Schema.from_pandas(own, preserve_index=False)
    ]
    if joined is not None:
        # From the whole catalog: in the first piece a column may be empty.
        fields += pa.Schema.from_pandas(joined, preserve_index=False)
    schema = pa.schema(fields, metadata={"zoobot_hf": json.dumps(facts)})
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for piece in itertools.chain([first], pieces):
            writer.write_table(pa.Table.from_pandas(piece, schema=schema, preserve_index=False))
            count += len(piece)
    return count


def _write_csv(pieces: Iterator[pd.DataFrame], path: Path) -> int:
    count = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        for number, piece in enumerate(pieces):
            piece.to_csv(file, index=False, header=number == 0)
            count += len(piece)
    return count


def _write_with_astropy(
    whole: pd.DataFrame, path: Path, facts: dict[str, str], *, joined: pd.DataFrame | None, file_format: str
) -> None:
    # FITS headers are in ASCII, and the model may be a path that is not.
    header = {name: value.encode("ascii", "backslashreplace").decode() for name, value in facts.items()}
    table = Table(meta=header if file_format == "fits" else {})
    for name in whole.columns:
        table[name] = column_for_astropy(whole[name], file_format=file_format)
        is_own = joined is None or name not in joined.columns
        description = describe_column(str(name)) if is_own else ""
        table[name].description = description or None
        if description and pd.api.types.is_float_dtype(whole[name]):
            table[name].unit = units.dimensionless_unscaled
    if file_format == "fits":
        table.write(path, format="fits", overwrite=True)
        _write_comments(path, table)
        return
    document = votable.from_table(table)
    # What `Table.read` keeps of the whole table is its description alone.
    document.get_first_table().description = f"Predictions of the model {facts['MODEL'] or 'without a name'}"
    document.get_first_table().infos.extend(Info(name=name, value=value) for name, value in facts.items())
    votable.writeto(document, str(path))


def _write_comments(path: Path, table: Table) -> None:
    """Writes the descriptions to TCOMMn as well, where TOPCAT reads them; astropy's own place is known to it alone."""
    with fits.open(path, mode="update") as extensions:
        for number, name in enumerate(table.colnames, start=1):
            if table[name].description:
                extensions[1].header[f"TCOMM{number}"] = table[name].description
