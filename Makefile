# `make demo` and `make test` need Python 3.11 (or newer), make and a C compiler; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SAMPLE := demo/minilm-bf16.safetensors
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint unit cover bench fuzz golden clean

# torch is pinned and installed first: an open range would pull gigabytes of CUDA libraries.
$(STAMP): pyproject.toml setup.py $(wildcard codec/rac/native/src/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e ".[torch,safetensors,gguf,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The model whose exact sizes are tested (tests/promises/sizes.csv).
$(SAMPLE): | $(STAMP)
	$(BIN)/python tools/demo.py --fetch-only

unit: $(STAMP) $(SAMPLE)
	$(BIN)/python -m pytest -n auto --dist worksteal

# The same with the lines that no test runs; counting them takes a third more time.
cover: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal --cov=rac --cov-report=term:skip-covered

bench: $(STAMP) $(SAMPLE)
	$(BIN)/python -m pip install -q -e ".[bench]"
	$(BIN)/python tools/bench_lossless.py demo/minilm-bf16.safetensors demo/minilm-f32.safetensors --threads 1 2

fuzz: $(STAMP)
	PYTHONPATH=tests:tools:format_spec $(BIN)/python -m fuzz.fuzz_reader --seconds 300

golden: $(STAMP)
	$(BIN)/python tools/make_golden.py

clean:
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis codec/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f codec/rac/native/*.so codec/rac/native/*.dylib codec/rac/native/*.dll
