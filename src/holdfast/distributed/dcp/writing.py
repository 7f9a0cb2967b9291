"""What one rank writes of a checkpoint: its tensors, or its boxes of them, in files of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from holdfast.distributed.dcp.names import Path, Place, paths_of, place_of
from holdfast.distributed.dcp.values import encode_values
from holdfast.errors import UsageError
from holdfast.format import safetensors
from holdfast.format.dtypes import DTYPES
from holdfast.format.names import data_file_name, shard_name
from holdfast.format.records import FileRecord, Piece, TensorRecord
from holdfast.state.capture import CapturedTensor
from holdfast.state.image import StateImage
from holdfast.state.plan import in_files
from holdfast.state.tensors import check_tensor, is_flat, memory_format, tensor_address
from holdfast.storage.store import PendingCheckpoint


@dataclass(frozen=True, slots=True)
class Share:
    """Which files a rank writes. It stays true when the plan is used again, whatever the others write then.

    Attributes:
        rank: of the one that writes.
        world_size: how many there are.
        alone: entries whose tensors it writes alone, and whole.
    """

    rank: int
    world_size: int
    alone: frozenset[str]

    def file_names(self, entry: str, count: int) -> list[str]:
        """The names of so many files of the tensors of ``entry`` that this rank writes; no other has any of them."""
        if entry not in self.alone and self.world_size > 1:
            numbers = range(self.rank + 1, count * self.world_size + 1, self.world_size)
            return [shard_name(entry, number, count * self.world_size) for number in numbers]
        if count == 1:
            return [data_file_name(entry)]
        return [shard_name(entry, number, count) for number in range(1, count + 1)]


@dataclass(slots=True)
class Written:
    """What a rank wrote, for the coordinator.

    Attributes:
        files: the record of each file.
        boxes: the flat name of each tensor, with a record of what was written of it: one piece.
        nodes: by flat name, the typed trees of other values.
        tensors: by entry and name, the tensors within those.
        aliases: by entry, other names of those tensors.
    """

    files: dict[str, FileRecord] = field(default_factory=dict)
    boxes: list[tuple[str, TensorRecord]] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)


def shares(plans: Sequence[SavePlan]) -> list[Share]:
    """The share of each rank, by all their plans: those of a planner that keeps them say which are still good."""
    writers: dict[str, set[int]] = {}
    cut: set[str] = set()
    for rank, plan in enumerate(plans):
        paths = paths_of(plan.planner_data)
        for item in plan.items:
            if item.type is not WriteItemType.BYTE_IO and not _is_empty_part(item):
                entry = _place(item, paths).entry
                writers.setdefault(entry, set()).add(rank)
                if not _is_whole(item):
                    cut.add(entry)
    known = all(plan.usable for plan in plans)
    return [
        Share(
            rank,
            len(plans),
            frozenset(entry for entry, ranks in writers.items() if known and ranks == {rank} and entry not in cut),
        )
        for rank in range(len(plans))
    ]


def write(
    pending: PendingCheckpoint, plan: SavePlan, planner: SavePlanner, share: Share, checkpoint_id: str
) -> Written:
    """Write what ``plan`` says, durably. Blocks; tensors are read where they are.

    Raises:
        UnsupportedValueError: a value cannot be written exactly.
        UsageError: the planner gives no values, or other tensors than it planned.
        StorageError, DiskFullError: the file system refused.
    """
    paths = paths_of(plan.planner_data)
    written = Written()
    contents: dict[str, _Content] = {}
    _take_values([item for item in plan.items if item.type is WriteItemType.BYTE_IO], planner, paths, written, contents)
    for item in plan.items:
        if item.type is not WriteItemType.BYTE_IO and not _is_empty_part(item):
            place = _place(item, paths)
            contents.setdefault(place.entry, _Content()).add_box(item, place, _tensor_of(item, planner))
    images = {}
    for entry, content in contents.items():
        parts = in_files(content.tensors)
        places: dict[str, tuple[str, int]] = {}
        for name, part in zip(share.file_names(entry, len(parts)), parts, strict=True):
            tensors = {tensor: value for tensor, value in content.tensors.items() if tensor in part}
            layout = safetensors.plan(_stored(tensors), {"holdfast_checkpoint_id": checkpoint_id, "format": "pt"})
            image = images[name] = StateImage(layout, tensors)
            image.settle()
            places.update({tensor.name: (name, tensor.begin) for tensor in layout.tensors})
        content.report(written, entry, places)
    written.files = pending.write_files(images)
    return written


def _take_values(
    items: Sequence[WriteItem],
    planner: SavePlanner,
    paths: dict[str, Path] | Any,
    written: Written,
    contents: dict[str, _Content],
) -> None:
    """Encode the values of a plan, and add the tensors that are within them."""
    found: dict[tuple[str, bool], list[tuple[WriteItem, Place]]] = {}
    for item in items:
        place = _place(item, paths)
        found.setdefault((place.entry, not place.inner), []).append((item, place))
    for (entry, whole), placed in found.items():
        named = [(place.name, _value_of(item, planner)) for item, place in placed]
        encoded = encode_values(entry, named, whole=whole)
        written.nodes.update({item.index.fqn: node for (item, _), node in zip(placed, encoded.nodes, strict=True)})
        if encoded.tensors:
            contents.setdefault(entry, _Content()).add_inner(encoded.tensors)
        if encoded.aliases:
            written.aliases[entry] = encoded.aliases


def _place(item: WriteItem, paths: Any) -> Place:
    path = paths.get(item.index.fqn, (item.index.fqn,))
    return place_of(path, item.type is not WriteItemType.BYTE_IO)


def _value_of(item: WriteItem, planner: SavePlanner) -> Any:
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise UsageError(
            f"{item.index.fqn} is not a tensor, and {type(planner).__qualname__} has no lookup_object(index) that "
            "gives its value. Holdfast writes values, not what resolve_data() pickles: derive the planner from "
            "DefaultSavePlanner, or add the method.",
            key=item.index.fqn,
        )
    return look_up(item.index)


def _tensor_of(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert item.tensor_data is not None
    expected = tuple(item.tensor_data.chunk.sizes)
    found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__qualname__
    if not isinstance(tensor, torch.Tensor) or found != expected:
        raise UsageError(
            f"{item.index.fqn}: {type(planner).__qualname__} planned a tensor of shape {expected}, and gave {found}.",
            key=item.index.fqn,
        )
    return tensor.detach()


def _is_whole(item: WriteItem) -> bool:
    data = item.tensor_data
    return data is not None and tuple(data.chunk.sizes) == tuple(data.size)


def box_bytes(item: WriteItem) -> int:
    """Bytes of the tensor, or of the box of one, that an item stands for; 0 for other values."""
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _is_empty_part(item: WriteItem) -> bool:
    """Whether it is a part without elements of a tensor that has some: there are more ranks than rows."""
    data = item.tensor_data
    return data is not None and 0 in data.chunk.sizes and 0 not in data.size


def _stored(tensors: Mapping[str, CapturedTensor]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """What a layout is planned from."""
    for name, tensor in tensors.items():
        dtype = DTYPES[tensor.dtype]
        yield name, dtype.code, dtype.stored_shape(tensor.shape)


class _Content:
    """What a rank writes of an entry: tensors, by the names that they have in its files."""

    def __init__(self) -> None:
        self.tensors: dict[str, CapturedTensor] = {}
        self._boxes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._inner: list[str] = []

    def add_inner(self, tensors: dict[str, CapturedTensor]) -> None:
        """Add tensors that are within values: whole ones."""
        self.tensors.update(tensors)
        self._inner += tensors

    def add_box(self, item: WriteItem, place: Place, tensor: torch.Tensor) -> None:
        """Add a tensor, or a box of one."""
        assert item.tensor_data is not None
        name = _free(place.name, self.tensors)
        flat = is_flat(tensor)
        whole = _is_whole(item)
        self.tensors[name] = CapturedTensor(
            name=name,
            dtype=check_tensor(tensor, item.index.fqn),
            shape=tuple(tensor.shape),
            memory_format=memory_format(tensor) if whole else "contiguous",
            device=str(tensor.device),
            value=tensor,
            address=tensor_address(tensor),
            flat=flat,
        )
        self._boxes[name] = item.index.fqn, () if whole else tuple(item.tensor_data.chunk.offsets)

    def report(self, written: Written, entry: str, places: Mapping[str, tuple[str, int]]) -> None:
        """Note in ``written`` what lies where: by name, in which file and where in it."""
        records = {
            name: TensorRecord(
                dtype=tensor.dtype,
                shape=tensor.shape,
                pieces=(Piece(places[name][0], name, places[name][1], tensor.shape),),
                memory_format=tensor.memory_format,
                device=tensor.device,
            )
            for name, tensor in self.tensors.items()
        }
        for name, (fqn, offset) in self._boxes.items():
            record = records[name]
            piece = msgspec.structs.replace(record.pieces[0], offset=offset)
            written.boxes.append((fqn, msgspec.structs.replace(record, pieces=(piece,))))
        if self._inner:
            written.tensors[entry] = {name: records[name] for name in self._inner}


def _free(name: str, taken: Iterable[str]) -> str:
    free, number = name, 1
    while free in taken:  # several boxes of one tensor
        number += 1
        free = f"{name}#{number}"
    return free
