# `make demo` and `make test` work on a fresh machine that has Python 3.11 or newer and make; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src -name '*.py' -o -name 'py.typed')
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test check bench torture clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     train on real data, kill it, resume it, compare"
	@echo "make test     the tests, against the built wheel"
	@echo "make check    ruff, mypy, the floors of the house"
	@echo "make bench    the peers side by side (BENCH_ARGS='--rounds 3' and the like)"
	@echo "make torture  the slow tests with their full counts"
	@echo "make clean    remove what the others made"

# The tools, made anew when what they are made from changes.
$(VENV)/tools: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Holdfast needs Python 3.11 or newer; this is %d.%d. Set PYTHON=..." % v)'
	@echo "making $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt hatchling
	@mkdir -p build && $(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["dev"]))' > build/requirements.txt
	@$(PIP) install -c constraints.txt -r build/requirements.txt
	@touch $@

# Holdfast itself, as a user gets it: built into a wheel and installed. Nothing runs from src/.
$(VENV)/holdfast: $(VENV)/tools $(SOURCES) README.md LICENSE
	@rm -rf build/wheel
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel .
	@$(PIP) install --no-deps --force-reinstall build/wheel/*.whl
	@touch $@

$(VENV)/bench: $(VENV)/tools
	@$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["optional-dependencies"]["bench"]))' > build/bench.txt
	@$(PIP) install -c constraints.txt -r build/bench.txt
	@touch $@

demo: $(VENV)/holdfast
	@$(BIN)/python examples/demo.py

test: $(VENV)/holdfast
	@$(BIN)/python -m pytest -q $(TEST_ARGS)

check: $(VENV)/holdfast
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_house.py tests/test_public_names.py

bench: $(VENV)/holdfast $(VENV)/bench
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

torture: $(VENV)/holdfast
	@HOLDFAST_TORTURE=1 $(BIN)/python -m pytest -q $(TEST_ARGS)

clean:
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
