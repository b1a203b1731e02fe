"""Processes in which some packages are not to be found, as if they were not installed, and several at once."""

import os
import subprocess
import sys
import textwrap

HIDE = """
import importlib.util
import sys

class Hider:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)

hidden = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Hider(finder) for finder in sys.meta_path]
assert not any(importlib.util.find_spec(name) for name in hidden)
"""


# Without a GPU, accelerate's launcher starts several processes only when told --multi_gpu.
ON_TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def run_on_two(script, *arguments):
    """What a script in a file prints on two processes; the script's failure is the test's."""
    done = subprocess.run(
        [*ON_TWO_PROCESSES, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_without(packages, script, *arguments, **environment):
    """What a script prints in a process without these packages; the script's failure is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE + textwrap.dedent(script), ",".join(packages), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
