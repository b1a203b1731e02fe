import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from PIL import Image

from zoobot_hf import ZoobotForImageClassification, predict_galaxies, read_galaxies
from zoobot_hf.data.catalog import CatalogError
from zoobot_hf.data.images import open_image
from zoobot_hf.prediction import galaxies, runs, shards
from zoobot_hf.prediction.embeddings import embed_survey
from zoobot_hf.prediction.runs import SurveyError
from zoobot_hf.prediction.survey import predict_survey

SIZES = {"shard_size": 6, "batch_size": 4}


@pytest.fixture
def predict(layer_norm_model, processor, galaxy_folder, tmp_path):
    """Predicts the drawn galaxies into tmp_path/out, and gives the table."""

    def run(model=layer_norm_model, catalog=galaxy_folder, output=tmp_path / "out", **options):
        done = predict_survey(model, processor, catalog, output, **{**SIZES, **options})
        return done, pd.read_parquet(Path(output) / "predictions"), pd.read_parquet(Path(output) / "failures.parquet")

    return run


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def damage_files(folder):
    """Eight galaxies of the folder, each in another way not to be read; and their reasons."""
    path = lambda number: folder / f"images/galaxy_{number:02d}.png"  # noqa: E731
    path(0).write_bytes(b"")
    path(3).write_text("not an image")
    path(11).unlink()
    path(12).write_bytes(path(13).read_bytes()[:2000])
    Image.new("F", (8, 8)).save(path(20), format="TIFF")
    path(21).unlink()
    path(21).mkdir()
    Image.new("1", (10_000, 10_000)).save(path(38), format="PNG")
    fits.PrimaryHDU(np.full((8, 8), np.nan)).writeto(folder / "nan.fits", overwrite=True)
    (folder / "nan.fits").replace(path(39))
    return {
        "galaxy_00": "the file is empty",
        "galaxy_03": "it is not an image in a format that PIL knows",
        "galaxy_11": "there is no such file",
        "galaxy_12": "it is damaged",
        "galaxy_20": "the processor refuses it",
        "galaxy_21": "it is damaged",
        "galaxy_38": "it has over 89 million pixels and may be a decompression bomb",
        "galaxy_39": "the processor refuses it: 64 of 64 pixels are NaN or infinite",
    }


def test_the_shards_together_are_the_table_of_the_whole_catalog(
    predict, layer_norm_model, processor, galaxy_folder, tmp_path
):
    done, table, failures = predict(model_name="astronomer/rings")
    expected = predict_galaxies(layer_norm_model, processor, read_galaxies(galaxy_folder), batch_size=4).table
    assert done == (tmp_path / "out", 40, 0)
    assert len(list((tmp_path / "out/predictions").iterdir())) == 7
    assert table["id_str"].tolist() == expected["id_str"].tolist()
    assert table["predicted_label"].tolist() == expected["predicted_label"].tolist()
    assert np.abs(table["probability_ring"] - expected["probability_ring"]).max() < 1e-6
    assert list(failures.columns) == ["id_str", "file_loc", "reason"]
    assert failures.empty
    manifest = manifest_of(tmp_path / "out")
    assert manifest["model"] == "astronomer/rings"
    assert manifest["galaxies"] == 40
    assert manifest["finished"] is True
    assert manifest["processor"]["size"] == {"height": 32, "width": 32}


def test_a_finished_run_is_not_computed_again(predict, monkeypatch):
    _, expected, _ = predict()
    monkeypatch.setattr(runs, "run_galaxies", lambda *args, **options: pytest.fail("computed"))
    _, table, _ = predict()
    pd.testing.assert_frame_equal(table, expected)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty", "half-written"])
def test_a_shard_that_is_not_whole_is_computed_again(predict, damage, tmp_path):
    _, expected, _ = predict()
    path = tmp_path / "out/predictions/000003.parquet"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        place = content.index(b"galaxy_18")
        content[place + 7 : place + 9] = b"99"
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.rename(path.with_name(".partial-1-000003.parquet"))
    _, table, _ = predict()
    pd.testing.assert_frame_equal(table, expected)
    assert len(list((tmp_path / "out/predictions").iterdir())) == 7


