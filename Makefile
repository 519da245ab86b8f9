# `make demo` shows what this is, `make test` checks it. Both set up what they need, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.files
# `make test VENV=.venv-5.24 CONSTRAINTS=FILE` takes the versions in another file.
CONSTRAINTS ?= constraints.txt
CODE := $(shell sed -n 's/^    vlv[.a-z_]* = \([a-z_]*\)$$/\1/p' setup.cfg)
LIST_OF_FILES = find $(CODE) -type f -not -path '*/__pycache__/*' | LC_ALL=C sort
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# With it, each of the many processes of the tests would compile all of the code again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast lint format miniature evaluate bench clean always
.DEFAULT_GOAL := demo

$(VENV)/.ready: pyproject.toml setup.cfg $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed; pass PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint $(CONSTRAINTS) --editable '.[train,gguf,eval,formats,miniature,space,serve,dev]'
	$(LIST_OF_FILES) > $(READY)
	touch $@

# A strict editable install links each file: changed contents are live, but a new, moved or removed file needs new links.
$(READY): $(VENV)/.ready always
	@$(LIST_OF_FILES) | cmp -s - $@ || { \
		$(INSTALL) --no-deps --no-build-isolation --force-reinstall --editable . && $(LIST_OF_FILES) > $@; }

# Captions and reconstructs the example images with the embedded miniature.
demo: $(READY)
	$(BIN)/vlv caption examples/images --output outputs/captions.json --overwrite
	$(BIN)/vlv reconstruct examples/images --output-dir outputs/reconstructions --sheet outputs/side_by_side.png --captions outputs/captions.json --overwrite
	@echo "captions: outputs/captions.json    images: outputs/side_by_side.png, outputs/reconstructions/"

# A file runs in one worker, which computes on one thread.
test: $(READY)
	$(PYTEST)

# Without the tests marked `slow`.
test-fast: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p vlv

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Prints a plan, then trains every part of the miniature from nothing and measures the paper's tables in it.
# This takes hours on two cores. An interrupted run resumes.
miniature: $(READY)
	$(BIN)/python -m vlv.miniature --root runs/miniature --output checkpoints/vlv-miniature

# All metrics in the miniature's card.
evaluate: $(READY)
	$(BIN)/vlv evaluate miniature --output outputs/evaluation.json --overwrite

# Each path beside the authors' method, and how its cost grows: reports in benchmarks/. An hour or two.
bench: $(READY)
	$(BIN)/python -m benchmarks.bench --growth --output benchmarks
	$(BIN)/python -m benchmarks.bench.profile --missed benchmarks
	$(BIN)/python -m benchmarks.bench.options --output benchmarks
	$(BIN)/python -m benchmarks.bench.startup --output benchmarks

clean:
	rm -rf $(VENV) .cache build dist outputs *.egg-info .pytest_cache .ruff_cache
