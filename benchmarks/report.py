"""Figures in sum, for programs, and what they depend on."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measures import HOLDFAST
from benchmarks.peers import installed
from benchmarks.rounds import Samples


@dataclass(frozen=True, slots=True)
class Result:
    """What one workload gave: its bytes, the samples of every measure, and who was left out for what reason."""

    nbytes: int
    samples: Samples
    left_out: dict[str, str] = field(default_factory=dict)


def summary(samples: Samples) -> dict[str, dict[str, dict[str, float]]]:
    """Per measure and peer: median, least and greatest figure, and the median of its ratios to Holdfast's.

    A ratio compares the two figures of one round: the disk of one minute with the disk of the same minute.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure, by_name in samples.items():
        own = by_name.get(HOLDFAST)
        found[measure] = {}
        for name, samples_of in by_name.items():
            row = {"median": statistics.median(samples_of), "least": min(samples_of), "greatest": max(samples_of)}
            # Time that training lost can come out as nothing or less; with that there is no ratio.
            if own is not None and len(own) == len(samples_of) and min(*own, *samples_of) > 0:
                row["ratio"] = statistics.median(other / mine for other, mine in zip(samples_of, own, strict=True))
            found[measure][name] = row
    return found


def environment(packages: Iterable[str], directory: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": _file_system(directory),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in sorted(set(packages))},
    }


def figures(results: Mapping[str, Result]) -> dict[str, Any]:
    """Everything that was measured, for programs: samples in seconds, bytes or ratios, and their summary."""
    return {
        name: {
            "bytes": result.nbytes,
            "samples": result.samples,
            "summary": summary(result.samples),
            "left_out": result.left_out,
        }
        for name, result in results.items()
    }


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
