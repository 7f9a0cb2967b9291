"""A disk that is full at each block, without an inode at each file, and a limit of size at each block of a file.

What was there stays, what was acknowledged is there, what was refused leaves nothing, and says that the disk is full.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.judge import PathJudge, RunJudge, place_foreign
from lab.marks import Promises
from lab.states import fill, numbered
from lab.workloads import name_of

import holdfast
from holdfast import Checkpointer, Every, KeepLast, Run, classic
from holdfast.errors import DiskFullError
from holdfast.state import unchanged
from holdfast.storage import durable

BLOCK_BYTES = 4096
DISK_BYTES = 2 * 2**20
DISK_INODES = 100

Mount = Callable[[str], Path]
Count = Callable[[int, int], int]
RecordProperty = Callable[[str, object], None]
Work = Callable[[Path, Promises, int], None]
"""Something that takes space; given the directory, what it promises, and how many bytes more its states hold."""
Shortage = Callable[[Path, int], AbstractContextManager[None]]
"""Within, a disk has only so much left."""


def state_of(seed: int, more_bytes: int) -> dict[str, Any]:
    """A state that is told from others, and as large as asked for."""
    return {**numbered(seed), "more": {"w": torch.full((more_bytes,), seed, dtype=torch.uint8)}}


# ------------------------------------------------------------------------------------------------- what may not succeed


def save(directory: Path, promises: Promises, more_bytes: int) -> None:
    """The next step."""
    promises.may[name_of(3)] = {3}
    Run(directory).save(state_of(3, more_bytes), step=3)
    promises.must[name_of(3)] = {3}


def save_another_generation(directory: Path, promises: Promises, more_bytes: int) -> None:
    """A step that is there already."""
    promises.may[name_of(2)] = {2, 12}
    promises.must[Run(directory).save(state_of(12, more_bytes), step=2).name] = {12}


def save_frozen(directory: Path, promises: Promises, more_bytes: int) -> None:
    """A step whose frozen backbone is linked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unchanged, "MIN_GROUP_BYTES", 4096)
        save(directory, promises, more_bytes)


def prune(directory: Path, promises: Promises, _: int) -> None:
    """Retention, which gives space back and needs none."""
    promises.must.pop(name_of(1))
    removed = Run(directory).prune(KeepLast(1)).removed
    assert [checkpoint.name for checkpoint in removed] == [name_of(1)]


def annotate(directory: Path, promises: Promises, _: int) -> None:
    """A pin."""
    Run(directory).pin(1)
    promises.pinned.add(name_of(1))


def save_in_the_background(directory: Path, promises: Promises, more_bytes: int) -> None:
    """What a training loop does, retention included."""
    state = state_of(0, more_bytes)
    with Checkpointer(directory, state, save=Every(steps=10**6), keep=KeepLast(1)) as ckpt:
        ckpt.step()
        fill(state, 3)
        promises.may[name_of(3)] = {3}
        ckpt.save().result(60)
        promises.must = {name_of(3): {3}}


def replace(directory: Path, promises: Promises, more_bytes: int) -> None:
    """Another state under the same path."""
    promises.may["model_2"] = {2, 12}
    promises.must["model_2"] = {2, 12}
    classic.save_rotating_checkpoint({**state_of(12, more_bytes), "epoch": 2}, directory / "model_2", keep_last=2)
    promises.must["model_2"] = {12}


def replace_without_exchange(directory: Path, promises: Promises, more_bytes: int) -> None:
    """The same where two names cannot be swapped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "_renameat2", lambda *_: False)
        replace(directory, promises, more_bytes)


WORK = (
    *(save, save_another_generation, save_frozen, prune, annotate, save_in_the_background),
    *(replace, replace_without_exchange),
)
NEEDS_NOTHING = (prune,)


def is_replaced(work: Work) -> bool:
    """Whether it is about paths with numbers, not about a run."""
    return work in (replace, replace_without_exchange)


# ------------------------------------------------------------------------------------------------------ what is short


def free(disk: Path) -> tuple[int, int]:
    """Blocks and inodes that are left."""
    found = os.statvfs(disk)
    return found.f_bavail, found.f_favail


@contextmanager
def blocks_left(disk: Path, left: int) -> Iterator[None]:
    """Within, exactly so many blocks are left."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        if free(disk)[0] > left:
            os.posix_fallocate(file.fileno(), 0, (free(disk)[0] - left) * BLOCK_BYTES)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def inodes_left(disk: Path, left: int) -> Iterator[None]:
    """Within, exactly so many files can be made."""
    ballast = disk / "ballast"
    ballast.mkdir()
    for number in range(free(disk)[1] - left):
        (ballast / str(number)).touch()
    try:
        yield
    finally:
        shutil.rmtree(ballast)