def test_bad_files_are_failures_with_their_reason_and_no_other_row_moves(predict, galaxy_folder, tmp_path):
    _, clean, _ = predict()
    reasons = damage_files(galaxy_folder)
    done, table, failures = predict(output=tmp_path / "again")
    assert failures["id_str"].tolist() == list(reasons)
    assert done.failures == len(reasons)
    for reason, beginning in zip(failures["reason"], reasons.values(), strict=True):
        assert reason.startswith(beginning)
    left = clean[~clean["id_str"].isin(reasons)].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, left)  # to the last bit


REASONS_OF_DAMAGE = {
    "truncated": "it is damaged",
    "empty": "the file is empty",
    "no image": "it is not an image in a format that PIL knows",
    "missing": "there is no such file",
    "bomb": "it has over 89 million pixels and may be a decompression bomb",
    "NaN": "the processor refuses it: 64 of 64 pixels are NaN or infinite",
    "folder": "it is damaged",
}


def damage(path, kind, files):
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        contents = {"truncated": content[: len(content) // 2], "empty": b"", "no image": b"not an image", **files}
        path.write_bytes(contents[kind])


@pytest.mark.slow
def test_of_two_thousand_galaxies_exactly_the_hundred_bad_ones_fail(layer_norm_model, processor, tmp_path):
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"images/galaxy_{number:04d}.png" for number in range(2000)]
    paths[0].parent.mkdir()
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    predict_survey(layer_norm_model, processor, tmp_path / "images", tmp_path / "clean", shard_size=300, batch_size=16)
    clean = pd.read_parquet(tmp_path / "clean/predictions")
    clean["file_loc"] = [str(path) for path in paths]
    clean.to_csv(tmp_path / "catalog.csv", columns=["id_str", "file_loc"], index=False)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    fits.PrimaryHDU(np.full((8, 8), np.nan)).writeto(tmp_path / "nan.fits")
    files = {"bomb": (tmp_path / "bomb.png").read_bytes(), "NaN": (tmp_path / "nan.fits").read_bytes()}
    bad = sorted(generator.choice(2000, 100, replace=False))
    kinds = [list(REASONS_OF_DAMAGE)[place % len(REASONS_OF_DAMAGE)] for place in range(100)]
    for number, kind in zip(bad, kinds, strict=True):
        damage(paths[number], kind, files)

    output = tmp_path / "out"
    done = predict_survey(layer_norm_model, processor, tmp_path / "catalog.csv", output, shard_size=300, batch_size=16)
    failures = pd.read_parquet(output / "failures.parquet")
    assert done == (output, 2000, 100)
    assert failures["id_str"].tolist() == [f"galaxy_{number:04d}" for number in bad]
    assert failures["file_loc"].tolist() == [str(paths[number]) for number in bad]
    for kind, reason in zip(kinds, failures["reason"], strict=True):
        assert reason.startswith(REASONS_OF_DAMAGE[kind])
    expected = clean.drop(index=bad, columns="file_loc").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(output / "predictions"), expected, check_exact=True)


def test_failures_are_tried_again_when_asked(predict, galaxy_folder, tmp_path):
    _, clean, _ = predict(output=tmp_path / "clean")
    whole = shutil.copytree(galaxy_folder / "images", tmp_path / "whole")
    reasons = damage_files(galaxy_folder)
    predict()
    (galaxy_folder / "images/galaxy_21.png").rmdir()
    shutil.copytree(whole, galaxy_folder / "images", dirs_exist_ok=True)
    (galaxy_folder / "images/galaxy_38.png").write_bytes(b"")
    assert len(predict()[2]) == len(reasons)  # not unasked
    done, table, failures = predict(retry_failures=True)
    assert done.failures == 1
    assert failures.to_numpy().tolist() == [
        ["galaxy_38", str(galaxy_folder / "images/galaxy_38.png"), "the file is empty"]
    ]
    pd.testing.assert_frame_equal(table, clean[clean["id_str"] != "galaxy_38"].reset_index(drop=True))


