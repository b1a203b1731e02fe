from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_models import with_decided_head

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification, predict_galaxies, read_galaxies
from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.data.images import BATCHES_IN_A_TURN
from zoobot_hf.training import machine


@pytest.fixture
def catalog(galaxy_folder):
    return read_galaxies(galaxy_folder)


def own_probabilities(model, processor, images):
    with torch.no_grad():
        return model(pixel_values=processor(images)["pixel_values"]).logits.softmax(-1).numpy()


@pytest.mark.parametrize("name", ["layer_norm_model", "batch_norm_model", "vit_model", "timm_model"])
@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_the_table_says_what_the_model_says(name, batch_size, request, processor, catalog, galaxy_images):
    model = request.getfixturevalue(name)
    table, failures = predict_galaxies(model, processor, catalog, batch_size=batch_size)
    expected = own_probabilities(model, processor, galaxy_images)
    assert table["id_str"].tolist() == catalog["id_str"].tolist()
    assert np.abs(table["probability_ring"].to_numpy() - expected[:, 1]).max() < 1e-6
    assert np.abs(table["probability_not_ring"].to_numpy() - expected[:, 0]).max() < 1e-6
    assert (table["predicted_label"] == np.where(expected[:, 1] > expected[:, 0], "ring", "not ring")).all()
    assert expected[:, 1].std() > 1e-5  # and not the same for every galaxy
    assert failures.empty


@pytest.mark.parametrize("name", ["layer_norm_model", "batch_norm_model", "timm_model"])
def test_bfloat16_is_the_encoders_alone_and_only_on_request(name, request, processor, catalog):
    model = request.getfixturevalue(name)
    exact, rounded = (predict_galaxies(model, processor, catalog, bf16=bf16).table for bf16 in (False, True))
    pd.testing.assert_frame_equal(predict_galaxies(model, processor, catalog).table, exact)
    difference = (rounded["probability_ring"] - exact["probability_ring"]).abs()
    assert 0 < difference.max() < 0.02
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_catalogs_order_is_kept(layer_norm_model, processor, catalog):
    shuffled = catalog.sample(frac=1, random_state=0)
    in_order = predict_galaxies(layer_norm_model, processor, catalog, batch_size=8).table.set_index("id_str")
    table = predict_galaxies(layer_norm_model, processor, shuffled, batch_size=8).table
    assert table["id_str"].tolist() == shuffled["id_str"].tolist()
    expected = in_order.loc[table["id_str"], "probability_ring"].to_numpy()
    assert np.abs(table["probability_ring"].to_numpy() - expected).max() < 1e-6


def test_dropout_and_batch_statistics_have_no_say(batch_norm_model, processor, catalog):
    expected = predict_galaxies(batch_norm_model, processor, catalog).table
    again = predict_galaxies(batch_norm_model.train(), processor, catalog).table
    pd.testing.assert_frame_equal(again, expected)


def test_what_cannot_be_read_is_listed_with_its_reason(layer_norm_model, processor, catalog, galaxy_images):
    paths = catalog["file_loc"]
    open(paths[0], "wb").close()
    with open(paths[11], "w") as file:
        file.write("not an image")
    Image.new("F", (8, 8)).save(paths[12], format="TIFF")
    catalog.loc[39, "file_loc"] = "/nowhere/galaxy.png"
    table, failures = predict_galaxies(layer_norm_model, processor, catalog, batch_size=12)
    broken = [0, 11, 12, 39]
    assert failures["id_str"].tolist() == catalog["id_str"][broken].tolist()
    assert failures["file_loc"].tolist() == catalog["file_loc"][broken].tolist()
    assert failures["reason"].str.split(":").str[0].tolist() == [
        "the file is empty",
        "it is not an image in a format that PIL knows",
        "the processor refuses it",
        "there is no such file",
    ]
    left = [index for index in range(40) if index not in broken]
    assert table["id_str"].tolist() == catalog["id_str"][left].tolist()
    expected = own_probabilities(layer_norm_model, processor, [galaxy_images[index] for index in left])
    assert np.abs(table["probability_ring"].to_numpy() - expected[:, 1]).max() < 1e-6


