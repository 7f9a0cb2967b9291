"""Prints what other ways to save a training leave after crashes: ``make peers``, or ``python -m peers`` here."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peers.cuts import FILE_SYSTEMS
from peers.measuring import ADAPTERS, Bounds
from peers.pool import measure_all
from peers.table import tables


def main() -> None:
    """Measure what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(prog="make peers", description=__doc__)
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help=f"which; all by default: {', '.join(ADAPTERS)}")
    parser.add_argument("--states", type=int, default=500, help="after a power cut, at most, for each peer")
    parser.add_argument("--seed", type=int, default=0, help="of the states that are chosen where there are more")
    parser.add_argument("--cuts", type=int, default=12, help="real power cuts, for each peer and file system")
    parser.add_argument("--verbose", action="store_true", help="let the peers print")
    options = parser.parse_args()
    if shutil.which("strace") is None:
        parser.error("strace is not installed; make tools installs it")
    obstacle = _obstacle()
    if obstacle and options.cuts:
        print(f"No real power cuts: {obstacle}.", file=sys.stderr)
    cuts = 0 if obstacle else options.cuts
    with _scratch() as scratch:
        bounds = Bounds(options.states, options.seed, cuts, scratch)
        print(tables(measure_all(options.adapters or ADAPTERS, bounds, options.verbose)))


def _obstacle() -> str:
    """Why there can be no real power cuts here; empty when there can."""
    missing = [f"mkfs.{kind}" for kind in FILE_SYSTEMS if shutil.which(f"mkfs.{kind}") is None]
    if missing:
        return f"there is no {' and no '.join(missing)} here; make tools installs them"
    return "" if os.geteuid() == 0 else "only root can mount file systems"


@contextmanager
def _scratch() -> Iterator[Path]:
    """In memory where that can be."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="holdfast-peers-", dir=memory if memory.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
