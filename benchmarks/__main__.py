"""The command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES, EVERYBODY, Setting, measure
from benchmarks.output import RESULTS, Run, write
from benchmarks.peers import installed

NEEDED_BYTES = {"full": 6 * 10**9, "small": 300 * 10**6}


def main() -> int:
    """Measure what the arguments ask for, print it, and write it."""
    options = parse()
    notes = Console(stderr=True)
    only = choose(options.only, notes)
    base = options.directory
    base.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base).free
    if free < NEEDED_BYTES[options.scale]:
        sys.exit(f"{base}: {NEEDED_BYTES[options.scale] / 1e9} GB of free space are needed, {free / 1e9:.1f} are there")
    results: dict[str, report.Result] = {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=base) as name:
        directory = Path(name)
        environment = report.environment((one.package for one in EVERYBODY), directory)
        for workload in options.workload or CASES:
            with notes.status(workload) as status:
                setting = Setting(options.scale, options.rounds, only, directory, status.update)
                results[workload] = measure(workload, setting)
    run = Run(environment, options.scale, options.rounds, results)
    print(run.markdown())
    output = options.output or (RESULTS if is_complete(options) else None)
    if output is not None:
        write(run, output, notes.print)
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Holdfast beside its peers.")
    parser.add_argument("--scale", choices=["full", "small"], default="full", help="1.49 GB, or 29 MB to try it out")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--only", action="append", metavar="PEER", help="measure this peer; may be repeated")
    parser.add_argument("--workload", action="append", choices=list(CASES), help="by default all")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIRECTORY",
        help="write the figures, the tables and the picture there; by default into benchmarks/results, if nothing was "
        "left out",
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least one")
    return options


def is_complete(options: argparse.Namespace) -> bool:
    """Whether this run may replace the results that are shown."""
    return options.scale == "full" and options.only is None and options.workload is None


def choose(only: list[str] | None, notes: Console) -> frozenset[str] | None:
    """The names of those to measure; who is not installed is left out, with a note."""
    names = list(dict.fromkeys(one.name for one in EVERYBODY))
    unknown = set(only or ()) - set(names)
    if unknown:
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; there are: {'; '.join(names)}")
    for package in dict.fromkeys(one.package for one in EVERYBODY if only is None or one.name in only):
        if installed(package) is None:
            notes.print(f"left out: the package {package} is not installed")
    return None if only is None else frozenset(only)


if __name__ == "__main__":
    sys.exit(main())
