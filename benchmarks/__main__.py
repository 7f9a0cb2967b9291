"""The command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.memory import peaks_of
from benchmarks.peers import PEERS, Peer, installed
from benchmarks.rounds import run_rounds
from benchmarks.workloads import WORKLOADS

NEEDED_BYTES = {"full": 5 * 10**9, "small": 200 * 10**6}


def main() -> int:
    """Measure what the arguments ask for, and print it."""
    options = parse()
    console, notes = Console(), Console(stderr=True)
    peers = choose(options.only, notes)
    base = options.directory
    base.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base).free
    if free < NEEDED_BYTES[options.scale]:
        sys.exit(f"{base}: {NEEDED_BYTES[options.scale] / 1e9} GB of free space are needed, {free / 1e9:.1f} are there")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=base) as name:
        directory = Path(name)
        results: dict[str, Any] = {
            "environment": report.environment(peers, directory),
            "scale": options.scale,
            "rounds": options.rounds,
            "workloads": {},
        }
        console.print("  ".join(f"{key}={value}" for key, value in results["environment"].items()), highlight=False)
        for workload in options.workload:
            results["workloads"][workload] = measure(workload, options, peers, directory, console, notes)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Holdfast beside its peers.")
    parser.add_argument("--scale", choices=["full", "small"], default="full", help="1.49 GB, or 29 MB to try it out")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--only", action="append", metavar="PEER", help="measure this peer; may be repeated")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="by default all")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least one")
    options.workload = options.workload or list(WORKLOADS)
    return options


def choose(only: list[str] | None, notes: Console) -> list[Peer]:
    """The peers to measure; those that are not installed are left out, with a note."""
    unknown = set(only or ()) - {peer.name for peer in PEERS}
    if unknown:
        sys.exit(f"--only: unknown {', '.join(sorted(unknown))}; there are: {', '.join(peer.name for peer in PEERS)}")
    wanted = [peer for peer in PEERS if only is None or peer.name in only]
    for peer in wanted:
        if installed(peer) is None:
            notes.print(f"{peer.name} is left out: the package {peer.package} is not installed")
    return [peer for peer in wanted if installed(peer) is not None]


def measure(
    workload: str, options: argparse.Namespace, peers: list[Peer], directory: Path, console: Console, notes: Console
) -> dict[str, Any]:
    """Measure one workload, print its tables, and return its figures."""
    make = WORKLOADS[workload]
    nbytes = make(options.scale, 0).nbytes
    with notes.status(workload) as status:
        samples = run_rounds(peers, lambda seed: make(options.scale, seed), directory, options.rounds, status.update)
        peaks = {}
        for peer in peers:
            status.update(f"memory of {peer.name}")
            found = peaks_of(peer, workload, options.scale, directory)
            if found is not None:
                peaks[peer.name] = found
    report.print_tables(console, f"{workload}, {nbytes / 1e6:.0f} MB", samples, peaks, nbytes)
    return {"bytes": nbytes, "samples_s": samples, "summary": report.summary(samples), "peak_bytes": peaks}


if __name__ == "__main__":
    sys.exit(main())
