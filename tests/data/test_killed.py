"""Real processes, really killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast.data import ResumableDataLoader

DRIVER = str(Path(__file__).parent / "loader_driver.py")


def drive(*arguments: object) -> tuple[int, list[Any]]:
    """Run the driver; its exit status and what it said."""
    command = [sys.executable, DRIVER, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_training_killed_twice_in_an_epoch(kit: SimpleNamespace, tmp_path: Path) -> None:
    """SIGKILL after 2 steps, and after 2 more; with other numbers of workers; data and the training's own draws."""
    loader = ResumableDataLoader(kit.Pictures(20), 4, shuffle=True, seed=1)
    torch.manual_seed(1)
    whole = [[batch.tolist(), torch.rand(()).item()] for _ in range(2) for batch in loader]
    found = []
    for workers, kill_after, status in ((2, 2, -signal.SIGKILL), (0, 2, -signal.SIGKILL), (1, 0, 0)):
        ended, said = drive("train", tmp_path / "part", workers, kill_after)
        assert ended == status
        found += said
    assert found == whole


def test_workers_that_are_spawned(kit: SimpleNamespace) -> None:
    """Everything that goes to a worker can be pickled, and what comes back is the same."""
    expected = kit.batches(ResumableDataLoader(kit.Pictures(20), 4, seed=5))
    assert drive("spawned") == (0, expected)


@pytest.mark.parametrize("how", ["held", "stuck"])
def test_a_trainer_that_ends_takes_its_workers_along(how: str) -> None:
    """At once, though they would have lived on after its SIGTERM; and with a status that tells nothing bad."""
    status, (_, pids) = drive("leave", how)
    assert status == 0
    assert len(pids) == 2
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
