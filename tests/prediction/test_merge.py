import functools
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.io import fits, votable
from astropy.table import Table

from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.prediction import merge
from zoobot_hf.prediction.merge import merge_predictions
from zoobot_hf.prediction.runs import SurveyError
from zoobot_hf.prediction.survey import predict_survey


@pytest.fixture
def survey_folder(layer_norm_model, processor, galaxy_folder, tmp_path):
    sizes = {"shard_size": 12, "batch_size": 4}
    return predict_survey(
        layer_norm_model, processor, galaxy_folder, tmp_path / "out", model_name="astronomer/rings", **sizes
    ).folder


@pytest.fixture
def expected(survey_folder):
    return pd.read_parquet(survey_folder / "predictions")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".fits", ".vot"])
def test_the_merged_table_is_all_of_the_shards(survey_folder, expected, suffix, tmp_path):
    path = tmp_path / f"merged{suffix}"
    assert merge_predictions(survey_folder, path) == 40
    if suffix in (".fits", ".vot"):
        table = Table.read(path).to_pandas()
    else:
        table = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert table.columns.tolist() == expected.columns.tolist()
    for name in ("id_str", "predicted_label"):
        assert [value.decode() if isinstance(value, bytes) else value for value in table[name]] == list(expected[name])
    np.testing.assert_allclose(table["probability_ring"], expected["probability_ring"], rtol=1e-6)


def test_a_fits_table_says_what_it_holds(survey_folder, tmp_path):
    merge_predictions(survey_folder, tmp_path / "merged.fits")
    table = Table.read(tmp_path / "merged.fits")
    assert table["probability_ring"].description == "Probability of the label, 0-1"
    assert table.meta["MODEL"] == "astronomer/rings"
    header = fits.getheader(tmp_path / "merged.fits", 1)
    number = table.colnames.index("probability_ring") + 1
    assert header["MODEL"] == "astronomer/rings"
    assert header[f"TTYPE{number}"] == "probability_ring"
    assert header[f"TCOMM{number}"] == "Probability of the label, 0-1"
    assert header[f"TUNIT{number}"] == ""  # a number without a unit


def test_a_votable_says_what_it_holds(survey_folder, tmp_path):
    merge_predictions(survey_folder, tmp_path / "merged.vot")
    table = votable.parse(tmp_path / "merged.vot", verify="exception").get_first_table()
    assert {info.name: info.value for info in table.infos}["MODEL"] == "astronomer/rings"
    field = table.get_field_by_id_or_name("probability_ring")
    assert field.description == "Probability of the label, 0-1"
    assert field.unit == ""
    read = Table.read(tmp_path / "merged.vot")
    assert read["probability_ring"].description == "Probability of the label, 0-1"
    assert read["probability_ring"].unit == units.dimensionless_unscaled
    assert read.meta["description"] == "Predictions of the model astronomer/rings"


def test_a_parquet_file_says_what_it_holds(survey_folder, tmp_path):
    merge_predictions(survey_folder, tmp_path / "merged.parquet")
    schema = pq.read_schema(tmp_path / "merged.parquet")
    manifest = json.loads((survey_folder / "manifest.json").read_text())
    assert json.loads(schema.metadata[b"zoobot_hf"]) == {
        "MODEL": "astronomer/rings",
        "WEIGHTS": manifest["weights"],
        "CATALOG": manifest["catalog_fingerprint"],
        "PREVALEN": "training",
    }
    assert schema.field("probability_ring").metadata[b"description"] == b"Probability of the label, 0-1"


def test_the_catalogs_columns_are_joined(survey_folder, galaxy_folder, expected, galaxy_labels, tmp_path):
    shuffled = pd.read_csv(galaxy_folder / "catalog.csv").sample(frac=1, random_state=0)
    shuffled.to_csv(galaxy_folder / "shuffled.csv", index=False)
    merge_predictions(survey_folder, tmp_path / "merged.parquet", catalog=galaxy_folder / "shuffled.csv")
    table = pd.read_parquet(tmp_path / "merged.parquet")
    assert table["id_str"].tolist() == expected["id_str"].tolist()
    assert table["ring"].tolist() == list(galaxy_labels)
    assert table["file_loc"].tolist() == sorted(shuffled["file_loc"])  # relative, as the catalog has it


def test_a_csv_file_is_in_utf_8_whatever_the_platform_writes(survey_folder, galaxy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "open", functools.partial(open, encoding="ascii"), raising=False)
    whole = pd.read_csv(galaxy_folder / "catalog.csv")
    whole.assign(größe=1).to_csv(galaxy_folder / "foreign.csv", index=False)
    merge_predictions(survey_folder, tmp_path / "merged.csv", catalog=galaxy_folder / "foreign.csv")
    assert "größe" in (tmp_path / "merged.csv").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("suffix", [".parquet", ".vot"])
