"""What the tests of the laboratory share."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab.subject import Subjects
from lab.volumes import KINDS, Volume, VolumeError, make_file_system

IN_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for thousands of small trees: in memory, where there is such a place."""
    if not IN_MEMORY.is_dir():
        yield tmp_path_factory.mktemp("scratch")
        return
    path = Path(tempfile.mkdtemp(prefix="holdfast-", dir=IN_MEMORY))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def subjects() -> Iterator[Subjects]:
    """What starts processes under test."""
    with Subjects() as started:
        yield started


@pytest.fixture
def strace() -> None:
    """Skips where system calls cannot be recorded."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed here")


@pytest.fixture
def volume(scratch: Path) -> Iterator[Callable[[str], Volume]]:
    """Makes a real file system on a loop device, not mounted yet: ``volume("ext4")``; skips where that cannot be."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Volume:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            (folder / "mounted").mkdir()
            stack.callback(shutil.rmtree, folder)
            try:
                make_file_system(KINDS[name], folder / "image")
                made = stack.enter_context(Volume(KINDS[name], folder / "image", folder / "mounted"))
                made.mount()
                made.unmount()
            except VolumeError as error:
                pytest.skip(str(error))
            return made

        yield make


@pytest.fixture
def needed_syncs(subjects: Subjects, tmp_path: Path) -> Callable[[str], list[str]]:
    """From where a workload makes durable what no file system keeps otherwise: the last directory, and each file."""

    def find(workload: str) -> list[str]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        subjects.run(workload, folder / "run", fault=["note_places", str(folder / "places")])
        places = [json.loads(line) for line in (folder / "places").read_text(encoding="utf-8").splitlines()]
        last = [place for place in places if place.startswith("sync_directory ")][-1]
        return [last, *sorted({place for place in places if place.startswith("sync_file ")})]

    return find
