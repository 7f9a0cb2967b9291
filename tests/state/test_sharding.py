"""How tensors are cut over ranks: torch's own arithmetic, for all ranks at once."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from holdfast.errors import UnsupportedValueError
from holdfast.state.sharding import REPLICATED, Placement, Sharding, local_box, merged_owners, sharding_of

SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 12, 16, 17])


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """Any cut of a small tensor over a small mesh."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    placed = st.builds(Placement, st.integers(-1, len(shape) - 1), st.sampled_from([1, 1, 2, 4]))
    placements = [draw(placed) for _ in mesh]
    ranks = range(10, 10 + math.prod(mesh))
    return made(shape, mesh, *(REPLICATED if placement.dim < 0 else placement for placement in placements), ranks=ranks)


def made(shape: tuple[int, ...], mesh: tuple[int, ...], *placements: Placement, ranks: range | None = None) -> Sharding:
    """A sharding over ranks in their order."""
    return Sharding(shape, mesh, tuple(range(math.prod(mesh)) if ranks is None else ranks), placements)


def of_torch(placement: Placement) -> Any:
    """The same in torch's words."""
    if placement.dim < 0:
        return Replicate()
    if placement.split_factor == 1:
        return Shard(placement.dim)
    return _StridedShard(placement.dim, split_factor=placement.split_factor)


@given(shardings())
def test_boxes_are_those_of_torch(sharding: Sharding) -> None:
    """Offset and shape, for every rank, wherever its part is one box."""
    try:
        sharding.check()
    except UnsupportedValueError:
        return
    placements = [of_torch(placement) for placement in sharding.placements]
    for rank, at in zip(sharding.ranks, itertools.product(*map(range, sharding.mesh_shape)), strict=True):
        shape, offset = _compute_local_shape_and_global_offset(
            sharding.shape, sharding.mesh_shape, list(at), placements
        )
        assert sharding.box(rank) == (offset, shape)


@given(shardings())
def test_a_cut_is_refused_where_it_gives_some_rank_several_ranges(sharding: Sharding) -> None:
    """And only there."""
    one_range = all(
        indices == list(range(indices[0], indices[0] + len(indices)))
        for rank in _indices(sharding)
        for indices in rank
        if indices
    )
    if one_range:
        sharding.check()
    else:
        with pytest.raises(UnsupportedValueError, match="redistribute"):
            sharding.check()


def _indices(sharding: Sharding) -> list[list[list[int]]]:
    """For each rank, what it has along each dimension, element by element."""
    ranks = []
    for at in itertools.product(*map(range, sharding.mesh_shape)):
        indices = [list(range(size)) for size in sharding.shape]
        for index, count, placement in zip(at, sharding.mesh_shape, sharding.placements, strict=True):
            if placement.dim >= 0:
                here = indices[placement.dim]
                firsts = _chunks(here, placement.split_factor)
                indices[placement.dim] = [item for first in firsts for item in _chunks(first, count)[index]]
        ranks.append(indices)
    return ranks