@contextmanager
def file_size(_: Path, blocks: int) -> Iterator[None]:
    """Within, no file may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (blocks * BLOCK_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SHORTAGES = (blocks_left, inodes_left, file_size)


# ------------------------------------------------------------------------------------------------------- what must hold


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A save that fails in the background is logged too."""
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("holdfast").setLevel(logging.NOTSET)


def prepare(directory: Path, work: Work, more_bytes: int) -> Promises:
    """Two checkpoints; what is promised of them."""
    names = [f"model_{seed}" if is_replaced(work) else name_of(seed) for seed in (1, 2)]
    for seed, name in enumerate(names, start=1):
        holdfast.save(directory / name, state_of(seed, more_bytes), step=seed)
    if not is_replaced(work):
        place_foreign(directory)
    return Promises({name: {seed} for seed, name in enumerate(names, start=1)}, {}, set())


def refused(disk: Path, work: Work, promises: Promises, more_bytes: int) -> bool:
    """Whether there was no room for it; then all that it took is given back."""
    before = free(disk)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - of descriptors there are only names
    try:
        work(disk / "run", promises, more_bytes)
    except DiskFullError as error:
        said = is_clear(error, disk / "run")  # nothing is kept of the error: what its frames hold open takes space
    else:
        return False
    assert said
    assert free(disk) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    return True


def is_clear(error: DiskFullError, directory: Path) -> bool:
    """Whether it says what could not be done, where, why, and what to do."""
    within = error.path is not None and error.path.startswith(str(directory))
    advises = str(error).startswith("cannot ") and "Free some space" in str(error)
    return within and advises and error.errno in (errno.ENOSPC, errno.EFBIG)


def wrong_after(directory: Path, work: Work, promises: Promises, more_bytes: int) -> list[str]:
    """What is wrong now that there is room again: the promises, and whether the next save works."""
    for name, seeds in promises.must.items():
        promises.may.setdefault(name, set()).update(seeds)
    judge = PathJudge() if is_replaced(work) else RunJudge(foreign=True)
    problems = judge.problems(directory, promises)
    if is_replaced(work):
        work(directory, promises, more_bytes)
        problems += judge.problems(directory, promises)
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("reserving", [True, False], ids=["fallocate", "no fallocate"])
@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda shortage: shortage.__name__)
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_no_room(
    work: Work,
    shortage: Shortage,
    reserving: bool,
    mount: Mount,
    scratch: Path,
    count: Count,
    monkeypatch: pytest.MonkeyPatch,
    record_property: RecordProperty,
) -> None:
    """With any number of blocks or inodes, or any limit of size: a clear error, and nothing is lost or left."""
    if not reserving:
        monkeypatch.setattr(durable, "_fallocate", no_fallocate)
    more_bytes = count(1, 60) * BLOCK_BYTES
    disk = mount(f"size={DISK_BYTES},nr_inodes={DISK_INODES}")
    pristine = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    promised = prepare(pristine, work, more_bytes)
    room: list[bool] = []
    while room[-2:] != [True] * 2:
        shutil.copytree(pristine, disk / "run", symlinks=True)
        promises = copy.deepcopy(promised)
        with shortage(disk, len(room)):
            room.append(not refused(disk, work, promises, more_bytes))
        assert wrong_after(disk / "run", work, promises, more_bytes) == [], f"with {len(room) - 1}"
        shutil.rmtree(disk / "run")
    boundaries = len(room) - 2
    assert room == [False] * boundaries + [True] * 2
    assert (boundaries == 0) == (work in NEEDS_NOTHING)
    record_property("count: disk-full boundaries", boundaries)


def no_fallocate(fd: int, nbytes: int) -> None:
    """A file system that cannot reserve space."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
