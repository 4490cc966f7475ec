# Needs Python 3.11 or newer and make; everything else is installed into .venv at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two workers with a thread each beat one with two threads on these many small tests.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: install demo test test-all style quality clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## real digits, a VAE, a transformer, samples: under 8 minutes on 2 cores
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py --output_dir demo

test: quality  ## what CI runs: no network, no GPU
	$(PYTEST) -m "not slow"

test-all: quality  ## with the long matrix
	$(PYTEST)

style: $(INSTALLED)  ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache
