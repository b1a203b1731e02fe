"""Configurations damaged at random: an error or a working model, never a hang, a crash or a gigabyte of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoobot_hf import ZoobotImageProcessor

SCRIPT = Path(__file__).resolve().parents[1] / "damaged_models.py"


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_configuration_is_an_error_or_a_working_model(count, tiny_models, tmp_path):
    for name, model in tiny_models.items():
        model.save_pretrained(tmp_path / name)
        ZoobotImageProcessor(32).save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(count), "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = [outcome.split(":")[0] for _, _, _, outcome, _, _ in cases]
    assert len(cases) == count
    assert {"works", "ValueError", "OSError"} <= set(outcomes)
    wrong = [case for case in cases if case[3].startswith(("memory", "TimeoutError", "shape")) or case[5] > 1000]
    assert wrong == []
