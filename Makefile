# Everything a developer runs; `make` alone lists it. Needs only make and Python >= 3.11:
# the first target that needs something installed makes .venv, later runs reuse it.

PYTHON ?= python3
VENV   ?= .venv

# Development happens on the oldest supported torch, so the lower bound in pyproject.toml is true.
# The newest one: `make test TORCH=torch`; whatever `pip install` takes may stand there.
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Options: make bench BENCH="--only CNN" BENCH_TRAIN="--only CNN", make zoo ZOO="--only timm/".
BENCH ?=
BENCH_TRAIN ?=
ZOO   ?=

# A process for each core, up to 4 for the memory, of one thread each: those of OpenMP would wait
# for each other. A file's tests stay together, because many share what is slow to make.
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# torchvision belongs to one torch, and not to the oldest: the zoo has a venv of its own.
ZOO_VENV         ?= .venv-zoo
ZOO_TORCH        ?= torch==2.14.1
ZOO_TORCHVISION  ?= torchvision==0.29.1
ZOO_TIMM         ?= timm==1.0.31
ZOO_TRANSFORMERS ?= transformers==5.23.0

ZOO_BIN := $(ZOO_VENV)/bin
ZOO_PIP := $(ZOO_BIN)/python -m pip --disable-pip-version-check

# One empty file per finished install step. A step writes its file last, so a step that failed or
# was interrupted has none and runs again. They live in the venv and go when it goes.
STAMPS  := $(VENV)/.unisono
# The file of the torch step carries a checksum of what was asked for: another TORCH, another step.
TORCHED := $(STAMPS)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

ZOO_ALL := $(ZOO_TORCH) $(ZOO_TORCHVISION) $(ZOO_TIMM) $(ZOO_TRANSFORMERS)
ZOOED   := $(ZOO_VENV)/.unisono-$(shell printf '%s' '$(ZOO_ALL)' | cksum | cut -d ' ' -f 1)

# $(call step,name,command,what to try): announce the step, run it, say so if it failed.
define step
@printf '\nunisono: %s\n' '$(1)'
@$(2) || { printf "\nunisono: step '%s' failed, the reason is above; try: %s\n" '$(1)' '$(3)' >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:                 # two pips in one venv would break it
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow format lint types docs bench zoo wheel clean

help:  ## List the targets
	@printf 'make TARGET, with TARGET one of\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMPS)/demo  ## Train ten networks on 5,000 MNIST images at once
	$(call step,train ten networks on MNIST,$(BIN)/unisono train --data mnist5k --members 10 --epochs 15 --seed 0 --out runs/mnist,$(BIN)/unisono train --help)

test: $(STAMPS)/dev  ## Check everything: format, lint, types, tests, doctests, README blocks, docs
	$(call step,check the format,$(BIN)/ruff format --check,make format)
	$(call step,lint,$(BIN)/ruff check,make format)
	$(call step,check the types,$(BIN)/mypy,make types)
	$(call step,run tests and doctests and README blocks,OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PARALLEL),$(BIN)/pytest --last-failed)
	$(sphinx)
	@printf '\nunisono: all checks passed\n'

test-slow: $(STAMPS)/dev  ## Run the tests that take long or need the network
	$(call step,run the slow tests,$(BIN)/pytest -m slow,$(BIN)/pytest -m slow --last-failed)

format: $(STAMPS)/dev  ## Format the code and mend what the linter can mend
	$(call step,mend what the linter can mend,$(BIN)/ruff check --fix-only,$(BIN)/ruff check)
	$(call step,format,$(BIN)/ruff format,$(BIN)/ruff check)

lint: $(STAMPS)/dev  ## Check the format and lint
	$(call step,check the format,$(BIN)/ruff format --check,make format)
	$(call step,lint,$(BIN)/ruff check,make format)

types: $(STAMPS)/dev  ## Check the types
	$(call step,check the types,$(BIN)/mypy,$(BIN)/mypy --show-error-context)

# -E reads every page anew: an unchanged page would keep its warnings to itself the second time.
sphinx = $(call step,build the docs,$(BIN)/sphinx-build -W --keep-going -n -E -q docs build/docs,make docs)

