"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch, here and in the processes that tests start: the same bits on every machine, and tests
# that run beside each other do not fight for cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

TORTURE = os.environ.get("HOLDFAST_TORTURE", "0") != "0"

# No test asserts a time. By default the same examples each time, so that a failure is nobody's luck; new ones in
# `make torture`.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.register_profile(
    "torture", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("torture" if TORTURE else "default")


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """How many rounds to run: ``count(default, full)`` is ``full`` in `make torture`."""

    def choose(default: int, full: int) -> int:
        return full if TORTURE else default

    return choose