def test_a_run_is_not_finished_while_its_failures_are_tried_again(predict, galaxy_folder, tmp_path, monkeypatch):
    galaxy = galaxy_folder / "images/galaxy_00.png"
    whole = galaxy.read_bytes()
    galaxy.write_bytes(b"")
    predict()

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("zoobot_hf.prediction.runs.write_shard", fail)
        galaxy.write_bytes(whole)
        with pytest.raises(OSError, match="no space left"):
            predict(retry_failures=True)
    assert not manifest_of(tmp_path / "out")["finished"]
    assert predict(retry_failures=True)[0].failures == 0
    assert manifest_of(tmp_path / "out")["finished"]


def test_a_model_that_is_loaded_by_another_version_is_the_same_model(predict, layer_norm_model, tmp_path):
    predict()
    layer_norm_model.save_pretrained(tmp_path / "model")
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path / "model")
    loaded.config.transformers_version = "5.99.0"
    assert predict(model=loaded)[0].failures == 0
    loaded.config.calibration_temperature = 2.0
    with pytest.raises(SurveyError, match="another model"):
        predict(model=loaded)


def test_where_all_of_a_shard_fail_the_table_can_still_be_read(predict, galaxy_folder):
    for number in range(6):
        (galaxy_folder / f"images/galaxy_{number:02d}.png").unlink()
    _, table, failures = predict()
    assert len(failures) == 6
    assert table["id_str"].tolist() == [f"galaxy_{number:02d}" for number in range(6, 40)]
    assert table["probability_ring"].dtype == np.float32


def test_too_many_failures_stop_the_run_and_finished_shards_stay(predict, galaxy_folder, tmp_path):
    for number in range(20, 40):
        (galaxy_folder / f"images/galaxy_{number:02d}.png").unlink()
    with pytest.raises(SurveyError, match=r"galaxies can't be predicted, and max_failures is 5; the last one is .*png"):
        predict(max_failures=5)
    assert len(list((tmp_path / "out/predictions").iterdir())) == 4
    assert len(predict(max_failures=20)[2]) == 20
    with pytest.raises(SurveyError, match="galaxies can't be predicted, and max_failures is 5"):
        predict(max_failures=5)  # what failed in an earlier run counts


def test_a_shard_in_the_place_of_another_is_refused(predict, tmp_path):
    predict()
    first, second = (tmp_path / f"out/predictions/00000{number}.parquet" for number in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(SurveyError, match=r"000001\.parquet is of another model or catalog"):
        predict()


def test_a_run_goes_on_with_batches_as_large_as_before(predict, tmp_path, monkeypatch):
    predict()
    (tmp_path / "out/predictions/000001.parquet").unlink()
    runner = "zoobot_hf.prediction.survey.inference_runner"
    monkeypatch.setattr(runner, lambda model, size, **options: pytest.fail(f"batches of {size}"))
    with pytest.raises(pytest.fail.Exception, match=f"batches of {SIZES['batch_size']}"):
        predict(batch_size=None)


def test_another_model_on_the_same_output_is_refused(predict, batch_norm_model, tmp_path):
    _, expected, _ = predict()
    with pytest.raises(SurveyError, match=r"holds the predictions of another model .*choose another output"):
        predict(model=batch_norm_model)
    with pytest.raises(SurveyError, match="another precision, bfloat16 or not"):
        predict(bf16=True)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out/predictions"), expected)
    # As a run leaves it that failed before its first shard, while another process had nothing to do.
    shutil.rmtree(tmp_path / "out/predictions")
    (tmp_path / "out/failures.parquet").unlink()
    (tmp_path / "out/.partial-done-1").touch()
    assert predict(model=batch_norm_model)[0].failures == 0


def test_a_catalog_that_has_changed_is_refused(predict, galaxy_folder):
    predict()
    with open(galaxy_folder / "catalog.csv", "a") as file:
        file.write("one_more,images/galaxy_00.png,1\n")
    with pytest.raises(SurveyError, match="another catalog, or one that has changed since"):
        predict()


def test_a_folder_without_its_manifest_is_refused(predict, tmp_path):
    predict()
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(SurveyError, match=r"no manifest.json that can be read"):
        predict()


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["a,a.png", "b,b.png", "a,c.png"], "more than once for 1 galaxy: 'a'"), ([], "has no rows")],
)
def test_a_catalog_with_duplicates_or_without_rows_is_refused(predict, tmp_path, lines, message):
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(["id_str,file_loc", *lines]) + "\n")
    with pytest.raises(CatalogError, match=message):
        predict(catalog=path)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_finished_shards_stay(predict, monkeypatch, tmp_path):
    _, expected, _ = predict(output=tmp_path / "clean")
    real_write = shards.pq.write_table

    def write(table, path, **options):
        if "000002" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real_write(table, path, **options)

    monkeypatch.setattr(shards.pq, "write_table", write)
    with pytest.raises(OSError, match=r"000002\.parquet can't be written: No space left on device. What is finished"):
        predict()
    assert sorted(os.listdir(tmp_path / "out/predictions")) == ["000000.parquet", "000001.parquet"]
    monkeypatch.undo()
    pd.testing.assert_frame_equal(predict()[1], expected)


