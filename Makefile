# Everything happens in .venv, which the first target that needs it makes. PYTHON chooses another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint smoke test-torch test-ml chaos clean

demo: $(VENV)/installed      ## start the quickstart, send it tasks, see a hung one killed
	$(BIN)/python examples/quickstart/demo.py

test: $(VENV)/installed lint ## lint, types, and the whole suite
	$(BIN)/python -m pytest -n 3  # most tests wait for processes, not for a core

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile.*
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.*.yml

smoke: $(VENV)/installed     ## a part of the suite on every other Python 3.10 to 3.13 found here
	$(BIN)/nox --session smoke

test-torch: $(VENV)/installed ## the PyTorch example and tests (installs PyTorch)
	$(PIP) -r examples/torch/requirements.txt
	$(BIN)/python -m pytest -m torch

# Which PyTorch, and which TensorFlow: their builds for CPUs are a fraction of the size.
TORCH ?= torch
TENSORFLOW ?= tensorflow-cpu
test-ml: $(VENV)/installed   ## the PyTorch and TensorFlow examples and tests (installs both)
	$(PIP) -r examples/torch/requirements.txt '$(TORCH)' '$(TENSORFLOW)'
	$(BIN)/python -m pytest -m "torch or tensorflow"

SECONDS ?= 300
chaos: $(VENV)/installed     ## every fault at once, at random, for SECONDS with each start method
	CHAOS_SECONDS=$(SECONDS) $(BIN)/python -m pytest -n 2 -o faulthandler_timeout=0 tests/chaos/test_random.py

clean:
	rm -rf $(VENV) .nox

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@
