"""Figures as a table for people and as JSON for programs."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import Peer, installed
from benchmarks.rounds import Samples

HOLDFAST = "holdfast"


def summary(samples: Samples) -> dict[str, dict[str, dict[str, float]]]:
    """Per measure and peer: median, least and greatest seconds, and the median of its ratios to Holdfast's.

    A ratio compares the two figures of one round: the disk of one minute with the disk of the same minute.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure, by_name in samples.items():
        own = by_name.get(HOLDFAST)
        found[measure] = {}
        for name, seconds in by_name.items():
            row = {"median": statistics.median(seconds), "least": min(seconds), "greatest": max(seconds)}
            if own is not None and len(own) == len(seconds):
                row["ratio"] = statistics.median(other / mine for other, mine in zip(seconds, own, strict=True))
            found[measure][name] = row
    return found


def environment(peers: Iterable[Peer], directory: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": _file_system(directory),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {peer.package: installed(peer) for peer in peers},
    }


def print_tables(
    console: Console, title: str, samples: Samples, peaks: Mapping[str, Mapping[str, int]], nbytes: int
) -> None:
    """One table a measure, the fastest first."""
    for measure, rows in summary(samples).items():
        table = Table(title=f"{title}: {measure}", title_justify="left", box=None, pad_edge=False)
        for column in ("", "median", "least to greatest", "GB/s", "times Holdfast's"):
            table.add_column(column, justify="left" if not column else "right")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["median"]):
            table.add_row(
                f"[bold]{name}[/bold]" if name == HOLDFAST else name,
                f"{row['median']:.3f} s",
                f"{row['least']:.3f} to {row['greatest']:.3f}",
                f"{nbytes / row['median'] / 1e9:.2f}",
                f"{row['ratio']:.2f}" if "ratio" in row else "",
            )
        console.print(table, "")
    if peaks:
        console.print(_peaks_table(title, peaks), "")


def _peaks_table(title: str, peaks: Mapping[str, Mapping[str, int]]) -> Table:
    measures: Sequence[str] = list(next(iter(peaks.values())))
    table = Table(title=f"{title}: beside the state itself", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for measure in measures:
        table.add_column(measure, justify="right")
    for name, found in sorted(peaks.items(), key=lambda item: sum(item[1].values())):
        table.add_row(name, *(f"{found[measure] / 1e6:.1f} MB" for measure in measures))
    return table


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file_system(directory: Path) -> str:
    """The kind of file system that holds a directory: that of the longest mount point above it."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [fields for fields in mounts if directory.resolve().is_relative_to(fields[1])]
    return max(above, key=lambda fields: len(fields[1]))[2] if above else "unknown"
