"""What the tests of the laboratory share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.subject import Subjects

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
