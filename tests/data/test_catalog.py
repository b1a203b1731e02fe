"""Catalogs are read from every format, checked, and written whole."""

import errno
import gzip
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits, votable
from astropy.table import Table
from astropy.time import Time

from zoobot_hf.data.catalog import (
    CATALOG_FORMATS,
    CatalogError,
    check_catalog_can_be_written,
    find_catalog,
    read_catalog,
    read_galaxies,
    read_image_folder,
    write_catalog,
)

RINGS = Path(__file__).resolve().parents[2] / "../shared/data/rings"
NAMES = ["007", "NA", "J000411.19+020924.0"]


@pytest.fixture
def folder(tmp_path):
    """A folder with three image files; nothing here opens them."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"an image")
    return tmp_path


@pytest.fixture
def table():
    """A catalog of three galaxies."""
    return pd.DataFrame(
        {
            "id_str": NAMES,
            "file_loc": ["0.png", "1.png", "2.png"],
            "ring": [1, 0, 1],
            "disk-edge-on_no_fraction": [0.5, np.nan, 0.25],
        }
    )


@pytest.mark.parametrize("suffix", CATALOG_FORMATS)
def test_what_was_written_is_read_back(suffix, folder, table):
    write_catalog(table, folder / f"galaxies{suffix}")

    catalog = read_catalog(folder / f"galaxies{suffix}", label_column="ring")

    assert list(catalog.columns) == ["id_str", "file_loc", "ring", "disk-edge-on_no_fraction"]
    assert list(catalog["id_str"]) == NAMES
    assert list(catalog["file_loc"]) == [str(folder / f"{number}.png") for number in range(3)]
    assert list(catalog["ring"]) == [1, 0, 1]
    np.testing.assert_array_equal(catalog["disk-edge-on_no_fraction"], [0.5, np.nan, 0.25])
    assert catalog["disk-edge-on_no_fraction"].dtype.isnative


@pytest.mark.parametrize("suffix", [".csv", ".fits", ".vot", ".ecsv"])
def test_a_compressed_catalog_is_read(suffix, folder, table):
    write_catalog(table, folder / f"galaxies{suffix}")
    (folder / f"galaxies{suffix}.gz").write_bytes(gzip.compress((folder / f"galaxies{suffix}").read_bytes()))

    assert list(read_catalog(folder / f"galaxies{suffix}.gz")["id_str"]) == NAMES


def test_a_fits_table_gives_native_numbers_and_stripped_text(folder):
    columns = [
        fits.Column("id_str", format="12A", array=np.array([b"007   ", b"b", b"c"])),
        fits.Column("file_loc", format="12A", array=np.array(["0.png", "1.png", "2.png"])),
        fits.Column("mag", format="E", array=np.array([17.5, 18.0, 18.5])),
        fits.Column("flux_in_apertures", format="3E", array=np.ones((3, 3))),
        fits.Column("visits", format="PJ()", array=np.array([[1], [2, 3], []], dtype=object)),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(folder / "galaxies.fits")

    catalog = read_catalog(folder / "galaxies.fits")

    assert list(catalog["id_str"]) == ["007", "b", "c"]
    assert list(catalog["mag"]) == [17.5, 18.0, 18.5]
    assert catalog["mag"].dtype == np.dtype("float32")
    assert list(catalog.columns) == ["id_str", "file_loc", "mag"]


@pytest.mark.parametrize("suffix", [".ecsv", ".fits"])
def test_coordinates_and_times_of_astropy_are_left_out(suffix, folder, table):
    galaxies = Table.from_pandas(table)
    galaxies["position"] = SkyCoord([1, 2, 3], [4, 5, 6], unit="deg")
    galaxies["observed"] = Time(["2020-01-01", "2021-01-01", "2022-01-01"])
    galaxies.write(folder / f"galaxies{suffix}")
    assert list(read_catalog(folder / f"galaxies{suffix}").columns) == list(table.columns)


def test_integer_names_keep_every_digit(folder, table):
    table["id_str"] = [1237648720693690487, 1237648720693690488, 1237648720693690489]
    write_catalog(table, folder / "galaxies.fits")

    names = read_catalog(folder / "galaxies.fits")["id_str"]

    assert list(names) == ["1237648720693690487", "1237648720693690488", "1237648720693690489"]


def test_floating_point_names_are_refused(folder, table):
    write_catalog(table.assign(id_str=[1.0, 2.0, 3.0]), folder / "galaxies.fits")

    with pytest.raises(CatalogError, match=r"floating-point numbers in 'id_str', for example .*1\.0"):
        read_catalog(folder / "galaxies.fits")


def test_an_absolute_location_stays(folder, table):
    (folder / "elsewhere").mkdir()
    table["file_loc"] = [str(folder / name) for name in table["file_loc"]]
    write_catalog(table, folder / "elsewhere/galaxies.csv")

    assert list(read_catalog(folder / "elsewhere/galaxies.csv")["file_loc"]) == list(table["file_loc"])


def test_a_missing_column_is_named_with_those_there_are(folder, table):
    write_catalog(table.rename(columns={"id_str": "iauname"}), folder / "galaxies.csv")

    with pytest.raises(CatalogError, match=r"no column 'id_str', 'bar'; its columns are 'iauname', 'file_loc', 'ring'"):
        read_catalog(folder / "galaxies.csv", label_column="bar")
    with pytest.raises(CatalogError, match=r"no column 'id_str'; its columns are .*\. Rename a column\.$"):
        read_catalog(folder / "galaxies.csv", label_column="ring")


def test_duplicate_names_are_counted_and_the_first_five_are_listed(folder):
    names = [f"g{number}" for number in range(7) for _ in range(3)]
    pd.DataFrame({"id_str": names, "file_loc": "0.png"}).to_csv(folder / "galaxies.csv", index=False)

    with pytest.raises(CatalogError, match=r"more than once for 7 galaxies: 'g0', 'g1', 'g2', 'g3', 'g4', \.\.\.;"):
        read_catalog(folder / "galaxies.csv")


def test_images_that_are_not_there_are_counted_and_listed(folder, table):
    table["file_loc"] = ["0.png", "lost.png", "."]
    write_catalog(table, folder / "galaxies.csv")

    with pytest.raises(CatalogError, match=r"not there, for 2 galaxies: '.*lost\.png', '.*'\. A relative"):
        read_catalog(folder / "galaxies.csv")
    assert len(read_catalog(folder / "galaxies.csv", images_must_exist=False)) == 3


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits", ".vot", ".ecsv"])
def test_missing_labels_are_counted_and_listed(suffix, folder, table):
    write_catalog(table.assign(ring=["yes", None, None]), folder / f"galaxies{suffix}")

    with pytest.raises(CatalogError, match=r"column 'ring' has no label for 2 galaxies: 'NA', 'J000411"):
        read_catalog(folder / f"galaxies{suffix}", label_column="ring")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits", ".vot", ".ecsv"])
def test_a_missing_name_is_an_error_that_gives_the_row(suffix, folder, table):
    write_catalog(table.assign(id_str=["a", None, "c"]), folder / f"galaxies{suffix}")

    with pytest.raises(CatalogError, match=r"no 'id_str' in 1 of 3 rows, the first of them row 2"):
        read_catalog(folder / f"galaxies{suffix}")


def test_a_masked_name_is_an_error(folder):
    masked = Table({"id_str": [1, 2, 3], "file_loc": ["0.png", "1.png", "2.png"]}, masked=True)
    masked["id_str"].mask = [False, False, True]
    masked.write(folder / "galaxies.ecsv")

    with pytest.raises(CatalogError, match="no 'id_str' in 1 of 3 rows, the first of them row 3"):
        read_catalog(folder / "galaxies.ecsv")


def test_a_catalog_without_rows_is_refused(folder, table):
    write_catalog(table.iloc[:0], folder / "galaxies.csv")

    with pytest.raises(CatalogError, match="has no rows"):
        read_catalog(folder / "galaxies.csv")


def test_an_unknown_suffix_lists_the_known_ones(folder, table):
    with pytest.raises(CatalogError, match=re.escape("'.xlsx'; known are .csv, .parquet, .fits, .fit, .vot")):
        read_catalog(folder / "galaxies.xlsx")
    with pytest.raises(CatalogError, match=re.escape("'.xlsx'; known are .csv")):
        write_catalog(table, folder / "galaxies.xlsx")


def test_a_catalog_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(CatalogError, match=r"galaxies\.csv does not exist"):
        read_catalog(tmp_path / "galaxies.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits", ".vot", ".ecsv", ".csv.gz", ".fits.gz"])
@pytest.mark.parametrize("content", [b"", bytes(range(256))], ids=["empty", "noise"])
def test_a_damaged_catalog_is_named(suffix, content, tmp_path):
    (tmp_path / f"galaxies{suffix}").write_bytes(content)

    with pytest.raises(CatalogError, match=rf"galaxies{re.escape(suffix)} (can't be read as|has no column)"):
        read_catalog(tmp_path / f"galaxies{suffix}")


@pytest.mark.filterwarnings("ignore::astropy.io.fits.verify.VerifyWarning")
@pytest.mark.parametrize("suffix", [".parquet", ".fits", ".vot"])
def test_a_truncated_catalog_is_named(suffix, folder, table):
    path = folder / f"galaxies{suffix}"
    write_catalog(table, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(CatalogError, match=r"can't be read as"):
        read_catalog(path)


def test_text_of_another_encoding_and_several_tables_are_named(folder, table):
    (folder / "latin.csv").write_text("id_str,file_loc\nNuñez 1,0.png\n", encoding="latin-1")
    with pytest.raises(CatalogError, match=r"latin\.csv can't be read as csv: .*, that text is in UTF-8, "):
        read_catalog(folder / "latin.csv")
    tables = votable.from_table(Table.from_pandas(table))
    tables.resources.append(votable.from_table(Table.from_pandas(table)).resources[0])
    tables.to_xml(str(folder / "two.vot"))
    with pytest.raises(CatalogError, match=r"two\.vot can't be read as votable: .* is the only table in it"):
        read_catalog(folder / "two.vot")


def test_a_fits_image_is_no_catalog(tmp_path):
    fits.writeto(tmp_path / "galaxy.fits", np.zeros((4, 4)))

    with pytest.raises(CatalogError, match="can't be read as fits: No table found"):
        read_catalog(tmp_path / "galaxy.fits")


def test_a_folder_gives_every_image_in_order(tmp_path):
    for name in ["b/2.JPG", "a/1.png", "3.fits.gz", "b/4.fts", "b/5.fit.fz", "notes.txt", "._2.JPG", ".cache/6.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    catalog = read_image_folder(tmp_path)

    assert list(catalog["id_str"]) == ["3", "1", "2", "4", "5"]
    in_order = ["3.fits.gz", "a/1.png", "b/2.JPG", "b/4.fts", "b/5.fit.fz"]
    assert list(catalog["file_loc"]) == [str(tmp_path / name) for name in in_order]


def test_subfolders_name_the_classes(tmp_path):
    for name in ["ring/deep/1.png", "ring/2.png", "not ring/3.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    catalog = read_image_folder(tmp_path, label_column="class")

    assert dict(zip(catalog["id_str"], catalog["class"], strict=True)) == {"1": "ring", "2": "ring", "3": "not ring"}


def test_an_image_outside_of_the_subfolders_has_no_class(folder):
    (folder / "ring").mkdir()
    (folder / "ring/9.png").write_bytes(b"")

    with pytest.raises(CatalogError, match=r"in none: 3 galaxies: '0\.png', '1\.png', '2\.png'\. Put every image"):
        read_image_folder(folder, label_column="ring")


def test_two_images_of_one_name_are_refused(folder):
    (folder / "0.jpg").write_bytes(b"")

    with pytest.raises(CatalogError, match="more than once for 1 galaxy: '0'"):
        read_image_folder(folder)


def test_a_folder_without_images_lists_the_suffixes(tmp_path):
    with pytest.raises(CatalogError, match=r"holds no images; their suffixes may be \.png, \.jpg"):
        read_image_folder(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/data-00000-of-00001.arrow").touch()
    with pytest.raises(CatalogError, match=r"\.fz\. If it is a saved dataset, push that to the Hub and give its id"):
        read_image_folder(tmp_path)
    with pytest.raises(CatalogError, match="nowhere does not exist"):
        read_image_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["catalog.csv", "Catalog.CSV", "catalog.parquet", "catalog.fits", "catalog.fits.gz"])
def test_a_folder_with_a_catalog_is_that_catalog(name, folder, table):
    uncompressed = folder / name.removesuffix(".gz")
    write_catalog(table, uncompressed)
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(uncompressed.read_bytes()))
        uncompressed.unlink()

    assert find_catalog(folder) == folder / name
    assert list(read_galaxies(folder, label_column="ring")["id_str"]) == NAMES
    assert list(read_galaxies(folder / name)["id_str"]) == NAMES


@pytest.mark.parametrize(
    "names",
    [
        ["catalog.csv", "CATALOG.csv"],
        ["catalog.parquet", "Catalog.csv", "catalog.csv.gz"],
        ["Catalog.Parquet", "catalog.csv.gz"],
        ["catalog.fits.gz", "catalog.parquet.gz"],
    ],
)
def test_of_several_catalogs_the_first_is_taken(names, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "catalog.xml").mkdir()
    assert find_catalog(tmp_path) == tmp_path / names[0]


def test_a_folder_without_a_catalog_is_its_images(folder):
    assert list(read_galaxies(folder)["id_str"]) == ["0", "1", "2"]


def test_a_source_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(CatalogError, match="nowhere does not exist; give a catalog file or a folder of images"):
        read_galaxies(tmp_path / "nowhere")


def test_writing_that_fails_leaves_the_old_file(folder, table, monkeypatch):
    write_catalog(table, folder / "galaxies.csv")
    before = (folder / "galaxies.csv").read_bytes()

    def write_half(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", write_half)
    with pytest.raises(OSError, match="the disk is full"):
        write_catalog(table.iloc[:1], folder / "galaxies.csv")

    assert (folder / "galaxies.csv").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png", "2.png", "galaxies.csv"]


def test_a_link_stays_and_what_it_points_to_is_written(folder, table):
    (folder / "disk").mkdir()
    (folder / "galaxies.csv").symlink_to("disk/galaxies.csv")
    for rows in (table, table.iloc[:1]):  # to a file that isn't there yet, and to one that is
        write_catalog(rows, folder / "galaxies.csv")
        assert (folder / "galaxies.csv").is_symlink()
        assert len(pd.read_csv(folder / "disk/galaxies.csv")) == len(rows)


def test_a_table_that_can_not_get_its_name_stays_where_the_error_says(folder, table, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(source))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="resource busy") as raised:
        write_catalog(table, folder / "galaxies.csv")
    assert len(pd.read_csv(raised.value.filename)) == len(table)


def test_a_name_too_long_for_a_file_that_is_being_written_is_refused_before(folder):
    with pytest.raises(CatalogError, match=r"File name too long; make the folder, .* or a shorter name"):
        check_catalog_can_be_written(folder / f"{'x' * 246}.csv")


def test_a_compressed_file_is_not_written(folder, table):
    with pytest.raises(CatalogError, match=r"ends in \.gz; catalogs are written uncompressed"):
        write_catalog(table, folder / "galaxies.csv.gz")


# VOTable makes identifiers of names, and says so; pytest-xdist can't take this warning from process to process.
@pytest.mark.filterwarnings("ignore::astropy.io.votable.exceptions.W03")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"column_{number}" for number in range(1000)], r"has 1000 columns, and FITS holds at most 999; choose Parq"),
        (
            ["é"],
            r"has a column 'é', and in FITS a name has at most 68 characters, all of them ASCII; choose Parquet or",
        ),
        (["x" * 69], "has a column 'x{69}', and in FITS a name has at most 68 characters"),
        (["'" * 35], 'has a column "\'{35}", and in FITS a name has at most 68 characters'),
    ],
)
def test_columns_that_fits_has_no_room_for_are_refused(names, message, folder):
    table = pd.DataFrame([range(len(names))], columns=names)
    with pytest.raises(CatalogError, match=rf"galaxies\.fit {message}"):
        write_catalog(table, folder / "galaxies.fit")
    write_catalog(table, folder / "galaxies.vot")
    assert Table.read(folder / "galaxies.vot", use_names_over_ids=True).colnames == names


def test_columns_that_fits_has_just_room_for_are_written(folder):
    names = ["x" * 68, "'" * 34, *(f"column_{number}" for number in range(997))]
    write_catalog(pd.DataFrame([range(999)], columns=names), folder / "galaxies.fits")
    assert Table.read(folder / "galaxies.fits").colnames == names


@pytest.mark.skipif(not RINGS.exists(), reason="needs ../shared/data/rings, which is not part of the project")
def test_the_ring_galaxies_are_read():
    catalog = read_galaxies(RINGS, label_column="ring")

    assert len(catalog) == 470
    assert catalog["ring"].value_counts().to_dict() == {1: 235, 0: 235}
    assert catalog["id_str"][0] == "J000411.19+020924.0"


def test_a_logical_that_fits_does_not_know_is_a_missing_label(folder, table):
    path = folder / "galaxies.fits"
    columns = [
        fits.Column("id_str", "20A", array=table["id_str"]),
        fits.Column("file_loc", "5A", array=table["file_loc"]),
        fits.Column("ring", "L", array=[True, False, False]),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(path)
    content = bytearray(path.read_bytes())
    place = content.rfind(b"2.png") + len("2.png")
    assert content[place : place + 1] == b"F"
    content[place] = 0
    path.write_bytes(content)
    assert read_catalog(path)["ring"].isna().tolist() == [False, False, True]
    assert read_catalog(path)["ring"].tolist()[:2] == [True, False]
    with pytest.raises(CatalogError, match=f"no label for 1 galaxy: '{re.escape(NAMES[2])}'"):
        read_catalog(path, label_column="ring")


@pytest.mark.parametrize("suffix", CATALOG_FORMATS)
def test_letters_outside_ascii_are_written_and_read_back(suffix, folder, table):
    table["id_str"] = ["gé0", "plain", "银河"]
    table["kind"] = ["Sérsic", "", "bulge"]
    write_catalog(table, folder / f"galaxies{suffix}")
    catalog = read_catalog(folder / f"galaxies{suffix}")
    assert catalog["id_str"].tolist() == ["gé0", "plain", "银河"]
    assert catalog["kind"][0] == "Sérsic"


IDENTIFIERS = [39627733663191235, 39627733663191237]  # the same number in floating point


@pytest.mark.parametrize("suffix", CATALOG_FORMATS)
def test_whole_numbers_with_a_gap_keep_every_digit(suffix, folder, table):
    # 999999 is what astropy fills gaps with.
    table["target"] = pd.array([*IDENTIFIERS, None], dtype="Int64")
    table["field"] = pd.array([999999, None, 1], dtype="Int64")
    write_catalog(table, folder / f"galaxies{suffix}")
    catalog = read_catalog(folder / f"galaxies{suffix}")
    assert catalog["target"].dropna().tolist() == IDENTIFIERS
    assert catalog["target"].isna().tolist() == [False, False, True]
    assert catalog["field"].dropna().tolist() == [999999, 1]


def test_none_is_a_gap_among_whole_numbers(folder):
    (folder / "galaxies.csv").write_text(f"id_str,file_loc,target\na,0.png,{IDENTIFIERS[0]}\nb,1.png,None\n")
    assert read_catalog(folder / "galaxies.csv")["target"].dropna().tolist() == IDENTIFIERS[:1]


def test_whole_numbers_of_another_tools_parquet_keep_every_digit(folder):
    columns = {"id_str": ["a", "b", "c"], "file_loc": ["0.png"] * 3, "target": [*IDENTIFIERS, None]}
    pq.write_table(pa.table({**columns, "share": [1.0, 2.0, None]}), folder / "galaxies.parquet")
    catalog = read_catalog(folder / "galaxies.parquet")
    assert catalog["target"].dropna().tolist() == IDENTIFIERS
    assert catalog["share"].dtype == "float64"


@pytest.mark.parametrize("index", ["id_str", ["ring", "id_str"]])
def test_names_that_are_the_index_of_a_parquet_file_are_read(index, folder, table):
    table["target"] = pd.array([*IDENTIFIERS, None], dtype="Int64")
    table.set_index(index).to_parquet(folder / "galaxies.parquet")
    catalog = read_catalog(folder / "galaxies.parquet", label_column="ring")
    assert catalog["id_str"].tolist() == NAMES
    assert catalog["ring"].tolist() == [1, 0, 1]
    assert catalog["target"].dropna().tolist() == IDENTIFIERS


def test_rows_of_a_parquet_file_may_share_their_index(folder, table):
    table["target"] = pd.array([*IDENTIFIERS, None], dtype="Int64")
    table.set_index(pd.Index([5, 5, 6], name="field")).to_parquet(folder / "galaxies.parquet")
    catalog = read_catalog(folder / "galaxies.parquet")
    assert catalog["target"].dropna().tolist() == IDENTIFIERS
    assert catalog["field"].tolist() == [5, 5, 6]


@pytest.mark.parametrize("suffix", CATALOG_FORMATS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32", "uint64", "float16", "UInt64", "Float64"])
def test_numbers_of_every_type_are_written(suffix, dtype, folder, table):
    table["number"] = pd.Series([0, 3, 100], dtype=dtype)
    write_catalog(table, folder / f"galaxies{suffix}")
    numbers = read_catalog(folder / f"galaxies{suffix}")["number"]
    assert numbers.tolist() == [0, 3, 100]
    assert not pd.api.types.is_bool_dtype(numbers)


@pytest.mark.parametrize("suffix", [".fits", ".vot", ".ecsv"])
def test_what_has_no_type_is_written_as_text(suffix, folder, table):
    table["large"] = np.array([2**64 - 1, 0, 1], dtype="uint64")
    table["barred"] = pd.array([True, None, False], dtype="boolean")
    write_catalog(table, folder / f"galaxies{suffix}")
    catalog = read_catalog(folder / f"galaxies{suffix}")
    assert catalog["large"].tolist() == [str(2**64 - 1), "0", "1"]
    assert catalog["barred"].fillna("").tolist() == ["True", "", "False"]


def test_a_class_of_a_csv_file_may_be_called_none(folder):
    (folder / "galaxies.csv").write_text(
        "id_str,file_loc,bar,votes,share,edge\na,0.png,None,NA,nan,True\nb,1.png,weak,3,2.0,\nc,2.png,NA,4,3.0,False\n"
    )
    catalog = read_catalog(folder / "galaxies.csv")
    assert catalog["bar"].tolist()[:2] == ["None", "weak"]
    assert catalog["bar"].isna().tolist() == [False, False, True]
    assert (catalog["votes"].dtype, catalog["votes"].dropna().tolist()) == ("Int64", [3, 4])
    np.testing.assert_array_equal(catalog["share"], [np.nan, 2, 3])
    assert catalog["edge"].dropna().tolist() == [True, False]
    with pytest.raises(CatalogError, match="column 'bar' has no label for 1 galaxy: 'c'"):
        read_catalog(folder / "galaxies.csv", label_column="bar")


def test_a_name_that_reads_as_a_missing_number_is_a_name(folder):
    (folder / "galaxies.csv").write_text("id_str,file_loc\n007,0.png\nNA,1.png\n")
    assert read_catalog(folder / "galaxies.csv")["id_str"].tolist() == ["007", "NA"]


def test_a_comma_at_the_end_of_every_row_is_no_value(folder):
    (folder / "galaxies.csv").write_text("id_str,file_loc,ring\na,0.png,1,\nb,1.png,0,\n")
    catalog = read_catalog(folder / "galaxies.csv", label_column="ring")
    assert [catalog[name].tolist() for name in ("id_str", "ring")] == [["a", "b"], [1, 0]]
    (folder / "galaxies.csv").write_text("id_str,file_loc\n1,a,0.png\n2,b,1.png\n")
    with pytest.raises(CatalogError, match="more values than it has names of columns; name every column"):
        read_catalog(folder / "galaxies.csv")


def test_a_table_without_images_is_read_where_none_are_needed(folder, table):
    write_catalog(table[["id_str", "ring"]], folder / "galaxies.csv")
    catalog = read_catalog(folder / "galaxies.csv", needs_locations=False)
    assert catalog["id_str"].tolist() == NAMES
    with pytest.raises(CatalogError, match="has no column 'file_loc'"):
        read_catalog(folder / "galaxies.csv")
