# make demo | demo-video | test | test-all | lint | bench | docs: each, alone, on a machine with Python 3.10+, a C++ compiler and make,
# creates the virtual environment, installs torch if it is absent, builds the kernels, and runs.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
READY = $(VENV)/.sage-ready
# One process a core, at most four: each holds a torch of its own. They share what tests/simt/build.py compiles.
PYTEST = $(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo demo-video test test-slow test-all matrix lint bench docs clean
demo: $(READY)
	$(BIN)/sage-ext demo --out demo-run --overwrite

# The same from raw video: drawn people, their voices, and what breaking the sound or the picture does.
demo-video: $(READY)
	$(BIN)/sage-ext demo --video --out demo-video --overwrite

# Every part of the project, in minutes; test-slow: what the `slow` marker keeps from it; test-all: both.
test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

test-all: $(READY)
	$(PYTEST)

# The tests with the other versions of Python that this machine has: each takes gigabytes, and the time of make test.
matrix:
	$(PYTHON) tests/matrix.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# Every op and the model against eager PyTorch, torch.compile and torchmetrics, half an hour alone on the machine; then the tables
# of README.md and docs/benchmarks.md.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py --runs 3 --allocator both
	$(BIN)/python benchmarks/bench.py --write

# The documentation site: site/index.html.
docs: $(READY)
	test -x $(BIN)/mkdocs || $(BIN)/pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean -f .mkdocs.yml

$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)" numpy
	$(BIN)/pip install -q -e ".[test,lint]"
	touch $@

clean:
	rm -rf build site $(READY)