def test_the_catalogs_columns_are_not_described_as_the_models(suffix, survey_folder, galaxy_folder, tmp_path):
    whole = pd.read_csv(galaxy_folder / "catalog.csv")
    # The first shard's twelve galaxies have no class, so that their column has no type.
    whole.assign(smooth_fraction=0.5, agn=[None] * 12 + [True] * 28).to_parquet(galaxy_folder / "votes.parquet")
    path = tmp_path / f"merged{suffix}"
    merge_predictions(survey_folder, path, catalog=galaxy_folder / "votes.parquet")
    if suffix == ".vot":
        table = Table.read(path)
        assert (table["smooth_fraction"].description, table["smooth_fraction"].unit) == (None, None)
        return
    schema = pq.read_schema(path)
    assert not schema.field("smooth_fraction").metadata
    assert schema.field("probability_ring").metadata
    assert pd.read_parquet(path)["agn"].isna().sum() == 12


def test_the_catalog_is_not_overwritten(survey_folder, galaxy_folder):
    before = (galaxy_folder / "catalog.csv").read_bytes()
    with pytest.raises(ValueError, match="the catalog itself, which would be lost"):
        merge_predictions(survey_folder, galaxy_folder / "catalog.csv", catalog=galaxy_folder / "catalog.csv")
    assert (galaxy_folder / "catalog.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["failures.parquet", "predictions/000000.parquet", "predictions/all.parquet"])
def test_the_surveys_own_files_are_not_overwritten(name, survey_folder):
    before = {path: path.is_file() and path.read_bytes() for path in survey_folder.rglob("*")}
    with pytest.raises(CatalogError, match=rf"{name} is among the survey's own files; choose another name or folder"):
        merge_predictions(survey_folder, survey_folder / name)
    assert {path: path.is_file() and path.read_bytes() for path in survey_folder.rglob("*")} == before


def test_what_can_not_be_joined_is_named(survey_folder, galaxy_folder, tmp_path):
    whole = pd.read_csv(galaxy_folder / "catalog.csv")
    whole[1:].to_csv(galaxy_folder / "short.csv", index=False)
    with pytest.raises(CatalogError, match="has no row for 1 galaxy: 'galaxy_00'"):
        merge_predictions(survey_folder, tmp_path / "merged.csv", catalog=galaxy_folder / "short.csv")
    whole.assign(probability_not_ring=0, probability_ring=1).to_csv(galaxy_folder / "twice.csv", index=False)
    with pytest.raises(CatalogError, match="both have 'probability_not_ring', 'probability_ring'; rename"):
        merge_predictions(survey_folder, tmp_path / "merged.csv", catalog=galaxy_folder / "twice.csv")
    whole.assign(**{"größe": 1}).to_csv(galaxy_folder / "foreign.csv", index=False)
    with pytest.raises(CatalogError, match=r"merged\.fits has a column 'größe', and in FITS a name has at most 68"):
        merge_predictions(survey_folder, tmp_path / "merged.fits", catalog=galaxy_folder / "foreign.csv")
    assert not list(tmp_path.glob("*merged*"))


def test_what_is_not_finished_or_damaged_is_not_merged(survey_folder, tmp_path):
    with pytest.raises(SurveyError, match="holds no predictions of a survey"):
        merge_predictions(tmp_path, tmp_path / "merged.csv")
    (tmp_path / "manifest.json").write_text('{"name": "of something else"}')
    with pytest.raises(SurveyError, match="holds no predictions of a survey; give the output of zoobot-hf predict"):
        merge_predictions(tmp_path, tmp_path / "merged.csv")
    (survey_folder / "predictions/000001.parquet").write_bytes(b"")
    with pytest.raises(SurveyError, match=r"000001\.parquet is damaged or missing"):
        merge_predictions(survey_folder, tmp_path / "merged.csv")
    manifest = json.loads((survey_folder / "manifest.json").read_text())
    (survey_folder / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(SurveyError, match="is not finished"):
        merge_predictions(survey_folder, tmp_path / "merged.csv")


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("merged.txt", "predictions", "has the suffix '.txt'"),
        ("merged.csv", "nice", "table is 'nice'"),
        ("merged.csv", "friendly", "the model has no decision tree"),
    ],
)
def test_formats_and_tables_that_do_not_exist_are_refused(survey_folder, tmp_path, name, table, message):
    with pytest.raises(ValueError, match=message):
        merge_predictions(survey_folder, tmp_path / name, table=table)


@pytest.mark.parametrize("suffix", [".fits", ".vot"])
def test_long_numbers_of_the_catalog_keep_every_digit(suffix, survey_folder, galaxy_folder, tmp_path):
    catalog = pd.read_csv(galaxy_folder / "catalog.csv")[["id_str"]]  # no images are needed
    catalog["target"] = pd.array([None, *range(39627733663191235, 39627733663191235 + 39)], dtype="Int64")
    catalog.to_csv(galaxy_folder / "targets.csv", index=False)
    merge_predictions(survey_folder, tmp_path / f"merged{suffix}", catalog=galaxy_folder / "targets.csv")
    target = Table.read(tmp_path / f"merged{suffix}")["target"]
    assert target.tolist() == [None, *catalog["target"][1:]]


def test_a_fits_table_names_a_model_whose_path_is_not_in_ascii(survey_folder, tmp_path):
    path = survey_folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": "modèle"}))
    merge_predictions(survey_folder, tmp_path / "merged.fits")
    assert fits.getheader(tmp_path / "merged.fits", 1)["MODEL"] == r"mod\xe8le"
