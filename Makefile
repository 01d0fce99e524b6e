# Everything a fresh machine needs is Python 3.11 or newer, make and git. `make demo` and `make test` do all set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 3
export DAGSTER_HOME := $(CURDIR)/.dagster_home
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Each of the many processes of a run would compile all modules anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-ui test test-system soak lint ui bench docs screenshots clean

demo: $(VENV)/installed  ## the whole graph on packaged data, offline
	@$(BIN)/finetune demo

demo-ui: $(VENV)/installed  ## Dagster's UI with what the demo made
	@$(BIN)/finetune --demo ui $(ARGS)

test: $(VENV)/installed  ## tests for every change, ten minutes on two cores in JOBS=3 processes, for many wait
	$(BIN)/python -m pytest -n $(JOBS) -m "not system" --durations=20 $(ARGS)

test-system: $(VENV)/installed  ## the other tests: Slurm, PostgreSQL, every page of the documentation, sweeps
	$(BIN)/python -m pytest -n $$(($(JOBS) + 1)) -m system --durations=20 $(ARGS)

soak: $(VENV)/installed  ## all tests of both kinds at their full counts
	SOAK=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/installed  ## style, import rules, types, definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/dg check defs
	@! grep -rnwiE --include=*.py --include=*.jinja --include=*.yaml --include=*.md --exclude=world.py -f docs/words.txt \
		finetune_assets configs README.md docs/settings.md | grep -v '# older name$$' \
		|| (echo "Words of docs/words.txt above: use the standard terms"; exit 1)

ui: $(VENV)/installed  ## Dagster's UI on http://127.0.0.1:3000, and its daemon
	@$(BIN)/finetune ui $(ARGS)

bench: $(VENV)/installed  ## benchmarks; see benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.data_prep
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.near_duplicates
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.evaluation

docs: $(VENV)/installed  ## write the generated parts of the documentation, and build it as a site in build/site
	$(BIN)/python -m finetune_assets.config.reference
	$(BIN)/python -m docs.graph
	$(BIN)/python -m docs.layers
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

screenshots: $(VENV)/installed  ## take the documentation's pictures of Dagster's UI; needs chromium
	PYTHONPATH=tests $(BIN)/python -m docs.screenshots

# torch first and exactly: a looser request, or one by another package, may take another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV); this takes a minute or two ..."
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:  ## remove what was installed and made here
	rm -rf $(VENV) .finetune build *.egg-info
