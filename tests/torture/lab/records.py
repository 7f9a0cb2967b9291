"""What a disk was asked for, as it is kept in a file: writes and flushes, in order."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096
HEAD = struct.Struct("=qq")
"""Before the bytes that were written: their offset and their number; -1 and 0 for a flush."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that were to be written."""

    offset: int
    data: bytes


Record = Write | None
"""A write, or a flush."""


def append(log: int, record: Record) -> None:
    """To the open file."""
    if record is None:
        os.write(log, HEAD.pack(-1, 0))
    else:
        os.writev(log, [HEAD.pack(record.offset, len(record.data)), record.data])


def read(log: Path) -> Iterator[Record]:
    """All that is in the file."""
    with log.open("rb") as file:
        while head := file.read(HEAD.size):
            offset, nbytes = HEAD.unpack(head)
            yield None if offset < 0 else Write(offset, file.read(nbytes))


def contents(image: Path) -> Iterator[Write]:
    """The blocks of a disk that are not zero."""
    zeros = bytes(BLOCK_BYTES)
    with image.open("rb") as file:
        offset = 0
        while True:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA) // BLOCK_BYTES * BLOCK_BYTES
            except OSError:  # there is no more
                return
            block = os.pread(file.fileno(), BLOCK_BYTES, offset)
            if block != zeros[: len(block)]:
                yield Write(offset, block)
            offset += BLOCK_BYTES
