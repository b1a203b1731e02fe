import io
import tarfile

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table

from zoobot_hf import read_galaxies
from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.prediction.pieces import check_catalog, find_source, fingerprint_rows, read_pieces

NAMES = ["007", "NA", "1237648720693755918", "J0001-02", *(f"g{number}" for number in range(19))]


@pytest.fixture
def table():
    return pd.DataFrame({"id_str": NAMES, "file_loc": [f"images/{name}.png" for name in NAMES], "redshift": 0.1})


def write(table, path):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path, row_group_size=5)
    else:
        Table({name: table[name].to_numpy(dtype=str) for name in ("id_str", "file_loc")}).write(
            path, format="fits" if path.suffix == ".fits" else "votable"
        )
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits", ".vot"])
@pytest.mark.parametrize("rows", [1, 5, 7, 23, 100])
def test_the_pieces_together_are_the_catalog(table, suffix, rows, tmp_path):
    path = write(table, tmp_path / f"catalog{suffix}")
    pieces = list(read_pieces(path, rows=rows))
    assert {len(piece) for piece in pieces[:-1]} <= {rows}
    whole = pd.concat(pieces, ignore_index=True)
    assert whole["id_str"].tolist() == NAMES
    assert whole["file_loc"].tolist() == [str(tmp_path / f"images/{name}.png") for name in NAMES]


def test_a_pattern_reads_many_files_in_the_order_of_their_names(table, tmp_path):
    write(table[10:], tmp_path / "part_2.parquet")
    write(table[:10], tmp_path / "part_1.csv")
    pieces = list(read_pieces(tmp_path / "part_*", rows=8))
    assert [len(piece) for piece in pieces] == [8, 8, 7]
    assert pd.concat(pieces)["id_str"].tolist() == NAMES
    assert check_catalog(tmp_path / "part_*") == check_catalog(write(table, tmp_path / "all.parquet"))
    with pytest.raises(CatalogError, match="no file matches"):
        check_catalog(tmp_path / "none_*")


def test_a_pattern_is_relative_to_a_folder_with_any_name(table, tmp_path, monkeypatch):
    folder = tmp_path / "old [1]"
    folder.mkdir()
    write(table, folder / "part.csv")
    monkeypatch.chdir(folder)
    (piece,) = read_pieces("part*")
    assert piece["file_loc"][0] == str(folder / "images/007.png")


def test_a_pattern_for_catalogs_and_archives_is_refused(table, tmp_path):
    write(table, tmp_path / "a.csv")
    tarfile.open(tmp_path / "b.tar", "w").close()
    with pytest.raises(CatalogError, match=r"\* matches catalogs as well as tar archives; give a pattern that matches"):
        check_catalog(tmp_path / "*")


def test_names_that_are_the_index_of_a_parquet_file_are_read(table, tmp_path):
    table.set_index("id_str").to_parquet(tmp_path / "catalog.parquet")
    (piece,) = read_pieces(tmp_path / "catalog.parquet")
    assert piece["id_str"].tolist() == NAMES


def test_folders_and_tables_are_catalogs_too(galaxy_folder):
    expected = read_galaxies(galaxy_folder)[["id_str", "file_loc"]]
    for source in (galaxy_folder, galaxy_folder / "images", read_galaxies(galaxy_folder)):
        (piece,) = read_pieces(source)
        assert piece.to_numpy().tolist() == expected.to_numpy().tolist()


def test_the_fingerprint_changes_with_every_name_place_and_order(table, tmp_path):
    path = write(table, tmp_path / "catalog.csv")
    facts = check_catalog(path)
    assert facts.galaxies == 23
    assert check_catalog(write(table.assign(redshift=0.2), path)) == facts
    moved = table.assign(file_loc=["elsewhere.png", *table["file_loc"][1:]])
    for other in (table[::-1], table[:-1], moved, table.assign(id_str=["7", *NAMES[1:]])):
        assert check_catalog(write(other, path)).fingerprint != facts.fingerprint
    assert len({fingerprint_rows(rows) for rows in (table, table[::-1], moved)}) == 3


