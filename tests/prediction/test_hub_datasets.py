import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.prediction import hub_datasets, runs
from zoobot_hf.prediction.embeddings import embed_survey
from zoobot_hf.prediction.hub_datasets import HubDataset
from zoobot_hf.prediction.pieces import (
    attach_readers,
    check_catalog,
    find_source,
    name_of,
    names_hub_dataset,
    read_pieces,
)
from zoobot_hf.prediction.runs import SurveyError
from zoobot_hf.prediction.survey import predict_survey

SIZES = {"shard_size": 6, "batch_size": 4}


def make_rows(galaxy_folder, numbers):
    names = [f"galaxy_{number:02d}" for number in numbers]
    contents = [(galaxy_folder / f"images/{name}.png").read_bytes() for name in names]
    images = [{"bytes": content, "path": f"{name}.png"} for name, content in zip(names, contents, strict=True)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"id_str": names, "image": pa.array(images, kind), "plain": contents, "number": [*numbers]})


@pytest.fixture
def upload(hub_token, repo_id, tmp_path):
    """Puts tables into a dataset on the Hub, each a file of many parts, and gives the dataset's id."""

    def run(*tables, split="train"):
        folder = tmp_path / "upload/data"
        folder.mkdir(parents=True, exist_ok=True)
        for number, table in enumerate(tables):
            path = folder / f"{split}-{number:05d}-of-{len(tables):05d}.parquet"
            pq.write_table(table, path, row_group_size=7)
        api = HfApi(token=hub_token)
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder.parent, repo_type="dataset")
        return repo_id

    return run


@pytest.fixture
def galaxies(upload, galaxy_folder):
    """The drawn galaxies in two files, the 17th of them empty and the 30th missing."""
    (galaxy_folder / "images/galaxy_17.png").write_bytes(b"")
    second = make_rows(galaxy_folder, range(18, 40))
    images = second["image"].to_pylist()
    images[12] = None
    return upload(
        make_rows(galaxy_folder, range(18)), second.set_column(1, "image", pa.array(images, second["image"].type))
    )


@pytest.fixture
def predict(layer_norm_model, processor, tmp_path):
    def run(catalog, output=tmp_path / "out", **options):
        done = predict_survey(layer_norm_model, processor, catalog, output, **{**SIZES, **options})
        return done, pd.read_parquet(Path(output) / "predictions"), pd.read_parquet(Path(output) / "failures.parquet")

    return run


def count_fetched(monkeypatch):
    fetched = []
    fetch = hub_datasets._fetch_images
    monkeypatch.setattr(hub_datasets, "_fetch_images", lambda rows: fetched.append(rows) or fetch(rows))
    return fetched


def test_a_dataset_is_predicted_like_the_images_in_it(predict, galaxies, galaxy_folder, tmp_path):
    (galaxy_folder / "images/galaxy_30.png").write_bytes(b"")
    _, expected, _ = predict(galaxy_folder, output=tmp_path / "folder")
    done, table, failures = predict(galaxies)
    assert done == (tmp_path / "out", 40, 2)
    pd.testing.assert_frame_equal(table, expected)
    commit = HfApi().dataset_info(galaxies).sha
    address = f"hf://datasets/{galaxies}@{commit}/data/train-0000"
    assert failures.to_numpy().tolist() == [
        ["galaxy_17", f"{address}0-of-00002.parquet#17", "the file is empty"],
        ["galaxy_30", f"{address}1-of-00002.parquet#12", "there is no image in this row of the dataset"],
    ]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["catalog"] == f"{galaxies} at {commit}"


def test_a_run_that_goes_on_fetches_only_what_is_missing(predict, galaxies, tmp_path, monkeypatch):
    _, expected, _ = predict(galaxies)
    (tmp_path / "out/predictions/000001.parquet").unlink()
    fetched = count_fetched(monkeypatch)
    _, table, _ = predict(galaxies)
    pd.testing.assert_frame_equal(table, expected)
    assert [[row["row"] for row in rows] for rows in fetched] == [[6], [0, 1, 2, 3, 4]]


def test_failures_are_tried_again_from_the_parts_that_have_them(predict, galaxies, tmp_path, monkeypatch):
    _, expected, failures = predict(galaxies)
    fetched = count_fetched(monkeypatch)
    _, table, again = predict(galaxies, retry_failures=True)
    pd.testing.assert_frame_equal(table, expected)
    pd.testing.assert_frame_equal(again, failures)
    assert [[row["id_str"] for row in rows if row] for rows in fetched] == [["galaxy_17"], ["galaxy_30"]]


def test_a_dataset_that_has_changed_is_refused_and_its_old_commit_goes_on(predict, galaxies, upload, galaxy_folder):
    _, expected, _ = predict(galaxies)
    commit = HfApi().dataset_info(galaxies).sha
    upload(make_rows(galaxy_folder, range(20)), make_rows(galaxy_folder, range(20, 40)))
    with pytest.raises(SurveyError, match="another catalog, or one that has changed since"):
        predict(galaxies)
    pd.testing.assert_frame_equal(predict(HubDataset(galaxies, revision=commit))[1], expected)


