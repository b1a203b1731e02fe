# Needs Python 3.11 or later and make; everything else goes into .venv from the ordinary package registry.
PYTHON ?= python3
BIN = .venv/bin
# A process for each core: most tests keep only one busy. The tests of a file share what it sets up.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all lint bench clean

# One file stands for "installed": it is older than pyproject.toml or constraints.txt when something changed.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $@

demo: .venv/installed
	$(BIN)/zoobot-hf demo --output_dir demo

test: .venv/installed
	$(PYTEST) -m "not slow and not network"

test-all: .venv/installed
	$(PYTEST) -m "not network"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Zoobot 2.9.0, to be measured against, with the same versions of everything that both need.
.venv-zoobot/installed: constraints.txt
	test -d .venv-zoobot || $(PYTHON) -m venv .venv-zoobot
	.venv-zoobot/bin/python -m pip install --quiet --constraint constraints.txt "zoobot[pytorch]==2.9.0"
	touch $@

# For example: make bench OPTIONS="--rows unfrozen prediction --repeats 1"
bench: .venv/installed .venv-zoobot/installed
	$(BIN)/python tests/benchmarks/run.py $(OPTIONS)

clean:
	rm -rf .venv .venv-zoobot .benchmarks demo demo-checkpoints
