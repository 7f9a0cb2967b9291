"""A short soak, and whether a soak notices what it is there for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.soak_mutants import MUTANTS

PROGRAM = Path(__file__).with_name("soak.py")
PARTS = 2
"""Of the mutants, for two workers that run side by side."""


def soak(directory: Path, seconds: float, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the program, with a limit that turns a hang into a failure."""
    command = [sys.executable, PROGRAM, "--minutes", str(seconds / 60), "--directory", directory, *options]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=10 * seconds + 600
    )


@pytest.mark.slow
def test_all_promises_are_kept(
    scratch: Path, count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    """Killed, preempted and disturbed at random moments, read and pruned beside: nothing is lost, torn or leaked."""
    seconds = count(8, 240)
    options = ("--seed", "1") if count(1, 0) else ()  # another one each time, where there is time for it
    done = soak(scratch / "soak", seconds, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.search(r"count: soak kills (\d+)", done.stdout)
    record_property("count: soak seconds", seconds)
    record_property("count: soak kills", 0 if kills is None else int(kills[1]))
    assert not (scratch / "soak").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_mutants_are_noticed(scratch: Path, count: Callable[[int, int], int], part: int) -> None:
    """A Holdfast that is broken does not come through; what to look at is kept, and named."""
    for mutant in list(MUTANTS)[part::PARTS][: count(0, len(MUTANTS))]:
        directory = scratch / mutant.replace(" ", "-")
        done = soak(directory, 60, "--seed", "7", "--mutant", mutant)
        assert done.returncode == 1, f"{mutant}: {done.stdout}{done.stderr}"
        assert "BROKEN: " in done.stdout
        assert f"again: --seed 7; look at {directory}/run" in done.stdout
        assert directory.exists()