def test_a_batch_without_a_readable_galaxy_is_passed_over(layer_norm_model, processor, catalog):
    for path in catalog["file_loc"][5:10]:
        open(path, "wb").close()
    table, failures = predict_galaxies(layer_norm_model, processor, catalog, batch_size=5)
    assert len(table) == 35
    assert len(failures) == 5


def test_where_all_fail_the_table_is_empty(layer_norm_model, processor, catalog):
    catalog["file_loc"] = "/nowhere/galaxy.png"
    table, failures = predict_galaxies(layer_norm_model, processor, catalog)
    assert list(table.columns) == ["id_str", "predicted_label", "probability_not_ring", "probability_ring"]
    assert table.empty
    assert len(failures) == 40
    assert set(failures["reason"]) == {"there is no such file"}


def test_a_table_that_nothing_has_checked_is_checked(layer_norm_model, processor, catalog):
    numbered = catalog.assign(id_str=range(40), file_loc=catalog["file_loc"].map(Path))
    assert predict_galaxies(layer_norm_model, processor, numbered).table["id_str"].tolist() == [*map(str, range(40))]
    for wrong, message in (
        (catalog["file_loc"][0], "the catalog is a str and no table of pandas; read it with read_galaxies"),
        (catalog.drop(columns="id_str"), "the catalog has no column 'id_str'"),
        (catalog.assign(id_str=1.237648720693756e18), "the catalog has floating-point numbers in 'id_str'"),
        (catalog.assign(file_loc=None), "the catalog has no 'file_loc' in 40 of 40 rows"),
    ):
        with pytest.raises(CatalogError, match=message):
            predict_galaxies(layer_norm_model, processor, wrong)
    with pytest.raises(ValueError, match="batch_size is 0; give 1 or more"):
        predict_galaxies(layer_norm_model, processor, catalog, batch_size=0)


def test_what_processes_read_gives_the_same(layer_norm_model, processor, catalog, monkeypatch):
    open(catalog["file_loc"][3], "wb").close()
    catalog.loc[10:19, "file_loc"] = "/nowhere/galaxy.png"
    expected = predict_galaxies(layer_norm_model, processor, catalog, batch_size=5)
    monkeypatch.setattr(machine, "_reading_processes", lambda device: 2)
    predictions = predict_galaxies(layer_norm_model, processor, catalog, batch_size=5)
    pd.testing.assert_frame_equal(predictions.table, expected.table)
    pd.testing.assert_frame_equal(predictions.failures, expected.failures)
    assert len(expected.failures) == 11


def test_a_regression_is_predicted_in_its_own_units(layer_norm_model, processor, catalog, galaxy_images):
    encoder_config = layer_norm_model.config.encoder_config
    labels = {0: "bar fraction", 1: "ring fraction"}
    config = ZoobotConfig(encoder_config, problem_type="regression", unit_interval=True, id2label=labels)
    model = with_decided_head(ZoobotForImageClassification(config).eval())
    table = predict_galaxies(model, processor, catalog).table
    assert list(table.columns) == ["id_str", "predicted_bar_fraction", "predicted_ring_fraction"]
    with torch.no_grad():
        expected = model(pixel_values=processor(galaxy_images)["pixel_values"]).logits
    assert np.abs(table.iloc[:, 1:].to_numpy(dtype=float) - expected.numpy()).max() < 1e-6
    assert table.iloc[:, 1:].to_numpy().min() > 0


def test_no_more_images_are_held_than_are_read_in_a_turn(layer_norm_model, processor, catalog, monkeypatch):
    opened, predicted, ahead = [], [], []

    def count_opened(self, image, **keywords):
        opened.append(image)
        return torch.zeros(3, 32, 32, dtype=torch.uint8)

    def count_predicted(pixel_values, **keywords):
        if len(pixel_values) == 2:  # a single one shows which layers can be fused
            ahead.append(len(opened) - len(predicted))
            predicted.extend(pixel_values)
        return (torch.zeros(len(pixel_values), 2),)

    monkeypatch.setattr(type(processor), "crop_and_resize", count_opened)
    monkeypatch.setattr(layer_norm_model, "forward", count_predicted)
    predict_galaxies(layer_norm_model, processor, catalog, batch_size=2)
    assert len(opened) == len(predicted) == 40
    assert max(ahead) == BATCHES_IN_A_TURN * 2
