"""From memory to files."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.errors import DiskFullError, StorageError
from holdfast.format.records import CHUNK_BYTES, FileRecord
from holdfast.storage import direct, durable, memory
from holdfast.storage.durable import Descriptor
from holdfast.storage.writing import PART_BYTES, gather, write_files

RecordOf = Callable[[bytes, int], FileRecord]
PAGE = 4096
SIZES = sorted(
    {
        *(0, 1, PAGE - 1, PAGE, PAGE + 1),
        *(CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1),
        *(PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, PART_BYTES + PAGE),
        2 * PART_BYTES + CHUNK_BYTES + PAGE + 1,
    }
)


@pytest.fixture(scope="module")
def data() -> memoryview:
    """Bytes that do not repeat, at an address that is a multiple of 4096."""
    nbytes = max(SIZES)
    view = memory.allocate(nbytes)
    view[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8).data
    return view


@pytest.fixture
def here(tmp_path: Path) -> Descriptor:
    """A directory to write in."""
    return durable.open_directory(str(tmp_path))


def is_direct(fd: int) -> bool:
    """Whether writes to a descriptor go past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def failing(code: int) -> OSError:
    """An error of the system."""
    return OSError(code, os.strerror(code))


# ------------------------------------------------------------------------------------- how a file system takes writes


def ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes direct I/O where it takes it."""


def refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not take the flag."""
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise failing(errno.EINVAL)
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


