import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import with_decided_head

from zoobot_hf import ZoobotConfig, ZoobotForGalaxyZoo, ZoobotForImageClassification, ZoobotImageProcessor, ZoobotModel
from zoobot_hf.prediction import embeddings, runs
from zoobot_hf.prediction.components import read_components, write_components
from zoobot_hf.prediction.embeddings import embed_survey, hash_encoder, predict_embeddings
from zoobot_hf.prediction.merge import merge_predictions
from zoobot_hf.prediction.runs import SurveyError
from zoobot_hf.prediction.survey import predict_survey

SIZES = {"shard_size": 6, "batch_size": 4}


@pytest.fixture
def embed(layer_norm_model, processor, galaxy_folder, tmp_path):
    """Embeds the drawn galaxies into tmp_path/embedded, and gives the names and the values."""

    def run(model=layer_norm_model, output=tmp_path / "embedded", **options):
        embed_survey(model, processor, galaxy_folder, output, **{**SIZES, **options})
        table = pd.read_parquet(output / "embeddings")
        return table["id_str"].tolist(), np.stack(table["embedding"])

    return run


@pytest.fixture
def predict(layer_norm_model, processor, tmp_path):
    """Predicts from tmp_path/embedded into tmp_path/out, and gives the table."""

    def run(model=layer_norm_model, processor=processor, output=tmp_path / "out", **options):
        done = predict_embeddings(model, processor, tmp_path / "embedded", output, **options)
        return done, pd.read_parquet(output / "predictions"), pd.read_parquet(output / "failures.parquet")

    return run


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# Embeddings of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("float32", 1e-5)])
def test_the_table_has_what_the_encoder_says(embed, layer_norm_model, processor, galaxy_images, dtype, most):
    names, values = embed(dtype=dtype)
    with torch.inference_mode():
        expected = layer_norm_model.zoobot(**processor(galaxy_images)).embeddings.numpy()
    assert names == [f"galaxy_{number:02d}" for number in range(40)]
    assert values.dtype == dtype
    assert np.abs(values - expected).max() < most
    assert values.std(axis=0).max() > 10 * most  # and not the same for every galaxy


def test_the_column_is_a_list_of_fixed_size_also_where_all_of_a_file_fail(embed, galaxy_folder, tmp_path):
    for number in range(6):
        (galaxy_folder / f"images/galaxy_{number:02d}.png").unlink()
    names, values = embed()
    assert names == [f"galaxy_{number:02d}" for number in range(6, 40)]
    assert values.shape == (34, 16)
    for number in range(7):
        schema = embeddings.read_shard(tmp_path / f"embedded/embeddings/{number:06d}.parquet").table.schema
        assert str(schema.field("embedding").type) == "fixed_size_list<element: halffloat>[16]"


def test_a_run_that_was_stopped_goes_on(embed, tmp_path, monkeypatch):
    names, expected = embed(output=tmp_path / "clean")
    embed()
    path = tmp_path / "embedded/embeddings/000003.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    computed = []
    real_run = runs.run_galaxies

    def run(runner, processor, rows, **options):
        rows = list(rows)
        computed.extend(row["id_str"] for row in rows)
        return real_run(runner, processor, rows, **options)

    monkeypatch.setattr(runs, "run_galaxies", run)
    again, values = embed()
    assert again == names
    assert np.array_equal(values, expected)
    assert computed == names[18:24]


def test_failures_are_named_and_tried_again(embed, galaxy_folder, tmp_path):
    names, clean = embed(output=tmp_path / "clean")
    content = (galaxy_folder / "images/galaxy_08.png").read_bytes()
    for number in (8, 9):
        (galaxy_folder / f"images/galaxy_{number:02d}.png").write_bytes(b"")
    found, values = embed()
    assert found == [name for name in names if name not in ("galaxy_08", "galaxy_09")]
    assert np.array_equal(values, np.delete(clean, [8, 9], axis=0))
    (galaxy_folder / "images/galaxy_08.png").write_bytes(content)
    found, values = embed(retry_failures=True)
    assert found == [name for name in names if name != "galaxy_09"]
    assert np.array_equal(values, np.delete(clean, 9, axis=0))
    failures = pd.read_parquet(tmp_path / "embedded/failures.parquet")
    assert failures["id_str"].tolist() == ["galaxy_09"]


def test_an_embedding_that_does_not_fit_its_type_is_a_failure(embed, layer_norm_model, tmp_path):
    with torch.no_grad():
        layer_norm_model.encoder.layernorm.weight.fill_(1e6)
    names, _ = embed(dtype="float32")
    assert len(names) == 40
    embed_into = tmp_path / "half"
    with pytest.raises(ValueError, match="need at least one array"):  # all have failed
        embed(output=embed_into)
    reasons = pd.read_parquet(embed_into / "failures.parquet")["reason"]
    assert set(reasons) == {"the model's output for it is not a finite number in float16"}
    assert len(reasons) == 40


