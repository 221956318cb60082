# Two commands do everything on a fresh machine: `make demo` and `make test`.
#
#   PYTHON=python3.12   interpreter of the virtual environment (default: python3, 3.11 or newer)
#   TORCH=auto          build of torch: cpu, cuda, or auto (cuda where nvidia-smi answers)
#   VENV=.venv          where the virtual environment goes
#   WORKERS=2           test files that run at the same time

PYTHON ?= python3
TORCH ?= auto
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
SHELL := /bin/bash

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all lint install install-dev bench bench-offload clean

demo: install
	$(BIN)/pretrain data prepare stdlib data/stdlib
	$(BIN)/pretrain run experiment=demo

# A file's tests stay together: they share what the file starts. Slow files come first (tests/conftest.py).
test: install-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Every layout of both engines with every model, every move of a checkpoint between layouts and every fault on Slurm by
# itself, where `make test` takes a subset that changes with the commit: about two hours on two cores.
test-all: install-dev
	OMP_NUM_THREADS=1 PRETRAIN_FULL_MATRIX=1 $(BIN)/python -m pytest tests/engines tests/slurm

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mamba2_mixer.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/demo.py
	$(BIN)/pretrain data prepare stdlib data/stdlib
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trainer_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/watching_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lifecycle_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/checkpoint.py

# On a GPU; in pieces with OFFLOAD="--seconds-limit 540" (benchmarks/offload/README.md). Without one: a function check.
bench-offload: install-dev
	$(BIN)/python benchmarks/offload/run.py --resume $(OFFLOAD)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A CPU build is several GB smaller. It is taken from the indexes pip is set up with where they have it, else from
# PyTorch's own index; the CUDA build comes from the default index.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@choice=$(TORCH); \
	if [ $$choice = auto ]; then \
	  if nvidia-smi -L >/dev/null 2>&1; then choice=cuda; else choice=cpu; fi; \
	fi; \
	case $$choice in \
	  cuda) $(PIP) install --quiet "torch==$(TORCH_VERSION)" -c constraints.txt;; \
	  cpu) $(PIP) install --quiet "torch==$(TORCH_VERSION)+cpu" -c constraints.txt 2>/dev/null \
	    || $(PIP) install --quiet "torch==$(TORCH_VERSION)+cpu" -c constraints.txt \
	         --extra-index-url https://download.pytorch.org/whl/cpu;; \
	  *) echo "TORCH is '$$choice'; expected auto, cpu or cuda"; exit 2;; \
	esac
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install --quiet -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
