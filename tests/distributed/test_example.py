"""The example: started by torchrun, killed again and again, it ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = "--characters 20000 --context 16 --batch-size 8 --width 16 --layers 1 --epochs 2 --steps 6 --save-steps 2"
SIZE += " --dropout 0.2"


def torchrun(ranks: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a script on some ranks, which start again when one has died."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--max-restarts=3"]
    start += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1"]
    own_store = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/distributed.md
    return subprocess.run(
        [*start, *map(str, command)], capture_output=True, text=True, check=False, timeout=240, env=own_store
    )


def train(directory: Path, name: str, ranks: int, *before: object) -> dict[str, Any]:
    """Train to the end; what it reports."""
    report = directory / f"{name}.json"
    arguments = ["--directory", directory / name, "--report", report, *SIZE.split()]
    done = torchrun(ranks, *before, EXAMPLES / "fsdp.py", *arguments)
    assert done.returncode == 0, done.stderr[-5000:]
    return {**json.loads(report.read_text()), "resumed": done.stdout.count("resuming")}


@pytest.mark.slow
def test_the_example_is_killed_and_ends_like_one_that_was_not(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """Each process kills itself after so many steps of its own; torchrun starts all again."""
    if not count(0, 1):
        pytest.skip("in make torture")
    whole = train(tmp_path, "whole", 2)
    killed = train(tmp_path, "killed", 2, EXAMPLES / "kill_at.py", 7)

    assert (whole["resumed"], killed["resumed"]) == (0, 1)
    assert {**killed, "resumed": 0} == whole
    assert whole["steps"] == 12
