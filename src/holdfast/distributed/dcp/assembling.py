"""What all ranks wrote, put together by the coordinator: the trees and the records of a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from holdfast.distributed.dcp.names import (
    DCP_ENTRY,
    Path,
    Place,
    flattened,
    is_tensor_node,
    nest,
    paths_of,
    place_of,
    root_of,
)
from holdfast.distributed.dcp.writing import Written
from holdfast.errors import UsageError
from holdfast.format import tree
from holdfast.format.names import index_name
from holdfast.format.records import FileRecord, TensorRecord, check_tensors


@dataclass(slots=True)
class Assembled:
    """The parts of a manifest that DCP's planners decide.

    Attributes:
        state: by entry, its typed tree.
        tensors: by entry and name, what each tensor is and where its pieces lie.
        aliases: by entry, other names of tensors.
        files: the record of each file.
        indexes: by name, the contents of files that say which tensor lies in which file, where all are whole.
    """

    state: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    indexes: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A node that is part of a larger tree."""

    node: Any


class _Leaves:
    """Puts nodes that are encoded already into the tree around them."""

    def encode(self, value: Any, path: str) -> Any:
        """See ``LeafEncoder``."""
        return value.node if isinstance(value, _Leaf) else None


def assemble(metadata: Metadata, parts: Sequence[Written]) -> Assembled:
    """Put together what the ranks wrote of a plan.

    Raises:
        UsageError: they did not write all of it, or names are used twice.
    """
    paths = paths_of(metadata.planner_data)
    places = {
        fqn: place_of(paths.get(fqn, (fqn,)), not isinstance(stored, BytesStorageMetadata))
        for fqn, stored in metadata.state_dict_metadata.items()
    }
    made = Assembled()
    for part in parts:
        made.files.update(part.files)
        for entry, records in part.tensors.items():
            for name, record in records.items():
                _add(made.tensors, entry, name, record)
        for entry, aliases in part.aliases.items():
            made.aliases.setdefault(entry, {}).update(aliases)
    for fqn, record in _tensors(metadata, parts):
        _add(made.tensors, places[fqn].entry, places[fqn].name, record)
    nodes = {fqn: node for part in parts for fqn, node in part.nodes.items()}
    made.state = _trees(places, nodes)
    for entry in made.state:
        made.tensors.setdefault(entry, {})
    made.state[DCP_ENTRY] = _own_tree(metadata, places, made.state)
    made.tensors[DCP_ENTRY] = {}
    _check(made)
    made.indexes = dict(_indexes(made))
    return made


def _add(tensors: dict[str, dict[str, TensorRecord]], entry: str, name: str, record: TensorRecord) -> None:
    if tensors.setdefault(entry, {}).setdefault(name, record) is not record:
        raise UsageError(f"two tensors would be {name!r} of {entry!r}; rename one.", key=f"{entry}.{name}")


def _tensors(metadata: Metadata, parts: Iterable[Written]) -> Iterator[tuple[str, TensorRecord]]:
    """Each tensor's flat name and record, its pieces those that the ranks wrote."""
    boxes: dict[str, list[TensorRecord]] = {}
    for part in parts:
        for fqn, box in part.boxes:
            boxes.setdefault(fqn, []).append(box)
    for fqn, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        found = boxes.get(fqn, [])
        if not found or {box.dtype for box in found} != {found[0].dtype}:
            raise UsageError(
                f"{fqn}: expected its parts from the ranks that planned to write it, all of one dtype; found "
                f"{', '.join(box.dtype for box in found) or 'none'}.",
                key=fqn,
            )
        shape = tuple(stored.size)
        pieces = tuple(box.pieces[0] for box in found)
        first = found[0]
        yield fqn, msgspec.structs.replace(first, shape=shape, pieces=pieces if 0 not in shape else pieces[:1])


def _trees(places: Mapping[str, Place], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The typed tree of each entry."""
    items: dict[str, list[tuple[Path, Any]]] = {}
    for fqn, place in places.items():
        node = nodes.get(fqn, {"$tensor": place.name})
        items.setdefault(place.entry, []).append((place.inner, None if node is None else _Leaf(node)))
    return {entry: tree.encode(nest(found, entry), entry, _Leaves()) for entry, found in items.items()}


def _own_tree(metadata: Metadata, places: Mapping[str, Place], trees: Mapping[str, Any]) -> Any:
    """What a reader has to know to give DCP the flat names and the planner data that it gave us.

    That is next to nothing where they are what the trees say by themselves, as with DCP's own planners.
    """
    found = {
        ".".join(map(str, path)): (path, is_tensor_node(node))
        for entry, node in trees.items()
        for path, node in flattened(node, root_of(entry, by_dcp=True))
    }
    expected = {
        fqn: (path, isinstance(metadata.state_dict_metadata.get(fqn), TensorStorageMetadata))
        for fqn, path in paths_of(metadata.planner_data).items()
    }
    if found == expected and expected.keys() == metadata.state_dict_metadata.keys():
        return {"flattened": True}
    names = {fqn: (place.entry, *place.inner) for fqn, place in places.items()}
    own = {"flattened": False, "names": names, "planner_data": metadata.planner_data}
    return tree.encode(own, DCP_ENTRY, tree.OpaqueLeaves())


def _check(made: Assembled) -> None:
    """Refuse what a reader would: before it is committed."""
    try:
        check_tensors(made.tensors, made.files)
    except ValueError as error:
        raise UsageError(f"the ranks did not write all of what they planned: {error}") from error


def _indexes(made: Assembled) -> Iterator[tuple[str, bytes]]:
    """``*.safetensors.index.json`` of entries that lie in several files, every tensor in one of them."""
    for entry, records in made.tensors.items():
        weights = {name: record.pieces[0].file for name, record in records.items()}
        if len(set(weights.values())) > 1 and all(len(record.pieces) == 1 for record in records.values()):
            total = sum(record.nbytes for record in records.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
            yield index_name(entry), msgspec.json.encode(index)
