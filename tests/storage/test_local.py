"""Checkpoints in a directory: how one comes to be, and how it goes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import CheckpointExistsError, CheckpointNotFoundError, DiskFullError, RunBusyError, StorageError
from holdfast.format.names import TemporaryName, aside_name, host_label, trash_name
from holdfast.format.records import CHUNK_BYTES, FileRecord
from holdfast.storage import direct, durable, local_cleaning, local_reading, memory
from holdfast.storage.chunks import digest
from holdfast.storage.local import LocalStore
from holdfast.storage.local_reading import DIRECT_READ_BYTES, LocalCheckpoint, LocalFile
from holdfast.storage.residency import cached_share

Commit = Callable[..., str]
Contents = Callable[[LocalStore], dict[str, dict[str, bytes]]]
Replace = Callable[[LocalStore, bytes], None]
NONCE = "0123456789abcdef"
ONE = "step-000000000001"
TWO = "step-000000000002"


def whole(data: bytes = b"data") -> dict[str, bytes]:
    """What the fixture ``commit`` leaves in a checkpoint."""
    return {"model.safetensors": data, "manifest.json": b"manifest"}


def read(store: LocalStore, name: str) -> bytes:
    """A checkpoint's data, the way a reader gets it."""
    stored = store.open(name)
    try:
        stored.lock()
        return stored.read_whole("model.safetensors", 100)
    finally:
        stored.close()


# --------------------------------------------------------------------------------------------------------- committing


def test_order_of_a_save(store: LocalStore, commit: Commit, system_calls: Any) -> None:
    """Each step is durable before the next: directories, data, manifest, names, and only then the final name."""
    commit(store, 1)
    assert system_calls.only(
        "mkdir", "fallocate", "write", "pwritev", "fsync", "renameat2", "rename", "unlink", "rmdir"
    ) == [
        ("mkdir", "run"),
        ("fsync", "."),
        ("mkdir", "run/TMP"),
        ("fallocate", "run/TMP/model.safetensors"),
        ("pwritev", "run/TMP/model.safetensors"),
        ("fsync", "run/TMP/model.safetensors"),
        ("write", "run/TMP/manifest.json"),
        ("fsync", "run/TMP/manifest.json"),
        ("fsync", "run/TMP"),
        ("renameat2", "TMP", ONE),
        ("fsync", "run"),
    ]


def test_the_writer_is_locked_before_it_writes(store: LocalStore, commit: Commit, system_calls: Any) -> None:
    """From the first file on, nobody may take the directory for abandoned."""
    commit(store, 1)
    assert [call[0] for call in system_calls.trace[2:5]] == ["mkdir", "flock", "open"]


def test_what_a_save_leaves(store: LocalStore, contents: Contents, image: Any) -> None:
    """The checkpoint and nothing else; its records have the files' checksums."""
    pending = store.create(1)
    records = pending.write_files({"model.safetensors": image(b"data")})
    pending.commit(ONE, b"manifest")
    assert contents(store) == {ONE: whole()}
    assert records == {"model.safetensors": FileRecord(4, CHUNK_BYTES, (digest(b"data"),))}


def test_invisible_until_committed(store: LocalStore, image: Any) -> None:
    """While it is written it has no name that a reader looks at."""
    pending = store.create(7)
    pending.write_files({"model.safetensors": image(b"data")})
    (name,) = store.names()
    parsed = TemporaryName.parse(name)
    assert parsed is not None
    assert (parsed.step, parsed.pid) == (7, os.getpid())
    pending.abort()
    assert store.names() == []


def test_a_taken_name(store: LocalStore, commit: Commit, contents: Contents, image: Any) -> None:
    """What is there stays; the next name may be tried without writing anything again."""
    commit(store, 1, b"old")
    pending = store.create(1)
    pending.write_files({"model.safetensors": image(b"new")})
    with pytest.raises(CheckpointExistsError, match="it was left as it is"):
        pending.commit(ONE, b"manifest")
    pending.commit(f"{ONE}.g2", b"manifest")
    assert contents(store) == {ONE: whole(b"old"), f"{ONE}.g2": whole(b"new")}


def test_umask_decides(store: LocalStore, commit: Commit) -> None:
    """Permissions are what the process's umask leaves, as for every other file."""
    before = os.umask(0o027)
    try:
        commit(store, 1)
    finally:
        os.umask(before)
    made = [Path(store.path), *Path(store.path).rglob("*")]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in made}
    assert modes == {"run": "0o750", ONE: "0o750", "model.safetensors": "0o640", "manifest.json": "0o640"}


