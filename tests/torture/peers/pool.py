"""All peers, those of each module in a process of its own, so that none meets what another left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from peers.measuring import Bounds, Measured, measure

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
"""Set before anything in these processes is imported: they do not fight for cores, and look for no accelerator."""


def measure_all(adapters: Sequence[str], bounds: Bounds, verbose: bool) -> list[Measured]:
    """Measure the peers of these modules; says on standard error how far it is."""
    os.environ.update(ENVIRONMENT)
    began = time.monotonic()
    measured: dict[str, list[Measured]] = {}
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), None if verbose else _be_quiet, max_tasks_per_child=1
    ) as pool:
        # From the end: those that take longest stand there.
        futures = {pool.submit(measure, adapter, bounds): adapter for adapter in reversed(adapters)}
        for future in as_completed(futures):
            measured[futures[future]] = future.result()
            print(f"{time.monotonic() - began:5.0f} s  {futures[future]}", file=sys.stderr)
    return [peer for adapter in adapters for peer in measured[adapter]]


def _be_quiet() -> None:
    """Nobody reads what the peers print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
