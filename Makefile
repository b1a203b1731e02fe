# Needs Python 3.11 or later and make; everything else goes into .venv from the ordinary package registry.
PYTHON ?= python3
BIN = .venv/bin

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
	$(BIN)/python -m pytest -m "not slow and not network"

test-all: .venv/installed
	$(BIN)/python -m pytest -m "not network"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python tests/benchmarks/rings_cross_validation.py --encoder ../shared/encoders/mobilenetv2-in1k --dataset ../shared/data/rings

clean:
	rm -rf .venv demo demo-checkpoints
