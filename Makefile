# Two commands do everything on a fresh machine: `make demo` and `make test`. The first of either also installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := .tools
OPEN_DATA ?= $(or $(FEDMIX_OPEN_DATA),../shared/data/cxr-open)

# Tests use one thread each, and those that start whole systems mostly wait: two files at a time.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: demo test test-systems test-all lint bench open field-open compare sbom audit clean
demo: $(STAMP)  ## train, evaluate and report a federation of phantom hospitals (minutes)
	rm -rf runs/demo
	$(BIN)/fedmix simulate configs/demo.yaml --out runs/demo

test: $(STAMP)  ## the default tests
	$(BIN)/pytest $(SIDE_BY_SIDE)

test-systems: $(STAMP)  ## the tests that start whole systems or use real data; UNTIL=unix time: none begins after it
	$(BIN)/pytest $(SIDE_BY_SIDE) --durations 12 -m "(e2e or data) and not slow and not gpu" $(if $(UNTIL),--begin-until $(UNTIL))

test-all: $(STAMP)  ## with the tests that start whole systems, use real data or take minutes
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not gpu"

lint: $(STAMP)  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)  ## speed as ratios
	$(BIN)/fedmix bench

compare: $(STAMP)  ## more baselines beside the main method (long)
	$(BIN)/fedmix simulate configs/compare.yaml

shards/open/%: $(STAMP)
	mkdir -p shards/open
	$(BIN)/fedmix prepare table $(OPEN_DATA) --size 96 --max-words 128 --sections whole --phi count --key-file shards/open.key --out $@ --replace $(ARGUMENTS_$*)
ARGUMENTS_iu := --csv reports-only.csv --stream text
ARGUMENTS_nih := --csv images-only.csv --stream image
ARGUMENTS_covid := --csv paired.csv --stream paired --labels none

open: shards/open/iu shards/open/nih shards/open/covid  ## three real sites from the small open corpus (OPEN_DATA=folder)
	rm -rf runs/open
	$(BIN)/fedmix simulate configs/open.yaml --out runs/open

field-open: shards/open/iu shards/open/nih shards/open/covid  ## the field's methods on the small open corpus (OPEN_DATA=folder)
	rm -rf runs/field-open
	$(BIN)/fedmix simulate configs/field-open.yaml --out runs/field-open

sbom: $(STAMP) $(TOOLS)  ## what is installed, as CycloneDX: sbom.json
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o sbom.json $(BIN)/python

audit: $(TOOLS)  ## known weaknesses of what is pinned; asks the public advisory database, and fails where it cannot
	$(TOOLS)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

clean:  ## forget the environment
	rm -rf $(VENV) $(TOOLS)

# Apart from what runs: it would stand in the list that it makes.
$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1

# One resolve for everything, against pinned versions; touched only when what is installed should change.
$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@
