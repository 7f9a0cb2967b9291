"""A real torchrun: a rank dies, the job restarts by itself, and ends with the bits of one in which nobody died."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from lab.ranks import Ended, Launch, Outcome
from lab.ranks_kills import differences
from lab.ranks_moments import Kill

DRIVER = Path(__file__).with_name("elastic_driver.py")
SETTINGS: dict[str, Any] = {"layout": "fsdp", "epochs": 2}
RANKS = 2


def torchrun(order: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Start a job, and wait for its end."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--max-restarts=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1"]
    return subprocess.run(
        [*command, str(DRIVER), json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # see docs/distributed.md
    )


@pytest.mark.slow
def test_a_job_goes_on_by_itself(
    launch: Launch,
    undisturbed: Callable[..., Outcome],
    tmp_path: Path,
    fresh: Callable[[], Path],
    count: Callable[[int, int], int],
) -> None:
    """After a rank was killed at a random moment of the first attempt."""
    whole = undisturbed(RANKS, **SETTINGS)
    usual = launch("train", tmp_path / "usual", RANKS, **SETTINGS)
    rng = random.Random(0)
    for _ in range(count(1, 10)):
        directory, rank = fresh(), rng.randrange(RANKS)
        kind = rng.choice(["disk", "message", "forward"])
        kill = Kill(kind, rng.randint(1, usual.ranks[rank].counts[kind] * 9 // 10))

        job = torchrun(
            {
                "directory": str(directory),
                "rank": rank,
                "kill": asdict(kill),
                "arguments": {**SETTINGS, "patience_s": 20},
            }
        )

        assert job.returncode == 0, (kill, job.stdout, job.stderr)
        told = [json.loads((directory / f"rank-{number}.json").read_text()) for number in range(RANKS)]
        # On a busy machine the process group of the second attempt may fail to come up: then there is a third.
        assert [each["attempt"] for each in told] in ([1] * RANKS, [2] * RANKS)
        outcome = Outcome(tuple(Ended(0, each["result"]) for each in told))
        assert list(differences(whole, outcome, directory)) == []