def test_other_settings_on_the_same_output_are_refused(embed, layer_norm_model, processor, galaxy_folder, tmp_path):
    embed()
    with pytest.raises(SurveyError, match=r"holds the embeddings of another number type .*choose another output"):
        embed(dtype="float32")
    with pytest.raises(SurveyError, match="another precision, bfloat16 or not"):
        embed(bf16=True)
    with pytest.raises(SurveyError, match="another PCA"):
        embed(pca=3)
    with pytest.raises(SurveyError, match="holds the embeddings of another command"):
        predict_survey(layer_norm_model, processor, galaxy_folder, tmp_path / "embedded")
    with pytest.raises(ValueError, match="dtype is 'int8'; choose float16 or float32"):
        embed(dtype="int8")


def test_a_head_does_not_change_the_embeddings_folder(embed, layer_norm_model):
    embed()
    torch.nn.init.ones_(layer_norm_model.head[-1].weight)
    embed()


# Principal components -----------------------------------------------------------------------------------------------


def test_embeddings_are_reduced_by_components_that_are_kept(embed, tmp_path):
    _, whole = embed(dtype="float32", output=tmp_path / "whole")
    _, reduced = embed(dtype="float32", pca=3)
    components = read_components(tmp_path / "embedded/pca.safetensors")
    assert components.directions.shape == (3, 16)
    np.testing.assert_allclose(reduced, components.reduce(whole), atol=1e-5)
    # The sample is all of so small a catalog, so these are the directions of largest variance.
    expected = np.linalg.svd(whole - whole.mean(axis=0), full_matrices=False)[1][:3] ** 2 / 40
    np.testing.assert_allclose(reduced.var(axis=0), expected, rtol=1e-3)


def test_a_run_does_not_go_on_with_other_components(embed, tmp_path):
    embed(pca=3, output=tmp_path / "first")
    embed(pca=3)
    path = tmp_path / "embedded/pca.safetensors"
    other = read_components(path)
    write_components(other._replace(directions=-other.directions), path)
    with pytest.raises(SurveyError, match=r"000000\.parquet is of another model or catalog"):
        embed(pca=3)


def test_a_run_with_components_goes_on_with_the_same(embed, tmp_path, monkeypatch):
    _, expected = embed(pca=3)
    (tmp_path / "embedded/embeddings/000002.parquet").unlink()
    monkeypatch.setattr(embeddings, "fit_components", lambda *args, **options: pytest.fail("fitted again"))
    assert np.array_equal(embed(pca=3)[1], expected)


def test_the_sample_is_spread_over_the_catalog(embed, monkeypatch, tmp_path):
    seen = []
    real_run = embeddings.run_galaxies

    def run(runner, processor, rows, **options):
        rows = list(rows)
        seen.extend(row["id_str"] for row in rows)
        return real_run(runner, processor, rows, **options)

    monkeypatch.setattr(embeddings, "run_galaxies", run)
    monkeypatch.setattr(embeddings, "GALAXIES_FOR_PCA", 4)
    read_pieces = embeddings.read_pieces
    monkeypatch.setattr(embeddings, "read_pieces", lambda source, rows=15: read_pieces(source, rows=rows))
    embed(pca=2)
    assert seen == ["galaxy_00", "galaxy_13", "galaxy_26", "galaxy_39"]


def test_components_of_another_run_are_applied(embed, galaxy_folder, tmp_path):
    _, expected = embed(pca=3, output=tmp_path / "first")
    _, reduced = embed(pca=tmp_path / "first")
    assert np.array_equal(reduced, expected)
    again = read_components(tmp_path / "embedded/pca.safetensors")
    assert again.fingerprint() == read_components(tmp_path / "first/pca.safetensors").fingerprint()


