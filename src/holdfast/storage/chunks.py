"""A file as chunks with a checksum each: what a chunk is, and how one is read and checked."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

import xxhash

from holdfast.format.manifest import FileRecord
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


def read_chunk(file: StoredFile, record: FileRecord, index: int, buffer: memoryview) -> memoryview | None:
    """Read one chunk into ``buffer`` and check it; its bytes, or None where they are damaged."""
    begin = index * record.chunk_bytes
    chunk = buffer[: min(record.chunk_bytes, record.bytes - begin)]
    try:
        if file.read_into(begin, chunk) != len(chunk):
            return None
    except OSError as error:
        if error.errno in _LOST:
            return None
        raise
    return chunk if digest(chunk) == record.xxh3_128[index] else None