docs: $(STAMPS)/dev  ## Build the documentation into build/docs
	$(sphinx)
	@printf 'unisono: open build/docs/index.html\n'

bench: $(STAMPS)/bench  ## Time ensembles against the loop and others on many networks; about 40 min
	@mkdir -p build
	$(call step,run the benchmarks of training,$(BIN)/python -m benchmarks.train --json build/train.json $(BENCH_TRAIN),make bench BENCH_TRAIN="--only MLP")
	$(call step,run the benchmarks,$(BIN)/python -m benchmarks.predict --json build/bench.json --png build/bench.png $(BENCH),make bench BENCH="--only MLP")

zoo: $(ZOOED)  ## Compare ensembles of public models with the loop; about an hour, can be resumed
	$(call step,go through the zoo,$(ZOO_BIN)/python -m benchmarks.zoo --json build/zoo/zoo.json --page docs/zoo.md $(ZOO),make zoo ZOO="--only NAME")

wheel: $(STAMPS)/pip  ## Build the wheel into dist
	$(call step,build the wheel,$(PIP) wheel --quiet --no-deps --wheel-dir dist .,an internet connection: the build fetches hatchling)

clean:  ## Remove the venv and everything built; keeps runs/
	rm -rf $(VENV) $(ZOO_VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The install steps. --clear: without this file, a venv that is there was left half made.
# pip comes first, because the one that Python 3.11 brings can't install dependency groups.
$(STAMPS)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  printf '%s\n' "unisono: no '$(PYTHON)' found; name a Python >= 3.11: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  printf '%s\n' "unisono: needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@printf 'unisono: the first run installs what it needs into $(VENV), which takes a few minutes\n'
	$(call step,create $(VENV),$(PYTHON) -m venv --clear $(VENV),on Debian and Ubuntu apt install python3-venv)
	$(call step,upgrade pip,$(PIP) install --quiet --upgrade "pip>=25.1",an internet connection and the same command again)
	@mkdir -p $(STAMPS) && touch $@

$(TORCHED): $(STAMPS)/pip
	@rm -f $(STAMPS)/torch-*
	$(call step,install torch,$(PIP) install --quiet --upgrade $(TORCH),an internet connection or another torch: make TORCH=... $(MAKECMDGOALS))
	@touch $@

$(STAMPS)/demo: EXTRA := demo
$(STAMPS)/dev: EXTRA := all
$(STAMPS)/bench: EXTRA := all
$(STAMPS)/dev: GROUP := --group dev
$(STAMPS)/bench: GROUP := --group bench
$(STAMPS)/demo $(STAMPS)/dev $(STAMPS)/bench: $(TORCHED) pyproject.toml
	$(call step,$(strip install unisono[$(EXTRA)] $(GROUP)),$(PIP) install --quiet --editable ".[$(EXTRA)]" $(GROUP),an internet connection and the same command again)
	@touch $@

# torch first and by itself, so that what comes next finds the build that was asked for. timm without
# its requirements: it would bring another torchvision; what it needs of them is the group `zoo`.
$(ZOOED): $(STAMPS)/pip pyproject.toml
	@rm -f $(ZOO_VENV)/.unisono-*
	$(call step,create $(ZOO_VENV),$(PYTHON) -m venv $(ZOO_VENV),rm -rf $(ZOO_VENV) and the same command again)
	$(call step,upgrade pip,$(ZOO_PIP) install --quiet --upgrade "pip>=25.1",an internet connection and the same command again)
	$(call step,install torch for the zoo,$(ZOO_PIP) install --quiet $(ZOO_TORCH),another one: make ZOO_TORCH=... zoo)
	$(call step,install torchvision,$(ZOO_PIP) install --quiet $(ZOO_TORCH) $(ZOO_TORCHVISION),the one that belongs to your torch: make ZOO_TORCHVISION=... zoo)
	$(call step,install unisono and what the zoo needs,$(ZOO_PIP) install --quiet --editable . --group zoo $(ZOO_TORCH) $(ZOO_TRANSFORMERS),an internet connection and the same command again)
	$(call step,install timm,$(ZOO_PIP) install --quiet --no-deps $(ZOO_TIMM),an internet connection and the same command again)
	@touch $@
