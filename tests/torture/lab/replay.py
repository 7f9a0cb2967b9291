"""Builds the disks that a crash may leave below a real file system, mounts each, and has it judged.

A disk with a volatile cache promises only this: what it had taken when a flush was asked for is there when the flush is
done. Of what came since, each sector may be there or not. Those states are the crashes here; the file system recovers
from each when it is mounted.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lab.blocklog import Recording, Span
from lab.records import BLOCK_BYTES, Write
from lab.volumes import Volume, VolumeError, examine
from lab.workloads import WORKLOADS


@dataclass(frozen=True, slots=True)
class Crash:
    """A state of the disk: everything before the last flush, and of what came since what is kept.

    Attributes:
        span: what was being done.
        moment: the number of records before the crash.
        unit: in which the writes since the last flush are kept or lost: bytes, or 0 for whole writes.
        kept: the numbers of the units that are kept.
        of: how many there are.
    """

    span: Span
    moment: int
    unit: int
    kept: tuple[int, ...]
    of: int

    def __str__(self) -> str:
        unit = f"pieces of {self.unit} bytes" if self.unit else "writes"
        kept = f"{len(self.kept)} of {self.of} {unit} since the last flush"
        return f"{self.span.workload}, after {self.moment} records, with {kept}"


@dataclass(slots=True)
class Findings:
    """What came of looking at many states.

    Attributes:
        states: how many.
        broken: those that break promises, with which.
    """

    states: int = 0
    broken: list[str] = field(default_factory=list)


def replay(recording: Recording, volume: Volume, *, most: int, seed: int, enough: int = 10) -> Findings:
    """Judge different states that a crash may leave.

    Args:
        recording: of a file system of the volume's kind.
        volume: where they are mounted; not mounted now.
        most: how many.
        seed: of everything that is left to chance.
        enough: stop after so many that break promises.
    """
    findings = Findings()
    fd = os.open(volume.image, os.O_RDWR)
    disk = _Disk(recording.kind.size_bytes, recording.base)
    done = 0
    try:
        for crash in sorted(sample(recording, most, seed), key=lambda crash: crash.moment):
            flushed = last_flush(recording, crash.moment)
            disk.write(record for record in recording.records[done:flushed] if record is not None)
            done = flushed
            disk.copy(fd)
            since = units(recording, flushed, crash.moment, crash.unit)
            for number in crash.kept:
                os.pwrite(fd, since[number].data, since[number].offset)
            findings.states += 1
            problems = _judge(recording, crash, volume)
            if problems:
                findings.broken.append(f"{crash}: {'; '.join(problems)}")
                if len(findings.broken) >= enough:
                    break
    finally:
        os.close(fd)
        disk.close()
    return findings


def sample(recording: Recording, most: int, seed: int) -> Iterator[Crash]:
    """Different crashes, of all workloads alike."""
    chance = random.Random(seed)
    seen: set[tuple[int, tuple[int, ...], int, str]] = set()
    fruitless = 0
    while len(seen) < most and fruitless < 1000:
        span = recording.spans[(len(seen) + fruitless) % len(recording.spans)]
        moment = chance.randint(span.begin, span.end)
        flushed = last_flush(recording, moment)
        unit = chance.choice([0, BLOCK_BYTES, recording.kind.atom_bytes])
        of = len(units(recording, flushed, moment, unit))
        kept = _choose(chance, of)
        key = (flushed, kept, unit if 0 < len(kept) < of else len(kept), span.promises(moment).key())
        if key in seen:
            fruitless += 1
            continue
        fruitless = 0
        seen.add(key)
        yield Crash(span, moment, unit, kept, of)


def last_flush(recording: Recording, moment: int) -> int:
    """The number of records up to the last flush before a moment."""
    while moment > 0 and recording.records[moment - 1] is not None:
        moment -= 1
    return moment


def units(recording: Recording, begin: int, end: int, nbytes: int) -> list[Write]:
    """What was written, in pieces of so many bytes; 0 for the writes themselves."""
    return [
        Write(record.offset + cut, record.data[cut : cut + (nbytes or len(record.data))])
        for record in recording.records[begin:end]
        if record is not None
        for cut in range(0, len(record.data), nbytes or len(record.data))
    ]


def _choose(chance: random.Random, of: int) -> tuple[int, ...]:
    """Which units are kept: a beginning, all but one, one, or any."""
    how = chance.randrange(4)
    if how == 0 or of == 0:
        return tuple(range(chance.randint(0, of)))
    one = chance.randrange(of)
    if how == 1:
        return tuple(number for number in range(of) if number != one)
    if how == 2:
        return (one,)
    share = chance.random()
    return tuple(number for number in range(of) if chance.random() < share)


def _judge(recording: Recording, crash: Crash, volume: Volume) -> list[str]:
    try:
        volume.mount(recording.options)
    except VolumeError as error:
        return [str(error)]
    folder = volume.path / crash.span.folder / "run"
    problems = examine(WORKLOADS[crash.span.workload].judge, folder, crash.span.promises(crash.moment))
    volume.unmount()
    return problems


class _Disk:
    """What is durable, in memory."""

    def __init__(self, size_bytes: int, base: Iterable[Write]) -> None:
        self._bytes = mmap.mmap(-1, size_bytes)
        self._blocks: set[int] = set()
        self.write(base)

    def write(self, writes: Iterable[Write]) -> None:
        """More of it."""
        for write in writes:
            end = write.offset + len(write.data)
            self._bytes[write.offset : end] = write.data
            self._blocks.update(range(write.offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)))

    def copy(self, fd: int) -> None:
        """All of it to a file, and nothing else."""
        os.ftruncate(fd, 0)
        os.ftruncate(fd, len(self._bytes))
        with memoryview(self._bytes) as view:
            for begin, end in _runs(sorted(self._blocks)):
                os.pwrite(fd, view[begin * BLOCK_BYTES : end * BLOCK_BYTES], begin * BLOCK_BYTES)

    def close(self) -> None:
        """No more."""
        self._bytes.close()


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Numbers that follow each other: the first, and the one behind the last."""
    begin = 0
    for place, number in enumerate(numbers):
        if place + 1 == len(numbers) or numbers[place + 1] != number + 1:
            yield numbers[begin], number + 1
            begin = place + 1
