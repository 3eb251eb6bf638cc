# One door to the project: `make help` lists what it does.

PYTHON ?= python3
# Optional extra wheel index for torch, as in:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
QUICK := not slow and not gpu and not container

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all bench lint format lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the locked versions (variables: PYTHON, TORCH_INDEX)

demo: $(STAMP) ## Train the smallest model on the bundled data and draw 16 images
	rm -rf demo-run demo-images
	$(BIN)/synthcube train -c workspace/config.yaml -d workspace/data -o demo-run
	$(BIN)/synthcube infer -m demo-run -o demo-images -n 16
	@echo "The images are in $(CURDIR)/demo-images/grid.png"

test: $(STAMP) ## Run the quick tests
	$(BIN)/python -m pytest -m "$(QUICK)"

test-all: $(STAMP) ## Run every test, also those marked slow, gpu and container
	$(BIN)/python -m pytest

bench: $(STAMP) ## Measure speed
	$(BIN)/python -m bench

lint: $(STAMP) ## Check style, types, imports and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: $(STAMP) ## Mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(STAMP) ## Write constraints.txt anew with the newest versions
	$(BIN)/uv pip compile --universal --python-version 3.10 --group dev --no-annotate \
	  --no-python-downloads --upgrade --output-file constraints.txt pyproject.toml

clean: ## Remove what the targets above made, except .venv
	rm -rf demo-run demo-images build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Debian and Ubuntu ship venv without ensurepip; then pip comes from the package index.
.venv/bin/pip: | .venv/bin/python
	$(BIN)/python -m ensurepip --default-pip 2>/dev/null || $(BIN)/python scripts/bootstrap_pip.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "synthcube needs Python 3.10 or newer, and '$(PYTHON)' is missing or older:" \
	    "name another one, as in: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --without-pip .venv

$(STAMP): pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) install --constraint constraints.txt pip
	$(PIP) install --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable . --group dev
	@touch $@
