# Everything a clean clone needs; `make` alone lists the targets.

PYTHON ?= python3
JOBS ?= 2
OUT ?= runs/demo
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
MARK := @printf '== %s\n'

.DEFAULT_GOAL := help
.PHONY: help setup demo test proof lint format docs wheel clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '  variables: PYTHON=%s JOBS=%s OUT=%s PIP_ARGS=%s\n' '$(PYTHON)' '$(JOBS)' '$(OUT)' '$(PIP_ARGS)'

setup: $(STAMP) ## make .venv with the pinned versions (again only when they change)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'make: $(PYTHON) is missing or older than 3.10; say which: make PYTHON=python3.12'; exit 1; }
	$(MARK) 'installing into $(VENV) (minutes the first time: torch is large)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) \
		-c constraints.txt -e '.[viz,data,export,openvino,dev]'
	@touch $@

demo: setup ## search, derive, train and export on synthetic people, into OUT
	@$(BIN)/posefabric demo --out $(OUT)

# Each worker takes one thread: two that take all cores are slower than one.
test: setup lint ## lint, then every test but the slow ones, with coverage
	$(MARK) 'pytest, $(JOBS) workers'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --cov --cov-report=term

proof: setup ## the slow tests: trainings, whole stories, the wheel
	$(MARK) 'pytest, slow tests'
	@$(BIN)/python -m pytest -m slow --durations=10

lint: setup ## ruff (rules and format) and pyright
	$(MARK) 'ruff, pyright'
	@$(BIN)/python -m ruff check -q --output-format concise
	@$(BIN)/python -m ruff format --check -q || \
		{ echo 'make: these files are not formatted; run `make format`:'; \
		  $(BIN)/python -m ruff format --check | head -20; exit 1; }
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright

format: setup ## apply ruff's fixes and format
	@$(BIN)/python -m ruff check -q --fix-only
	@$(BIN)/python -m ruff format

docs: setup ## write docs/configuration.md and README's list of files anew
	@$(BIN)/python docs/build_configuration.py
	@$(BIN)/python docs/build_tree.py

# A stale build folder would put deleted modules into the wheel.
wheel: setup ## build dist/*.whl
	@rm -rf build
	@$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@rm -rf build
	@ls -1t dist/*.whl | head -1

clean: ## remove what was built, but neither .venv nor runs
	@rm -rf build dist *.egg-info .coverage coverage.xml .pytest_cache .ruff_cache .hypothesis
	@find posefabric tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