def test_a_threshold_selects_galaxies(predict, layer_norm_model, tmp_path):
    table = predict()[1]
    threshold = float(table["probability_ring"].median())
    layer_norm_model.config.decision_threshold = {"ring": threshold}
    table = predict(output=tmp_path / "selected")[1]
    assert table["selected"].dtype == bool
    assert (table["selected"] == (table["probability_ring"] >= np.float32(threshold))).all()
    assert 0 < table["selected"].sum() < 40


def test_the_prevalence_decides_the_probabilities(predict, layer_norm_model, tmp_path):
    layer_norm_model.config.training_prevalence = {"ring": 0.5, "not ring": 0.5}
    layer_norm_model.config.sky_prevalence = {"ring": 0.1, "not ring": 0.9}
    layer_norm_model.config.predictions_for = "sky"
    layer_norm_model.config.decision_threshold = {"ring": 0.1}
    tables = predict()[1], predict(output=tmp_path / "training", prevalence="training")[1]
    assert ["selected" in table for table in tables] == [True, False]  # the threshold is for the sky
    sky, training = (table["probability_ring"].astype(float) for table in tables)
    assert np.allclose(sky / (1 - sky) * 9, training / (1 - training), rtol=1e-5)  # odds, by Bayes' theorem
    with pytest.raises(SurveyError, match="another prevalence"):
        predict(prevalence="training")
    shutil.copy(tmp_path / "out/predictions/000001.parquet", tmp_path / "training/predictions")
    with pytest.raises(SurveyError, match=r"000001\.parquet is of another model or catalog"):
        predict(output=tmp_path / "training", prevalence="training")


# Tar archives ---------------------------------------------------------------------------------------------------


@pytest.fixture
def archives(galaxy_folder, tmp_path):
    """The drawn galaxies in three tar archives, and the pattern of their names; the 17th image is empty."""
    (galaxy_folder / "images/galaxy_17.png").write_bytes(b"")
    (tmp_path / "tars").mkdir()
    for number, rows in enumerate((range(15), range(15, 16), range(16, 40))):
        with tarfile.open(tmp_path / f"tars/galaxies-{number}.tar", "w") as archive:
            for row in rows:
                archive.add(galaxy_folder / f"images/galaxy_{row:02d}.png", arcname=f"galaxy_{row:02d}.png")
    return tmp_path / "tars/galaxies-*.tar"


