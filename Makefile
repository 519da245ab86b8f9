# `make demo` shows what this is; `make test` proves it. Both set up what they need, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format miniature evaluate clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed; pass PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=strict --editable '.[train,eval,miniature,space,dev]'
	touch $@

# Captions and reconstructs the example images with the embedded miniature.
demo: $(READY)
	$(BIN)/vlv caption examples/images --output outputs/captions.json
	$(BIN)/vlv reconstruct examples/images --output-dir outputs/reconstructions --sheet outputs/side_by_side.png --captions outputs/captions.json
	@echo "captions: outputs/captions.json    pictures: outputs/side_by_side.png, outputs/reconstructions/"

test: $(READY)
	$(BIN)/python -m pytest

# mypy reads an installed copy: it does not know that the folders here are packages of other names.
lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf .cache/lint build && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .cache/lint .
	cd .cache/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p vlv

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains everything in the miniature from nothing, and then what the paper's tables compare; prints a plan first.
# Hours on two cores; stopped and started again, it goes on.
miniature: $(READY)
	$(BIN)/python -m vlv.miniature --root runs/miniature --output checkpoints/vlv-miniature

# Every figure in the miniature's card.
evaluate: $(READY)
	$(BIN)/vlv evaluate miniature --output outputs/evaluation.json

clean:
	rm -rf $(VENV) .cache build dist outputs *.egg-info .pytest_cache .ruff_cache
