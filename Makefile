# Two commands set everything up on a fresh machine with Python 3.11+: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# A stamp inside the environment: installed again only when the dependencies change.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

# Shards, a small model, logs and pictures under runs/demo, from photographs that come with scikit-image and scikit-learn.
demo: $(VENV)/.installed
	$(BIN)/fastmae demo --out runs/demo

# Every test that needs no GPU.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs *.egg-info
