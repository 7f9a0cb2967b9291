"""One group of four processes for all checks of this directory: starting it takes longer than any of them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WORLD_SIZE = 4
_DRIVER = Path(__file__).with_name("layouts_driver.py")
_TIMEOUT_S = 300


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank and check, "ok" or what went wrong. Tests that run beside each other wait for one group."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "ended").exists():
            _run(directory)
            (directory / "ended").touch()
    return [
        json.loads(path.read_text()) if path.exists() else {}
        for path in (directory / f"{rank}.json" for rank in range(WORLD_SIZE))
    ]


def _run(directory: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, str(_DRIVER), str(rank), str(WORLD_SIZE), str(directory)])
        for rank in range(WORLD_SIZE)
    ]
    try:
        for rank in ranks:
            rank.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:  # what the others say shows where it stopped
        pass
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture
def passed(outcomes: list[dict[str, str]]) -> Callable[[str], None]:
    """Asserts that a check passed on every rank."""

    def check(name: str) -> None:
        found = {rank: outcome.get(name, "it did not come so far") for rank, outcome in enumerate(outcomes)}
        wrong = {rank: text for rank, text in found.items() if text != "ok"}
        assert not wrong, "\n".join(f"rank {rank}:\n{text}" for rank, text in wrong.items())

    return check
