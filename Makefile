PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATASET ?=
MRL_RAG_LONG_SECONDS ?= 3600

.PHONY: setup demo test test-faults test-long lint bench

setup: $(READY)

# torch first and alone: where a CPU build is offered it is taken, and the rest then asks for no other.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mrl-rag needs Python 3.11 or later: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); a few minutes the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

test-faults: $(READY)
	MRL_RAG_KILLS=200 MRL_RAG_DAMAGES=150 MRL_RAG_STEPS=5000 $(BIN)/python -m pytest tests/faults tests/index/test_stateful.py tests/scale/test_ray.py

test-long: $(READY)
	MRL_RAG_LONG_SECONDS=$(MRL_RAG_LONG_SECONDS) $(BIN)/python -m pytest -n 0 tests/long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive mrl_rag integrations

bench: $(READY)
	$(BIN)/python benchmarks/encoder.py
	$(if $(DATASET),$(BIN)/python benchmarks/retrieval.py $(DATASET))