def test_components_that_do_not_fit_are_refused(embed, vit_model, batch_norm_model, tmp_path):
    embed(pca=3)
    batch_norm_model.config.embedding_size = 8
    with pytest.raises(ValueError, match=r"is for embeddings of 16 dimensions, and this encoder's have 8"):
        embed(model=batch_norm_model, pca=tmp_path / "embedded", output=tmp_path / "other")
    with pytest.raises(ValueError, match="pca is 50; 40 galaxies with embeddings of 16 dimensions allow 1 to 16"):
        embed(pca=50, output=tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_a_folder_in_which_no_galaxy_was_done_is_begun_anew(embed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "fit_components", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(pca=3)
    assert embed(pca=2)[1].shape == (40, 2)


def test_an_output_that_is_a_file_is_refused(embed, tmp_path):
    (tmp_path / "embedded").write_text("My thesis")
    with pytest.raises(SurveyError, match="embedded, which is a file; choose a folder"):
        embed()


# Predictions from embeddings ----------------------------------------------------------------------------------------


def test_a_head_predicts_from_embeddings_what_the_model_predicts_from_images(
    embed, predict, layer_norm_model, processor, galaxy_folder, tmp_path
):
    config = layer_norm_model.config
    config.training_prevalence = {"ring": 0.5, "not ring": 0.5}
    config.sky_prevalence = {"ring": 0.3, "not ring": 0.7}
    config.predictions_for, config.calibration_temperature = "sky", 0.5
    predict_survey(layer_norm_model, processor, galaxy_folder, tmp_path / "first", **SIZES)
    middle = float(pd.read_parquet(tmp_path / "first/predictions")["probability_ring"].median()) + 1e-5
    config.decision_threshold = {"ring": middle}
    predict_survey(layer_norm_model, processor, galaxy_folder, tmp_path / "images", **SIZES)
    expected = pd.read_parquet(tmp_path / "images/predictions")
    embed(dtype="float32")
    done, table, failures = predict(model_name="astronomer/rings")
    assert done == (tmp_path / "out", 40, 0)
    assert failures.empty
    pd.testing.assert_frame_equal(table, expected, rtol=0, atol=1e-6)
    assert 0 < table["selected"].sum() < 40
    assert merge_predictions(tmp_path / "out", tmp_path / "merged.fits") == 40
    options = {**SIZES, "prevalence": "training"}
    predict_survey(layer_norm_model, processor, galaxy_folder, tmp_path / "images-training", **options)
    expected = pd.read_parquet(tmp_path / "images-training/predictions")
    _, table, _ = predict(output=tmp_path / "training", prevalence="training")
    assert "selected" not in table  # the threshold is for the sky
    pd.testing.assert_frame_equal(table, expected, rtol=0, atol=1e-6)


def test_half_precision_changes_probabilities_in_the_fourth_digit(
    embed, predict, layer_norm_model, processor, galaxy_folder, tmp_path
):
    predict_survey(layer_norm_model, processor, galaxy_folder, tmp_path / "images", **SIZES)
    expected = pd.read_parquet(tmp_path / "images/predictions")["probability_ring"]
    embed()
    difference = np.abs(predict()[1]["probability_ring"] - expected).max()
    assert 0 < difference < 1e-3


def test_a_decision_tree_is_predicted_from_embeddings(embed, layer_norm_model, processor, galaxy_folder, tmp_path):
    from zoobot_hf import load_survey

    tree = load_survey("gz2").to_dict()
    torch.manual_seed(1)
    model = ZoobotForGalaxyZoo(ZoobotConfig(layer_norm_model.config.encoder_config, decision_tree=tree)).eval()
    with_decided_head(model).zoobot.load_state_dict(layer_norm_model.zoobot.state_dict())
    embed(dtype="float32")
    predict_survey(model, processor, galaxy_folder, tmp_path / "images", **SIZES)
    predict_embeddings(model, processor, tmp_path / "embedded", tmp_path / "out")
    table, expected = (pd.read_parquet(tmp_path / name / "predictions") for name in ("out", "images"))
    pd.testing.assert_frame_equal(table, expected, rtol=1e-5)


def test_what_failed_then_is_a_failure_now_until_it_is_mended(embed, predict, galaxy_folder):
    path = galaxy_folder / "images/galaxy_08.png"
    content = path.read_bytes()
    path.write_bytes(b"")
    embed()
    done, table, failures = predict()
    assert done.failures == 1
    assert failures.to_numpy().tolist() == [["galaxy_08", str(path), "the file is empty"]]
    assert len(table) == 39
    path.write_bytes(content)
    embed(retry_failures=True)
    assert len(predict()[1]) == 39  # not unasked
    done, table, failures = predict(retry_failures=True)
    assert done.failures == 0
    assert table["id_str"].tolist() == [f"galaxy_{number:02d}" for number in range(40)]


def test_where_all_of_a_file_fail_the_predictions_can_still_be_read(embed, predict, galaxy_folder):
    for number in range(6, 12):
        (galaxy_folder / f"images/galaxy_{number:02d}.png").unlink()
    embed()
    done, table, failures = predict()
    assert done.failures == len(failures) == 6
    assert len(table) == 34
    assert table["probability_ring"].dtype == np.float32


def test_a_finished_run_is_not_computed_again(embed, predict, monkeypatch):
    embed()
    _, expected, _ = predict()
    monkeypatch.setattr(embeddings, "survey_table", lambda *args, **options: pytest.fail("computed"))
    pd.testing.assert_frame_equal(predict()[1], expected)


def test_embeddings_of_the_encoder_alone_serve_a_model_that_was_saved_with_it(
    layer_norm_model, processor, galaxy_folder, tmp_path
):
    layer_norm_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    embed_survey(ZoobotModel.from_pretrained(tmp_path / "model"), processor, galaxy_folder, tmp_path / "embedded")
    model = ZoobotForImageClassification.from_pretrained(tmp_path / "model")
    own_processor = ZoobotImageProcessor.from_pretrained(tmp_path / "model")
    done = predict_embeddings(model, own_processor, tmp_path / "embedded", tmp_path / "out")
    assert done.galaxies == 40
    assert done.failures == 0


def test_embeddings_of_another_encoder_are_refused(embed, predict, layer_norm_model, batch_norm_model):
    embed(model_name="astronomer/encoder")
    trained_on = copy.deepcopy(layer_norm_model)
    with torch.no_grad():
        next(trained_on.encoder.parameters()).view(-1)[0] += 1e-3
    for other in (batch_norm_model, trained_on):
        with pytest.raises(SurveyError, match=r"are of another encoder \(astronomer/encoder\)"):
            predict(model=other)


def test_the_hash_of_an_encoder_knows_weights_buffers_and_pooling(batch_norm_model):
    before = hash_encoder(batch_norm_model)
    torch.nn.init.ones_(batch_norm_model.head[-1].weight)
    assert hash_encoder(batch_norm_model) == before == hash_encoder(batch_norm_model.zoobot)
    pooled = copy.deepcopy(batch_norm_model)
    pooled.config.pooling = "mean"
    moved = copy.deepcopy(batch_norm_model)
    next(moved.encoder.buffers()).add_(1)
    assert len({before, hash_encoder(pooled), hash_encoder(moved)}) == 3


def test_embeddings_of_otherwise_prepared_images_are_refused(embed, predict):
    embed()
    with pytest.raises(SurveyError, match=r"the image processors differ in zoom; run zoobot-hf embed"):
        predict(processor=ZoobotImageProcessor(32, zoom=1.5))


def test_reduced_unfinished_or_missing_embeddings_are_refused(embed, predict, tmp_path):
    with pytest.raises(SurveyError, match="holds no embeddings"):
        predict()
    embed(pca=3)
    with pytest.raises(SurveyError, match=r"were reduced by a PCA, and a head needs all of their 16 dimensions"):
        predict()
    manifest = manifest_of(tmp_path / "embedded")
    (tmp_path / "embedded/manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(SurveyError, match="is not finished"):
        predict()


def test_damaged_embeddings_are_named(embed, predict, tmp_path):
    embed()
    path = tmp_path / "embedded/embeddings/000002.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    for damaged in (content, b""):
        path.write_bytes(damaged)
        with pytest.raises(SurveyError, match=r"000002\.parquet is damaged or missing; run the same zoobot-hf embed"):
            predict()


def test_an_output_that_is_not_finite_is_a_failure(embed, predict, layer_norm_model):
    embed()
    with torch.no_grad():
        layer_norm_model.head[-1].bias.fill_(torch.nan)
    done, table, failures = predict()
    assert done.failures == 40
    assert table.empty
    assert set(failures["reason"]) == {"the model's output for its embedding is not a finite number"}


def test_a_failure_among_others_takes_no_name_from_them(embed, predict, monkeypatch):
    read_outputs = embeddings.read_outputs

    def read_every_second(outputs, **options):
        return np.where(np.arange(len(outputs))[:, None] % 2, read_outputs(outputs, **options), np.nan)

    names, _ = embed()
    monkeypatch.setattr(embeddings, "read_outputs", read_every_second)
    _, table, failures = predict()
    assert table["id_str"].tolist() == names[1::2]
    assert failures["id_str"].tolist() == names[::2]


def test_predictions_of_other_embeddings_are_refused(embed, predict, tmp_path):
    embed(dtype="float16")
    predict()
    shutil.rmtree(tmp_path / "embedded")
    embed(dtype="float32")
    with pytest.raises(SurveyError, match="holds the predictions of other embeddings, or of images"):
        predict()


def test_embeddings_are_not_merged_as_predictions(embed, tmp_path):
    embed()
    with pytest.raises(SurveyError, match="holds embeddings, which are Parquet files as they are"):
        merge_predictions(tmp_path / "embedded", tmp_path / "merged.fits")
