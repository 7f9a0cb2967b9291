"""A file as chunks with a checksum each: the one loop that writes them and the one that reads them."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from holdfast.format.manifest import CHUNK_BYTES, FileRecord
from holdfast.storage.store import StoredFile

GATHER_BYTES = 2**20
_LOST = frozenset({errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)})
"""What a disk or file system says of bytes that it cannot give back: these are damaged, others may be intact."""


class ChunkHasher:
    """The checksums of the chunks of a stream of bytes."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._room = chunk_bytes
        self._hash = xxhash.xxh3_128()
        self._done: list[str] = []
        self._nbytes = 0

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        self._nbytes += len(data)
        while len(data) >= self._room:
            self._hash.update(data[: self._room])
            data = data[self._room :]
            self._finish_chunk()
        if len(data):
            self._hash.update(data)
            self._room -= len(data)

    def record(self) -> FileRecord:
        """The record of all that was taken."""
        if self._room < self._chunk_bytes:
            self._finish_chunk()
        return FileRecord(bytes=self._nbytes, chunk_bytes=self._chunk_bytes, xxh3_128=tuple(self._done))

    def _finish_chunk(self) -> None:
        self._done.append(self._hash.hexdigest())
        self._hash = xxhash.xxh3_128()
        self._room = self._chunk_bytes


def gathered(blocks: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    """``blocks`` with the small ones joined, so that ten thousand small tensors are not ten thousand system calls.

    A view that was yielded is valid until the next one is asked for.
    """
    pending = bytearray()
    for block in blocks:
        if pending and len(pending) + len(block) > GATHER_BYTES:
            yield memoryview(pending)
            pending = bytearray()
        if len(block) >= GATHER_BYTES // 4:
            if pending:
                yield memoryview(pending)
                pending = bytearray()
            yield memoryview(block)
        else:
            pending += block
    if pending:
        yield memoryview(pending)


def read_chunks(file: StoredFile, record: FileRecord, wanted: Iterable[int]) -> Iterator[tuple[int, memoryview | None]]:
    """Read chunks and check them: yields each index of ``wanted`` with its bytes, or None where they are damaged.

    The bytes are valid until the next chunk is asked for; only one chunk is in memory at a time.
    """
    buffer = memoryview(bytearray(min(record.chunk_bytes, max(record.bytes, 1))))
    for index in wanted:
        begin = index * record.chunk_bytes
        chunk = buffer[: min(record.chunk_bytes, record.bytes - begin)]
        intact = _read_fully(file, begin, chunk) and digest(chunk) == record.xxh3_128[index]
        yield index, chunk if intact else None


def _read_fully(file: StoredFile, begin: int, chunk: memoryview) -> bool:
    try:
        return file.read_into(begin, chunk) == len(chunk)
    except OSError as error:
        if error.errno in _LOST:
            return False
        raise


def digest(data: Any) -> str:
    """The xxh3_128 of ``data``, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)
