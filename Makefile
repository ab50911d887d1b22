# Reproduce the study: `make` prints this help.
PROFILE ?= default
PYTHON  ?= python3
VENV    ?= .venv
FORM    ?= supervised
SEED    ?= 0
EPOCHS  ?= 0

override PROFILE := $(strip $(PROFILE))
PY        := $(VENV)/bin/python
READY     := $(VENV)/ready
OUT       := build/$(PROFILE)
RECORDS   := data/results/$(PROFILE)
NAMES     := $(basename $(notdir $(sort $(wildcard notebooks/*.ipynb))))
# A notebook is made by its number, or by its name where it has none.
target     = $(or $(filter 0% 1%,$(firstword $(subst _, ,$(1)))),$(1))
TARGETS   := $(foreach name,$(NAMES),$(call target,$(name)))
# Every file of the module, at any depth, but for those that no notebook needs, sweeps' apart.
APART     := $(addprefix ff_utils/run/,sweep.py faults.py repeat.py)
SOURCES   := $(filter-out $(APART),$(sort $(shell find ff_utils -name '*.py')))
PROFILES  := $(basename $(notdir $(wildcard notebooks/profiles/*.yaml)))
# The user root needs this: JupyterLab refuses to start without it.
LAB       ?= $(if $(filter 0,$(shell id -u)),--allow-root)

ifeq ($(PROFILES),)
$(error make runs in the repository's folder, as in: make -C FOLDER help)
endif
ifneq ($(words $(PROFILE))$(filter-out $(PROFILES),$(PROFILE)),1)
$(error PROFILE is '$(PROFILE)'; choose one of: $(PROFILES))
endif
ifneq ($(words $(VENV)),1)
$(error VENV is '$(VENV)'; give a folder without spaces)
endif

.DELETE_ON_ERROR:
.SUFFIXES:
# Time and memory are measured with nothing else running; the smoke profile's numbers mean nothing.
ifneq ($(PROFILE),smoke)
.NOTPARALLEL:
endif
.PHONY: help reproduce data train sweep publish gpu-reference site test faults verify lint lab clean $(TARGETS)
.DEFAULT_GOAL := help

help:  ## print this help
	@echo "make TARGET [PROFILE=smoke|default|paper|gpu]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile
	@echo "  01 ... 10     execute one notebook, and those whose records it reads"

reproduce: data $(NAMES:%=$(OUT)/%.html)  ## environment, data, every notebook and figure

data: build/data  ## fetch and check MNIST, or say what stands in for it

train: $(READY)  ## train one form at full length: FORM=supervised SEED=0 EPOCHS=50
	@$(PY) -m ff_utils run notebooks/full_length.ipynb --set form='$(FORM)' --set seed='$(SEED)' \
	  --set epochs='$(EPOCHS)' --output build/full_length/'$(FORM)-$(SEED)'.ipynb

sweep: $(READY)  ## run notebooks/sweeps/SWEEP.yaml, JOBS points at a time
	@$(PY) -m ff_utils sweep '$(SWEEP)' $(if $(JOBS),--jobs $(JOBS))

test: $(READY)  ## the linter and all tests
	@$(PY) -m ruff check && $(PY) -m ruff format --check
	@$(PY) -m pytest

faults: $(READY)  ## disturb commands, see whether the next run mends it: TRIALS=50 SEED=0
	@$(PY) -m ff_utils faults $(if $(TRIALS),--trials $(TRIALS)) --seed $(SEED)

verify: $(READY)  ## judge every claim of the ledger against the records; run the smoke profile twice
	@$(PY) -m ff_utils verify
	@$(PY) -m ff_utils repeat

lint: $(READY)  ## format the code and report what the formatter cannot mend
	@$(PY) -m ruff format && $(PY) -m ruff check --fix

lab: $(READY)  ## open JupyterLab on the notebooks, saved on request only: LAB='options of its own'
	@$(PY) -m jupyterlab --notebook-dir=notebooks --LabApp.app_settings_dir=docs/lab $(LAB)

gpu-reference: $(READY)  ## measure every arm and the example networks on this machine's GPU
	@$(PY) -m pytest tests/test_cuda.py
	@set -e; folder=data/results/gpu; \
	if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(MAKE) --no-print-directory 04 PROFILE=gpu; \
	else folder=build/gpu; echo "no GPU here: a rehearsal on the CPU, whose numbers go to $$folder"; \
	  $(PY) -m ff_utils run notebooks/04_memory_profiling.ipynb --profile smoke --set on_gpu=true \
	    --set minutes=1 --output $$folder/04.ipynb; fi; \
	mkdir -p $$folder; \
	for name in vgg16 vit_s16 gpt2; do echo "examples/$$name.py, every choice measured"; \
	  $(PY) -m ff_utils memory --network examples/$$name.py:build --measure --json \
	  $(if $(BATCH),--batch $(BATCH)) > $$folder/network_$$name.json || exit 1; done

site: $(READY)  ## build/site/index.html: the notebooks and the reference as pages
	@$(PY) docs/make_site.py

publish:  ## put the default run's outputs into the notebooks, its numbers into README
	@$(MAKE) --no-print-directory reproduce PROFILE=default
	@$(PY) -m ff_utils publish

clean:  ## remove what make built (data and records stay)
	rm -rf build

# --- environment -----------------------------------------------------------------------------

$(READY): requirements.lock requirements.hashes
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "error: Python %d.%d is too old; give 3.11 or later, as in: make PYTHON=python3.12" % sys.version_info[:2])'
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
	  echo "error: VENV is $(VENV), which is there and is no Python environment; give another" >&2; exit 1; fi
	@echo "making the environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  -r requirements.hashes
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

build/data: ff_utils/data.py $(READY)
	@mkdir -p build
	@$(PY) -m ff_utils data
	@touch $@

# --- notebooks -------------------------------------------------------------------------------

# One run makes two files: the executed notebook and its record.
$(OUT)/%.ipynb $(RECORDS)/%.json: notebooks/%.ipynb notebooks/profiles/$(PROFILE).yaml $(SOURCES) $(READY)
	@$(PY) -m ff_utils run $< --profile $(PROFILE) --output $(OUT)/$*.ipynb

$(OUT)/%.html: $(OUT)/%.ipynb $(RECORDS)/%.json
	@$(PY) -m ff_utils html $< --output $@

.PRECIOUS: $(OUT)/%.ipynb $(RECORDS)/%.json

# `make 04` is build/PROFILE/04_....html
define by_target
$(call target,$(1)): $(OUT)/$(1).html
endef
$(foreach name,$(NAMES),$(eval $(call by_target,$(name))))

# Notebooks that read tables, or the records of others.
records_of = $(foreach name,$(1),$(OUT)/$(name).ipynb $(RECORDS)/$(name).json)
$(OUT)/08_sweeps.ipynb: ff_utils/run/sweep.py $(wildcard data/results/sweeps/*.parquet)
$(OUT)/03_backprop_baseline.ipynb: $(call records_of,02_ff_training)
$(OUT)/10_figures.ipynb: data/claims.yaml $(call records_of,02_ff_training 07_ff_language_model \
  03_backprop_baseline 04_memory_profiling 05_your_own_network 06_every_form 09_past_one_machine)
$(foreach name,05_your_own_network 06_every_form full_length,$(OUT)/$(name).ipynb): notebooks/forms.yaml \
  $(wildcard data/results/full_length/*.json)
