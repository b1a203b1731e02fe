"""The `hf` command line against the test Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HF = Path(sys.executable).with_name("hf")


def run_hf(*arguments, token):
    done = subprocess.run(
        [HF, *map(str, arguments)],
        env={**os.environ, "HF_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_hf_command_uploads_and_downloads(hub, hub_token, repo_id, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 50)
    (folder / "config.json").write_text("{}")
    assert "astronomer" in run_hf("auth", "whoami", token=hub_token)
    run_hf("upload", repo_id, folder, token=hub_token)
    assert len(hub.commits(repo_id)) == 2
    run_hf("download", repo_id, "--local-dir", tmp_path / "back", token=hub_token)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
