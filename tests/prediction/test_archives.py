import gzip
import io
import os
import tarfile

import pandas as pd
import pytest

from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.data.images import UnreadableImageError
from zoobot_hf.prediction.archives import attach_member_reader, read_archive


def write_archive(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def read(path, *, rows=100):
    """The names, places and contents of an archive's galaxies."""
    found = [row for piece in read_archive(path, rows=rows) for row in piece.to_dict("records")]
    return [(row["id_str"], row["file_loc"], attach_member_reader(row)["read"]()) for row in found]


def test_a_galaxy_is_what_shares_its_name_up_to_the_first_dot(tmp_path):
    path = write_archive(
        tmp_path / "galaxies.tar",
        {
            "a.json": b"{}",
            "a.JPG": b"the image of a",
            "a.seg.png": b"a mask",
            "night/b.fits.fz": b"the image of b",
            "night/b.cls": b"1",
            "c.r.png": b"the image of c",
            "1.png": b"the image of 1",
            "1.seg1.png": b"a mask",
            "README": b"no galaxy",
            "._d.jpg": b"of another system",
            f"{'long' * 40}.png": b"",
        },
    )
    assert read(path) == [
        ("a", f"tar://a.JPG::{path}", b"the image of a"),
        ("night/b", f"tar://night/b.fits.fz::{path}", b"the image of b"),
        ("c", f"tar://c.r.png::{path}", b"the image of c"),
        ("1", f"tar://1.png::{path}", b"the image of 1"),
        ("long" * 40, f"tar://{'long' * 40}.png::{path}", b""),
    ]


def test_what_tar_makes_of_a_folder_is_read(galaxy_folder, tmp_path):
    path = tmp_path / "folder.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(galaxy_folder / "images", arcname=".")
    found = {name: content for name, _, content in read(path)}
    assert sorted(found) == [f"galaxy_{number:02d}" for number in range(40)]
    assert found["galaxy_07"] == (galaxy_folder / "images/galaxy_07.png").read_bytes()


@pytest.mark.parametrize("rows", [1, 3, 7, 10])
def test_the_pieces_together_are_the_archive(rows, tmp_path):
    path = write_archive(tmp_path / "galaxies.tar", {f"{number}.jpg": b"%d" % number for number in range(7)})
    pieces = list(read_archive(path, rows=rows))
    assert {len(piece) for piece in pieces[:-1]} <= {rows}
    whole = pd.concat(pieces)
    assert whole["id_str"].tolist() == [str(number) for number in range(7)]
    assert list(whole.columns) == ["id_str", "file_loc", "archive", "offset", "size"]


def test_a_galaxy_without_an_image_keeps_its_row_and_says_so(tmp_path):
    path = write_archive(tmp_path / "galaxies.tar", {"a.json": b"{}", "b.jpg": b"image"})
    (piece,) = read_archive(path, rows=10)
    assert piece["id_str"].tolist() == ["a", "b"]
    with pytest.raises(UnreadableImageError, match="there is no image among its members of the archive"):
        attach_member_reader(piece.to_dict("records")[0])["read"]()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_galaxy_whose_image_is_a_link_keeps_its_row_and_says_so(link, galaxy_folder, tmp_path):
    image = galaxy_folder / "images/galaxy_00.png"
    link(image, image.with_name("linked.png"))
    with tarfile.open(tmp_path / "galaxies.tar", "w") as archive:
        for name in ("galaxy_00", "linked"):
            archive.add(image.with_name(f"{name}.png"), arcname=f"{name}.png")
    (piece,) = read_archive(tmp_path / "galaxies.tar", rows=10)
    first, second = map(attach_member_reader, piece.to_dict("records"))
    assert first["read"]() == image.read_bytes()
    assert second["id_str"] == "linked"
    with pytest.raises(UnreadableImageError, match="it is a link in the archive; make the archive with tar's --deref"):
        second["read"]()


def test_a_link_beside_its_own_image_is_no_second_image(galaxy_folder, tmp_path):
    image = galaxy_folder / "images/galaxy_00.png"
    os.symlink(image.name, image.with_suffix(".jpg"))
    with tarfile.open(tmp_path / "galaxies.tar", "w") as archive:
        for suffix in (".jpg", ".png"):
            archive.add(image.with_suffix(suffix), arcname=f"galaxy_00{suffix}")
    (piece,) = read_archive(tmp_path / "galaxies.tar", rows=10)
    (row,) = map(attach_member_reader, piece.to_dict("records"))
    assert row["read"]() == image.read_bytes()


def test_several_images_of_one_galaxy_are_refused(tmp_path):
    path = write_archive(tmp_path / "galaxies.tar", {"J01.5+02.jpg": b"", "J01.7+02.jpg": b""})
    with pytest.raises(CatalogError, match=r"2 images of the galaxy 'J01': 'J01\.5\+02\.jpg', .*no dot in the names"):
        read(path)


@pytest.mark.parametrize("damage", ["truncated", "compressed", "text"])
def test_what_is_no_whole_archive_is_refused(damage, tmp_path):
    path = write_archive(tmp_path / "galaxies.tar", {"a.jpg": b"1" * 600, "b.jpg": b"2" * 5000})
    content = path.read_bytes()
    changed = {"truncated": content[:3000], "compressed": gzip.compress(content), "text": b"hello" * 500}
    path.write_bytes(changed[damage])
    with pytest.raises(CatalogError, match=r"galaxies\.tar can't be read: .*whole, and unpack it where it is compress"):
        read(path)
