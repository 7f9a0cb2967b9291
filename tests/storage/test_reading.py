"""From files to whoever wants their bytes."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.records import FileRecord
from holdfast.storage import memory, reading
from holdfast.storage.reading import FileReads, Read, read_files

RecordOf = Callable[[bytes, int], FileRecord]
CHUNK = 16
BLOCK = 4096


class Collector:
    """Takes bytes and puts them where they belong; what nobody brought stays None."""

    def __init__(self, nbytes: int) -> None:
        self.found: list[int | None] = [None] * nbytes
        self.twice = 0
        self._lock = threading.Lock()

    def __call__(self, offset: int, address: int, nbytes: int) -> None:
        """See ``Sink``."""
        data = bytes(memory.view_at(address, nbytes))
        with self._lock:
            self.twice += sum(value is not None for value in self.found[offset : offset + nbytes])
            self.found[offset : offset + nbytes] = data


class Wanted:
    """A file of the test, with what is wanted of it."""

    def __init__(self, name: str, file: Any, record: FileRecord, places: list[tuple[int, int]], whole: bool) -> None:
        size = record.bytes
        self.file = file
        self.record = record
        self.places = [(min(begin, size), min(nbytes, size - min(begin, size))) for begin, nbytes in places]
        self.sinks = [Collector(nbytes) for _, nbytes in self.places]
        reads = [Read(begin, nbytes, sink) for (begin, nbytes), sink in zip(self.places, self.sinks, strict=True)]
        self.reads = FileReads(name, file.open, record, reads, whole)
        inside = {index for begin, nbytes in self.places for index in chunks_of(begin, nbytes, record.chunk_bytes)}
        self.needed = set(range(len(record.xxh3_128))) if whole else inside

    def expected(self, data: bytes, damaged: set[int]) -> list[list[int | None]]:
        """What the sinks have to hold in the end: all but the bytes of damaged chunks."""
        values = [None if at // self.record.chunk_bytes in damaged else value for at, value in enumerate(data)]
        return [values[begin : begin + nbytes] for begin, nbytes in self.places]

    def found(self) -> list[list[int | None]]:
        """What they hold."""
        return [sink.found for sink in self.sinks]


def chunks_of(begin: int, nbytes: int, chunk_bytes: int) -> set[int]:
    """The chunks that hold some of these bytes, by definition."""
    return {at // chunk_bytes for at in range(begin, begin + nbytes)}


PLACES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60)), max_size=6)
FILE = st.tuples(st.binary(max_size=100), st.integers(1, 50), PLACES, st.booleans())


@given(files=st.lists(FILE, max_size=4))
def test_everybody_gets_their_bytes(
    stored: Any, record_of: RecordOf, files: list[tuple[bytes, int, list[tuple[int, int]], bool]]
) -> None:
    """Any reads of any files, in any order, overlapping and the same one twice too: each byte comes once."""
    wanted = [
        Wanted(str(index), stored(data), record_of(data, chunk_bytes), places, whole)
        for index, (data, chunk_bytes, places, whole) in enumerate(files)
    ]
    assert read_files([one.reads for one in wanted]) == []
    assert [one.found() for one in wanted] == [
        one.expected(data, set()) for one, (data, *_) in zip(wanted, files, strict=True)
    ]
    assert [sink.twice for one in wanted for sink in one.sinks] == [0 for one in wanted for _ in one.sinks]


@given(files=st.lists(FILE, max_size=4))
def test_each_chunk_is_read_once(
    stored: Any, record_of: RecordOf, files: list[tuple[bytes, int, list[tuple[int, int]], bool]]
) -> None:
    """Those that somebody wants, and of whole files all; a file is opened once, if at all, and closed."""
    wanted = [
        Wanted(str(index), stored(data), record_of(data, chunk_bytes), places, whole)
        for index, (data, chunk_bytes, places, whole) in enumerate(files)
    ]
    read_files([one.reads for one in wanted])
    assert [sorted(one.file.read) for one in wanted] == [
        [index * one.record.chunk_bytes for index in sorted(one.needed)] for one in wanted
    ]
    assert [(one.file.opened, one.file.closed) for one in wanted] == [
        (1, 1) if one.needed else (0, 0) for one in wanted
    ]


@pytest.mark.parametrize("inner", [(5, 5), (16, 8), (40, 1)])
def test_a_read_around_another(stored: Any, record_of: RecordOf, inner: tuple[int, int]) -> None:
    """One that ends earlier although it begins later hides nothing."""
    data = bytes(range(100))
    one = Wanted("f", stored(data), record_of(data, CHUNK), [(0, 100), inner], False)
    read_files([one.reads])
    assert one.found() == one.expected(data, set())


# What can befall the chunk at an offset of a file: the file's bytes afterwards, and what reading there raises.
DAMAGES: dict[str, Callable[[bytes, int], tuple[bytes, dict[int, OSError]]]] = {
    "changed": lambda data, at: (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], {}),
    "lost": lambda data, at: (data, {at: OSError(errno.EIO, "lost")}),
    "cut": lambda data, at: (data[:at], {}),
}


@given(
    files=st.lists(st.tuples(FILE, st.integers(0, 99), st.sampled_from(sorted(DAMAGES))), min_size=1, max_size=4),
)
def test_all_damage_is_found(stored: Any, record_of: RecordOf, files: list[Any]) -> None:
    """In order; what is intact reaches its sinks, nothing of a damaged chunk does, and all bytes are counted."""
    wanted, contents, expected = [], [], []
    for index, ((data, chunk_bytes, places, whole), place, kind) in enumerate(files):
        record = record_of(data, chunk_bytes)
        damaged: set[int] = set()
        file = stored(data)
        if data:
            first = place % len(data) // chunk_bytes
            file = stored(*DAMAGES[kind](data, first * chunk_bytes))
            damaged = set(range(first, len(record.xxh3_128))) if kind == "cut" else {first}
        one = Wanted(str(index), file, record, places, whole)
        wanted.append(one)
        contents.append(one.expected(data, damaged))
        expected += [(str(index), chunk) for chunk in sorted(damaged & one.needed)]
    counted: list[int] = []
    assert read_files([one.reads for one in wanted], to_the_end=True, progress=counted.append) == expected
    assert [one.found() for one in wanted] == contents
    assert sum(counted) == sum(
        min(one.record.chunk_bytes, one.record.bytes - chunk * one.record.chunk_bytes)
        for one in wanted
        for chunk in one.needed
    )


@given(place=st.integers(0, 99), kind=st.sampled_from(sorted(DAMAGES)))
def test_damage_is_reported_without_going_to_the_end(stored: Any, record_of: RecordOf, place: int, kind: str) -> None:
    """One damaged chunk is enough, and no byte of it reaches a sink."""
    data = bytes(range(100))
    at = place // CHUNK * CHUNK
    one = Wanted("f", stored(*DAMAGES[kind](data, at)), record_of(data, CHUNK), [(0, 100)], True)
    found = read_files([one.reads])
    possible = {("f", chunk) for chunk in range(at // CHUNK, 7 if kind == "cut" else at // CHUNK + 1)}
    assert found
    assert set(found) <= possible
    assert set(one.sinks[0].found[at : at + CHUNK]) == {None}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one buffer: chunks are read one after the other."""
    monkeypatch.setattr(reading, "BUFFERS_BYTES", 1)


