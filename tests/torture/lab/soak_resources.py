"""What processes hold on to: descriptors and memory, how they grow, and a limit for them all."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MEMORY_SLACK_BYTES = 24 * 2**20
"""How much more the median of the last third may be than that of the first: caches, and what malloc does not return."""
FEWEST = 15
"""Fewer samples say nothing, and of memory fewer than twice as many."""
_GONE_S = 10.0

_GROUPS = (
    ("memory.max", "memory.peak", Path("/sys/fs/cgroup")),
    ("memory.max", "memory.peak", Path("/sys/fs/cgroup/unified")),
    ("memory.limit_in_bytes", "memory.max_usage_in_bytes", Path("/sys/fs/cgroup/memory")),
)


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds at one moment."""

    descriptors: int
    memory_bytes: int


def held() -> Held:
    """What this process holds: its descriptors, and its anonymous memory."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    status = Path("/proc/self/status").read_text()
    anonymous_kb = int(status.partition("RssAnon:")[2].split()[0])
    return Held(descriptors, anonymous_kb * 1024)


@dataclass(slots=True)
class Growth:
    """What a process held at equal moments, in order."""

    samples: list[Held] = field(default_factory=list)

    def problem(self) -> str | None:
        """What grows, in words: descriptors by their least, memory by its median, from the first third to the last."""
        warm = self.samples[len(self.samples) // 10 :]  # the first of everything makes what stays
        third = len(warm) // 3
        if third < FEWEST // 3:
            return None
        first, last = warm[:third], warm[-third:]
        before, after = (min(item.descriptors for item in part) for part in (first, last))
        if after > before:
            return f"descriptors: never fewer than {before} at first, never fewer than {after} at last"
        before, after = (_median_bytes(part) for part in (first, last))
        if third >= 2 * FEWEST // 3 and after > before + MEMORY_SLACK_BYTES:
            return f"memory: {before / 1e6:.1f} MB at first, {after / 1e6:.1f} MB at last (medians)"
        return None

    def most(self) -> Held:
        """The most of each."""
        return Held(
            max((item.descriptors for item in self.samples), default=0),
            max((item.memory_bytes for item in self.samples), default=0),
        )


def _median_bytes(samples: Sequence[Held]) -> int:
    return int(statistics.median(item.memory_bytes for item in samples))


class MemoryLimit:
    """A limit on the memory of all processes that join it: by a control group, or else of each one's addresses.

    Args:
        limit_bytes: together.
        name: of the group.
    """

    def __init__(self, limit_bytes: int, name: str) -> None:
        self._limit_bytes = limit_bytes
        self._group: Path | None = None
        self._peak = ""
        self.how = f"address space of each process, {16 * limit_bytes >> 20} MiB"
        for limit, peak, root in _GROUPS:
            group = root / name
            try:
                group.mkdir()
            except OSError:
                continue
            if not (group / limit).exists():  # no control group after all, or one without the memory controller
                group.rmdir()
                continue
            (group / limit).write_text(str(limit_bytes))
            self._group, self._peak = group, peak
            self.how = f"control group {group}, {limit_bytes >> 20} MiB"
            return

    def join(self) -> None:
        """Have this process and its children counted."""
        if self._group is not None:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))
        else:  # generous: what a process may address is far more than what it uses
            resource.setrlimit(resource.RLIMIT_AS, (16 * self._limit_bytes, resource.RLIM_INFINITY))

    def peak_bytes(self) -> int | None:
        """The most that was used together, where that is known."""
        if self._group is None:
            return None
        try:
            return int((self._group / self._peak).read_text())
        except OSError:  # older kernels do not tell
            return None

    def close(self) -> None:
        """Remove the group, when those that were killed in it are gone."""
        until = time.monotonic() + _GONE_S
        while self._group is not None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self._group.rmdir()
                return
            time.sleep(0.05)
