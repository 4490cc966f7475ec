# Needs Python 3.11 to 3.13 and make; everything else is installed into .venv at the versions of constraints.txt.
PYTHON ?= python3
# Where torch comes from: a package index, a folder or a wheel (CONTRIBUTING.md); empty: where pip finds it.
export TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two workers with a thread each beat one with two threads on these many small tests. A file goes to one worker, which
# makes its fixtures once.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-all test-lowest test-wheel bench gpu docs tiny style quality clean

install: $(INSTALLED)  ## says what it brings, and how much; repairs what was interrupted

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) .ci/install.py

# Also when TORCH is not the one of the last installation.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(INSTALLED) 2>/dev/null))
.PHONY: $(INSTALLED)
endif
endif

demo: $(INSTALLED)  ## real digits, a VAE, a transformer, samples: about 4 minutes on 2 idle cores
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py --output_dir demo

test: quality  ## what CI runs: no network, no GPU
	$(PYTEST) -m "not slow"

test-all: quality  ## with the long matrix
	$(PYTEST)

test-lowest:  ## the same tests on the oldest versions that pyproject.toml allows, in an environment of their own
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) .ci/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --disable-pip-version-check --quiet --constraint .venv-lowest/constraints.txt --editable ".[dev]"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-wheel: $(INSTALLED)  ## build, install in an empty environment, import, type-check a user's file
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt dist/*.whl mypy
	.venv-wheel/bin/python -P .ci/check_wheel.py

bench: $(INSTALLED)  ## E beside A and diffusers' DiT, about 35 minutes on 2 cores; leave the machine to it
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed/speed.py --output benchmarks/records/speed
	HF_HUB_OFFLINE=1 THP_MEM_ALLOC_ENABLE=1 $(BIN)/python benchmarks/speed/parts.py --output benchmarks/records/parts.md
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed/speed.py --sample_size 32 --batch_size 4 --output benchmarks/records/speed_256_tokens

# Nothing is installed: torch is that of PYTHON. WHEELS: a folder of what PYTHON lacks (docs/results/gpu.md).
gpu:  ## on one large GPU, without network: values, speed, memory, a training; 8 minutes
	$(PYTHON) benchmarks/gpu/gpu.py $(if $(WHEELS),--wheels $(WHEELS))

tiny: $(INSTALLED)  ## the checkpoint in docs/tiny, its curves and its evaluation: about 15 minutes on one core
	rm -rf build/tiny
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quality/make_tiny_checkpoint.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=benchmarks/quality $(BIN)/python examples/evaluate.py --pretrained_model_name_or_path docs/tiny --reference_dir build/tiny/digits/held_out --extractors digits_features:hidden_units --num_samples 1000 --batch_size 100 --guidance_scales 1 1.5 2 3 4 --num_inference_steps 5 10 25 50 --scheduler DPMSolverMultistepScheduler --heat_map --write_card --output_dir build/tiny/evaluation

docs: $(INSTALLED)  ## the pages of docs/ as build/docs/index.html; every warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/docs

style: $(INSTALLED)  ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-lowest .venv-wheel demo build dist *.egg-info .pytest_cache .ruff_cache