def every_fault(calls: int) -> Iterator[tuple[int, OSError]]:
    """An I/O error and a full disk at every system call."""
    for index in range(calls):
        yield index, OSError(errno.EIO, os.strerror(errno.EIO))
        yield index, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_any_failing_system_call_fails_the_save(
    tmp_path: Path, commit: Commit, contents: Contents, system_calls: Any
) -> None:
    """Whichever call fails: an error of the storage, nothing earlier lost, no litter, and no descriptor left open."""
    store = LocalStore(tmp_path / "run")
    commit(store, 1, b"old")
    begin = len(system_calls.trace)
    commit(store, 2)
    calls = system_calls.trace[begin:]
    published = calls.index(("renameat2", "TMP", TWO))
    for index, error in every_fault(len(calls)):
        store = LocalStore(tmp_path / f"run {index} {error.errno}")
        commit(store, 1, b"old")
        at = len(system_calls.trace) + index
        system_calls.fault = lambda name, now, at=at, error=error: error if now == at else None
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - of descriptors there are only names
        with pytest.raises(StorageError, match=error.strerror) as caught:
            commit(store, 2)
        system_calls.fault = lambda name, now: None
        assert isinstance(caught.value, DiskFullError) == (error.errno == errno.ENOSPC), calls[index]
        assert caught.value.errno == error.errno
        visible = {ONE: whole(b"old"), **({TWO: whole()} if index > published else {})}
        assert contents(store) == visible, calls[index]
        error.__traceback__ = None
        del caught  # and with it the frames that hold descriptors
        assert len(os.listdir("/proc/self/fd")) == files, calls[index]  # noqa: PTH208
        commit(store, 3)


def test_an_interrupted_reservation_is_no_failure(
    store: LocalStore, commit: Commit, contents: Contents, refuse_in_c: Callable[[str, int], None]
) -> None:
    """A signal, such as that of a preemption, ends fallocate on some file systems; the save goes on without."""
    refuse_in_c("fallocate", errno.EINTR)
    commit(store, 1)
    assert contents(store) == {ONE: whole()}


