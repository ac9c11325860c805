# Each target sets itself up from a bare Python >= 3.11: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test lint format docs notebooks bench clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## noisy K-FAC on diabetes and digits: a table and examples/output/demo.png
	$(BIN)/python examples/demo.py

test: $(READY)  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(READY)  ## style, docstrings, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation, in docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

notebooks: $(READY)  ## run every notebook in full and keep its outputs; minutes each
	for source in notebooks/*.py; do \
	  $(BIN)/jupytext --to ipynb $$source && $(BIN)/jupyter execute --inplace $${source%.py}.ipynb || exit 1; \
	done

bench: $(READY)  ## the published UCI regression table; minutes to hours, resumable
	$(BIN)/python benchmarks/uci.py

clean:
	rm -rf $(VENV) docs/_build examples/output
