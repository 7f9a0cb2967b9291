"""Tensors of which each process holds a part: PyTorch's DTensor, as FSDP2 and tensor parallelism use it.

How a tensor is cut is arithmetic on shapes, meshes and placements, which :class:`Sharding` holds as plain values: any
rank can say what every other one holds, without a message. It is the arithmetic of torch's
``torch.distributed.tensor._utils._compute_local_shape_and_global_offset``, for all ranks at once.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from holdfast.errors import UnsupportedValueError
from holdfast.state.cuts import Cut, cut_of

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins in the whole, and its shape."""

_KEPT_OWNERS = 1024


class Placement(NamedTuple):
    """What one dimension of a mesh does to a tensor: it cuts a dimension, or, with ``dim`` -1, nothing.

    Attributes:
        dim: the dimension of the tensor that is cut; -1 where each rank along the mesh's dimension has the same.
        split_factor: what torch's ``_StridedShard`` has: first into so many chunks, each of which is cut then. 1 for
            ``Shard``.
    """

    dim: int = -1
    split_factor: int = 1


REPLICATED = Placement()


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is cut over ranks. A value: equal ones are cut alike.

    Attributes:
        shape: of the whole tensor.
        mesh_shape: how many ranks there are along each dimension of the mesh.
        ranks: the global ranks of the mesh, in row-major order.
        placements: what each dimension of the mesh does, the first one first.

    Raises:
        UnsupportedValueError: from all properties and methods, when what some rank holds is not one box.
    """

    shape: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def cells(self) -> tuple[int, ...] | None:
        """The shape of a cell, when the cut is regular; None when it is not.

        Cell ``i`` covers ``i*c`` to ``min((i+1)*c, n)`` along each dimension. No size of a cell is zero.
        """
        sizes = tuple(self._cut_of(dim).cell for dim in range(len(self.shape)))
        return None if None in sizes else sizes  # type: ignore[return-value]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many cells there are along each dimension: none where the tensor has no elements.

        Raises:
            ValueError: the cut is not regular.
        """
        cells = self.cells
        if cells is None:
            raise ValueError(f"{self} is not cut into cells")
        return tuple(-(-whole // size) for whole, size in zip(self.shape, cells, strict=True))

    def owners(self) -> tuple[tuple[int, ...], ...]:
        """For each cell, in row-major order, the global ranks that hold it, ascending.

        Raises:
            ValueError: the cut is not regular.
        """
        counts = self.counts
        axes = tuple((axis.dim if axis.dim >= 0 else None) for axis in self.placements)
        places = tuple(self._cut_of(dim).places for dim in range(len(self.shape)))
        return _owners(self.mesh_shape, self.ranks, axes, places, counts)

    def box(self, rank: int) -> Box | None:
        """Offset and shape of what a global rank holds; sizes of zero where that is nothing, None outside the mesh."""
        place = self._positions().get(rank)
        if place is None:
            return None
        at = _coordinate(place, self.mesh_shape)
        offset, shape = [], []
        for dim in range(len(self.shape)):
            begin, end = self._cut_of(dim).parts[self._index(dim, at)]
            offset.append(begin)
            shape.append(end - begin)
        return tuple(offset), tuple(shape)

    @property
    def is_whole(self) -> bool:
        """Whether each rank of the mesh holds all of it."""
        return all(
            placement.dim < 0 or count == 1 for placement, count in zip(self.placements, self.mesh_shape, strict=True)
        )

    def check(self) -> None:
        """Refuse a cut in which some rank's part is not one box."""
        for dim in range(len(self.shape)):
            self._cut_of(dim)

    def _positions(self) -> Mapping[int, int]:
        return _positions(self.ranks)

    def _steps_of(self, dim: int) -> tuple[tuple[int, int], ...]:
        return tuple(
            (count, placement.split_factor)
            for count, placement in zip(self.mesh_shape, self.placements, strict=True)
            if placement.dim == dim
        )

    def _cut_of(self, dim: int) -> Cut:
        cut = cut_of(self.shape[dim], self._steps_of(dim))
        if cut is None:
            raise UnsupportedValueError(
                f"a tensor of shape {self.shape}, cut over a mesh of {self.mesh_shape} by {list(self.placements)}: "
                f"expected one box for each rank, but dimension {dim} gives some rank several ranges. "
                "Make its size divisible by the number of ranks that share it, or redistribute the tensor."
            )
        return cut

    def _index(self, dim: int, at: tuple[int, ...]) -> int:
        """Which part of a dimension a coordinate of the mesh has."""
        index = 0
        for axis, placement in enumerate(self.placements):
            if placement.dim == dim:
                index = index * self.mesh_shape[axis] + at[axis]
        return index


@functools.lru_cache(_KEPT_OWNERS)
def _owners(
    mesh_shape: tuple[int, ...],
    ranks: tuple[int, ...],
    axes: tuple[int | None, ...],
    places: tuple[tuple[int, ...], ...],
    counts: tuple[int, ...],
) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(math.prod(counts))]
    for rank, at in zip(ranks, itertools.product(*map(range, mesh_shape)), strict=True):
        cell = 0
        for dim, count in enumerate(counts):
            index = 0
            for axis, cuts in enumerate(axes):
                if cuts == dim:
                    index = index * mesh_shape[axis] + at[axis]
            place = places[dim][index]
            if place < 0:
                break
            cell = cell * count + place
        else:
            found[cell].append(rank)
    return tuple(tuple(sorted(holders)) for holders in found)


def merged_owners(shardings: Iterable[Sharding]) -> tuple[tuple[int, ...], ...]:
    """For each cell of one tensor, in row-major order, the ranks that hold it by any of several shardings.

    Ranks may know a tensor by different meshes, of which each sees its own: where FSDP2 cuts what tensor parallelism
    leaves whole, there is one mesh for each rank of the latter, and all have the same cells.

    Raises:
        ValueError: one is not regular, or they are not of the same cells.
    """
    different = list(dict.fromkeys(shardings))
    if len({(sharding.shape, sharding.cells) for sharding in different}) != 1:
        raise ValueError(f"expected shardings of the same shape and cells, found {different}")
    if len(different) == 1:
        return different[0].owners()
    every = zip(*(sharding.owners() for sharding in different), strict=True)
    return tuple(tuple(sorted({rank for holders in cell for rank in holders})) for cell in every)


@functools.lru_cache(64)
def _positions(ranks: tuple[int, ...]) -> dict[int, int]:
    return {rank: position for position, rank in enumerate(ranks)}


def _coordinate(position: int, mesh_shape: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for count in reversed(mesh_shape):
        position, index = divmod(position, count)
        found.append(index)
    return tuple(reversed(found))


# ------------------------------------------------------------------------------------------------------- live tensors


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Does not import what makes them."""
    api = sys.modules.get("torch.distributed.tensor")
    return api is not None and isinstance(tensor, api.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of ``tensor``: itself, unless it is a DTensor. Shares memory with it."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def sharding_of(tensor: torch.Tensor, path: str = "") -> Sharding | None:
    """How ``tensor`` is cut over ranks; None for plain tensors, and for those that each rank of a mesh holds whole.

    Args:
        tensor: any.
        path: what an error calls it.

    Raises:
        UnsupportedValueError: it waits for a reduction, or what some rank holds is not one box.
    """
    if not is_sharded(tensor):
        return None
    known = _known_shardings(tensor.device_mesh)  # type: ignore[attr-defined]
    key = (tuple(tensor.shape), tensor.placements)  # type: ignore[attr-defined]
    try:
        sharding = known[key]
    except KeyError:
        sharding = known[key] = _made(tensor, path)
    return None if sharding.is_whole else sharding


def local_box(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this process holds of ``tensor``, and where that begins in the whole: empty for all of a plain tensor.

    Raises:
        UnsupportedValueError: it waits for a reduction, or what this rank holds is not one box.
    """
    if not is_sharded(tensor):
        return tensor, ()
    local = local_of(tensor)
    sharding = sharding_of(tensor)
    if sharding is None:
        return local, (0,) * tensor.dim()
    box = sharding.box(torch.distributed.get_rank())
    if box is None:  # nothing of it is here
        return local, tuple(tensor.shape)
    offset, shape = box
    if tuple(local.shape) != shape:
        raise UnsupportedValueError(
            f"a tensor of shape {sharding.shape}, cut over a mesh of {sharding.mesh_shape} by "
            f"{list(sharding.placements)}: expected {shape} on this rank, found {tuple(local.shape)}. Make its "
            "dimensions divisible by the number of ranks that share them."
        )
    return local, offset


def empty_beside(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """An uninitialized DTensor, made as an optimizer makes one beside a parameter: cut like it where the shapes agree.

    Only what this process holds of it takes memory.
    """
    with torch.no_grad():
        if tuple(like.shape) == shape:
            return torch.empty_like(like, dtype=dtype, device=device)
        return like.new_empty(shape, dtype=dtype, device=device)


_SHARDINGS: weakref.WeakKeyDictionary[Any, dict[Any, Sharding]] = weakref.WeakKeyDictionary()
"""By mesh, the shardings met so far: of thousands of tensors few are cut differently."""


def _known_shardings(mesh: Any) -> dict[Any, Sharding]:
    known = _SHARDINGS.get(mesh)
    if known is None:
        known = _SHARDINGS[mesh] = {}
    return known


def _made(tensor: Any, path: str) -> Sharding:
    mesh = tensor.device_mesh
    where = f"{path}: " if path else ""
    sharding = Sharding(
        shape=tuple(tensor.shape),
        mesh_shape=tuple(mesh.shape),
        ranks=_interned(tuple(mesh.mesh.flatten().tolist())),
        placements=tuple(_placement(placement, where, path) for placement in tensor.placements),
    )
    try:
        sharding.check()
    except UnsupportedValueError as error:
        raise UnsupportedValueError(f"{where}{error}", key=path) from None
    return sharding


def _placement(placement: Any, where: str, path: str) -> Placement:
    if placement.is_replicate():
        return REPLICATED
    from torch.distributed.tensor import placement_types

    kind = type(placement)
    if kind is placement_types.Shard:
        return Placement(placement.dim)
    if kind is placement_types._StridedShard:
        return Placement(placement.dim, int(placement.split_factor))
    what = "waits for a reduction over ranks" if placement.is_partial() else "is placed in a way that is not known here"
    raise UnsupportedValueError(
        f"{where}expected a DTensor of which each rank holds a part, found {placement!r}: it {what}. Redistribute it "
        "first: tensor.redistribute(placements=[Replicate(), ...]).",
        key=path,
    )


@functools.lru_cache(64)
def _interned(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """One and the same tuple for equal ones, so that comparing two takes one look."""
    return ranks
