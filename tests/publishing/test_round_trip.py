"""Train and push, then load in a process that has never seen the run: the same probabilities by every way."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from zoobot_hf.cli import main

LOAD = """
import json, sys
import torch, zoobot_hf
from PIL import Image
from transformers import pipeline
from zoobot_hf import ZoobotForImageClassification, ZoobotImageProcessor
from zoobot_hf.cli import main

name, folder, table = sys.argv[1:]
catalog = zoobot_hf.read_galaxies(folder)
model = ZoobotForImageClassification.from_pretrained(name)
processor = ZoobotImageProcessor.from_pretrained(name)
images = [Image.open(path).convert("RGB") for path in catalog["file_loc"]]
with torch.inference_mode():
    direct = model(**processor(images)).logits.softmax(-1)[:, 1].tolist()
classify = pipeline("image-classification", model=name, device="cpu")
answers = [{answer["label"]: answer["score"] for answer in classify(image)}["ring"] for image in images]
status = main(["predict", "--model", name, "--images", folder, "--output", table])
print(json.dumps([status, catalog["id_str"].tolist(), direct, answers]))
"""


def test_a_pushed_run_gives_the_same_probabilities_in_a_fresh_process(
    hub, hub_token, repo_id, shared_galaxy_folder, layer_norm_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub_token)
    layer_norm_model.zoobot.encoder.save_pretrained(tmp_path / "encoder")
    options = ["--encoder", tmp_path / "encoder", "--dataset", shared_galaxy_folder, "--label_column", "ring"]
    options += ["--output_dir", tmp_path / "out", "--frozen_epochs", 2, "--unfrozen_epochs", 1, "--device", "cpu"]
    options += ["--sky_prevalence", "ring=0.1", "--license", "apache-2.0", "--push_to_hub", repo_id]
    assert main(["finetune", *map(str, options)]) == 0
    assert len(hub.commits(repo_id)) == 2  # the repository's creation, and one with everything
    names = {name.partition("/")[0] for name in hub.files(repo_id)}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "figures"} < names
    assert {"metrics.json", "predictions.parquet"} < names

    table = tmp_path / "table.csv"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, repo_id, str(shared_galaxy_folder), str(table)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    status, identifiers, direct, answers = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    predicted = pd.read_csv(table, dtype={"id_str": str})
    assert predicted["id_str"].tolist() == identifiers
    assert predicted["probability_ring"].tolist() == pytest.approx(direct, abs=1e-5)
    assert answers == pytest.approx(direct, abs=1e-5)
    own = pd.read_parquet(tmp_path / "out" / "predictions.parquet").set_index("id_str")["probability_ring"]
    there = predicted.set_index("id_str")["probability_ring"]
    assert there[own.index].tolist() == pytest.approx(own.tolist(), abs=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["predictions_for"], config["sky_prevalence"]["ring"]) == ("sky", 0.1)
