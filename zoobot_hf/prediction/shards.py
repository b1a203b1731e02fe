"""Shards of a survey's predictions or embeddings: Parquet files that are there whole or not at all.

A shard holds what was made of consecutive rows of the catalog. Beside them, in the metadata of the same file, are
the galaxies that failed and what the shard depends on, so that a shard is one file and can't be half there.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from zoobot_hf.data.catalog import PARTIAL, whole_file

METADATA = b"zoobot_hf"


class Shard(NamedTuple):
    """A shard's content.

    Attributes:
        table: A row for each galaxy that could be read, in the catalog's order.
        failures: A row for each that could not, in the catalog's order: `id_str`, `file_loc`, `reason`.
        key: A hash of all that the shard depends on.
    """

    table: pa.Table
    failures: list[dict[str, str]]
    key: str


def write_shard(path: Path, shard: Shard) -> None:
    """A shard written to a file whole or not at all.

    Args:
        path: The file; its folder is there.
        shard: What to write.

    Raises:
        OSError: No space left, or no right to write; an earlier file is then as it was.
    """
    content = json.dumps({"key": shard.key, "failures": shard.failures})
    table = shard.table.replace_schema_metadata({METADATA: content.encode()})
    # Text repeats itself, numbers do not, and without a dictionary embeddings are read several times as fast.
    text = [field.name for field in table.schema if field.type == pa.string()]
    with whole_file(path) as partial:
        pq.write_table(table, partial, write_page_checksum=True, use_dictionary=text)


def read_shard(path: Path) -> Shard | None:
    """A shard from a file, all of it read and its checksums compared; None where it is missing or damaged.

    Args:
        path: The file.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        content = json.loads(table.schema.metadata[METADATA])
        return Shard(table.replace_schema_metadata(None), content["failures"], content["key"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def read_key(path: Path) -> str | None:
    """What a shard depends on, without reading its table; None where it is missing or damaged.

    Args:
        path: The file.
    """
    try:
        return str(json.loads(pq.read_schema(path).metadata[METADATA])["key"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def read_failures(path: Path) -> list[dict[str, str]]:
    """The galaxies that failed in a shard, without reading its table.

    Args:
        path: The file of a whole shard.
    """
    failures: list[dict[str, str]] = json.loads(pq.read_schema(path).metadata[METADATA])["failures"]
    return failures


def remove_partial_files(folder: Path) -> None:
    """Deletes what runs that were killed left half-written, and what says that a process is done with its share.

    Args:
        folder: Where shards are; no run may be writing there.
    """
    for path in folder.glob(f"{PARTIAL}*"):
        path.unlink(missing_ok=True)


def shard_paths(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The shards' files in order, there or not.

    Args:
        folder: The run's folder.
        manifest: The run's: `contents`, `galaxies` and `shard_size`.
    """
    count = -(-int(manifest["galaxies"]) // int(manifest["shard_size"]))
    return [folder / manifest["contents"] / f"{number:06d}.parquet" for number in range(count)]
