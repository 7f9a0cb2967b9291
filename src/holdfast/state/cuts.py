"""How one dimension of a tensor is cut into ranges: the arithmetic of ``torch.chunk``, once or several times over."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

_KEPT_CUTS = 4096  # of dimensions; a model has a few dozen


class Cut(NamedTuple):
    """How one dimension is cut: the range of each coordinate of the mesh's dimensions that cut it, in row-major order.

    Attributes:
        parts: begin and end of each.
        cell: the size of a cell; None when the cut is not regular.
        places: which cell each part is; -1 for none.
    """

    parts: tuple[tuple[int, int], ...]
    cell: int | None
    places: tuple[int, ...]


@functools.lru_cache(_KEPT_CUTS)
def cut_of(size: int, steps: tuple[tuple[int, int], ...]) -> Cut | None:
    """Cut a dimension of ``size`` in steps of (number of parts, split factor); None where a part has several ranges."""
    parts = []
    for ranges in _steps([(0, size)] if size else [], steps):
        joined = _joined(ranges)
        if len(joined) > 1:
            return None
        parts.append(joined[0] if joined else (size, size))
    begins = sorted({part for part in parts if part[0] < part[1]})
    cell = begins[0][1] if begins else 1
    expected = [(begin, min(begin + cell, size)) for begin in range(0, size, cell)]
    if begins != expected:
        return Cut(tuple(parts), None, ())
    return Cut(tuple(parts), cell, tuple(begin // cell if begin < end else -1 for begin, end in parts))


def _steps(ranges: list[tuple[int, int]], steps: tuple[tuple[int, int], ...]) -> Iterator[list[tuple[int, int]]]:
    """The ranges of each coordinate, the last step's index running fastest."""
    if not steps:
        yield ranges
        return
    count, split_factor = steps[0]
    firsts = [_chunk(ranges, split_factor, first) for first in range(split_factor)] if split_factor > 1 else [ranges]
    for index in range(count):
        yield from _steps([piece for first in firsts for piece in _chunk(first, count, index)], steps[1:])


def _chunk(ranges: list[tuple[int, int]], count: int, index: int) -> list[tuple[int, int]]:
    """Chunk ``index`` of ``count``, as ``torch.chunk`` cuts what lies in some ranges, one after the other."""
    length = sum(end - begin for begin, end in ranges)
    size = -(-length // count)
    low, high = min(size * index, length), min(size * (index + 1), length)
    found = []
    at = 0
    for begin, end in ranges:
        first, last = max(low, at), min(high, at + end - begin)
        if first < last:
            found.append((begin + first - at, begin + last - at))
        at += end - begin
    return found


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
