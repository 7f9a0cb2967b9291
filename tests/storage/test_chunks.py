"""Chunks and their checksums."""

from __future__ import annotations

import errno

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.manifest import FileRecord
from holdfast.storage import chunks
from holdfast.storage.chunks import ChunkHasher, gathered, read_chunks

BLOCKS = st.lists(st.binary(max_size=40), max_size=10)


class Memory:
    """A stored file in memory."""

    def __init__(self, data: bytes, error: OSError | None = None) -> None:
        self.data = data
        self.nbytes = len(data)
        self.error = error

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Bytes, or the error."""
        if self.error is not None:
            raise self.error
        found = self.data[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Nothing to let go of."""


def record_of(data: bytes, chunk_bytes: int) -> FileRecord:
    """The record by definition: one checksum for each chunk."""
    cuts = range(0, len(data), chunk_bytes)
    return FileRecord(
        bytes=len(data),
        chunk_bytes=chunk_bytes,
        xxh3_128=tuple(xxhash.xxh3_128_hexdigest(data[cut : cut + chunk_bytes]) for cut in cuts),
    )


@given(BLOCKS, st.integers(1, 50))
def test_the_hasher_sees_only_bytes(blocks: list[bytes], chunk_bytes: int) -> None:
    """However a stream is cut into blocks, its record is that of its bytes."""
    hasher = ChunkHasher(chunk_bytes)
    for block in blocks:
        hasher.update(memoryview(block))
    assert hasher.record() == record_of(b"".join(blocks), chunk_bytes)


@given(BLOCKS)
def test_gathering_keeps_the_bytes(blocks: list[bytes]) -> None:
    """Joined or not, the bytes are the same and in order, with small blocks joined."""
    before = chunks.GATHER_BYTES
    chunks.GATHER_BYTES = 32
    try:
        views = [bytes(view) for view in gathered(blocks)]
    finally:
        chunks.GATHER_BYTES = before
    assert b"".join(views) == b"".join(blocks)
    assert all(views)
    assert all(len(view) <= 32 or view in blocks for view in views)


def test_large_blocks_are_not_copied() -> None:
    """A large block is passed on as it is."""
    block = bytearray(chunks.GATHER_BYTES)
    (view,) = gathered([memoryview(block)])
    assert view.obj is block


@given(st.binary(min_size=1, max_size=100), st.integers(1, 40))
def test_intact_chunks_are_read(data: bytes, chunk_bytes: int) -> None:
    """Each wanted chunk comes with its index and bytes."""
    record = record_of(data, chunk_bytes)
    found = [
        (index, bytes(view)) for index, view in read_chunks(Memory(data), record, range(len(record.xxh3_128))) if view
    ]
    assert found == [(cut // chunk_bytes, data[cut : cut + chunk_bytes]) for cut in range(0, len(data), chunk_bytes)]


@given(st.binary(min_size=1, max_size=60), st.data())
def test_any_changed_byte_is_found(data: bytes, draw: st.DataObject) -> None:
    """The chunk with the changed byte is None, the others are intact."""
    place = draw.draw(st.integers(0, len(data) - 1))
    value = draw.draw(st.integers(0, 255).filter(lambda value: value != data[place]))
    changed = data[:place] + bytes([value]) + data[place + 1 :]
    record = record_of(data, 16)
    damaged = [
        index for index, view in read_chunks(Memory(changed), record, range(len(record.xxh3_128))) if view is None
    ]
    assert damaged == [place // 16]


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_file_cut_short_is_found(data: bytes, draw: st.DataObject) -> None:
    """Whatever is missing at the end, the first chunk that is not whole is the first that is None."""
    length = draw.draw(st.integers(0, len(data) - 1))
    record = record_of(data, 16)
    short = [
        index for index, view in read_chunks(Memory(data[:length]), record, range(len(record.xxh3_128))) if view is None
    ]
    assert short == list(range(length // 16, len(record.xxh3_128)))


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG])
def test_a_lost_sector_is_damage(code: int) -> None:
    """What a disk cannot read back is damaged, so that a run resumes from the checkpoint before."""
    record = record_of(b"abc", 16)
    assert list(read_chunks(Memory(b"abc", OSError(code, "lost")), record, [0])) == [(0, None)]


def test_other_errors_are_not_damage() -> None:
    """A file that may not be read may be intact."""
    with pytest.raises(PermissionError):
        list(read_chunks(Memory(b"abc", PermissionError(errno.EACCES, "no")), record_of(b"abc", 16), [0]))
