# AVATAR-RL. `make demo` trains a tiny audio-visual model on this machine; `make test` runs the tests.
# Both set everything up first; the second time setup is a no-op.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/local.yaml
ARGS ?=
# Processes that run tests: two suit two cores, a training run in a test has several of its own.
WORKERS ?= 2
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.setup-$(EXTRA)
# A quarter of what is installed, never imported here: left to be compiled by whoever does import it.
UNUSED := /transformers/models/(?!auto|qwen|whisper)[a-z0-9_]*/(modeling|modular|convert)_|/ray/(rllib|tune|train|serve|data)/|/site-packages/(anthropic|numba|nltk|mypy|mypyc|pip|sentry_sdk|dns|mcp)/|/pygments/lexers/|/torch/testing/_internal/
# What is compiled while something runs is kept, or each of a run's dozen processes would compile it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo cold-start test test-unit test-chaos lint bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml deploy/constraints/$(EXTRA).txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info[:2] < (3,13) else "AVATAR-RL needs Python 3.11 or 3.12; found %s: set PYTHON=python3.11" % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing AVATAR-RL ($(EXTRA)) into $(VENV), once"
	@# -qq: errors are shown, warnings (an index without some package, a script beside PATH) are not
	@# pip 26 resolves in half the time of the one that Python brings; where there is none, that one does
	@$(BIN)/python -m pip install -qq --disable-pip-version-check 'pip>=26' 2>/dev/null || true
	@echo "  1/3  packages, about 75 s from a near index ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --editable '.[$(EXTRA),dev]' -c deploy/constraints/$(EXTRA).txt
	@# pip compiles on one core, and all of it; some packages carry templates that are no Python, hence "|| true"
	@echo "  2/3  compiling, about 15 s ..."
	@$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib avatar_rl >/dev/null 2>&1 || true
	@echo "  3/3  checking torch and Redis, about 10 s ..."
	@$(BIN)/python -m avatar_rl.cluster.install.cpu_media
	@$(BIN)/python -m avatar_rl.cluster.install.redis_binary
	@touch $@

demo: setup  # FROM_SCRATCH=1 trains the tiny model's cold start here instead of taking the one that is there
	@$(BIN)/avatar train $(RECIPE) $(if $(PRESET),--preset $(PRESET)) $(if $(FROM_SCRATCH),--cold_start.ready null) $(ARGS)

cold-start: setup  # makes recipes/assets/tiny_omni anew
	@$(BIN)/python -m avatar_rl.cluster.training.make_ready $(RECIPE)

test: setup
	@$(BIN)/python -m pytest tests -m 'not chaos' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-unit: setup
	@$(BIN)/python -m pytest tests/unit -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-chaos: setup
	@$(BIN)/python -m pytest tests -m chaos $(ARGS)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench:  # its name is looked at before anything is installed
	@test -n "$(NAME)" || { echo "usage: make bench NAME=orchestration   (one of: $$(ls benchmarks/*.py | xargs -n1 basename | sed 's/.py//' | grep -v -e __init__ -e harness -e _side | xargs))"; exit 2; }
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

docs: setup $(VENV)/.setup-docs  # build/site, strictly: a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "open build/site/index.html"

$(VENV)/.setup-docs: pyproject.toml | setup
	@echo "Installing what builds the documentation, once"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	  | xargs $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c deploy/constraints/$(EXTRA).txt
	@touch $@

clean:
	rm -rf build runs .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