def test_archives_are_predicted_like_the_images_in_them(predict, archives, galaxy_folder, tmp_path):
    _, expected, _ = predict(output=tmp_path / "folder")
    done, table, failures = predict(catalog=archives)
    assert done == (tmp_path / "out", 40, 1)
    pd.testing.assert_frame_equal(table, expected)
    place = f"tar://galaxy_17.png::{tmp_path}/tars/galaxies-2.tar"
    assert failures.to_numpy().tolist() == [["galaxy_17", place, "the file is empty"]]
    with pytest.raises(SurveyError, match="another catalog"):
        predict(catalog=galaxy_folder)


def test_a_run_over_archives_goes_on_without_reading_what_is_done(predict, archives, tmp_path, monkeypatch):
    _, expected, _ = predict(catalog=archives)
    (tmp_path / "out/predictions/000003.parquet").unlink()
    opened = []
    monkeypatch.setattr(galaxies, "open_image", lambda content: opened.append(content) or open_image(content))
    _, table, _ = predict(catalog=archives)
    pd.testing.assert_frame_equal(table, expected)
    assert len(opened) == 6
    del opened[:]
    _, table, failures = predict(catalog=archives, retry_failures=True)
    pd.testing.assert_frame_equal(table, expected)
    assert failures["id_str"].tolist() == ["galaxy_17"]
    assert opened == [b""]


def test_archives_that_have_changed_are_refused(predict, archives, galaxy_folder, tmp_path):
    predict(catalog=archives)
    with tarfile.open(tmp_path / "tars/galaxies-1.tar", "w") as archive:
        archive.add(galaxy_folder / "catalog.csv", arcname="galaxy_15.txt")
        archive.add(galaxy_folder / "images/galaxy_15.png", arcname="galaxy_15.png")
    with pytest.raises(SurveyError, match="another catalog, or one that has changed since"):
        predict(catalog=archives)


@pytest.mark.slow
def test_two_processes_predict_archives_like_one(predict, archives, tmp_path):
    _, expected, expected_failures = predict(catalog=archives)
    output = tmp_path / "shared_out"
    done = launch(archives, output, processes=2)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(pd.read_parquet(output / "predictions"), expected)
    pd.testing.assert_frame_equal(pd.read_parquet(output / "failures.parquet"), expected_failures)


# Several processes, and killed ones ---------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from tiny_models import tiny_model
from zoobot_hf import ZoobotImageProcessor
from zoobot_hf.prediction import runs, survey
predict = lambda: survey.predict_survey(
    tiny_model("layer_norm"), ZoobotImageProcessor(32), sys.argv[1], sys.argv[2], shard_size=6, batch_size=4)
"""


def prepare(body):
    """A script, and the environment in which it finds the package and the tiny models."""
    script = SCRIPT + textwrap.dedent(body)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return script, environment


# One piece of text, or what two processes print at the same time gets mixed.
PREDICT = """
from accelerate import PartialState
sys.stdout.write(f"{predict()} {PartialState().num_processes}\\n")
"""
# The second process kills itself at its second shard.
PREDICT_AND_DIE = """
import os, signal
write = runs.write_shard
def write_once(path, shard):
    if path.name == "000003.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, shard)
runs.write_shard = write_once
predict()
"""


def launch(folder, output, *, processes, body=PREDICT):
    script, environment = prepare(body)
    path = output.with_name("predict.py")
    path.write_text(script)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return subprocess.run(
        [*command, path, folder, output], env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_table(predict, processes, galaxy_folder, tmp_path):
    (galaxy_folder / "images/galaxy_17.png").write_bytes(b"")
    _, expected, expected_failures = predict()
    output = tmp_path / "shared_out"
    done = launch(galaxy_folder, output, processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"galaxies=40, failures=1) {processes}") == processes
    assert done.stderr.count("predicting:   0%") == 1  # one bar
    pd.testing.assert_frame_equal(pd.read_parquet(output / "predictions"), expected)
    pd.testing.assert_frame_equal(pd.read_parquet(output / "failures.parquet"), expected_failures)


EMBED = """
from zoobot_hf.prediction.embeddings import embed_survey
print(embed_survey(
    tiny_model("layer_norm"), ZoobotImageProcessor(32), sys.argv[1], sys.argv[2], shard_size=6, batch_size=4, pca=3))