def test_the_fingerprint_of_an_archive_changes_with_the_places_of_its_images(tmp_path):
    fingerprints = set()
    for length in (10, 10, 600):  # of the first image, so that the second one lies elsewhere
        with tarfile.open(tmp_path / "galaxies.tar", "w") as archive:
            for name, size in (("a.jpg", length), ("b.jpg", 10)):
                header = tarfile.TarInfo(name)
                header.size = size
                archive.addfile(header, io.BytesIO(bytes(size)))
        fingerprints.add(check_catalog(tmp_path / "galaxies.tar").fingerprint)
    assert len(fingerprints) == 2


def test_names_that_are_there_twice_are_named_also_across_files(table, tmp_path):
    write(table, tmp_path / "part_1.parquet")
    write(table[3:5], tmp_path / "part_2.csv")
    with pytest.raises(CatalogError, match="more than once for 2 galaxies: 'J0001-02', 'g0'"):
        check_catalog(tmp_path / "part_*")


def test_names_that_only_share_their_hash_are_two(table, tmp_path, monkeypatch):
    monkeypatch.setattr("zoobot_hf.prediction.pieces._hash_rows", lambda piece: np.zeros(len(piece), np.uint64))
    assert check_catalog(write(table, tmp_path / "catalog.csv")).galaxies == 23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id_str": np.arange(23) / 2}, r"has floating-point numbers in 'id_str', for example 0\.0"),
        ({"id_str": [None, *NAMES[1:]]}, "has no 'id_str' in 1 of 23 rows"),
        ({"file_loc": ["  ", *NAMES[1:]]}, "has no 'file_loc' in 1 of 23 rows"),
    ],
)
def test_names_that_can_not_be_used_are_refused(table, change, message, tmp_path):
    with pytest.raises(CatalogError, match=message):
        check_catalog(write(table.assign(**change), tmp_path / "catalog.parquet"))


def test_files_that_are_no_catalogs_are_refused(table, tmp_path):
    for suffix in (".csv", ".parquet"):
        path = write(table.drop(columns="file_loc"), tmp_path / f"short{suffix}")
        with pytest.raises(CatalogError, match="has no column 'file_loc'; its columns are 'id_str', 'redshift'"):
            check_catalog(path)
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    with pytest.raises(CatalogError, match=r"bad\.parquet can't be read: .*Check that the file is whole"):
        check_catalog(tmp_path / "bad.parquet")
    (tmp_path / "latin.csv").write_text("id_str,file_loc\nNuñez 1,a.png\n", encoding="latin-1")
    with pytest.raises(CatalogError, match=r"latin\.csv can't be read: .*, and that text is in UTF-8\."):
        check_catalog(tmp_path / "latin.csv")
    with pytest.raises(CatalogError, match="does not exist"):
        check_catalog(tmp_path / "none.csv")
    with pytest.raises(CatalogError, match=r"the catalog is a Table; give a path, a pandas DataFrame with id_str"):
        find_source(Table.from_pandas(table))


def test_a_comma_at_the_end_of_every_row_is_no_value(tmp_path):
    (tmp_path / "galaxies.csv").write_text("id_str,file_loc,ring\na,0.png,1,\nb,1.png,0,\n")
    assert next(read_pieces(tmp_path / "galaxies.csv"))["id_str"].tolist() == ["a", "b"]
    (tmp_path / "galaxies.csv").write_text("id_str,file_loc\n1,a,0.png\n2,b,1.png\n")
    with pytest.raises(CatalogError, match="more values than it has names of columns; name every column"):
        next(read_pieces(tmp_path / "galaxies.csv"))


def test_a_compressed_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "galaxies.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(CatalogError, match="unpack it where it is compressed"):
        next(read_pieces(tmp_path / "galaxies.tar.gz"))