def refused_when_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the flag, and refuses the writes."""
    write = os.pwritev

    def refuse(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd):
            raise failing(errno.EINVAL)
        return write(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", refuse)


def refused_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the first direct write of each file and no other."""
    write, seen = os.pwritev, set()

    def refuse(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd) and fd in seen:
            raise failing(errno.EINVAL)
        seen.add(fd)
        return write(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", refuse)


def taken_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes some blocks of what it is given, at most, as a full disk or a signal may have it."""
    write = os.pwritev

    def short(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return write(fd, [views[0][: max(len(views[0]) // 2 // PAGE * PAGE, min(PAGE, len(views[0])))]], offset)

    monkeypatch.setattr(os, "pwritev", short)


def taken_at_odd_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the middle of a block, from where a direct write cannot go on."""
    write = os.pwritev

    def short(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd) and (offset % PAGE or len(views[0]) % PAGE):
            raise failing(errno.EINVAL)
        count = write(fd, views[:1], offset)
        return count - 1 if is_direct(fd) else count

    monkeypatch.setattr(os, "pwritev", short)


def without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """No direct I/O, no fallocate, no sync_file_range."""
    monkeypatch.setattr(durable, "_libc", None)
    monkeypatch.setattr(direct, "_libc", None)
    monkeypatch.delattr(os, "O_DIRECT")


FILE_SYSTEMS = (
    ordinary,
    refused_at_once,
    refused_when_writing,
    refused_now_and_then,
    taken_by_halves,
    taken_at_odd_places,
    without_anything,
)


def write_sizes(directory: Path, image: Any, data: memoryview, own: bool) -> dict[str, FileRecord]:
    """Write a file of each size at once."""
    with durable.open_directory(str(directory)) as opened:
        return write_files(opened, {f"{size}.safetensors": image(data[:size], own) for size in SIZES}, "run")


def checksums(directory: Path) -> dict[str, str]:
    """Of every file in a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def checksums_of(data: memoryview) -> dict[str, str]:
    """Of what :func:`write_sizes` has to write."""
    return {f"{size}.safetensors": hashlib.sha256(data[:size]).hexdigest() for size in SIZES}


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
@pytest.mark.parametrize("own", [False, True], ids=["gathered", "where they lie"])
def test_files_hold_their_images(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: Any,
    data: memoryview,
    file_system: Callable[[pytest.MonkeyPatch], None],
    own: bool,
) -> None:
    """Every byte of files of every size around a border, whatever the file system takes."""
    with monkeypatch.context() as patch:
        file_system(patch)
        write_sizes(tmp_path, image, data, own)
    assert checksums(tmp_path) == checksums_of(data)


@pytest.mark.parametrize("own", [False, True], ids=["gathered", "where they lie"])
def test_files_in_memory_hold_their_images(
    mount: Callable[[str], Path], image: Any, data: memoryview, own: bool
) -> None:
    """tmpfs, which has no disk to go straight to."""
    directory = mount(f"size={2 * sum(SIZES)}")
    write_sizes(directory, image, data, own)
    assert checksums(directory) == checksums_of(data)


@pytest.mark.parametrize("own", [False, True], ids=["gathered", "where they lie"])
def test_records_are_those_of_the_bytes(
    tmp_path: Path, image: Any, record_of: RecordOf, data: memoryview, own: bool
) -> None:
    """Size, and one checksum for each chunk, computed the simple way."""
    expected = {f"{size}.safetensors": record_of(bytes(data[:size]), CHUNK_BYTES) for size in SIZES}
    assert write_sizes(tmp_path, image, data, own) == expected


@pytest.mark.parametrize("alignment", [8192, 65536, 2**20])
def test_file_systems_with_large_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Any, data: memoryview, alignment: int
) -> None:
    """Whatever does not fill the last block goes the ordinary way, also where the whole file is smaller than one."""
    real, wrong = direct.enable, []
    monkeypatch.setattr(direct, "enable", lambda file: alignment if real(file) else 0)
    write = os.pwritev

    def checked(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd) and (offset % alignment or sum(map(len, views)) % alignment):
            wrong.append((offset, sum(map(len, views))))
        return write(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", checked)
    write_sizes(tmp_path, image, data, False)
    assert (checksums(tmp_path), wrong) == (checksums_of(data), [])


@pytest.mark.parametrize("own", [False, True], ids=["gathered", "where they lie"])
def test_large_files_go_past_the_page_cache(
    here: Descriptor, monkeypatch: pytest.MonkeyPatch, image: Any, data: memoryview, own: bool
) -> None:
    """All whole blocks do, aligned as the kernel wants it; only what is left at the end does not."""
    with durable.create_file(here, "probe") as probe:
        if not direct.enable(probe):
            pytest.skip("this file system does not take direct I/O")
    write, calls = os.pwritev, []

    def spy(fd: int, views: Sequence[memoryview], offset: int) -> int:
        addresses = {view.nbytes and np.frombuffer(view, np.uint8).ctypes.data % PAGE for view in views}
        calls.append((offset, sum(map(len, views)), is_direct(fd), addresses if is_direct(fd) else {0}))
        return write(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", spy)
    nbytes = PART_BYTES + PAGE + 7
    write_files(here, {"a": image(data[:nbytes], own)}, "run")
    assert sorted(calls) == [
        (0, PART_BYTES, True, {0}),
        (PART_BYTES, PAGE, True, {0}),
        (PART_BYTES + PAGE, 7, False, {0}),
    ]


@pytest.mark.parametrize(("size", "threads"), [(0, 0), (1, 1), (PART_BYTES, 1), (2 * PART_BYTES + 1, 3)])
def test_memory_is_a_few_parts(
    here: Descriptor, monkeypatch: pytest.MonkeyPatch, image: Any, data: memoryview, size: int, threads: int
) -> None:
    """One buffer for each thread, no larger than a part or the file; no more threads than there are parts."""
    allocate, allocated = memory.allocate, []

    def spy(nbytes: int) -> memoryview:
        allocated.append(nbytes)
        return allocate(nbytes)

    monkeypatch.setattr(memory, "allocate", spy)
    write_files(here, {"a": image(data[:size])}, "run")
    assert len(allocated) <= threads
    assert set(allocated) <= {min(PART_BYTES, size)}


def test_parts_are_written_side_by_side(here: Descriptor, image: Any, data: memoryview) -> None:
    """Two threads gather at the same time: each waits for the other."""
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(image):  # type: ignore[misc]
        def read(self, begin: int, room: memoryview) -> memoryview:
            if begin in (0, PART_BYTES):
                meeting.wait()
            return memoryview(super().read(begin, room))

    write_files(here, {"a": Meeting(data[: PART_BYTES + 1])}, "run")
    assert meeting.broken is False


def test_nothing_to_write(here: Descriptor, tmp_path: Path) -> None:
    """No files, no records."""
    assert (write_files(here, {}, "run"), list(tmp_path.iterdir())) == ({}, [])


# ------------------------------------------------------------------------------------------------------------ gathering


@pytest.mark.parametrize("own", [False, True], ids=["gathered", "where they lie"])
def test_images_are_gathered_in_their_slots(image: Any, data: memoryview, own: bool) -> None:
    """Every byte of every one, and none besides."""
    sizes = [0, 1, PART_BYTES, PART_BYTES + 1]
    rooms = {str(size): memoryview(bytearray(size + 1)) for size in sizes}
    slots = {name: room[:-1] for name, room in rooms.items()}
    gather({str(size): image(data[:size], own) for size in sizes}, slots, 2)
    found = {name: hashlib.sha256(room).hexdigest() for name, room in rooms.items()}
    assert found == {str(size): hashlib.sha256(bytes(data[:size]) + b"\0").hexdigest() for size in sizes}


# ----------------------------------------------------------------------------------------------------------- durability


def images_of(image: Any, data: memoryview) -> dict[str, Any]:
    """Files of several parts and of one, with an end that goes through the page cache and without."""
    sizes = {"a": 2 * PART_BYTES + 1, "b": PART_BYTES, "c": 10, "d": 0}
    return {name: image(data[:size]) for name, size in sizes.items()}


def test_every_file_is_synced_after_its_last_write(
    here: Descriptor, system_calls: Any, image: Any, data: memoryview
) -> None:
    """Before it returns, once each, the empty one too, and nothing is written afterwards."""
    write_files(here, images_of(image, data), "run")
    assert sorted(system_calls.only("fsync")) == [("fsync", name) for name in "abcd"]
    for name in "abc":
        calls = [call for call, *files in system_calls.trace if files == [name]]
        assert (calls[-2:], calls.count("fsync")) == (["pwritev", "fsync"], 1)


def test_space_is_reserved_before_the_first_byte(
    here: Descriptor, system_calls: Any, image: Any, data: memoryview
) -> None:
    """For all files, so that a full disk is found out before anything is written."""
    write_files(here, images_of(image, data), "run")
    calls = system_calls.only("fallocate", "pwritev")
    assert calls[:3] == [("fallocate", name) for name in "abc"]
    assert {call for call, _ in calls[3:]} == {"pwritev"}


def test_existing_files_are_left(here: Descriptor, tmp_path: Path, image: Any) -> None:
    """New files are new."""
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(StorageError, match="cannot write run/a: File exists"):
        write_files(here, {"a": image(b"new")}, "run")
    assert (tmp_path / "a").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------------------- failures


class LostError(Exception):
    """What a failing image raises."""


@pytest.fixture
def left() -> Callable[[], tuple[int, list[str]]]:
    """What must not be left behind: open descriptors and running threads."""

    def count() -> tuple[int, list[str]]:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("holdfast")]
        gc.collect()  # what earlier tests left is not ours
        return len(list(Path("/proc/self/fd").iterdir())), threads

    return count


@pytest.mark.parametrize("place", [0, PART_BYTES, 2 * PART_BYTES])
def test_an_image_that_fails(
    here: Descriptor,
    system_calls: Any,
    image: Any,
    data: memoryview,
    left: Callable[[], tuple[int, list[str]]],
    place: int,
) -> None:
    """A device that is lost: its own error is raised, and nothing is made durable."""

    class Failing(image):  # type: ignore[misc]
        def read(self, begin: int, room: memoryview) -> memoryview:
            if begin == place:
                raise LostError
            return memoryview(super().read(begin, room))

    before = left()
    with pytest.raises(LostError):
        write_files(here, {"a": Failing(data[: 2 * PART_BYTES + 1]), "b": image(b"b")}, "run")
    assert (left(), system_calls.only("fsync")) == (before, [])


@pytest.mark.parametrize("call", ["open", "fallocate", "pwritev", "fsync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_whatever_fails_is_raised(
    here: Descriptor,
    system_calls: Any,
    image: Any,
    data: memoryview,
    left: Callable[[], tuple[int, list[str]]],
    call: str,
    code: int,
) -> None:
    """Each call of its kind in turn: the error names the file and says why; no thread and no descriptor is left."""
    images = images_of(image, data)
    write_files(here, images, "run")
    total = len(system_calls.only(call))
    before = left()
    for index in range(total):
        for name in images:
            os.unlink(name, dir_fd=here.fd)
        seen = len(system_calls.only(call))
        system_calls.fault = lambda name, now, at=seen + index: (
            failing(code) if name == call and len(system_calls.only(call)) == at else None
        )
        with pytest.raises(StorageError, match=rf"cannot write run/[a-d]: {os.strerror(code)}") as caught:
            write_files(here, images, "run")
        system_calls.fault = lambda name, now: None
        assert (caught.value.errno, isinstance(caught.value, DiskFullError)) == (code, code != errno.EIO)
        caught.value.__traceback__ = None
        del caught
        assert left() == before
        for name in set(images) - set(os.listdir(here.fd)):  # noqa: PTH208 - a descriptor is no path
            durable.create_file(here, name).close()


def test_no_space_to_reserve(here: Descriptor, system_calls: Any, image: Any, data: memoryview) -> None:
    """Then not a byte is written, nor read from a device."""
    read: list[int] = []

    class Watched(image):  # type: ignore[misc]
        def read(self, begin: int, room: memoryview) -> memoryview:
            read.append(begin)
            return memoryview(super().read(begin, room))

    system_calls.fault = lambda name, index: failing(errno.ENOSPC) if name == "fallocate" else None
    with pytest.raises(DiskFullError, match="cannot write run/a: No space left"):
        write_files(here, {"a": Watched(data[:PAGE])}, "run")
    assert (read, system_calls.only("pwritev", "fsync")) == ([], [])


def test_a_full_disk(mount: Callable[[str], Path], image: Any, data: memoryview) -> None:
    """A real one: the second file finds no room."""
    images = {"a": image(data[: 2**19]), "b": image(data[: 2**20])}
    with (
        durable.open_directory(str(mount(f"size={2**20}"))) as directory,
        pytest.raises(DiskFullError, match="cannot write run/b: No space left"),
    ):
        write_files(directory, images, "run")


@pytest.mark.parametrize("index", range(4))
def test_a_failed_sync_is_not_tried_again(
    here: Descriptor, system_calls: Any, image: Any, data: memoryview, index: int
) -> None:
    """Linux reports a lost page once: a second fsync of the descriptor would lie."""
    system_calls.fault = lambda name, now: (
        failing(errno.EIO) if name == "fsync" and len(system_calls.only("fsync")) == index else None
    )
    with pytest.raises(StorageError, match="Input/output"):
        write_files(here, images_of(image, data), "run")
    synced = system_calls.only("fsync")
    assert len(synced) == len(set(synced)) > index


@pytest.mark.parametrize("size", [10, PAGE, PART_BYTES + 1])
def test_a_refusal_of_ordinary_writes_is_an_error(
    here: Descriptor, monkeypatch: pytest.MonkeyPatch, image: Any, data: memoryview, size: int
) -> None:
    """Where the second, ordinary way is refused too, nobody tries for ever."""

    def refuse(fd: int, views: Sequence[memoryview], offset: int) -> int:
        raise failing(errno.EINVAL)

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(StorageError, match="cannot write run/a: Invalid argument"):
        write_files(here, {"a": image(data[:size])}, "run")


def test_no_room_for_a_buffer(
    here: Descriptor,
    monkeypatch: pytest.MonkeyPatch,
    image: Any,
    data: memoryview,
    left: Callable[[], tuple[int, list[str]]],
) -> None:
    """The MemoryError of a thread is the caller's."""

    def full(nbytes: int) -> memoryview:
        raise MemoryError

    monkeypatch.setattr(memory, "allocate", full)
    before = left()
    with pytest.raises(MemoryError):
        write_files(here, images_of(image, data), "run")
    assert left() == before


def test_direct_writes_refused_to_two_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Callable[..., Any]
) -> None:
    """Both are under way when the first is refused: each writes its bytes again, the ordinary way."""
    write, meeting = os.pwritev, threading.Barrier(2, timeout=60)
    seen: set[int] = set()
    again = threading.Event()

    def refuse(fd: int, views: Any, offset: int) -> int:
        if offset in seen:
            again.set()
            return write(fd, views, offset)
        seen.add(offset)
        meeting.wait()
        if offset == PART_BYTES:
            assert again.wait(60)  # the other one has given up direct writes for this file
        raise OSError(errno.EINVAL, "Invalid argument")

    data = os.urandom(2 * PART_BYTES)
    with durable.open_directory(str(tmp_path)) as directory:
        with durable.create_file(directory, "probe") as probe:
            if not direct.enable(probe):
                pytest.skip("no direct writes on this file system")
        monkeypatch.setattr(os, "pwritev", refuse)
        write_files(directory, {"a": image(data)}, "run")
    assert (tmp_path / "a").read_bytes() == data


def test_an_image_that_gives_too_little(tmp_path: Path) -> None:
    """Nothing is written that differs from what was planned."""

    class Short:
        nbytes = 10

        def read(self, begin: int, room: memoryview) -> memoryview:
            return room[:-1]

    with (
        durable.open_directory(str(tmp_path)) as directory,
        pytest.raises(ValueError, match="run/a: 10 bytes were planned at 0, 9 came"),
    ):
        write_files(directory, {"a": Short()}, "run")
