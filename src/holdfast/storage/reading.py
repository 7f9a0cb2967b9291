"""From files to tensors: each chunk is read once, checked, and its bytes are handed to whoever wants them.

Chunks are read side by side: through the page cache where the file is in it, in large reads past it where it is not.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from holdfast.format.records import FileRecord
from holdfast.storage import memory
from holdfast.storage.chunks import read_chunks
from holdfast.storage.store import StoredFile
from holdfast.storage.workers import default_threads, in_parallel

MAX_OPEN_FILES = 64
BUFFERS_BYTES = 48 * 2**20
"""What all readers together may take, unless a single chunk is larger."""
MAX_DAMAGED = 10_000
"""After so many damaged chunks nobody needs to know of more."""
WORTH_CHOOSING_BYTES = 8 * 2**20
"""For less than this it is not looked at how to read a file best."""
_BLOCK_BYTES = 4096

Sink = Callable[[int, int, int], None]
"""Takes bytes that were read: their offset in what was wanted, their address in memory, and how many they are.

Called from several threads, for different bytes, in any order. The memory is valid only during the call. It is an
address, not a view: making views would take most of the time where tensors are small.
"""


class Read(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a file that somebody wants, and what takes them."""

    begin: int
    nbytes: int
    sink: Sink


@dataclass(frozen=True, slots=True)
class FileReads:
    """What to read of one file.

    Attributes:
        name: the file's name, for what is returned.
        open: opens it; it is called at most once, and what it gives is closed again.
        record: its checksums.
        reads: what is wanted of it, in any order.
        whole: check the chunks too that hold none of it.
    """

    name: str
    open: Callable[[], StoredFile]
    record: FileRecord
    reads: Sequence[Read]
    whole: bool = False

    def chunks(self) -> Sequence[int]:
        """The chunks to read, in order."""
        if self.whole:
            return range(len(self.record.xxh3_128))
        size = self.record.chunk_bytes
        wanted: set[int] = set()
        for read in self.reads:
            if read.nbytes:
                wanted.update(range(read.begin // size, (read.begin + read.nbytes - 1) // size + 1))
        return sorted(wanted)


Damaged = tuple[str, int]
"""A file's name, and the index of a chunk of it that is not what was written."""


def read_files(
    files: Sequence[FileReads],
    *,
    to_the_end: bool = False,
    progress: Callable[[int], None] | None = None,
    allocate: Callable[[int], memoryview] = memory.allocate,
) -> list[Damaged]:
    """Read what is wanted and hand it out, each chunk verified before any of its bytes reach a sink. Blocks.

    Args:
        files: what to read.
        to_the_end: go on after damage, to find all of it; no more of it than MAX_DAMAGED.
        progress: called with the number of bytes read since its last call, by one thread at a time.
        allocate: makes the buffers, which sinks get their bytes from.

    Returns:
        The damaged chunks, in order; without ``to_the_end`` those that were found before everybody had stopped.
    """
    damaged: list[Damaged] = []
    for first in range(0, len(files), MAX_OPEN_FILES):
        damaged += _read_together(_Transfer(files[first : first + MAX_OPEN_FILES], to_the_end, progress, allocate))
        if damaged and (not to_the_end or len(damaged) >= MAX_DAMAGED):
            break
    return sorted(damaged)


def _read_together(transfer: _Transfer) -> list[Damaged]:
    try:
        batches = transfer.batches()
        largest = max((batch.room_bytes for batch in batches), default=0)
        tasks = (task for batch in batches for task in batch.tasks())
        count = sum(len(batch.chunks) for batch in batches)
        in_parallel(tasks, lambda: transfer.worker(largest), transfer.threads(largest), count)
    except _StoppedError:
        pass
    finally:
        transfer.close()
    return transfer.damaged


class _StoppedError(Exception):
    """Damage was found, and nothing else matters."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is read of one file, up to ``most`` neighbouring chunks at once."""

    file: FileReads
    opened: StoredFile
    ordered: _Sorted
    chunks: Sequence[int]
    most: int

    @property
    def room_bytes(self) -> int:
        """What as many chunks take in a buffer, to the end of the last block."""
        record = self.file.record
        return _in_blocks(min(min(self.most, len(self.chunks)) * record.chunk_bytes, record.bytes))

    def tasks(self) -> Iterator[_Task]:
        """Its chunks in order."""
        return (_Task(self, run) for run in _runs(self.chunks, self.most))


class _Task(msgspec.Struct, frozen=True, gc=False):
    """Neighbouring chunks of a file, read at once."""

    batch: _Batch
    chunks: range

    @property
    def room_bytes(self) -> int:
        """What they take in a buffer, to the end of the last block."""
        record = self.batch.file.record
        return _in_blocks(
            min(self.chunks.stop * record.chunk_bytes, record.bytes) - self.chunks.start * record.chunk_bytes
        )


def _in_blocks(nbytes: int) -> int:
    return -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _runs(chunks: Iterable[int], most: int) -> Iterator[range]:
    """Neighbours of ascending ``chunks`` together, up to ``most`` of them."""
    start = stop = -1
    for index in chunks:
        if index == stop and stop - start < most:
            stop += 1
            continue
        if stop > start:
            yield range(start, stop)
        start, stop = index, index + 1
    if stop > start:
        yield range(start, stop)


@dataclass(slots=True)
class _Transfer:
    files: Sequence[FileReads]
    to_the_end: bool
    progress: Callable[[int], None] | None
    allocate: Callable[[int], memoryview]
    damaged: list[Damaged] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opened: list[StoredFile] = field(default_factory=list)

    def batches(self) -> list[_Batch]:
        """Everything to do, in the order of the files; opens them."""
        batches = []
        for file in self.files:
            chunks = file.chunks()
            if not chunks:
                continue
            opened = file.open()
            self._opened.append(opened)
            wanted_bytes = len(chunks) * file.record.chunk_bytes
            at_once_bytes = opened.choose_way() if wanted_bytes >= WORTH_CHOOSING_BYTES else 1
            most = max(1, at_once_bytes // file.record.chunk_bytes)
            batches.append(_Batch(file, opened, _Sorted(file.reads), chunks, most))
        return batches

    def threads(self, largest: int) -> int:
        """As many as their buffers leave room for."""
        return max(1, min(default_threads(), BUFFERS_BYTES // max(largest, 1)))

    def worker(self, room_bytes: int) -> Callable[[_Task], None]:
        """What does tasks, in a buffer of its own."""
        buffer = self.allocate(room_bytes)

        def work(task: _Task) -> None:
            batch = task.batch
            record = batch.file.record
            size = record.chunk_bytes
            found = read_chunks(batch.opened, record, task.chunks, buffer[: task.room_bytes])
            for index, data in zip(task.chunks, found, strict=True):
                if data is None:
                    with self._lock:
                        self.damaged.append((batch.file.name, index))
                    if not self.to_the_end or len(self.damaged) >= MAX_DAMAGED:
                        raise _StoppedError
                else:
                    batch.ordered.hand_out(index * size, data)
                if self.progress is not None:
                    with self._lock:
                        self.progress(min(size, record.bytes - index * size))

        return work

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


class _Sorted:
    """The reads of a file by where they begin."""

    def __init__(self, reads: Iterable[Read]) -> None:
        self._reads = sorted((read for read in reads if read.nbytes), key=lambda read: read.begin)
        self._begins = [read.begin for read in self._reads]
        self._ends = list(accumulate((read.begin + read.nbytes for read in self._reads), max))

    def hand_out(self, begin: int, data: memoryview) -> None:
        """Give ``data``, which starts at ``begin``, to all that want some of it."""
        end = begin + len(data)
        address = memory.address_of(data)
        first = bisect.bisect_right(self._ends, begin)
        for read in self._reads[first : bisect.bisect_left(self._begins, end)]:
            start = max(read.begin, begin)
            stop = min(read.begin + read.nbytes, end)
            if start < stop:
                read.sink(start - read.begin, address + start - begin, stop - start)
