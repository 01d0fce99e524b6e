# Everything a fresh machine needs is Python 3.11 or newer, make and git. `make demo` and `make test` do all set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := build/tools
JOBS ?= 3
export DAGSTER_HOME := $(CURDIR)/.dagster_home
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Each of the many processes of a run would compile all modules anew
unexport PYTHONDONTWRITEBYTECODE

MEASURED = COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml COVERAGE_ROOT=$(CURDIR)

.PHONY: demo demo-ui test test-system soak coverage lint ui bench peers vllm docs screenshots lock sbom audit pin clean

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

coverage: $(VENV)/installed  ## which statements the tests of both tiers run, with those of worker processes; twice as long as they
	rm -rf build/coverage && mkdir -p build/coverage
	-$(MEASURED) $(MAKE) test
	-$(MEASURED) $(MAKE) test-system
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --directory build/coverage/html
	$(BIN)/coverage report

lint: $(VENV)/installed  ## style, import rules, types, definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy --num-workers 2
	$(BIN)/dg check defs
	@! grep -rnwiE --include=*.py --include=*.jinja --include=*.yaml --include=*.md --exclude=world.py --exclude-dir=documents -f docs/words.txt \
		finetune_assets configs README.md CHANGELOG.md docs | grep -vE '# older name$$|\.tell\b' \
		|| (echo "Words of docs/words.txt above: use the standard terms"; exit 1)

ui: $(VENV)/installed  ## Dagster's UI on http://127.0.0.1:3000, and its daemon
	@$(BIN)/finetune ui $(ARGS)

bench: $(VENV)/installed peers  ## benchmarks; see benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.data_prep
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.near_duplicates
	$(BIN)/python -m benchmarks.retrieval
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.evaluation

peers: $(VENV)/installed  ## environments of TRL and LLaMA-Factory in build/peers, which bench compares with
	$(BIN)/python -m benchmarks.peers

vllm: $(VENV)/installed  ## environment of a vLLM server on the CPU in build/vllm, which its tests and benchmarks start; 2.4 GB
	$(BIN)/python -m benchmarks.vllm_server

docs: $(VENV)/installed  ## write the generated parts of the documentation, and build it as a site in build/site
	$(BIN)/python -m finetune_assets.config.reference
	$(BIN)/python -m docs.graph
	$(BIN)/python -m docs.layers
	$(BIN)/python -m docs.diagrams
	$(BIN)/python -m docs.reference
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

screenshots: $(VENV)/installed  ## take the documentation's pictures of Dagster's UI; needs chromium
	PYTHONPATH=tests $(BIN)/python -m docs.screenshots

lock: $(TOOLS)/installed  ## write requirements/*.txt: every package with the sha256 of each file; TORCH=URL locks one more build
	$(TOOLS)/bin/python requirements/lock.py --uv $(TOOLS)/bin/uv $(if $(TORCH),--torch $(TORCH))

sbom: $(VENV)/installed $(TOOLS)/installed  ## a CycloneDX bill of materials of what is installed, in build/sbom.cdx.json
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file build/sbom.cdx.json $(BIN)/python

audit: $(TOOLS)/installed  ## look for known vulnerabilities of what is locked; ARGS=--strict fails where it cannot
	$(TOOLS)/bin/python requirements/audit.py $(ARGS)

pin:  ## print which commits and digests the tags of deploy/ have now; needs git, docker and the internet
	deploy/pin.sh

$(VENV)/installed: pyproject.toml requirements/install.sh $(wildcard requirements/*.txt)
	@echo "Installing into $(VENV); this takes a few minutes ..."
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	requirements/install.sh $(BIN)/python dev --editable .
	@touch $@

# uv, pip-audit and cyclonedx-bom need other versions of some packages than the project does
$(TOOLS)/installed: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/tools.txt
	@touch $@

clean:  ## remove what was installed and made here
	rm -rf $(VENV) .finetune build *.egg-info