@pytest.mark.usefixtures("one_thread")
def test_reading_stops_at_damage(stored: Any, record_of: RecordOf) -> None:
    """Nothing else matters then; and it is not counted as read."""
    data = bytes(range(100))
    file = stored(data[:40] + b"x" + data[41:])
    one = Wanted("f", file, record_of(data, CHUNK), [(0, 100)], False)
    counted: list[int] = []
    assert read_files([one.reads], progress=counted.append) == [("f", 2)]
    assert (file.read, counted) == ([0, 16, 32], [16, 16])


@pytest.mark.usefixtures("one_thread")
def test_files_are_read_from_front_to_back(stored: Any, record_of: RecordOf) -> None:
    """In the order of their chunks, whatever the order of the reads."""
    one = Wanted("f", stored(bytes(100)), record_of(bytes(100), CHUNK), [(90, 5), (0, 5), (40, 20)], False)
    read_files([one.reads])
    assert one.file.read == [0, 32, 48, 80]


@pytest.mark.parametrize(("room", "threads"), [(1, 1), (BLOCK, 1), (2 * BLOCK + 1, 2), (10**6, 3)])
def test_buffers_are_bounded(
    stored: Any, record_of: RecordOf, monkeypatch: pytest.MonkeyPatch, room: int, threads: int
) -> None:
    """However many chunks there are, no more readers begin than there is room for, and one always does."""
    monkeypatch.setattr(reading, "BUFFERS_BYTES", room)
    monkeypatch.setattr(reading, "default_threads", lambda: 3)
    given_out: list[int] = []

    def allocate(nbytes: int) -> memoryview:
        given_out.append(nbytes)
        return memory.allocate(nbytes)

    one = Wanted("f", stored(bytes(160)), record_of(bytes(160), CHUNK), [(0, 160)], False)
    read_files([one.reads], allocate=allocate)
    assert given_out == [BLOCK] * threads


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size are asked how they are best read."""
    monkeypatch.setattr(reading, "WORTH_CHOOSING_BYTES", 0)


@pytest.mark.usefixtures("choosing")
@pytest.mark.parametrize(
    ("places", "at_once", "expected"),
    [
        ([(0, 10 * BLOCK)], 4, [0, 4, 8]),
        ([(0, 10 * BLOCK)], 100, [0]),
        ([(0, 1), (BLOCK, 1), (3 * BLOCK, 1), (4 * BLOCK, 1)], 4, [0, 3]),
        ([(9 * BLOCK, 1), (0, 1)], 4, [0, 9]),
        ([(0, 3 * BLOCK)], 1, [0, 1, 2]),
    ],
    ids=["full", "all at once", "neighbours only", "apart", "one by one"],
)
def test_neighbours_are_read_at_once(
    stored: Any, record_of: RecordOf, places: list[tuple[int, int]], at_once: int, expected: list[int]
) -> None:
    """As many as the file asks for, and nothing that nobody wants."""
    data = random.Random(0).randbytes(10 * BLOCK - 7)
    file = stored(data, at_once=at_once * BLOCK)
    one = Wanted("f", file, record_of(data, BLOCK), places, False)
    assert read_files([one.reads]) == []
    assert sorted(file.read) == [index * BLOCK for index in expected]
    assert one.found() == one.expected(data, set())


@pytest.mark.usefixtures("choosing")
@pytest.mark.parametrize("kind", ["changed", "lost", "cut"])
@pytest.mark.parametrize("chunk", [0, 3, 9])
def test_damage_among_neighbours(stored: Any, record_of: RecordOf, kind: str, chunk: int) -> None:
    """The chunks read together with a damaged one are intact, and are handed out; all of them are counted."""
    data = random.Random(0).randbytes(10 * BLOCK - 7)
    file = stored(*DAMAGES[kind](data, chunk * BLOCK), at_once=4 * BLOCK)
    one = Wanted("f", file, record_of(data, BLOCK), [(0, len(data))], False)
    damaged = set(range(chunk, 10)) if kind == "cut" else {chunk}
    counted: list[int] = []
    found = read_files([one.reads], to_the_end=True, progress=counted.append)
    assert found == [("f", index) for index in sorted(damaged)]
    assert one.found() == one.expected(data, damaged)
    assert sum(counted) == len(data)


@pytest.mark.usefixtures("choosing")
def test_buffers_are_what_direct_reads_take(stored: Any, record_of: RecordOf) -> None:
    """Aligned, and with room for whole blocks: the file's last one may not be full."""
    rooms: list[tuple[int, int]] = []

    class Watched(stored):  # type: ignore[misc]
        def read_into(self, offset: int, buffer: memoryview) -> int:
            rooms.append((memory.address_of(buffer) % BLOCK, len(buffer)))
            return int(super().read_into(offset, buffer))

    data = bytes(3 * BLOCK - 7)
    read_files([FileReads("f", Watched(data, at_once=2 * BLOCK).open, record_of(data, BLOCK), (), True)])
    assert sorted(rooms) == [(0, BLOCK), (0, 2 * BLOCK)]


