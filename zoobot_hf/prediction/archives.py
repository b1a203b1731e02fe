"""Tar archives as WebDataset lays them out: where in them the images are, and how to get one of them.

Only the headers are read to find the images, and each image is then one read at its place: a run that goes on passes
over what is done without touching it.
"""

import functools
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from zoobot_hf.data.catalog import IMAGE_SUFFIXES, CatalogError, quote
from zoobot_hf.data.images import UnreadableImageError

from .galaxies import Row

# WebDataset's convention (github.com/webdataset/webdataset): up to the first dot of its name, a member names its
# sample; what follows says what the member is. Names that begin with a dot belong to no sample.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<kind>[^/]*)")
# In place of an offset, why there are no bytes to read.
_NO_IMAGE, _LINK = -1, -2


class _Image(NamedTuple):
    """A row of an archive: `file_loc` as fsspec writes it, and the place of the image's bytes."""

    id_str: str
    file_loc: str
    archive: str
    offset: int
    size: int


def read_archive(path: Path, *, rows: int) -> Iterator[pd.DataFrame]:
    """The galaxies of a tar archive in its order, in pieces: `id_str`, `file_loc`, `archive`, `offset`, `size`.

    Consecutive members that share their name up to the first dot are one galaxy, and that is its `id_str`. Of an image
    that is a link, symbolic or hard, the archive has no bytes at this place, and reading it fails.

    Args:
        path: The archive, not compressed.
        rows: Most rows in a piece.

    Raises:
        CatalogError: It is no whole tar archive, or compressed; or a galaxy has several images.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            samples = groupby(_read_members(archive), key=lambda member: member[0])
            images = (_find_image(key, [member for _, member in group], path=path) for key, group in samples)
            while piece := list(islice(images, rows)):
                yield pd.DataFrame(piece).astype({"id_str": object, "file_loc": object, "archive": object})
    except tarfile.TarError as error:
        raise CatalogError(
            f"tar archive {path} can't be read: {error}. Check that the file is whole, and unpack it where it is "
            "compressed."
        ) from error


def attach_member_reader(row: Row) -> Row:
    """A row with `read`, which gives the content of the image's file.

    Args:
        row: Of a piece from `read_archive`.
    """
    return {**row, "read": functools.partial(_read_member, row["archive"], offset=row["offset"], size=row["size"])}


def _read_members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        name = _NAME.fullmatch(member.name.removeprefix("./"))
        if name is not None and (member.isreg() or _is_link(member)):
            yield name["key"], member


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()


def _find_image(key: str, members: list[tarfile.TarInfo], *, path: Path) -> _Image:
    images = [member for member in members if member.name.lower().endswith(IMAGE_SUFFIXES)]
    # "a.jpg" is the image of the galaxy "a", whatever else there is, such as a mask "a.seg.png".
    plain = [member for member in images if member.name.removeprefix("./").removeprefix(key).lower() in IMAGE_SUFFIXES]
    found = plain or images
    # A link beside its own image is another name of it.
    found = [member for member in found if not _is_link(member)] or found
    if len(found) > 1:
        raise CatalogError(
            f"tar archive {path} has {len(found)} images of the galaxy {key!r}: "
            f"{quote(member.name for member in found[:5])}; keep one, and no dot in the names of galaxies."
        )
    if not found:
        return _Image(key, f"tar://{members[0].name}::{path}", str(path), _NO_IMAGE, _NO_IMAGE)
    offset = _LINK if _is_link(found[0]) else found[0].offset_data
    return _Image(key, f"tar://{found[0].name}::{path}", str(path), offset, found[0].size)


def _read_member(archive: str, *, offset: int, size: int) -> bytes:
    if offset == _NO_IMAGE:
        raise UnreadableImageError("there is no image among its members of the archive")
    if offset == _LINK:
        raise UnreadableImageError(
            "it is a link in the archive; make the archive with tar's --dereference --hard-dereference"
        )
    with open(archive, "rb") as file:
        file.seek(offset)
        return file.read(size)
