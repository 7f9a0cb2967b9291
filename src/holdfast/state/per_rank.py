"""What each rank keeps for itself: generators, places in the data, and what a user says is kept so.

Everything else of a state is the same on all ranks, or cut over them, and is stored once. What is kept per rank lies in
an entry of its own: for each rank one tensor of bytes, the JSON of its typed trees, and beside it their tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
import numpy as np

from holdfast.errors import UnsupportedValueError
from holdfast.format.names import GRADIENTS_ENTRY, RANKS_ENTRY, RNG_ENTRY
from holdfast.state.capture import CapturedEntry, CapturedTensor
from holdfast.state.gradients import parameters_of
from holdfast.state.kinds import Kind, PerRank, has_per_rank_value, live_objects, name_parameters
from holdfast.state.loaders import is_kept_per_rank
from holdfast.state.sharding import sharding_of
from holdfast.state.tensors import array_address

__all__ = ["PerRank", "fold", "per_rank_entries", "rank_key", "rank_prefix"]

_JSON_BLOCK_BYTES = 4096  # the JSON is filled up with spaces, so that a number of one digit more moves nothing
_GLOBAL_KINDS = (Kind.MODULE, Kind.OPTIMIZER)


def rank_key(rank: int) -> str:
    """The name of the tensor that holds a rank's typed trees."""
    return f"{rank:05d}"


def rank_prefix(rank: int, entry: str) -> str:
    """What the names of the tensors of one of a rank's entries begin with."""
    return f"{rank_key(rank)}/{entry}/"


def per_rank_entries(state: Mapping[str, Any]) -> frozenset[str]:
    """The entries of a state that each rank keeps for itself.

    They are those with a generator, with a loader that knows its position and does not say that it is ``shared``, or
    with a :class:`PerRank` in them; the global generators; and the gradients of an accumulation, where parameters are
    not cut over ranks.

    Raises:
        UnsupportedValueError: one of them holds a module or an optimizer too.
    """
    found = {RNG_ENTRY}
    for entry, value in state.items():
        objects = list(live_objects(value, entry))
        own = next((path for path, item, kind in objects if _is_own(item, kind)), None)
        if own is None and not has_per_rank_value(value):
            continue
        for path, _, kind in objects:
            if kind in _GLOBAL_KINDS:
                raise UnsupportedValueError(
                    f"{path}: {own or 'a PerRank value'} beside it is kept by each rank for itself, and modules and "
                    "optimizers are not. Put what is kept per rank in an entry of its own.",
                    key=path,
                )
        found.add(entry)
    # Asked of the parameters, not of the gradients, of which a rank may have none: all ranks say the same.
    if any(sharding_of(parameter) is None for _, parameter in parameters_of(state, name_parameters(state))):
        found.add(GRADIENTS_ENTRY)
    return frozenset(found)


def _is_own(value: Any, kind: Kind | None) -> bool:
    return kind is Kind.GENERATOR or (kind is Kind.STATEFUL and is_kept_per_rank(value))


def fold(
    captured: Mapping[str, CapturedEntry], names: Collection[str], rank: int, world_size: int
) -> dict[str, CapturedEntry]:
    """What was captured, with the entries ``names`` moved into the one of what each rank keeps for itself.

    Of gradients, those that are cut over ranks stay where they are. With one process nothing is moved.

    Raises:
        UnsupportedValueError: an entry that is kept per rank holds a tensor of which each rank has a part.
    """
    if world_size == 1:
        return dict(captured)
    rest = {entry: content for entry, content in captured.items() if entry not in names}
    own = {entry: content for entry, content in captured.items() if entry in names}
    if GRADIENTS_ENTRY in own:
        rest[GRADIENTS_ENTRY], own[GRADIENTS_ENTRY] = _split(own[GRADIENTS_ENTRY])
    trees = {}
    tensors: dict[str, CapturedTensor] = {}
    aliases: dict[str, str] = {}
    for entry in sorted(own):
        content = own[entry]
        trees[entry] = content.tree
        prefix = rank_prefix(rank, entry)
        for name, tensor in content.tensors.items():
            if tensor.sharding is not None:
                raise UnsupportedValueError(
                    f"{entry}.{name}: a tensor of shape {tensor.shape}, of which each rank holds a part, lies in an "
                    "entry that each rank keeps for itself. Put it in an entry of its own.",
                    key=f"{entry}.{name}",
                )
            tensors[prefix + name] = msgspec.structs.replace(tensor, name=prefix + name)
        aliases |= {prefix + alias: prefix + name for alias, name in content.aliases.items()}
    listing = _listing(rank, trees)
    tree = {"world_size": world_size, "entries": sorted(own)}
    rest[RANKS_ENTRY] = CapturedEntry(tree, {listing.name: listing, **tensors}, aliases)
    return rest


def _listing(rank: int, trees: Mapping[str, Any]) -> CapturedTensor:
    data = msgspec.json.encode(trees)
    array = np.frombuffer(data.ljust(-(-len(data) // _JSON_BLOCK_BYTES) * _JSON_BLOCK_BYTES), np.uint8)
    return CapturedTensor(
        name=rank_key(rank),
        dtype="uint8",
        shape=array.shape,
        memory_format="contiguous",
        device="cpu",
        value=array,
        address=array_address(array),
        flat=True,
    )


def _split(gradients: CapturedEntry) -> tuple[CapturedEntry, CapturedEntry]:
    """Those that are cut over ranks, and those that are not."""
    cut, whole = CapturedEntry({}, {}, {}), CapturedEntry({}, {}, {})
    for parameter, leaf in gradients.tree.items():
        name = leaf["$tensor"]
        canonical = gradients.aliases.get(name, name)
        part = whole if gradients.tensors[canonical].sharding is None else cut
        part.tree[parameter] = leaf
        part.tensors[canonical] = gradients.tensors[canonical]
        if name != canonical:
            part.aliases[name] = canonical
    return cut, whole
