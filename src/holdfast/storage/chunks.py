"""A file as chunks with a checksum each: what a chunk is, and how one is read and checked."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from holdfast.format.records import FileRecord
from holdfast.storage.store import StoredFile

_LOST = frozenset({errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)})
"""What a disk or file system says of bytes that it cannot give back: these are damaged, others may be intact."""


def digest(data: Any) -> str:
    """The xxh3_128 of ``data``, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of(parts: Iterable[memoryview]) -> str:
    """The same of several parts, one after the other."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def read_chunks(file: StoredFile, record: FileRecord, chunks: range, room: memoryview) -> Iterator[memoryview | None]:
    """Read neighbouring chunks into ``room`` at once, and check each; its bytes, or None where they are damaged.

    Args:
        file: where from.
        record: what they have to be.
        chunks: their indexes, one after the other.
        room: takes their bytes; where the file is read past the page cache, rounded up to a multiple of 4096.
    """
    begin = chunks.start * record.chunk_bytes
    try:
        count = file.read_into(begin, room)
    except OSError as error:
        if error.errno not in _LOST:
            raise
        if len(chunks) > 1:  # which of them is it?
            for index in chunks:
                yield from read_chunks(file, record, range(index, index + 1), room[: record.chunk_bytes])
            return
        count = 0
    for index in chunks:
        start = index * record.chunk_bytes - begin
        stop = start + min(record.chunk_bytes, record.bytes - begin - start)
        chunk = room[start:stop]
        yield chunk if stop <= count and digest(chunk) == record.xxh3_128[index] else None