def _chunks(items: list[int], count: int) -> list[list[int]]:
    size = -(-len(items) // count)
    return [items[size * index : size * (index + 1)] for index in range(count)]


@given(shardings())
def test_cells_are_what_their_owners_hold(sharding: Sharding) -> None:
    """Where a cut is regular, each cell is the box of each rank that owns it, and no other rank has a box."""
    try:
        cells = sharding.cells
    except UnsupportedValueError:
        return
    if cells is None:
        with pytest.raises(ValueError, match="cells"):
            sharding.owners()
        return
    assert all(cells)
    held: dict[Any, list[int]] = {}
    for index in itertools.product(*map(range, sharding.counts)):
        offset = tuple(at * size for at, size in zip(index, cells, strict=True))
        shape = tuple(min(size, whole - at) for size, whole, at in zip(cells, sharding.shape, offset, strict=True))
        held[offset, shape] = []
    for rank in sharding.ranks:
        box = sharding.box(rank)
        assert box is not None
        if 0 not in box[1]:
            held[box].append(rank)
    assert list(sharding.owners()) == [tuple(ranks) for ranks in held.values()]


def test_more_ranks_than_rows() -> None:
    """The last ones hold nothing, and own no cell."""
    sharding = made((3, 2), (5,), Placement(0))
    assert sharding.cells == (1, 2)
    assert sharding.counts == (3, 1)
    assert sharding.owners() == ((0,), (1,), (2,))
    assert sharding.box(4) == ((3, 0), (0, 2))


def test_the_last_cell_is_shorter() -> None:
    """As torch.chunk cuts it."""
    sharding = made((10,), (4,), Placement(0))
    assert sharding.cells == (3,)
    assert [sharding.box(rank) for rank in range(4)] == [((0,), (3,)), ((3,), (3,)), ((6,), (3,)), ((9,), (1,))]


def test_replicas_own_a_cell_together() -> None:
    """Hybrid sharding: the first dimension of the mesh replicates."""
    sharding = made((4,), (2, 2), REPLICATED, Placement(0))
    assert sharding.owners() == ((0, 2), (1, 3))


def test_fsdp_and_tensor_parallel_on_one_dimension() -> None:
    """The tensor-parallel cut comes first, and is the coarser one, though its dimension of the mesh comes last."""
    sharding = made((8, 8), (2, 2), Placement(0, split_factor=2), Placement(0))
    assert sharding.cells == (2, 8)
    assert sharding.owners() == ((0,), (2,), (1,), (3,))


def test_cuts_of_cuts_may_be_irregular() -> None:
    """Ten rows over two, then over four: 2, 2, 1, 0 of each five."""
    sharding = made((10,), (2, 4), Placement(0), Placement(0))
    assert sharding.cells is None
    assert sharding.box(2) == ((4,), (1,))


def test_a_tensor_without_elements_has_no_cells() -> None:
    """Nobody holds anything of it."""
    sharding = made((0, 4), (2,), Placement(0))
    assert sharding.owners() == ()
    assert sharding.box(1) == ((0, 0), (0, 4))


def test_a_rank_outside_the_mesh_has_no_box() -> None:
    """It is none of those that share the tensor."""
    assert made((4,), (2,), Placement(0), ranks=range(4, 6)).box(0) is None


def test_owners_are_worked_out_once() -> None:
    """For thousands of tensors that are cut alike, and for those of other sizes in as many cells."""
    first, second, third = (made((size, 4), (8,), Placement(0)) for size in (16, 16, 32))
    assert first.owners() is second.owners()
    assert first.owners() is third.owners()


def test_meshes_that_see_one_tensor_each_in_its_own_way() -> None:
    """What they say of it together."""
    one, other = (Sharding((4,), (2,), ranks, (Placement(0),)) for ranks in ((0, 2), (1, 3)))
    assert merged_owners([one, other, one]) == ((0, 1), (2, 3))
    with pytest.raises(ValueError, match="cells"):
        merged_owners([one, Sharding((4,), (4,), (0, 1, 2, 3), (Placement(0),))])


def test_plain_tensors_are_not_cut() -> None:
    """All of one is here."""
    tensor = torch.ones(2)
    assert sharding_of(tensor) is None
    assert local_box(tensor) == (tensor, ())


def test_what_makes_dtensors_is_not_imported() -> None:
    """By saving and restoring what has none."""
    code = (
        "import sys, tempfile, torch, holdfast\n"
        "path = tempfile.mkdtemp() + '/x'\n"
        "state = {'model': torch.nn.Linear(2, 2), 'tensor': torch.ones(2)}\n"
        "loaded = 'torch.distributed.tensor' in sys.modules\n"
        "holdfast.save(path, state); holdfast.restore(path, state); holdfast.load(path)\n"
        "assert ('torch.distributed.tensor' in sys.modules) == loaded\n"
        "print(loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
