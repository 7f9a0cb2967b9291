"""Records what a real file system asks of its disk while workloads are done on it, with what they say at its place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.marks import Mark, Promises
from lab.records import Record, Write, contents, read
from lab.subject import Subjects
from lab.volumes import Kind, Volume, VolumeError, make_file_system


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a recording in which one workload was done.

    Attributes:
        workload: its name.
        folder: where in the file system.
        begin: the number of records before it.
        end: the number of records when it had ended.
        before: what was said before.
        marks: what was said, each with the number of records before it.
    """

    workload: str
    folder: str
    begin: int
    end: int
    before: list[Mark]
    marks: list[tuple[int, Mark]]

    def promises(self, moment: int) -> Promises:
        """Those in force after so many records."""
        return Promises.of([*self.before, *(mark for place, mark in self.marks if place <= moment)])


@dataclass(frozen=True, slots=True)
class Recording:
    """All that a disk was asked for since its file system was made.

    Attributes:
        kind: of the file system.
        options: what it was mounted with.
        base: what was on the disk before, where it is not zero.
        records: what was asked for.
        spans: what was done meanwhile.
    """

    kind: Kind
    options: str
    base: list[Write]
    records: list[Record]
    spans: list[Span]


def record(
    subjects: Subjects, kind: Kind, workloads: Sequence[str], scratch: Path, *, options: str = "", **order: object
) -> Recording:
    """Have workloads done on a new file system, and record what reaches its disk.

    Args:
        subjects: starts the processes under test.
        kind: of the file system.
        workloads: one after the other, each in a directory of its own.
        scratch: a directory, best in memory.
        options: what the file system is mounted with.
        order: more for the processes under test.

    Raises:
        VolumeError: it cannot be done on this machine.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        image, served, mounted = folder / "image", folder / "served", folder / "mounted"
        make_file_system(kind, image)
        base = [*contents(image)]
        served.mkdir()
        mounted.mkdir()
        with _Server(image, served, folder / "log") as server, Volume(kind, served / "image", mounted) as volume:
            volume.mount(options)
            spans = [_span(subjects, server, volume.path, workload, order) for workload in workloads]
            volume.unmount()
        return Recording(kind, options, base, [*read(folder / "log")], spans)
    finally:
        shutil.rmtree(folder)


def _span(subjects: Subjects, server: _Server, path: Path, workload: str, order: dict[str, object]) -> Span:
    begin: list[int] = []
    marks: list[tuple[int, Mark]] = []
    folder = workload.replace(" ", "-")
    (path / folder).mkdir()
    ended = subjects.run(
        workload,
        path / folder / "run",
        watch=lambda _: begin.append(server.count()),
        hear=lambda mark: marks.append((server.count(), mark)),
        **order,
    )
    assert (ended.status, ended.failure) == (0, ""), f"{workload} fails by itself: {ended}"
    return Span(workload, folder, begin[0], server.count(), ended.before, marks)


class _Server:
    """:mod:`lab.blockserver`. A process of its own: who waits for a disk must not be the one that serves it."""

    def __init__(self, image: Path, directory: Path, log: Path) -> None:
        if shutil.which("fusermount3") is None:
            raise VolumeError("there is no fusermount3 here")
        command = [sys.executable, str(Path(__file__).with_name("blockserver.py"))]
        self._process = subprocess.Popen(
            [*command, str(image), str(directory), str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt at the keyboard is not for it
        )
        while not (directory / "image").exists():
            if self._process.poll() is not None:
                raise VolumeError(f"FUSE does not work here: {self._process.communicate()[1].strip()}")
            time.sleep(0.001)

    def count(self) -> int:
        """How many records there are by now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *exc: object) -> None:
        complaints = self._process.communicate()[1].strip()
        assert not complaints, complaints
