"""From chunks to tensors."""

from __future__ import annotations

from collections.abc import Callable

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Damage
from holdfast.format.manifest import FileRecord
from holdfast.storage.scatter import Read, Span, scatter

CHUNK = 16


class Memory:
    """A stored file in memory that remembers what was read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.nbytes = len(data)
        self.read: list[int] = []

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Bytes."""
        self.read.append(offset // CHUNK)
        found = self.data[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Nothing to let go of."""


def record_of(data: bytes) -> FileRecord:
    """A record with small chunks."""
    cuts = range(0, len(data), CHUNK)
    return FileRecord(len(data), CHUNK, tuple(xxhash.xxh3_128_hexdigest(data[cut : cut + CHUNK]) for cut in cuts))


def collector(span: Span) -> tuple[Read, bytearray]:
    """A read into a buffer that starts empty; offsets must come in order and without gaps."""
    target = bytearray()

    def sink(offset: int, data: memoryview) -> None:
        assert offset == len(target)
        target.extend(data)

    return Read(span, sink), target


SPANS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60)), max_size=8)


@given(st.binary(min_size=100, max_size=100), SPANS, st.booleans())
def test_each_span_gets_its_bytes(data: bytes, places: list[tuple[int, int]], whole: bool) -> None:
    """Any spans, in any order, overlapping and the same one twice too; each chunk is read once."""
    spans = [Span(str(index), begin, min(nbytes, 100 - begin)) for index, (begin, nbytes) in enumerate(places)]
    collected = [collector(span) for span in spans]
    file = Memory(data)
    assert scatter(file, "f", record_of(data), [read for read, _ in collected], spans, whole=whole) == []
    assert [bytes(target) for _, target in collected] == [data[span.begin : span.end] for span in spans]
    needed = {
        chunk for span in spans if span.nbytes for chunk in range(span.begin // CHUNK, (span.end - 1) // CHUNK + 1)
    }
    assert file.read == (list(range(7)) if whole else sorted(needed))


def three() -> tuple[bytearray, list[Span]]:
    """A file of 64 bytes with three tensors."""
    return bytearray(range(64)), [Span("m/a", 16, 8), Span("m/b", 24, 16), Span("m/c", 40, 24)]


def fails(flip: int, wanted: Callable[[Span], bool]) -> tuple[list[Damage], dict[str, bytes]]:
    """Flip a byte, read what is wanted."""
    data, spans = three()
    record = record_of(bytes(data))
    data[flip] ^= 1
    collected = {span.label: collector(span) for span in spans if wanted(span)}
    damage = scatter(Memory(bytes(data)), "f", record, [read for read, _ in collected.values()], spans)
    return damage, {label: bytes(target) for label, (_, target) in collected.items()}


def test_damage_names_chunk_and_tensors() -> None:
    """All tensors with bytes in the chunk are named, also those that were not asked for; none of its bytes is used."""
    damage, found = fails(20, lambda span: span.label == "m/b")
    expected = Damage("f", "bytes 16 to 32 differ from what was written", chunk=1, tensors=("m/a", "m/b"))
    assert (damage, found) == ([expected], {"m/b": b""})


def test_chunks_that_nobody_wants_are_not_read() -> None:
    """Damage elsewhere does not keep a tensor from being read."""
    assert fails(60, lambda span: span.label == "m/a") == ([], {"m/a": bytes(range(16, 24))})


def test_the_whole_file_is_verified_when_asked() -> None:
    """A damaged chunk that holds no wanted tensor is found."""
    data, spans = three()
    record = record_of(bytes(data))
    data[0] ^= 1
    expected = Damage("f", "bytes 0 to 16 differ from what was written", chunk=0)
    assert scatter(Memory(bytes(data)), "f", record, [], spans, whole=True) == [expected]
    assert scatter(Memory(bytes(data)), "f", record, [], spans) == []
