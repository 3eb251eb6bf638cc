# One door to the project: `make help` lists what it does.

PYTHON ?= python3
# Optional extra wheel index for torch, as in:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# Containers: docker, or podman where docker has no daemon; names of what is built; cpu or cuda.
CONTAINER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo podman)
SINGULARITY ?= singularity
IMAGE ?= synthcube:latest
SIF ?= synthcube.sif
SIF_FLAGS ?=
TORCH ?= cpu
IMAGE_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What a run needs, and what the checks need beside it: a newcomer's demo waits for the first alone.
RUNS := .venv/.installed-package
STAMP := .venv/.installed
DOCS := .venv/.installed-docs
# Tests on so many cores, one thread on each; a worker takes about 1.5 GB. Who is done takes over
# what others have not begun, for some tests are as long as a hundred others.
WORKERS ?= --numprocesses auto --maxprocesses 4 --dist worksteal
# More flags of pytest for test-slow, as --begin-within=900.
SLOW_FLAGS ?=
QUICK := not slow and not gpu and not container and not browser

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all test-gpu bench lint format lock flower-env nvflare-env openfl-env docs clean image sif mlcube test-containers test-browser

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the locked versions (variables: PYTHON, TORCH_INDEX)

# So many steps, however slow the machine is: with a third of them, shapes would be in pieces.
demo: $(RUNS) ## Plan and train a model of the bundled pictures in about 3 minutes, and draw 16 images
	rm -rf demo-run demo-images
	$(BIN)/synthcube train -d workspace/data -o demo-run --set training.max_epochs=200 \
	  --set data.conditions={}
	$(BIN)/synthcube infer -m demo-run -o demo-images -n 16
	@echo "The images are in $(CURDIR)/demo-images/grid.png"

test: $(STAMP) ## Run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "$(QUICK)"

test-slow: $(STAMP) ## Run the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(SLOW_FLAGS) --timeout 1500 -m "slow and not gpu and not container"

test-all: $(STAMP) ## Run every test, also those marked slow, gpu and container
	$(BIN)/python -m pytest

test-gpu: $(STAMP) ## Run the tests marked gpu; they are skipped where PyTorch sees no NVIDIA GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 900 -m gpu tests/gpu

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

lock: $(STAMP) ## Write the four files of constraints anew with the newest versions
	$(BIN)/uv pip compile --universal --python-version 3.10 --group dev --group docs --no-annotate \
	  --no-python-downloads --upgrade --output-file constraints.txt pyproject.toml
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra flower --no-annotate \
	  --no-python-downloads --upgrade --output-file constraints-flower.txt pyproject.toml
	$(BIN)/uv pip compile --universal --python-version 3.10 --extra nvflare --no-annotate \
	  --no-python-downloads --upgrade --constraints constraints.txt \
	  --output-file constraints-nvflare.txt pyproject.toml
	$(BIN)/uv pip compile --universal --python-version 3.10 --extra openfl --no-annotate \
	  --no-python-downloads --upgrade --output-file constraints-openfl.txt pyproject.toml

image: ## Build the container image (variables: IMAGE, TORCH=cpu|cuda, CONTAINER, IMAGE_FLAGS)
	$(CONTAINER) build --tag $(IMAGE) --build-arg TORCH=$(TORCH) $(VERSION_ARGS) \
	  --build-arg CREATED=$(shell git log -1 --format=%cI 2>/dev/null || echo unknown) \
	  $(IMAGE_FLAGS) .

sif: ## Make the Singularity image of the container image (variables: SIF, IMAGE, SINGULARITY, SIF_FLAGS)
	rm -f synthcube.tar
	$(CONTAINER) save --output synthcube.tar $(IMAGE)
	$(SINGULARITY) build --force $(SIF_FLAGS) $(VERSION_ARGS) $(SIF) Singularity.def
	rm -f synthcube.tar

flower-env: .venv-flower/.installed ## Make .venv-flower, with Flower beside what is in .venv (Python 3.11 or newer)

nvflare-env: .venv-nvflare/.installed ## Make .venv-nvflare, with NVIDIA FLARE beside what is in .venv

openfl-env: .venv-openfl/.installed ## Make .venv-openfl, with OpenFL beside what is in .venv (Python 3.10 to 3.12)

mlcube: .venv-mlcube/.installed ## Make .venv-mlcube, with MLCube and its two runners

test-containers: $(STAMP) ## Run the tests marked container, on the images made before
	CONTAINER=$(CONTAINER) IMAGE=$(IMAGE) SIF=$(SIF) $(BIN)/python -m pytest --timeout 1500 -m container

test-browser: $(STAMP) ## Open the evaluation report in Chromium, where there is one
	$(BIN)/python -m pytest -m browser tests/evaluation

docs: $(DOCS) ## Build the documentation site, site/index.html; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean: ## Remove what the targets above made, except .venv
	rm -rf demo-run demo-images site synthcube.sif synthcube.tar build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Debian and Ubuntu ship venv without ensurepip; then pip comes from the package index.
.venv/bin/pip: | .venv/bin/python
	$(BIN)/python -m ensurepip --default-pip 2>/dev/null || $(BIN)/python scripts/bootstrap_pip.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "synthcube needs Python 3.10 or newer, and '$(PYTHON)' is missing or older:" \
	    "name another one, as in: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --without-pip .venv

INSTALL = $(PIP) install --constraint constraints.txt \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

$(RUNS): pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) install --constraint constraints.txt pip
	$(INSTALL) --editable .
	@touch $@

$(STAMP): $(RUNS)
	$(INSTALL) --editable . --group dev
	@touch $@

$(DOCS): $(STAMP)
	$(INSTALL) --editable . --group docs
	@touch $@

VERSION_ARGS = \
  --build-arg VERSION=$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/synthcube/__init__.py) \
  --build-arg REVISION=$(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

# What an engine of federations needs in other versions comes before all that is in .venv.
PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-flower/.installed: ENGINE := flwr>=1.42,<1.43
.venv-nvflare/.installed: ENGINE := nvflare>=2.9,<2.10
.venv-openfl/.installed: ENGINE := openfl>=1.9,<1.10
.venv-flower/.installed .venv-nvflare/.installed .venv-openfl/.installed: .venv-%/.installed: constraints-%.txt | $(STAMP)
	rm -rf .venv-$*
	$(BIN)/python -m venv --without-pip .venv-$*
	$(PIP) --python .venv-$*/bin/python install --quiet --constraint $< '$(ENGINE)'
	printf 'import site; site.addsitedir("%s")\n' "$$($(BIN)/python -c $(PURELIB))" \
	  > "$$(.venv-$*/bin/python -c $(PURELIB))/main.pth"
	@touch $@

# MLCube 0.0.9 asks for an omegaconf whose metadata newer pips refuse: its own venv, an older pip.
.venv-mlcube/.installed: | $(STAMP)
	rm -rf .venv-mlcube
	$(PYTHON) -m venv --without-pip .venv-mlcube
	$(BIN)/python -m pip --disable-pip-version-check --python .venv-mlcube/bin/python \
	  install --quiet pip==23.2 setuptools==68.2.2
	.venv-mlcube/bin/python -m pip --disable-pip-version-check install --quiet \
	  mlcube==0.0.9 mlcube-docker==0.0.9 mlcube-singularity==0.0.9
	@touch $@
