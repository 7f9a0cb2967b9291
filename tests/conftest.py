"""What all tests share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory: ``mount("size=64k")``."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        path = tmp_path / f"mounted{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)
