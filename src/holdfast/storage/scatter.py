"""From chunks to tensors: each chunk is read once, checked, and its bytes are handed to whoever wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.errors import Damage
from holdfast.format.manifest import FileRecord
from holdfast.storage.chunks import read_chunks
from holdfast.storage.store import StoredFile

Sink = Callable[[int, memoryview], None]
"""Takes the next bytes of a piece and their offset in it, in order; the view is valid only during the call."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that belong to one piece of a tensor."""

    label: str
    begin: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.begin + self.nbytes


@dataclass(frozen=True, slots=True)
class Read:
    """A span to be read, and where its bytes go."""

    span: Span
    sink: Sink


def scatter(
    file: StoredFile,
    name: str,
    record: FileRecord,
    reads: Sequence[Read],
    spans: Sequence[Span],
    *,
    whole: bool = False,
) -> list[Damage]:
    """Read ``reads`` from ``file`` and hand out their bytes; stops at the first damaged chunk and returns what it is.

    Args:
        file: the open file.
        name: its name, for what is returned.
        record: its checksums.
        reads: what to read, in any order.
        spans: all spans of the file, to name what lies in a damaged chunk.
        whole: read the chunks too that hold none of it, to verify them.
    """
    ordered = sorted((read for read in reads if read.span.nbytes), key=lambda read: read.span.begin)
    wanted: Sequence[int] = range(len(record.xxh3_128))
    if not whole:
        wanted = sorted({chunk for read in ordered for chunk in _chunks_of(read.span, record)})
    active = 0
    for index, data in read_chunks(file, record, wanted):
        if data is None:
            return [damaged_chunk(name, record, index, spans)]
        begin = index * record.chunk_bytes
        end = begin + len(data)
        while active < len(ordered) and ordered[active].span.end <= begin:
            active += 1
        for read in _overlapping(ordered, active, end):
            start = max(read.span.begin, begin)
            stop = min(read.span.end, end)
            if start < stop:
                read.sink(start - read.span.begin, data[start - begin : stop - begin])
    return []


def damaged_chunk(name: str, record: FileRecord, index: int, spans: Sequence[Span]) -> Damage:
    """What to say of a chunk whose bytes are not those that were written."""
    begin = index * record.chunk_bytes
    end = min(begin + record.chunk_bytes, record.bytes)
    tensors = tuple(span.label for span in spans if span.begin < end and span.end > begin)
    return Damage(name, f"bytes {begin} to {end} differ from what was written", chunk=index, tensors=tensors)


def _chunks_of(span: Span, record: FileRecord) -> range:
    return range(span.begin // record.chunk_bytes, (span.end - 1) // record.chunk_bytes + 1)


def _overlapping(ordered: Sequence[Read], start: int, end: int) -> Sequence[Read]:
    stop = start
    while stop < len(ordered) and ordered[stop].span.begin < end:
        stop += 1
    return ordered[start:stop]