def test_a_close_that_fails_changes_nothing(
    store: LocalStore, commit: Commit, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has to be durable was synced before; and the descriptor is gone even so."""
    close = os.close

    def fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - of descriptors there are only names
    monkeypatch.setattr(os, "close", fail)
    commit(store, 1)
    assert store.remove(ONE)
    commit(store, 2)
    monkeypatch.undo()
    assert contents(store) == {TWO: whole()}
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


def test_a_failed_sync_is_not_tried_again(store: LocalStore, commit: Commit, system_calls: Any) -> None:
    """Linux reports a lost page once: a second fsync of the descriptor would lie."""
    lost = OSError(errno.EIO, os.strerror(errno.EIO))
    system_calls.fault = lambda name, index: (
        lost if system_calls.trace[-1:] == [("pwritev", "run/TMP/model.safetensors")] else None
    )
    with pytest.raises(StorageError, match="Input/output"):
        commit(store, 1)
    assert system_calls.only("fsync") == [("fsync", "."), ("fsync", "run/TMP/model.safetensors")]


def test_a_name_that_is_not_durable(store: LocalStore, image: Any, contents: Contents, system_calls: Any) -> None:
    """The checkpoint can be seen, and stays; an error says that it may not outlast a power cut."""
    lost = OSError(errno.EIO, os.strerror(errno.EIO))
    system_calls.fault = lambda name, index: lost if system_calls.trace[-1:] == [("renameat2", "TMP", ONE)] else None
    pending = store.create(1)
    pending.write_files({"model.safetensors": image(b"data")})
    with pytest.raises(StorageError, match=f"durable, though it can be seen already, .*{ONE}: Input/output"):
        pending.commit(ONE, b"manifest")
    pending.abort()
    assert contents(store) == {ONE: whole()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_to_be_full(store: LocalStore, commit: Commit, system_calls: Any, code: int) -> None:
    """No space, no quota, a limit on file sizes: one error, that says what to do."""
    full = OSError(code, os.strerror(code))
    system_calls.fault = lambda name, index: full if name == "fallocate" else None
    with pytest.raises(DiskFullError, match="Free some space") as caught:
        commit(store, 1)
    assert caught.value.path is not None
    assert caught.value.path.endswith("model.safetensors")


@pytest.mark.usefixtures("no_renameat2")
def test_a_file_system_without_renameat2(store: LocalStore, commit: Commit, contents: Contents) -> None:
    """Commits work, and refuse taken names."""
    commit(store, 1, b"old")
    with pytest.raises(CheckpointExistsError):
        commit(store, 1, b"new")
    assert contents(store) == {ONE: whole(b"old")}


@pytest.mark.usefixtures("no_flock")
def test_a_file_system_without_locks(store: LocalStore, commit: Commit, contents: Contents) -> None:
    """Saving, reading, holding, removing and cleaning work."""
    store.hold()
    commit(store, 1)
    commit(store, 2)
    assert read(store, ONE) == b"data"
    assert store.remove(ONE)
    assert store.clean() == []
    store.release()
    assert contents(store) == {TWO: whole()}


def test_a_file_system_that_only_writes(
    store: LocalStore, commit: Commit, contents: Contents, system_calls: Any
) -> None:
    """No fallocate, and no fsync of directories."""
    unsupported = OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    system_calls.fault = lambda name, index: unsupported if name == "fallocate" else None
    sync = os.fsync

    def no_directories(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise unsupported
        sync(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_directories)
        commit(store, 1)
    assert contents(store) == {ONE: whole()}


def test_two_writers_at_once(store: LocalStore, contents: Contents, image: Any) -> None:
    """Their files never meet; the later one finds the name taken."""
    first = store.create(1)
    second = LocalStore(store.path).create(1)
    for pending, data in ((first, b"1"), (second, b"2")):
        pending.write_files({"model.safetensors": image(data)})
    first.commit(ONE, b"manifest")
    with pytest.raises(CheckpointExistsError):
        second.commit(ONE, b"manifest")
    second.commit(f"{ONE}.g2", b"manifest")
    assert contents(store) == {ONE: whole(b"1"), f"{ONE}.g2": whole(b"2")}


def test_a_cleaner_between_making_and_locking(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the unlocked directory of a new writer for abandoned only makes it choose another."""
    cleaner = LocalStore(store.path)
    opened, locked = durable.open_directory, durable.lock_exclusive
    removed: list[str] = []

    def before_open(path: str, parent: durable.Descriptor | None = None) -> durable.Descriptor:
        monkeypatch.setattr(durable, "open_directory", opened)
        removed.extend(cleaner.clean())
        return opened(path, parent)

    def before_lock(descriptor: durable.Descriptor) -> durable.Lock:
        monkeypatch.setattr(durable, "lock_exclusive", locked)
        removed.extend(cleaner.clean())
        return locked(descriptor)

    Path(store.path).mkdir()
    make = os.mkdir

    def after_mkdir(name: str, **kwargs: Any) -> None:
        make(name, **kwargs)
        monkeypatch.setattr(os, "mkdir", make)
        monkeypatch.setattr(durable, "lock_exclusive", locked)
        monkeypatch.setattr(durable, "open_directory", before_open)

    monkeypatch.setattr(os, "mkdir", after_mkdir)
    pending = store.create(1)
    monkeypatch.setattr(durable, "lock_exclusive", before_lock)
    other = store.create(2)
    assert len(removed) == 2
    pending.commit(ONE, b"manifest")
    other.commit(TWO, b"manifest")
    assert sorted(store.names()) == [ONE, TWO]


# ---------------------------------------------------------------------------------------------------------- replacing


@pytest.fixture
def replaced(image: Any) -> Replace:
    """Puts a checkpoint in the place of another."""

    def make(store: LocalStore, data: bytes) -> None:
        pending = store.create(1)
        try:
            pending.write_files({"model.safetensors": image(data)})
            pending.replace("best.pt", b"manifest")
        except BaseException:
            pending.abort()
            raise

    return make


def test_replacing(store: LocalStore, commit: Commit, contents: Contents, replaced: Replace) -> None:
    """The new one takes the name, the old one is gone."""
    commit(store, 1, b"old", name="best.pt")
    replaced(store, b"new")
    assert contents(store) == {"best.pt": whole(b"new")}


@pytest.mark.usefixtures("no_renameat2")
def test_replacing_without_exchange(store: LocalStore, commit: Commit, contents: Contents, replaced: Replace) -> None:
    """The same where names cannot be swapped."""
    commit(store, 1, b"old", name="best.pt")
    replaced(store, b"new")
    assert contents(store) == {"best.pt": whole(b"new")}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_at_any_call_of_a_replacement(
    tmp_path: Path,
    commit: Commit,
    contents: Contents,
    replaced: Replace,
    system_calls: Any,
    monkeypatch: pytest.MonkeyPatch,
    exchange: bool,
) -> None:
    """Afterwards the old or the new one is there, whole; it is brought back when it had stepped aside."""
    if not exchange:
        monkeypatch.setattr(durable, "_renameat2", lambda *args: False)
    store = LocalStore(tmp_path / "run")
    commit(store, 1, b"old", name="best.pt")
    begin = len(system_calls.trace)
    replaced(store, b"new")
    for index in range(len(system_calls.trace) - begin):
        store = LocalStore(tmp_path / f"run {index}")
        commit(store, 1, b"old", name="best.pt")
        at = len(system_calls.trace) + index

        def dead(name: str, now: int, at: int = at) -> OSError | None:
            return OSError(errno.EIO, "dead") if now >= at else None  # nothing works any more, not even cleaning up

        system_calls.fault = dead
        with contextlib.suppress(StorageError):
            replaced(store, b"new")
        system_calls.fault = lambda name, now: None
        if "best.pt" not in store.names():
            assert store.recover("best.pt")
        assert contents(store)["best.pt"] in (whole(b"old"), whole(b"new")), index
        store.clean()
        assert store.names() == ["best.pt"], index


@pytest.mark.usefixtures("no_renameat2")
def test_what_cannot_be_brought_back_is_not_said_to_be_missing(
    store: LocalStore, commit: Commit, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stepped aside is there, whatever keeps it from its name now."""
    aside = aside_name("best.pt", NONCE)
    commit(store, 1, name=aside)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match=r"cannot bring back .*best\.pt: Read-only file system"):
        store.recover("best.pt")
    monkeypatch.undo()
    assert store.recover("best.pt")
    assert contents(store) == {"best.pt": whole()}


@pytest.mark.usefixtures("no_renameat2")
def test_a_replacement_that_fails_puts_the_old_one_back(
    store: LocalStore, commit: Commit, contents: Contents, replaced: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the old one has to step aside first."""
    commit(store, 1, b"old", name="best.pt")
    publish = durable.publish

    def fails(parent: durable.Descriptor, name: str, final: str) -> None:
        if name.startswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        publish(parent, name, final)

    monkeypatch.setattr(durable, "publish", fails)
    with pytest.raises(StorageError, match="Input/output"):
        replaced(store, b"new")
    assert contents(store) == {"best.pt": whole(b"old")}


# ------------------------------------------------------------------------------------------------------------ reading


def test_reading_limits(store: LocalStore, commit: Commit) -> None:
    """A file longer than it may be is not read."""
    commit(store, 1)
    stored = store.open(ONE)
    assert stored.read_whole("manifest.json", 8) == b"manifest"
    with pytest.raises(ValueError, match="has 8 bytes, more than the 7"):
        stored.read_whole("manifest.json", 7)
    with pytest.raises(FileNotFoundError):
        stored.read_whole("nothing", 7)
    assert sorted(stored.names(3)) == ["manifest.json", "model.safetensors"]
    assert len(stored.names(1)) == 1


def test_a_file_that_begins_otherwise_is_not_read(store: LocalStore, commit: Commit) -> None:
    """Nothing is made for the rest of it: one that is a hole may have any size."""
    commit(store, 1)
    stored = store.open(ONE)
    assert stored.read_whole("manifest.json", 8, b"mani") == b"manifest"
    with pytest.raises(ValueError, match=r"manifest\.json does not begin with x"):
        stored.read_whole("manifest.json", 8, b"x")


def test_comparing_a_file(store: LocalStore, commit: Commit) -> None:
    """It is whole when it holds what is expected and nothing else."""
    commit(store, 1)
    stored = store.open(ONE)
    assert [stored.is_whole("manifest.json", data) for data in (b"manifest", b"manifesT", b"manifest.", b"")] == [
        True,
        False,
        False,
        False,
    ]


def test_a_mapped_file_of_another_size(store: LocalStore, commit: Commit) -> None:
    """Is compared when it is open, and not mapped."""
    commit(store, 1)
    with pytest.raises(ValueError, match="has 4 bytes, expected 5"):
        store.open(ONE).map_file("model.safetensors", 5)


def test_reading_past_the_end(store: LocalStore, commit: Commit) -> None:
    """There are fewer bytes than asked for, and no more."""
    commit(store, 1)
    file = store.open(ONE).open_file("model.safetensors")
    buffer = bytearray(6)
    assert (file.read_into(2, memoryview(buffer)), bytes(buffer)) == (2, b"ta\0\0\0\0")


# Larger than what is read at once past the page cache, with an end that fills no block.
LARGE = bytes(range(256)) * (DIRECT_READ_BYTES // 256) + b"the end"


@pytest.fixture
def large(store: LocalStore, commit: Commit) -> Iterator[LocalFile]:
    """A large file, none of which is in the page cache."""
    commit(store, 1, LARGE)
    file = store.open(ONE).open_file("model.safetensors")
    with (Path(store.path) / ONE / "model.safetensors").open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_share(durable.Descriptor(os.dup(opened.fileno())), len(LARGE)) > 0.1:
            pytest.skip("this file system is its own page cache")
    yield file
    file.close()


def takes_direct_reads(file: LocalFile) -> bool:
    """Whether the file will be read past the page cache; where its file system cannot, there is nothing to test."""
    return file.choose_way() == DIRECT_READ_BYTES


def read_through(file: LocalFile) -> tuple[int, bytes]:
    """The whole of a large file, the way it wants to be read; the bytes, and how many it said there were."""
    buffer = memory.allocate(DIRECT_READ_BYTES + 4096)
    count = file.read_into(0, buffer[:DIRECT_READ_BYTES])
    count += file.read_into(DIRECT_READ_BYTES, buffer[DIRECT_READ_BYTES:])
    return count, bytes(buffer[:count])


def test_a_file_on_disk_is_read_past_the_page_cache(large: LocalFile) -> None:
    """It gives all its bytes, to the last, and takes nobody's place in memory."""
    if not takes_direct_reads(large):
        pytest.skip("this file system does not take direct I/O")
    assert read_through(large) == (len(LARGE), LARGE)
    assert cached_share(large._descriptor, len(LARGE)) < 0.1


def test_a_file_in_memory_is_read_through_the_page_cache(large: LocalFile) -> None:
    """It is there already, and a disk is slower."""
    read_through(large)
    assert (large.choose_way(), read_through(large)) == (1, (len(LARGE), LARGE))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_the_page_cache_holds_decides(large: LocalFile, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Mostly there, or mostly not."""
    monkeypatch.setattr(local_reading, "cached_share", lambda file, nbytes: share)
    monkeypatch.setattr(direct, "enable", lambda file: 4096)
    assert large.choose_way() == (1 if share else DIRECT_READ_BYTES)


@pytest.mark.parametrize("alignment", [0, 65536])
def test_where_direct_reads_cannot_be(large: LocalFile, monkeypatch: pytest.MonkeyPatch, alignment: int) -> None:
    """Not at all, or only of larger blocks than ours: through the page cache."""
    monkeypatch.setattr(direct, "enable", lambda file: alignment)
    assert (large.choose_way(), read_through(large)) == (1, (len(LARGE), LARGE))


def test_refused_direct_reads(large: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems take the flag and not the reads: the same bytes come the ordinary way."""
    if not takes_direct_reads(large):
        pytest.skip("this file system does not take direct I/O")
    read = os.preadv

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    assert read_through(large) == (len(LARGE), LARGE)


def test_direct_reads_of_a_lost_sector(large: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk says is passed on, and nothing else is tried."""
    if not takes_direct_reads(large):
        pytest.skip("this file system does not take direct I/O")

    tried: list[int] = []

    def lost(fd: int, buffers: list[memoryview], offset: int) -> int:
        tried.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", lost)
    with pytest.raises(OSError, match="Input/output"):
        read_through(large)
    assert tried == [0]


@pytest.mark.parametrize("way", ["direct", "cached"])
@pytest.mark.parametrize("most", [4096, 5000])
def test_short_reads_are_continued(large: LocalFile, monkeypatch: pytest.MonkeyPatch, way: str, most: int) -> None:
    """Wherever the kernel stops, in the middle of a block too."""
    if way == "direct" and not takes_direct_reads(large):
        pytest.skip("this file system does not take direct I/O")
    read, some = os.preadv, 2**20 + most
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:some]], offset))
    assert read_through(large) == (len(LARGE), LARGE)


def test_a_mapped_file(store: LocalStore, commit: Commit) -> None:
    """Its bytes, as long as somebody looks at them, also when the checkpoint is gone."""
    commit(store, 1)
    stored = store.open(ONE)
    view = stored.map_file("model.safetensors", 4)
    stored.close()
    store.remove(ONE)
    commit(store, 1, b"other")
    assert bytes(view) == b"data"


def test_writing_to_a_mapped_file(store: LocalStore, commit: Commit, contents: Contents) -> None:
    """Changes a private copy."""
    commit(store, 1)
    view = store.open(ONE).map_file("model.safetensors", 4)
    view[:] = b"mine"
    assert (bytes(view), contents(store)) == (b"mine", {ONE: whole()})


def test_what_is_not_there(store: LocalStore) -> None:
    """A store that was never written to is empty, and has nothing to open."""
    assert store.names() == []
    assert store.clean() == []
    with pytest.raises(FileNotFoundError):
        store.open(ONE)


# ----------------------------------------------------------------------------------------------------------- removing


def test_order_of_a_removal(store: LocalStore, commit: Commit, contents: Contents, system_calls: Any) -> None:
    """Out of sight first, durably; then the manifest, so that no half of it looks whole."""
    commit(store, 1)
    commit(store, 2)
    begin = len(system_calls.trace)
    assert store.remove(ONE)
    assert system_calls.trace[begin:] == [
        ("flock", f"run/{ONE}"),
        ("rename", f"run/{ONE}", f"run/.trash-{ONE}"),
        ("fsync", "run"),
        ("unlink", f"run/.trash-{ONE}/manifest.json"),
        ("unlink", f"run/.trash-{ONE}/model.safetensors"),
        ("rmdir", f"run/.trash-{ONE}"),
    ]
    assert contents(store) == {TWO: whole()}


def test_a_removal_that_fails_is_finished_later(
    tmp_path: Path, commit: Commit, contents: Contents, system_calls: Any
) -> None:
    """Whichever call fails, the checkpoint is whole or out of sight, and a cleaning takes the rest."""
    for index in range(6):
        store = LocalStore(tmp_path / f"run {index}")
        commit(store, 1)
        commit(store, 2)
        at = len(system_calls.trace) + index
        lost = OSError(errno.EIO, os.strerror(errno.EIO))
        system_calls.fault = lambda name, now, at=at, lost=lost: lost if now == at else None
        with pytest.raises(StorageError, match="Input/output"):
            store.remove(ONE)
        system_calls.fault = lambda name, now: None
        assert contents(store).get(ONE) == (whole() if index < 2 else None)
        store.clean()
        assert contents(store) == {TWO: whole(), **({ONE: whole()} if index < 2 else {})}


def test_a_reader_keeps_it(store: LocalStore, commit: Commit) -> None:
    """While somebody reads, nothing is removed; afterwards it is."""
    commit(store, 1)
    reader = store.open(ONE)
    reader.lock()
    assert not LocalStore(store.path).remove(ONE)
    assert reader.read_whole("model.safetensors", 10) == b"data"
    reader.close()
    assert LocalStore(store.path).remove(ONE)
    assert not store.remove(ONE)


def test_strangers_files_stay(store: LocalStore, commit: Commit, contents: Contents) -> None:
    """What is not a checkpoint's own is not unlinked, and so its directory stays too, out of sight."""
    commit(store, 1)
    (Path(store.path) / ONE / "notes.txt").write_text("mine")
    store.remove(ONE)
    ((name, files),) = contents(store).items()
    assert (name.startswith(".trash-"), files) == (True, {"notes.txt": b"mine"})
    assert store.clean() == []


# ----------------------------------------------------------------------------------------------------------- cleaning


WRITER = """
import sys
from holdfast.storage.local import LocalStore


class Image:
    nbytes = 4

    def read(self, begin, room):
        return memoryview(b"data")


pending = LocalStore(sys.argv[1]).create(5)
pending.write_files({"model.safetensors": Image()})
print("writing", flush=True)
sys.stdin.readline()
pending.commit("step-000000000005", b"manifest")
"""


def writer(store: LocalStore) -> subprocess.Popen[str]:
    """Another process in the middle of a save."""
    arguments = [sys.executable, "-c", WRITER, store.path]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_live_writer_is_left_alone(store: LocalStore, contents: Contents) -> None:
    """Another process's save under way is not cleaned away, and ends well."""
    with writer(store) as process:
        assert store.clean() == []
        process.communicate("\n")
    assert contents(store) == {"step-000000000005": whole()}


def test_a_dead_writers_rest_is_removed(store: LocalStore, commit: Commit, contents: Contents) -> None:
    """The kernel gives its lock back when it dies, however it dies."""
    commit(store, 1)
    with writer(store) as process:
        process.kill()
    (left,) = set(store.names()) - {ONE}
    assert store.clean() == [left]
    assert contents(store) == {ONE: whole()}


def abandoned(store: LocalStore, name: str, *files: str) -> Path:
    """A directory as a writer leaves it."""
    directory = Path(store.path) / name
    directory.mkdir(parents=True)
    for file in files or ("model.safetensors",):
        (directory / file).write_bytes(b"x")
    return directory


def temporary(host: str | None = None, pid: int = 1) -> str:
    """The temporary name of some writer."""
    return str(TemporaryName(1, host or host_label(os.uname().nodename), pid, NONCE))


def age(directory: Path, seconds: float) -> None:
    """Let a directory and its files have changed last that long ago."""
    for path in (*directory.iterdir(), directory):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_another_hosts_rest_is_removed_when_it_is_idle(store: LocalStore) -> None:
    """A lock may not reach from host to host: only after an hour without any change is its writer taken for dead."""
    name = temporary("elsewhere")
    directory = abandoned(store, name)
    assert store.clean() == []
    age(directory, local_cleaning.FOREIGN_IDLE_S - 60)
    assert store.clean() == []
    age(directory, 120)
    assert store.clean() == [name]
    assert store.names() == []


def test_another_hosts_writer_shows_life_by_any_file(store: LocalStore) -> None:
    """A large file that grows for hours keeps its directory, whose own time stands still."""
    directory = abandoned(store, temporary("elsewhere"), "a.safetensors", "b.safetensors")
    age(directory, 2 * local_cleaning.FOREIGN_IDLE_S)
    (directory / "b.safetensors").write_bytes(b"more")
    assert store.clean() == []
    assert directory.exists()


@pytest.mark.usefixtures("no_flock")
def test_without_locks_only_the_provably_dead_go(store: LocalStore) -> None:
    """A process that is gone on this host; not one that lives, and nobody on another host."""
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    dead = temporary(pid=finished.pid)
    abandoned(store, dead)
    abandoned(store, temporary(pid=os.getpid()))
    age(abandoned(store, temporary("elsewhere")), 2 * local_cleaning.FOREIGN_IDLE_S)
    assert store.clean() == [dead]
    assert len(store.names()) == 2


def test_trash_is_removed(store: LocalStore) -> None:
    """Its removal was decided; unless somebody reads it still."""
    name = trash_name(ONE, NONCE)
    directory = abandoned(store, name, "manifest.json", "model.safetensors")
    with durable.open_directory(str(directory)) as reader:
        durable.lock_shared(reader)
        assert store.clean() == []
    assert store.clean() == [name]


def test_one_that_stepped_aside_goes_only_when_it_has_a_successor(store: LocalStore, commit: Commit) -> None:
    """Without one it is the only copy there is."""
    name = aside_name("best.pt", NONCE)
    abandoned(store, name, "manifest.json")
    assert store.clean() == []
    assert store.recover("best.pt")
    assert not store.recover("best.pt")
    abandoned(store, name, "manifest.json")
    assert store.clean() == [name]
    assert store.names() == ["best.pt"]


def test_strangers_stay(store: LocalStore, commit: Commit) -> None:
    """What is not exactly ours by name is not touched, and neither are a stranger's files in what is ours."""
    root = Path(store.path)
    commit(store, 1)
    for name in (".tmp-mine", ".trash", "step-1", ".git", "notes"):
        (root / name).mkdir()
    (root / temporary(pid=3)).write_text("a file of that name")
    (root / temporary(pid=4)).symlink_to("notes")
    mixed = abandoned(store, temporary(), "model.safetensors", "notes.txt", "manifest.json")
    (mixed / "x.safetensors").mkdir()
    before = set(store.names())
    assert store.clean() == []
    assert set(store.names()) == before
    assert {path.name for path in mixed.iterdir()} == {"notes.txt", "x.safetensors"}


# ------------------------------------------------------------------------------------------------------------ holding


def test_one_writer_holds_a_run(store: LocalStore) -> None:
    """A second one is told who has it, and gets it when the first lets go."""
    store.hold()
    with pytest.raises(RunBusyError, match=f"Process {os.getpid()} is writing this run") as caught:
        LocalStore(store.path).hold()
    assert caught.value.path == store.path
    store.release()
    store.release()
    LocalStore(store.path).hold()


def test_holding_keeps_nobody_from_reading_or_removing(store: LocalStore, commit: Commit) -> None:
    """The lock of a run is about writing trainings, not about looking."""
    commit(store, 1)
    store.hold()
    assert read(LocalStore(store.path), ONE) == b"data"
    store.release()


def test_a_lock_that_fails_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error is not a missing feature."""

    def lost(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", lost)
    with pytest.raises(StorageError, match="cannot open run"):
        store.hold()


# --------------------------------------------------------------------------------------------------------- annotating


def test_annotations_that_a_dead_writer_left_are_cleaned_up(
    store: LocalStore, commit: Commit, contents: Contents
) -> None:
    """Those of a live writer stay, and so does what is not known."""
    commit(store, 1)
    path = Path(store.path) / ONE
    for name in (".annotations.json.0123456789abcdef", ".annotations.json.fedcba9876543210", ".annotations.json.mine"):
        (path / name).write_bytes(b"half")
    with durable.open_directory(str(path)) as directory:
        live = durable.open_file(directory, ".annotations.json.fedcba9876543210")
        durable.lock_exclusive(live)
        assert store.clean() == []
    found = {".annotations.json.fedcba9876543210": b"half", ".annotations.json.mine": b"half"}
    assert contents(store) == {ONE: {**whole(), **found}}
    live.close()
    store.clean()
    assert contents(store) == {ONE: {**whole(), ".annotations.json.mine": b"half"}}


def test_a_probe_that_a_dead_process_left_is_cleaned_up(store: LocalStore, commit: Commit) -> None:
    """It was made to read the file system's clock."""
    commit(store, 1)
    (Path(store.path) / ".probe-0123456789abcdef").touch()
    (Path(store.path) / ".probe-mine").touch()
    store.clean()
    assert sorted(store.names()) == [".probe-mine", ONE]


def test_annotations_are_replaced_atomically(
    store: LocalStore, commit: Commit, contents: Contents, system_calls: Any
) -> None:
    """Written aside, synced, renamed over, and the directory synced; a failure leaves the old ones and no litter."""
    commit(store, 1)
    store.annotate(ONE, lambda _: b"old")
    expected = {ONE: {**whole(), "annotations.json": b"old"}}
    begin = len(system_calls.trace)
    store.annotate(ONE, lambda _: b"old")
    calls = system_calls.trace[begin:]
    made = ["flock", "flock", "open", "flock", "write", "fsync", "rename", "fsync"]
    assert [call[0] for call in calls] == made
    assert calls[-1] == ("fsync", f"run/{ONE}")
    for index in range(len(made) - 1):
        at = len(system_calls.trace) + index
        lost = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        system_calls.fault = lambda name, now, at=at, lost=lost: lost if now == at else None
        with pytest.raises(DiskFullError, match="cannot annotate"):
            store.annotate(ONE, lambda _: b"new")
        system_calls.fault = lambda name, now: None
        assert contents(store) == expected
    store.annotate(ONE, lambda _: b"new")
    assert contents(store)[ONE]["annotations.json"] == b"new"


def test_what_is_being_annotated_is_not_removed(store: LocalStore, commit: Commit) -> None:
    """Whoever removes it afterwards sees what was annotated."""
    commit(store, 1)
    removed = []

    def change(_: LocalCheckpoint) -> bytes:
        removed.append(LocalStore(store.path).remove(ONE))
        return b"new"

    store.annotate(ONE, change)
    assert removed == [False]
    assert not store.remove(ONE, lambda stored: stored.read_whole("annotations.json", 100) == b"new")
    assert store.remove(ONE, lambda stored: stored.read_whole("annotations.json", 100) == b"old")


def test_annotating_what_is_gone(store: LocalStore, commit: Commit) -> None:
    """Nothing is made, and the error says so."""
    commit(store, 1)
    store.remove(ONE)
    with pytest.raises(CheckpointNotFoundError, match=f"{ONE} was removed meanwhile"):
        store.annotate(ONE, lambda _: b"new")
    assert store.names() == []


def test_one_annotates_at_a_time(store: LocalStore, commit: Commit) -> None:
    """The next one begins when what the one before changed is there to be read."""
    commit(store, 1)
    begun = threading.Event()
    found = []

    def second(stored: LocalCheckpoint) -> bytes:
        begun.set()
        found.append(stored.read_whole("annotations.json", 100))
        return b"second"

    def first(_: LocalCheckpoint) -> bytes:
        other.start()
        assert not begun.wait(0.2), "two annotate at once"
        return b"first"

    other = threading.Thread(target=lambda: LocalStore(store.path).annotate(ONE, second))
    store.annotate(ONE, first)
    other.join()
    assert found == [b"first"]