def test_a_dataset_is_embedded_and_the_sample_for_pca_is_read_from_it(
    galaxies, layer_norm_model, processor, galaxy_folder, tmp_path
):
    (galaxy_folder / "images/galaxy_30.png").write_bytes(b"")
    tables = []
    for source, name in ((galaxies, "hub"), (galaxy_folder, "folder")):
        embed_survey(layer_norm_model, processor, source, tmp_path / name, pca=3, **SIZES)
        tables.append(pd.read_parquet(tmp_path / name / "embeddings"))
    assert tables[0]["id_str"].tolist() == tables[1]["id_str"].tolist()
    np.testing.assert_array_equal(np.stack(tables[0]["embedding"]), np.stack(tables[1]["embedding"]))


def test_names_and_images_may_be_in_other_columns_and_rows_without_names_are_numbered(upload, galaxy_folder):
    name = upload(make_rows(galaxy_folder, range(10)), make_rows(galaxy_folder, range(10, 20)))
    numbered = find_source(HubDataset(name, id_column=None, image_column="plain"))
    piece = pd.concat(read_pieces(numbered))
    assert piece["id_str"].tolist() == [f"train-{number}" for number in range(20)]
    rows = attach_readers([None, *piece.to_dict("records")])
    assert next(rows) is None
    contents = [row["read"]() for row in rows]
    assert contents == [(galaxy_folder / f"images/galaxy_{number:02d}.png").read_bytes() for number in range(20)]
    assert pd.concat(read_pieces(find_source(HubDataset(name, id_column="number"))))["id_str"].tolist()[:2] == [
        "0",
        "1",
    ]


def test_of_several_splits_one_is_chosen(upload, galaxy_folder):
    upload(make_rows(galaxy_folder, range(10)))
    name = upload(make_rows(galaxy_folder, range(10, 13)), split="test")
    with pytest.raises(CatalogError, match=r"split is None, and the dataset .* has 'train', 'test'; choose one"):
        check_catalog(find_source(name))
    source = find_source(HubDataset(name, split="test"))
    assert check_catalog(source).galaxies == 3
    assert name_of(source).startswith(f"{name} test at ")


def test_only_the_names_are_read_to_check_a_dataset(hub, upload, galaxy_folder):
    rows = make_rows(galaxy_folder, [*range(40)])
    noise = pa.array([np.random.default_rng(number).bytes(100_000) for number in range(40)])
    source = find_source(HubDataset(upload(rows.append_column("noise", noise)), image_column="noise"))
    sent = []
    forward = hub_datasets.HfFileSystem().open
    path = hub_datasets._find_files(source)[1][0]
    with forward(path, "rb", cache_type="none") as file:
        size = file.size

    class Counting:
        def open(self, *args, **options):
            file = forward(*args, **options)
            read_range = file.cache.fetcher
            file.cache.fetcher = lambda start, end: sent.append(end - start) or read_range(start, end)
            return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_datasets, "HfFileSystem", Counting)
        assert check_catalog(source).galaxies == 40
    assert size > 4_000_000
    assert 0 < sum(sent) < 100_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"id_column": "name"}, "has no column 'name'; its columns are 'id_str', 'image', 'plain', 'number'"),
        ({"image_column": "number"}, "has int64 in the column 'number', and no files of images"),
        ({"configuration": "rings"}, "can't be read: BuilderConfig 'rings' not found"),
        ({"revision": "v9"}, "can't be read: .*v9.*Check the name, the configuration, the revision and the network"),
        ({"name": "astronomer/nothing"}, "^astronomer/nothing is not here, and as a dataset on the Hub it can't be"),
    ],
)
def test_what_can_not_be_read_is_named(source, message, upload, galaxy_folder):
    name = upload(make_rows(galaxy_folder, range(3)))
    with pytest.raises(CatalogError, match=message):
        check_catalog(find_source(HubDataset(**{"name": name, **source})))


def test_a_dataset_that_is_not_in_parquet_files_is_refused(hub_token, repo_id, galaxy_folder):
    api = HfApi(token=hub_token)
    api.create_repo(repo_id, repo_type="dataset")
    api.upload_folder(repo_id=repo_id, folder_path=galaxy_folder / "images", repo_type="dataset")
    with pytest.raises(CatalogError, match=r"is not in Parquet files, .*choose the revision refs/convert/parquet"):
        check_catalog(find_source(repo_id))


def test_where_the_hub_fails_finished_shards_stay_and_the_run_goes_on(predict, galaxies, tmp_path, monkeypatch):
    _, expected, _ = predict(galaxies, output=tmp_path / "clean")
    write = runs.write_shard

    def write_and_fail(path, shard):
        write(path, shard)
        if path.name == "000002.parquet":
            monkeypatch.setattr(hub_datasets, "_open_parquet", refuse)

    def refuse(path):
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(runs, "write_shard", write_and_fail)
    with pytest.raises(CatalogError, match=r"the line is dead\. .*what is finished stays"):
        predict(galaxies)
    assert len(list((tmp_path / "out/predictions").iterdir())) == 3
    monkeypatch.undo()
    pd.testing.assert_frame_equal(predict(galaxies)[1], expected)


def test_an_id_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "galaxies/images").mkdir(parents=True)
    assert names_hub_dataset("owner/galaxies")
    for path in ("galaxies/images", "galaxies/missing.csv", "galaxies/*", "shards/000.tar", "images", "/a/b"):
        assert not names_hub_dataset(path)
