"""Chunks and their checksums."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.records import FileRecord
from holdfast.storage.chunks import digest, digest_of, read_chunks

RecordOf = Callable[[bytes, int], FileRecord]


def read_all(file: Any, record: FileRecord, at_once: int = 1) -> list[bytes | None]:
    """Every chunk, so many at once, through one buffer that is a little larger than they are."""
    count = len(record.xxh3_128)
    room = memoryview(bytearray(at_once * record.chunk_bytes + 3))
    runs = [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    views = [view and bytes(view) for run in runs for view in read_chunks(file, record, run, room)]
    assert len(views) == count
    return views


def test_the_checksum_is_the_one_of_the_format() -> None:
    """xxh3_128 as hex: the value for no bytes is the one in the specification of xxHash."""
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"


@given(st.lists(st.binary(max_size=300)))
def test_the_checksum_of_parts(parts: list[bytes]) -> None:
    """Is that of all bytes, however they are cut."""
    assert digest_of(map(memoryview, parts)) == digest(b"".join(parts))


AT_ONCE = st.integers(1, 5)


@given(st.binary(min_size=1, max_size=100), st.integers(1, 40), AT_ONCE)
def test_intact_chunks_are_read(stored: Any, record_of: RecordOf, data: bytes, chunk_bytes: int, at_once: int) -> None:
    """Each chunk gives its bytes, the last one too, which may be shorter; with one read for all that are neighbours."""
    file = stored(data)
    cuts = range(0, len(data), chunk_bytes)
    assert read_all(file, record_of(data, chunk_bytes), at_once) == [data[cut : cut + chunk_bytes] for cut in cuts]
    assert file.read == list(cuts[::at_once])


@given(st.binary(min_size=1, max_size=60), AT_ONCE, st.data())
def test_any_changed_byte_is_found(
    stored: Any, record_of: RecordOf, data: bytes, at_once: int, draw: st.DataObject
) -> None:
    """The chunk with the changed byte is None, the others are intact."""
    place = draw.draw(st.integers(0, len(data) - 1))
    value = draw.draw(st.integers(0, 255).filter(lambda value: value != data[place]))
    changed = data[:place] + bytes([value]) + data[place + 1 :]
    expected = [None if cut == place // 16 * 16 else data[cut : cut + 16] for cut in range(0, len(data), 16)]
    assert read_all(stored(changed), record_of(data, 16), at_once) == expected


@given(st.binary(min_size=1, max_size=60), AT_ONCE, st.data())
def test_a_file_cut_short_is_found(
    stored: Any, record_of: RecordOf, data: bytes, at_once: int, draw: st.DataObject
) -> None:
    """Whatever is missing at the end, the first chunk that is not whole is the first that is None."""
    length = draw.draw(st.integers(0, len(data) - 1))
    found = read_all(stored(data[:length]), record_of(data, 16), at_once)
    assert found == [data[cut : cut + 16] if cut + 16 <= length else None for cut in range(0, len(data), 16)]


def test_a_file_that_ends_in_what_was_there_before(stored: Any, record_of: RecordOf) -> None:
    """A chunk that is cut short is damaged even where the buffer still holds the bytes that are missing."""
    room = memoryview(bytearray(b"abcd"))
    assert list(read_chunks(stored(b"ab"), record_of(b"abcd", 16), range(1), room)) == [None]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
def test_a_lost_sector_is_damage(stored: Any, record_of: RecordOf, code: int) -> None:
    """What a disk cannot read back is damaged, so that a run resumes from the checkpoint before."""
    assert read_all(stored(b"abc", {0: OSError(code, "lost")}), record_of(b"abc", 16)) == [None]


@pytest.mark.parametrize("place", range(0, 64, 9))
def test_a_lost_sector_among_neighbours(stored: Any, record_of: RecordOf, place: int) -> None:
    """Chunks that were to be read at once are read one by one, so that only the one that is lost is damaged."""
    data = bytes(range(64))
    file = stored(data, {place: OSError(errno.EIO, "lost")}, at_once=64)
    found = list(read_chunks(file, record_of(data, 16), range(4), memoryview(bytearray(64))))
    cuts = range(0, 64, 16)
    assert [view is None for view in found] == [cut <= place < cut + 16 for cut in cuts]


def test_other_errors_are_not_damage(stored: Any, record_of: RecordOf) -> None:
    """A file that may not be read may be intact."""
    file = stored(b"abc", {0: PermissionError(errno.EACCES, "no")})
    with pytest.raises(PermissionError):
        read_all(file, record_of(b"abc", 16))
