# Reproduce the study: `make` prints this help.
PROFILE ?= default
PYTHON  ?= python3
VENV    ?= .venv
MINUTES ?= 10

PY        := $(VENV)/bin/python
READY     := $(VENV)/ready
OUT       := build/$(PROFILE)
# Any Python with PyTorch for CUDA and pandas will do for `make gpu-reference`: the environment's
# if it is there, else the plain one.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(PY),$(PYTHON))
NAMES     := $(basename $(notdir $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))))
NUMBERS   := $(foreach name,$(NAMES),$(firstword $(subst _, ,$(name))))
UNUSED    := $(addprefix ff_utils/,readme.py points.py sweep.py)
SOURCES   := $(filter-out $(UNUSED),$(wildcard ff_utils/*.py))
PROFILES  := $(basename $(notdir $(wildcard notebooks/profiles/*.yaml)))

ifeq ($(filter $(PROFILE),$(PROFILES)),)
$(error PROFILE is '$(PROFILE)'; choose one of: $(PROFILES))
endif

.DELETE_ON_ERROR:
.SUFFIXES:
# Time and memory are measured with nothing else running.
.NOTPARALLEL:
.PHONY: help reproduce data sweep publish gpu-reference test verify lint lab clean $(NUMBERS)
.DEFAULT_GOAL := help

help:  ## print this help
	@echo "make TARGET [PROFILE=smoke|default|paper]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile
	@echo "  01 ... 10     execute one notebook, and those whose records it reads"

reproduce: data $(NAMES:%=$(OUT)/%.html)  ## environment, data, every notebook and figure

data: build/data  ## fetch and check MNIST, or say what stands in for it

sweep: $(READY)  ## run notebooks/sweeps/SWEEP.yaml, JOBS points at a time
	@$(PY) -m ff_utils.sweep '$(SWEEP)' $(if $(JOBS),--jobs $(JOBS))

test: $(READY)  ## the linter and all tests
	@$(PY) -m ruff check && $(PY) -m ruff format --check
	@$(PY) -m pytest

verify: $(READY)  ## judge every claim of the ledger against the records
	@$(PY) -m ff_utils.claims

lint: $(READY)  ## format the code and report what the formatter cannot mend
	@$(PY) -m ruff format && $(PY) -m ruff check --fix

lab: $(READY)  ## open JupyterLab on the notebooks
	@$(PY) -m jupyterlab --notebook-dir=notebooks

gpu-reference:  ## measure every arm on this machine's GPU: MINUTES=10, GPU_PYTHON=python3
	@$(GPU_PYTHON) -c 'import torch, pandas' || { echo "error: $(GPU_PYTHON) lacks PyTorch or pandas;" \
	  "give one that has them, as in: make gpu-reference GPU_PYTHON=python3" >&2; exit 1; }
	@$(GPU_PYTHON) -m ff_utils.reference --minutes $(MINUTES)

publish:  ## put the default run's outputs into the notebooks, its numbers into README
	@$(MAKE) --no-print-directory reproduce PROFILE=default
	@$(PY) -m ff_utils.pipeline publish

clean:  ## remove what make built (data and records stay)
	rm -rf build

# --- environment -----------------------------------------------------------------------------

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "error: Python %d.%d is too old; give 3.11 or later, as in: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "making the environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

build/data: ff_utils/datasets.py $(READY)
	@mkdir -p build
	@$(PY) -m ff_utils.datasets
	@touch $@

# --- notebooks -------------------------------------------------------------------------------

$(OUT)/%.ipynb: notebooks/%.ipynb notebooks/profiles/$(PROFILE).yaml $(SOURCES) $(READY)
	@$(PY) -m ff_utils.pipeline run $< --profile $(PROFILE) --output $@

$(OUT)/%.html: $(OUT)/%.ipynb
	@$(PY) -m ff_utils.pipeline html $< --output $@

.PRECIOUS: $(OUT)/%.ipynb

# `make 05` is build/PROFILE/05_....html
define numbered
$(firstword $(subst _, ,$(1))): $(OUT)/$(1).html
endef
$(foreach name,$(NAMES),$(eval $(call numbered,$(name))))

# Notebooks that read tables, or the records of others.
$(OUT)/08_sweeps.ipynb: ff_utils/points.py ff_utils/sweep.py $(wildcard data/results/sweeps/*.parquet)
$(OUT)/04_backprop_baseline.ipynb: $(OUT)/02_ff_training.ipynb
$(OUT)/06_figures.ipynb: data/claims.yaml $(OUT)/02_ff_training.ipynb $(OUT)/03_ff_language_model.ipynb \
  $(OUT)/04_backprop_baseline.ipynb $(OUT)/05_memory_profiling.ipynb $(OUT)/07_every_form.ipynb \
  $(OUT)/10_past_one_machine.ipynb
$(OUT)/07_every_form.ipynb: $(wildcard data/results/study/*.json)