def test_small_files_are_not_looked_at(stored: Any, record_of: RecordOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding out how to read them best would take longer than reading them."""
    monkeypatch.setattr(stored, "choose_way", boom)
    data = bytes(10 * BLOCK)
    assert read_files([FileReads("f", stored(data).open, record_of(data, BLOCK), (), True)]) == []


def test_chunks_are_read_side_by_side(stored: Any, record_of: RecordOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three readers are in three sinks at the same time: each waits there for the others."""
    monkeypatch.setattr(reading, "default_threads", lambda: 3)
    meeting = threading.Barrier(3, timeout=60)
    reads = [Read(begin, 1, lambda offset, address, nbytes: meeting.wait()) for begin in (0, 16, 32)]
    assert read_files([FileReads("f", stored(bytes(48)).open, record_of(bytes(48), CHUNK), reads)]) == []


class BoomError(Exception):
    """What a caller's own function raises."""


def boom(*args: object) -> None:
    """Raise."""
    raise BoomError


@pytest.mark.parametrize("to_the_end", [False, True])
def test_other_errors_of_a_file_are_raised(stored: Any, record_of: RecordOf, to_the_end: bool) -> None:
    """A file that may not be read is not damaged; all files are closed."""
    error = PermissionError(errno.EACCES, "no")
    files = [stored(bytes(50)), stored(bytes(50), {16: error})]
    with pytest.raises(PermissionError) as caught:
        read_files(
            [FileReads("f", file.open, record_of(bytes(50), CHUNK), (), True) for file in files], to_the_end=to_the_end
        )
    assert caught.value is error
    assert [(file.opened, file.closed) for file in files] == [(1, 1), (1, 1)]


def test_a_failing_sink(stored: Any, record_of: RecordOf) -> None:
    """Its exception is raised, and the file is closed."""
    file = stored(bytes(50))
    with pytest.raises(BoomError):
        read_files([FileReads("f", file.open, record_of(bytes(50), CHUNK), [Read(0, 50, boom)])])
    assert file.closed == 1


def test_a_failing_progress(stored: Any, record_of: RecordOf) -> None:
    """The way for a caller to stop a long verification."""
    file = stored(bytes(50))
    with pytest.raises(BoomError):
        read_files([FileReads("f", file.open, record_of(bytes(50), CHUNK), (), True)], progress=boom)
    assert file.closed == 1


def test_a_file_that_cannot_be_opened(stored: Any, record_of: RecordOf) -> None:
    """The error is raised, and those that were opened before it are closed."""
    file = stored(bytes(50))
    files = [FileReads("f", opens, record_of(bytes(50), CHUNK), (), True) for opens in (file.open, boom)]
    with pytest.raises(BoomError):
        read_files(files)
    assert file.closed == file.opened


def test_nothing_to_read() -> None:
    """No files, no damage."""
    assert read_files([]) == []
