"""What tensors a training has and how they are cut over its processes, as far as all have to know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import xxhash

from holdfast.state.capture import CapturedEntry
from holdfast.state.sharding import Box, Placement, Sharding, merged_owners

Cells = tuple[tuple[int, ...] | None, tuple[tuple[int, ...], ...]]
"""The shape of a cell, None where cells are not alike; and for each cell the ranks that hold it."""


class Way(msgspec.Struct, frozen=True, array_like=True):
    """A way in which tensors are cut: over which ranks, in which mesh, and what along each of its dimensions."""

    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[tuple[int, int], ...]

    def of(self, shape: tuple[int, ...]) -> Sharding:
        """A tensor of ``shape`` cut like this."""
        return Sharding(
            shape, self.mesh_shape, self.ranks, tuple(Placement(*placement) for placement in self.placements)
        )


class Structure:
    """Everything that a plan depends on: names, shapes, and the ways in which tensors are cut.

    Processes may know one tensor by different meshes, of which each sees its own: where FSDP2 cuts what tensor
    parallelism leaves whole, there is a mesh for each rank of the latter. So ranks are left out of what is compared.

    Args:
        captured: without what is kept for each process.
    """

    def __init__(self, captured: Mapping[str, CapturedEntry]) -> None:
        self.ways: list[Way] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        self.items = [
            (
                entry,
                [
                    (item.name, item.shape, item.dtype, item.memory_format, item.frozen, self.number(item.sharding))
                    for item in content.tensors.values()
                ],
                content.aliases,
            )
            for entry, content in captured.items()
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.items == other.items and self.ways == other.ways

    __hash__ = None  # type: ignore[assignment]

    def number(self, sharding: Sharding | None) -> int | None:
        """The number of the way in which a tensor is cut: of 20,000 tensors most are cut in one of a few."""
        if sharding is None:
            return None
        # The tuples of ranks may be long. There are few of them, and tensors share them.
        seen = (sharding.mesh_shape, id(sharding.ranks), sharding.placements)
        if seen not in self._numbers:
            placements = tuple((placement.dim, placement.split_factor) for placement in sharding.placements)
            way = Way(sharding.mesh_shape, sharding.ranks, placements)
            if way not in self.ways:
                self.ways.append(way)
            self._numbers[seen] = self.ways.index(way)
        return self._numbers[seen]

    def digest(self) -> str:
        """A checksum, the same in all processes where it is the same but for the ranks."""
        ways = [(way.mesh_shape, way.placements) for way in self.ways]
        return xxhash.xxh3_128_hexdigest(repr((self.items, ways)).encode())


class Cuts:
    """Who holds what of each tensor, as all processes know it together.

    Args:
        structure: of this process.
        known: the ways of all processes, by their numbers; each different list once.
    """

    def __init__(self, structure: Structure, known: Sequence[Sequence[Way]]) -> None:
        self._structure = structure
        self._known = known
        self._cells: dict[int, tuple[Sharding, Cells]] = {}

    def cells(self, sharding: Sharding) -> Cells:
        """The cells of a tensor that this process knows by ``sharding``."""
        found = self._cells.get(id(sharding))
        if found is None:
            cell = sharding.cells
            found = sharding, (cell, () if cell is None else merged_owners(self._everybodys(sharding)))
            self._cells[id(sharding)] = found
        return found[1]

    def boxes(self, sharding: Sharding) -> dict[Box, list[int]]:
        """The boxes in which a tensor lies, each with the ranks that hold it."""
        holders: dict[Box, set[int]] = {}
        for other in self._everybodys(sharding):
            for rank in other.ranks:
                box = other.box(rank)
                if box is not None and 0 not in box[1]:
                    holders.setdefault(box, set()).add(rank)
        return {box: sorted(ranks) for box, ranks in sorted(holders.items())}

    def _everybodys(self, sharding: Sharding) -> list[Sharding]:
        number = self._structure.number(sharding)
        assert number is not None
        ways = dict.fromkeys(ways[number] for ways in self._known)
        return [sharding] if len(ways) == 1 else [way.of(sharding.shape) for way in ways]
