"""The examples as a user runs them: alone, on several processes, and all the way to the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from processes import ON_TWO_PROCESSES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ALONE = [sys.executable]


@pytest.fixture
def encoder_folder(layer_norm_model, tmp_path):
    layer_norm_model.save_pretrained(tmp_path / "encoder")
    from zoobot_hf import ZoobotImageProcessor

    ZoobotImageProcessor(32).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def run(launcher, example, *options, token=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"HF_TOKEN": token} if token else {})}
    command = [*launcher, str(EXAMPLES / example), *(str(option) for option in options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_minimal_example_can_be_read_in_one_sitting():
    assert len((EXAMPLES / "finetune_minimal.py").read_text().splitlines()) < 80


def test_the_minimal_example_ends_on_the_hub_in_one_commit(
    hub, hub_token, repo_id, galaxy_folder, encoder_folder, tmp_path
):
    options = ["--dataset", galaxy_folder, "--encoder", encoder_folder, "--output_dir", tmp_path / "out"]
    run(ALONE, "finetune_minimal.py", *options, "--epochs", 1, "--push_to_hub", repo_id, token=hub_token)
    assert len(hub.commits(repo_id)) == 2  # the one that made the repository, and the model's
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(hub.files(repo_id))
    assert "training_args.bin" not in hub.files(repo_id)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, ON_TWO_PROCESSES], ids=["alone", "two processes"])
def test_the_advanced_example_runs_both_stages(launcher, galaxy_folder, encoder_folder, tmp_path):
    options = ["--dataset", galaxy_folder, "--encoder", encoder_folder, "--output_dir", tmp_path / "out"]
    printed = run(launcher, "finetune_advanced.py", *options, "--frozen_epochs", 1, "--unfrozen_epochs", 1)
    assert printed.count("kept: the ") == 1
    assert {"frozen", "unfrozen"} < set(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert pd.read_parquet(tmp_path / "out" / "predictions.parquet")["id_str"].is_unique


def test_the_log_of_an_example_is_zoobot_hfs_alone(galaxy_folder, tmp_path):
    options = [str(EXAMPLES / "finetune_minimal.py"), "--dataset", str(galaxy_folder), "--epochs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*ALONE, *options, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The frozen stage is kept" in done.stderr
    assert "glyf" not in done.stderr


@pytest.mark.slow
def test_the_minimal_example_runs_on_two_processes(galaxy_folder, encoder_folder, tmp_path):
    options = ["--dataset", galaxy_folder, "--encoder", encoder_folder, "--output_dir", tmp_path / "out"]
    run(ON_TWO_PROCESSES, "finetune_minimal.py", *options, "--epochs", 1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_advanced_example_cuts_and_labels_by_votes(galaxy_folder, encoder_folder, tmp_path):
    catalog = pd.read_csv(galaxy_folder / "catalog.csv", dtype={"id_str": str})
    catalog["smooth-or-featured_featured-or-disk_fraction"] = [0.1 if i < 4 else 0.9 for i in range(len(catalog))]
    catalog["disk-edge-on_no_fraction"] = 0.9
    catalog["rare-features_ring_fraction"] = catalog["ring"] * 0.8
    catalog.to_csv(galaxy_folder / "catalog.csv", index=False)
    options = ["--dataset", galaxy_folder, "--encoder", encoder_folder, "--frozen_epochs", 1, "--unfrozen_epochs", 1]
    run(ALONE, "finetune_advanced.py", *options, "--output_dir", tmp_path / "votes", "--labels", "votes")
    run(ALONE, "finetune_advanced.py", *options, "--output_dir", tmp_path / "cut", "--labels", "cut")
    assert "not featured and face-on: 4" in (tmp_path / "cut" / "README.md").read_text()


def pretrain(launcher, encoder_config, folder, *options):
    encoder_config.save_pretrained(folder / "encoder_config")
    options = ["--encoder_config", folder / "encoder_config", "--output_dir", folder / "out", *options]
    run(launcher, "pretrain_galaxy_zoo.py", *options, "--pixels", 32, "--epochs", 1, "--batch_size", 8)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "vote_fractions.png"} < {
        path.name for path in (folder / "out").iterdir()
    }
    return json.loads((folder / "out" / "training.json").read_text())


@pytest.mark.slow
def test_pretraining_takes_simulated_volunteers(layer_norm_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    drawn = ["--galaxies", 40, "--held_out", 20, "--drawing_processes", 1]
    results = pretrain(ALONE, layer_norm_model.config.encoder_config, tmp_path, *drawn)
    assert results["galaxies"] == {"train": 40, "validation": 10, "test": 20}
    assert 0 <= results["coverage of true probabilities"]["ring"] <= 1
    assert {"eval_loss", "epoch"} < set().union(*results["history"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, ON_TWO_PROCESSES], ids=["alone", "two processes"])
def test_pretraining_takes_a_catalog_with_votes(launcher, layer_norm_model, galaxy_folder, tmp_path):
    catalog = pd.read_csv(galaxy_folder / "catalog.csv", dtype={"id_str": str})
    catalog["ring_yes"], catalog["ring_no"] = 3 + 10 * catalog["ring"], 15 - 10 * catalog["ring"]
    catalog.drop(columns="ring").to_csv(galaxy_folder / "catalog.csv", index=False)
    options = ["--dataset", galaxy_folder, "--surveys", "rings"]
    results = pretrain(launcher, layer_norm_model.config.encoder_config, tmp_path, *options)
    assert sum(results["galaxies"].values()) == len(catalog)
    assert 0 < results["test"]["vote_mean_absolute_error"] < 1
