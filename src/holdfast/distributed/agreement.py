"""What the processes of a training have in common besides tensors: plain values, compared before they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from holdfast.distributed.cuts import Way
from holdfast.errors import RanksDifferError
from holdfast.format.records import CHUNK_BYTES
from holdfast.format.strict_json import cut
from holdfast.format.tree import child
from holdfast.state.capture import CapturedEntry, CapturedTensor
from holdfast.state.image import StateImage
from holdfast.state.plan import layout_of

SMALL_BYTES = 64 * 2**10
_SHOWN = 5


class Description(msgspec.Struct, frozen=True):
    """What a process is about to save, in checksums: the same on all where they have the same.

    Attributes:
        structure: of names, shapes and the way in which tensors are cut.
        entries: by entry, of its plain values, and of tensors that each process holds whole.
        ways: how this process knows tensors to be cut, where that is not as it was at the last save.
    """

    structure: str
    entries: dict[str, str]
    ways: tuple[Way, ...] | None = None


def describe(
    captured: Mapping[str, CapturedEntry],
    structure: str,
    ways: Sequence[Way] | None,
    exempt: Mapping[str, frozenset[str]],
    *,
    thorough: bool,
) -> Description:
    """Describe a captured state. Blocks while tensors are read.

    Args:
        captured: without what is kept for each process.
        structure: the checksum of its structure.
        ways: how tensors are cut, where the others do not know yet.
        exempt: by entry, tensors that may differ, since what rank 0 has counts.
        thorough: compare all tensors that each process holds whole; else only small ones in the CPU's memory.
    """
    entries = {}
    for entry, content in captured.items():
        hashed = xxhash.xxh3_128(msgspec.json.encode(content.tree))
        chosen = _compared(content, exempt.get(entry, frozenset()), thorough=thorough)
        for name, tensor in chosen.items():
            hashed.update(name.encode() + digest_of_tensor(tensor, content).encode())
        entries[entry] = hashed.hexdigest()
    return Description(structure, entries, None if ways is None else tuple(ways))


def compare(descriptions: Sequence[Description]) -> list[str]:
    """The entries in which some differ; RanksDifferError where they have not the same tensors at all."""
    first = descriptions[0]
    strange = [rank for rank, other in enumerate(descriptions) if other.structure != first.structure]
    missing = sorted({entry for other in descriptions for entry in other.entries.keys() ^ first.entries.keys()})
    if missing:
        raise RanksDifferError(
            f"the processes do not save the same entries: {', '.join(missing)} are not in the state of all. Give every "
            "process the same state.",
            ranks=[rank for rank, other in enumerate(descriptions) if other.entries.keys() != first.entries.keys()],
            key=missing[0],
        )
    if strange:
        return list(first.entries)
    return [
        entry for entry in first.entries if any(other.entries[entry] != first.entries[entry] for other in descriptions)
    ]


def in_detail(
    captured: Mapping[str, CapturedEntry],
    entries: Sequence[str],
    exempt: Mapping[str, frozenset[str]],
    *,
    thorough: bool,
) -> dict[str, str]:
    """What a process has in some entries, by path, in few words each."""
    told: dict[str, str] = {}
    for entry in entries:
        content = captured[entry]
        told.update(_leaves(content.tree, entry))
        for name, tensor in content.tensors.items():
            told[f"{entry}/{name}"] = _form(tensor)
        for name, tensor in _compared(content, exempt.get(entry, frozenset()), thorough=thorough).items():
            told[f"{entry}/{name}"] += f", checksum {digest_of_tensor(tensor, content)[:8]}"
    return told


def refuse_differences(details: Sequence[Mapping[str, str]]) -> None:
    """Raise what tells a user which process has what: RanksDifferError."""
    keys = dict.fromkeys(key for detail in details for key in detail)
    found = [key for key in keys if len({detail.get(key) for detail in details}) > 1]
    lines = []
    for key in found[:_SHOWN]:
        by_value: dict[str, list[int]] = {}
        for rank, detail in enumerate(details):
            by_value.setdefault(detail.get(key, "missing"), []).append(rank)
        told = "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in by_value.items())
        lines.append(f"  {key}: {told}")
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    first = {key: details[0].get(key) for key in found}
    ranks = [rank for rank, detail in enumerate(details) if any(detail.get(key) != first[key] for key in found)]
    raise RanksDifferError(
        "what every process should have alike differs, and nothing was saved:\n"
        + "\n".join(lines)
        + more
        + "\nMake it the same on all: buffers of a module, such as BatchNorm's, by SyncBatchNorm or all_reduce. Of a "
        "plain value, PerRank(value) in the state (holdfast.distributed.PerRank) says that each has its own.",
        ranks=ranks,
        key=found[0] if found else None,
    )


def digest_of_tensor(tensor: CapturedTensor, content: CapturedEntry) -> str:
    """A checksum of what this process holds of a tensor."""
    value = tensor.value
    if isinstance(value, torch.Tensor) and value.is_cpu and value.is_contiguous() and tensor.flat:
        if not value.numel():
            return ""
        return xxhash.xxh3_128_hexdigest(value.reshape(-1).view(torch.uint8).numpy().data)
    if isinstance(value, np.ndarray) and value.flags.c_contiguous:
        return xxhash.xxh3_128_hexdigest(value.data)
    layout = layout_of(content, {tensor.name}, still=True)
    return "".join(StateImage(layout, {tensor.name: tensor}).digests(CHUNK_BYTES))


def _compared(content: CapturedEntry, exempt: frozenset[str], *, thorough: bool) -> dict[str, CapturedTensor]:
    return {
        name: tensor
        for name, tensor in content.tensors.items()
        if tensor.sharding is None
        and name not in exempt
        and (thorough or (tensor.value.nbytes <= SMALL_BYTES and tensor.device == "cpu"))
    }


def _form(tensor: CapturedTensor) -> str:
    held = (
        "whole" if tensor.sharding is None else f"cut by {tensor.sharding.placements} in {tensor.sharding.mesh_shape}"
    )
    frozen = ", frozen" if tensor.frozen else ""
    return cut(f"{tensor.dtype} {list(tensor.shape)} {tensor.memory_format}{frozen}, {held}")


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, item in node.items():
            yield from _leaves(item, child(path, key))
    elif isinstance(node, list) and node:
        for index, item in enumerate(node):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, cut(msgspec.json.encode(node).decode())


def _ranks(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"