"""


@pytest.mark.slow
def test_two_processes_embed_with_the_same_components(layer_norm_model, processor, galaxy_folder, tmp_path):
    (galaxy_folder / "images/galaxy_17.png").write_bytes(b"")
    embed_survey(layer_norm_model, processor, galaxy_folder, tmp_path / "alone", pca=3, **SIZES)
    done = launch(galaxy_folder, tmp_path / "shared_out", processes=2, body=EMBED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("galaxies=40, failures=1") == 2
    alone, shared = (pd.read_parquet(tmp_path / name / "embeddings") for name in ("alone", "shared_out"))
    assert shared["id_str"].tolist() == alone["id_str"].tolist()
    np.testing.assert_array_equal(np.stack(shared["embedding"]), np.stack(alone["embedding"]))


# Process 0 has three files of 6 galaxies and the last one, of 4. Where they are tried again, it knows of no other.
@pytest.mark.parametrize(("retry", "shown"), [(False, "40/40"), (True, "22/40")])
def test_a_process_waits_for_the_others_also_where_all_files_are_there_already(
    predict, tmp_path, monkeypatch, capsys, retry, shown
):
    def run_as_process(index):
        state = SimpleNamespace(
            num_processes=2, process_index=index, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(runs, "PartialState", lambda: state)
        return predict(retry_failures=retry)[0]

    def wait(_):
        raise TimeoutError("the other process is not done")

    done, _, _ = predict()
    monkeypatch.setattr(runs.time, "sleep", wait)
    with pytest.raises(TimeoutError, match="the other process is not done"):
        run_as_process(0)
    assert f"| {shown} [" in capsys.readouterr().err.split("\r")[-1]
    assert run_as_process(1) == done


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_the_next_run_ends_as_an_unbroken_one(predict, galaxy_folder, tmp_path):
    _, expected, _ = predict()
    output = tmp_path / "shared_out"
    assert launch(galaxy_folder, output, processes=2, body=PREDICT_AND_DIE).returncode != 0
    assert (output / "predictions/000001.parquet").exists()
    assert not (output / "predictions/000003.parquet").exists()
    assert launch(galaxy_folder, output, processes=2).returncode == 0
    pd.testing.assert_frame_equal(pd.read_parquet(output / "predictions"), expected)


# Forks of a process that has imported everything; each is killed at a moment between its start and its end.
KILL = """
import os, random, signal, time
moments, kills, finished = random.Random(0), 0, 0

def fork():
    child = os.fork()
    if child == 0:
        predict()
        os._exit(0)
    return child

started = time.monotonic()
assert os.waitpid(fork(), 0)[1] == 0
limit = time.monotonic() - started
while True:
    os.rename(sys.argv[2], f"{sys.argv[2]}-{finished}")
    finished += 1
    if kills >= int(sys.argv[3]):
        break
    while True:
        child = fork()
        if kills < int(sys.argv[3]):
            time.sleep(moments.uniform(0, limit))
            os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break
        kills += 1
print(kills, "kills")
"""


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_that_are_killed_again_and_again_end_as_an_unbroken_one(predict, kills, galaxy_folder, tmp_path):
    (galaxy_folder / "images/galaxy_17.png").write_bytes(b"")
    _, expected, expected_failures = predict()
    (tmp_path / "killed").mkdir()
    script, environment = prepare(KILL)
    done = subprocess.run(
        [sys.executable, "-c", script, galaxy_folder, tmp_path / "killed/out", str(kills)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= kills
    outputs = list((tmp_path / "killed").iterdir())
    assert len(outputs) > 1
    for output in outputs:
        pd.testing.assert_frame_equal(pd.read_parquet(output / "predictions"), expected)
        pd.testing.assert_frame_equal(pd.read_parquet(output / "failures.parquet"), expected_failures)
        assert sorted(path.name for path in output.iterdir()) == ["failures.parquet", "manifest.json", "predictions"]
