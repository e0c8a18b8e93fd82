# make train   install, prepare the quickstart text, train the quickstart model in FP8
# make test    install with the test extra, then lint, type-check and test (what CI runs)
# make evidence         under an hour on two cores: the comparisons of docs/evidence.md, shortened
# make evidence-full    hours: the same as committed; goes on where it was stopped
# make docs    build the documentation as a site, in build/docs; any warning is an error
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   := data/quickstart

.PHONY: train test lint type unit test-slow test-oldest audit fuzz dist reliability evidence evidence-full docs clean

train: $(DATA)/manifest.json
	$(BIN)/lightning-fp8 fit --config configs/quickstart.yaml

$(DATA)/manifest.json: | $(VENV)/.installed
	$(BIN)/lightning-fp8 prepare --config configs/data/quickstart.yaml

test: lint type unit

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.installed-test
	$(BIN)/mypy

# A process for each core, and a thread for each process: most tests wait for others or are too small to share.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
unit: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m "slow and not gpu"

evidence: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py --profile short

evidence-full: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py --profile full

# The lower bounds of pyproject.toml, on Python 3.12 where there is one (what GPU images ship), else on $(PYTHON).
OLDEST_PYTHON ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo $(PYTHON))
test-oldest:
	test -x .venv-oldest/bin/uv || { $(OLDEST_PYTHON) -m venv .venv-oldest && .venv-oldest/bin/pip install -q uv; }
	.venv-oldest/bin/uv pip install -q --python .venv-oldest/bin/python --upgrade --resolution lowest-direct -e '.[test]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile

# What is installed, against the published advisories. It needs the network, and fails over what it cannot look up.
audit: $(VENV)/.installed
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install -q pip-audit; }
	$(BIN)/python -m pip freeze --exclude-editable > .venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r .venv-audit/installed.txt

# Five minutes of what reads files of others, guided by coverage; what crashes it is left in fuzz/.
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q atheris
	mkdir -p fuzz
	cd fuzz && PYTHONPATH=.. ../$(BIN)/python ../tests/hostile/fuzz.py . ../tests/hostile/seeds -max_total_time=300

# The README's table of faults, from what the tests count; a quarter of an hour.
reliability: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/reliability.py

# The same bytes each time: the time in the archives is that of the last commit.
dist: $(VENV)/.installed-test
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m hatchling build

docs: $(VENV)/.installed-test
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-oldest .venv-audit build data runs fuzz
