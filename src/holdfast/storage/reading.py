"""From files to tensors: each chunk is read once, checked, and its bytes are handed to whoever wants them.

Chunks are read side by side, through the page cache. Where a file is in it, nothing else comes near; where it is not, a
few such readers were at least as fast as any number that read past it (benchmarks/README.md). So there is one way.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from holdfast.format.manifest import FileRecord
from holdfast.storage import memory
from holdfast.storage.chunks import read_chunk
from holdfast.storage.store import StoredFile
from holdfast.storage.workers import default_threads, in_parallel

BUFFERS_BYTES = 48 * 2**20
"""What all readers together may take, unless a single chunk is larger."""

Sink = Callable[[int, int, int], None]
"""Takes bytes that were read: their offset in what was wanted, their address in memory, and how many they are.

Called from several threads, for different bytes, in any order. The memory is valid only during the call. It is an
address, not a view: making views would take most of the time where tensors are small.
"""


@dataclass(frozen=True, slots=True)
class Read:
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

    def chunks(self) -> Iterable[int]:
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
    files: Sequence[FileReads], *, to_the_end: bool = False, progress: Callable[[int], None] | None = None
) -> list[Damaged]:
    """Read what is wanted and hand it out, each chunk verified before any of its bytes reach a sink. Blocks.

    Args:
        files: what to read.
        to_the_end: go on after damage, to find all of it.
        progress: called with the number of bytes read since its last call, by one thread at a time.

    Returns:
        The damaged chunks, in order; without ``to_the_end`` those that were found before everybody had stopped.
    """
    transfer = _Transfer(files, to_the_end, progress)
    threads = transfer.threads()
    try:
        in_parallel(transfer.tasks(), transfer.worker, threads)
    except _StoppedError:
        pass
    finally:
        transfer.close()
    return sorted(transfer.damaged)


class _StoppedError(Exception):
    """Damage was found, and nothing else matters."""


@dataclass(slots=True)
class _Transfer:
    files: Sequence[FileReads]
    to_the_end: bool
    progress: Callable[[int], None] | None
    damaged: list[Damaged] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opened: list[StoredFile] = field(default_factory=list)

    def tasks(self) -> Iterator[tuple[FileReads, StoredFile, _Sorted, int]]:
        for file in self.files:
            chunks = file.chunks()
            if chunks:
                opened = file.open()
                self._opened.append(opened)
                ordered = _Sorted(file.reads)
                for index in chunks:
                    yield file, opened, ordered, index

    def threads(self) -> int:
        """As many as their buffers leave room for."""
        return max(1, min(default_threads(), BUFFERS_BYTES // max(1, self._buffer_bytes())))

    def _buffer_bytes(self) -> int:
        return max((min(file.record.chunk_bytes, file.record.bytes) for file in self.files), default=0)

    def worker(self) -> Callable[[tuple[FileReads, StoredFile, _Sorted, int]], None]:
        buffer = memory.allocate(self._buffer_bytes())

        def work(task: tuple[FileReads, StoredFile, _Sorted, int]) -> None:
            file, opened, ordered, index = task
            data = read_chunk(opened, file.record, index, buffer)
            if data is None:
                with self._lock:
                    self.damaged.append((file.name, index))
                if not self.to_the_end:
                    raise _StoppedError
            else:
                ordered.hand_out(index * file.record.chunk_bytes, data)
            if self.progress is not None:
                begin = index * file.record.chunk_bytes
                with self._lock:
                    self.progress(min(file.record.chunk_bytes, file.record.bytes - begin))

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
