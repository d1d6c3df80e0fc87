# Everything a checkout can do. `make demo` and `make test` set up by themselves.
PYTHON ?= python3
WORKERS ?= 2
CASES ?= 10000
BIN := .venv/bin
# Whatever changes what is installed; Python files are read from the checkout.
INSTALLED_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/native/*.cpp kernels/native/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench kernels-offline gpu-check fuzz clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/.ready  ## environment in .venv with the exact versions of constraints.txt (about 2.5 GB)

.venv/.ready: $(INSTALLED_FROM)
	@echo "Setting up .venv; the first time takes a minute or more."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gpu,lidar,scale,log,test,dev]'
	@touch $@

demo: setup  ## the whole job on the built-in scene
	$(BIN)/fastdiffclip demo

# One OpenMP thread per worker: the workers themselves fill the cores.
test: setup  ## all tests; WORKERS=n processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# The folders are seen as they are installed: kernels, bench and configs inside fastdiffclip.
lint: setup  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .mypy_tree && mkdir -p .mypy_tree/fastdiffclip
	@for part in fastdiffclip/* kernels bench configs; do ln -s "../../$$part" .mypy_tree/fastdiffclip/; done
	cd .mypy_tree && ../$(BIN)/mypy --config-file ../pyproject.toml -p fastdiffclip

bench: setup  ## time everything on this machine
	$(BIN)/fastdiffclip bench

kernels-offline: setup  ## what every Triton kernel takes of a GPU that need not be here
	$(BIN)/python -m bench.offline

# Runs in any environment with torch and triton, set up or not.
gpu-check:  ## correctness, then timings, on a CUDA machine
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m bench.gpu_check

fuzz: setup  ## damaged files of every format; CASES=n, findings in fuzz-findings/
	$(BIN)/python -m tests.fuzz --cases $(CASES) --out fuzz.json

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf .venv build dist .mypy_tree .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
