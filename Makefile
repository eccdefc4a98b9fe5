# `make demo` and `make test` are all a newcomer needs: each installs what it uses into .venv first.
# Plain rules only: a Mac's make is GNU Make 3.81.
comma := ,
SYSTEM := $(shell uname -s)
BIN := .venv/bin
DEMO := demo/model

# On a Mac mlx-lm brings MLX itself; elsewhere BACKEND=cuda13 or cuda12 takes an NVIDIA GPU.
BACKEND ?= cpu
EXTRAS := $(if $(filter Darwin,$(SYSTEM)),test,$(BACKEND)$(comma)test)

# The first Python that is new enough; Apple's own python3 is 3.9.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(python) -c '$(RECENT)' >/dev/null 2>&1 && echo $(python))) python3)

FOUND = $(shell $(PYTHON) -c 'import sys; print("%d.%d at %s" % (sys.version_info[:2] + (sys.executable,)))' 2>/dev/null)
IS_RECENT = $(shell $(PYTHON) -c '$(RECENT)' >/dev/null 2>&1 && echo yes)
HOW := $(if $(filter Darwin,$(SYSTEM)),brew install python@3.13,e.g. apt install python3.13 python3.13-venv)
TOO_OLD = Python 3.11 or newer is needed; found $(or $(FOUND),no $(PYTHON)); install it ($(HOW)) and run \
	make PYTHON=python3.13 $(or $(MAKECMDGOALS),demo)

FORMS = $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

.DEFAULT_GOAL := help
.PHONY: help demo test test-mac mac soak fuzz check docs wheel

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s  %s\n", $$1, $$2 }' Makefile

demo: .venv/installed ## ask the demo model for a definition and the weather, and compare it with mlx-lm
	$(BIN)/python -m flashmoe_mlx.generate --model $(DEMO) --prompt "What is a heron?"
	$(BIN)/python -m demo.talk "What is the weather in Oslo?"
	$(BIN)/python -m benchmarks.exact --model $(DEMO)

test: .venv/installed ## run the tests
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

# Where the platform matters. For all of them: make test-mac MAC_TESTS="tests flashmoe_mlx"
MAC_TESTS ?= tests/benchmarks tests/checkpoint tests/cli tests/streaming tests/system

test-mac: .venv/installed ## run the tests as on a Mac, as far as Python can tell
	$(BIN)/python -m pytest -q -p tests.support.fake_mac --numprocesses auto --maxprocesses 4 --dist worksteal $(MAC_TESTS)

mac: .venv/installed ## measure this Mac: 15 minutes, 8 GB; writes build/mac/report.md
	$(BIN)/python -m benchmarks.mac

soak: .venv/installed ## run the long tests: minutes of faulty disks, kills, Ctrl-C and many requests
	$(BIN)/python -m pytest -q -m soak -s

fuzz: .venv/installed ## feed the header parser five million hostile headers (Linux)
	$(BIN)/pip install --quiet --editable ".[fuzz]"
	$(BIN)/python -m tests.checkpoint.hostile.fuzz build/corpus -runs=5000000 -max_len=2048 -timeout=5 -malloc_limit_mb=64 \
		-artifact_prefix=build/

check: .venv/installed ## check style, types, import contracts and workflows
	$(BIN)/pip install --quiet --editable ".[check]"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(FORMS)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet .github

docs: .venv/installed ## build the documentation's pages in build/site
	$(BIN)/pip install --quiet --editable ".[docs]"
	$(BIN)/mkdocs build --strict

# On Linux with a C++20 compiler the native CPU kernels are in it.
wheel: .venv/installed ## build a wheel for this machine in dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

.venv/installed: pyproject.toml hatch_build.py $(wildcard native/*.* native/*/*)
	$(if $(IS_RECENT),,$(error $(TOO_OLD)))
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@
