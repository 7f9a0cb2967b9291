# Everything here needs only Python and make. What is installed goes into .venv, the built wheel into dist.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# Arguments for the programs behind the targets: make test PYTEST_ARGS="-x tests/format", make bench BENCH_ARGS=--help
PYTEST_ARGS ?=
# How many processes the tests run in.
JOBS ?= logical
BENCH_ARGS ?=
PEERS_ARGS ?=
DEMO_ARGS ?=
SOAK_ARGS ?=
MINUTES ?= 30

TESTS = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
CODE := $(wildcard src tests examples benchmarks)
TYPED := $(wildcard src/holdfast examples benchmarks tests/torture/lab)
# The folders too: their times change when a file is added, removed or renamed.
SOURCES := $(shell find src \( -type f -o -type d \) -not -path '*/__pycache__*')

.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo test check bench torture soak peers tools clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.wheel ## train on real data, kill the training again and again, resume, compare
	@$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(VENV)/.wheel ## the tests, against the wheel that users would install
	@$(TESTS) $(PYTEST_ARGS)

check: $(VENV)/.wheel ## lint, format, types, and the floors of the house
	@$(BIN)/python -m ruff check --quiet --output-format concise $(CODE)
	@$(BIN)/python -m ruff format --quiet --check $(CODE) || { \
	    echo "to format: $(BIN)/python -m ruff format $(CODE)" >&2; exit 1; }
	@$(BIN)/python -m mypy --no-error-summary $(TYPED)
	@$(BIN)/python -m pytest -q tests/test_house.py tests/test_public_names.py
	@echo "lint, format, types and house are in order"

bench: $(VENV)/.wheel $(VENV)/.bench ## the benchmarks (BENCH_ARGS=--help lists them)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

torture: $(VENV)/.wheel ## the tests with all their rounds; takes long
	@HOLDFAST_TORTURE=1 $(TESTS) $(PYTEST_ARGS)

peers: $(VENV)/.wheel $(VENV)/.peers ## other ways to save, after the same crashes (PEERS_ARGS=--help lists them)
	@PYTHONPATH=tests/torture $(BIN)/python -m peers $(PEERS_ARGS)

# Where one of them is missing, the tests that use it skip and say so.
TOOLS := strace mkfs.ext4 mkfs.xfs mkfs.btrfs fusermount3
PACKAGES := strace e2fsprogs xfsprogs btrfs-progs fuse3
INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES)

tools: ## the system's programs that the crash tests use (Debian and Ubuntu, as root)
	@PATH="$$PATH:/usr/sbin:/sbin"; for tool in $(TOOLS); do command -v $$tool >/dev/null || missing=1; done; \
	[ -z "$$missing" ] || { $(INSTALL) || { apt-get update -qq && $(INSTALL); }; } >/dev/null

soak: $(VENV)/.wheel ## one run for MINUTES=30: killed, preempted, disturbed, read and pruned all the while
	@$(BIN)/python tests/torture/soak.py --minutes $(MINUTES) $(SOAK_ARGS)

clean: ## remove what the targets made
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment: everything but Holdfast itself has its final version here.
$(VENV)/.deps: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "There is no '$(PYTHON)' here. Say which Python to use: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Holdfast needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." >&2; \
	    echo "Say which Python to use: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "making $(VENV) (the first time downloads PyTorch, which takes minutes)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP) install -c constraints.txt hatchling
	@$(PIP) install -c constraints.txt --no-build-isolation '.[dev,examples]'
	@touch $@

# The benchmarks compare with other libraries, which nothing else needs.
$(VENV)/.bench: $(VENV)/.deps
	@echo "installing what the benchmarks compare with"
	@$(PIP) install -c constraints.txt --no-build-isolation '.[bench]'
	@touch $@

# So do the crashes.
$(VENV)/.peers: $(VENV)/.deps
	@echo "installing the peers"
	@$(PIP) install -c constraints.txt --no-build-isolation '.[peers]'
	@touch $@

# The wheel: built from src, installed as it is. Without this the tests could pass on files that are never shipped.
$(VENV)/.wheel: $(VENV)/.deps README.md LICENSE $(SOURCES)
	@rm -rf dist/holdfast-*.whl
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@$(PIP) install --no-deps --force-reinstall dist/holdfast-*.whl
	@touch $@
