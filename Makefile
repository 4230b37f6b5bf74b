# `make chat` talks with SmolLM2-135M-Instruct and its heads; `make demo` sets up what the demo needs and races the bundled
# model; `make test` sets everything up and tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: chat demo test lint types contract check clean

SMOLLM2 := runs/smollm2-135m-instruct

chat: $(VENV)/.ready-demo $(SMOLLM2)/model.safetensors
	$(BIN)/dynamo-lm chat models/smollm2-135m-instruct --weights int4 --adapt-threads

$(SMOLLM2)/model.safetensors: | $(VENV)/.ready-demo
	$(PIP) gguf accelerate
	$(BIN)/python -m recipes.smollm2.base $(SMOLLM2)

demo: $(VENV)/.ready-demo
	$(BIN)/dynamo-lm demo $(DEMO)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

contract: $(VENV)/.ready
	$(BIN)/lint-imports

check: test lint types contract

$(VENV)/.ready-demo: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): torch and what the demo needs; a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.ready: $(VENV)/.ready-demo
	@echo "Setting up the tests: training, evaluation, server and their tools; some minutes."
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
