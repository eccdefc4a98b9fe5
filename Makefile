# `make demo` and `make test` are all a newcomer needs: each installs what it uses into .venv first.
comma := ,
PYTHON ?= python3
# On a Mac mlx-lm brings MLX itself; elsewhere BACKEND=cuda13 or cuda12 takes an NVIDIA GPU.
BACKEND ?= cpu
EXTRAS := $(if $(filter Darwin,$(shell uname -s)),test,$(BACKEND)$(comma)test)
BIN := .venv/bin
DEMO := demo/model

.PHONY: demo test soak fuzz check wheel

demo: .venv/installed
	$(BIN)/python -m flashmoe_mlx.generate --model $(DEMO) --prompt "What is a heron?"
	$(BIN)/python -m demo.talk "What is the weather in Oslo?"
	$(BIN)/python -m benchmarks.exact --model $(DEMO)

test: .venv/installed
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

soak: .venv/installed
	$(BIN)/python -m pytest -q -m soak -s

check: .venv/installed
	$(BIN)/pip install --quiet --editable ".[check]"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# For this machine's Python and system; native CPU kernels are in it where there is a C++ compiler.
wheel: .venv/installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

fuzz: .venv/installed
	$(BIN)/pip install --quiet --editable ".[fuzz]"
	$(BIN)/python -m tests.checkpoint.hostile.fuzz build/corpus -runs=5000000 -max_len=2048 -timeout=5 -malloc_limit_mb=64 \
		-artifact_prefix=build/

.venv/installed: pyproject.toml hatch_build.py $(wildcard native/*.* native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@
