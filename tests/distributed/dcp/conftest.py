"""What the tests of DCP's adapters share: the ranks of a process group, forked, for importing torch takes seconds."""

from __future__ import annotations

import datetime
import faulthandler
import itertools
import logging
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE_S = 120
OnRanks = Callable[[int, Callable[[int], Any]], list[Any]]


@pytest.fixture
def on_ranks(tmp_path: Path) -> OnRanks:
    """Runs ``work(rank)`` on each rank of a gloo group of so many processes, and returns what each returned.

    A rank that hangs shows where, and ends. What one raises is shown.
    """
    runs = itertools.count()

    def run(world_size: int, work: Callable[[int], Any]) -> list[Any]:
        here = tmp_path / f".ranks-{next(runs)}"
        here.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 and JAX warn of forks where there are threads
            pids = [_forked(rank, world_size, work, here) for rank in range(world_size)]
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        failures = "\n".join(path.read_text() for path in sorted(here.glob("*.txt")))
        assert ended == [0] * world_size, failures
        return [pickle.loads((here / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]

    return run


def _forked(rank: int, world_size: int, work: Callable[[int], Any], here: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{here / 'init'}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=PATIENCE_S // 2),
            )
            (here / f"{rank}.pickle").write_bytes(pickle.dumps(work(rank)))
            dist.barrier()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent shows it
            (here / f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        finally:
            os._exit(status)
    return pid
