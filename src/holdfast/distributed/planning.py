"""Which process writes what. Each computes the plan of all, from what it knows of its own tensors.

Little is exchanged for it: processes of one training hold tensors of the same names and shapes, and how a tensor is cut
over them is known to each. So a plan takes time by tensors and by processes, not by their product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from holdfast.distributed.cuts import Cuts
from holdfast.errors import UnsupportedValueError
from holdfast.format.dtypes import DTYPES
from holdfast.format.names import data_file_name, index_name, shard_name
from holdfast.format.records import Piece, TensorRecord
from holdfast.state.capture import CapturedEntry, CapturedTensor
from holdfast.state.plan import FilePlan, Plan, in_files, index_of, layout_of, records_of
from holdfast.state.sharding import Sharding
from holdfast.state.unchanged import MIN_GROUP_BYTES

_Kind = tuple[bool, int]
"""Tensors that may lie in one file: whether they are expected to stay what they are, and of many of them, which."""
SPLIT_BYTES = 256 * 2**20
"""Whole tensors of an entry lie in one file, unless they are more than this: then several processes write them."""


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """Who writes which files, and what the manifest says of the tensors in them.

    Attributes:
        mine: the files of this process, and the records of all tensors but loose ones; indexes on rank 0 only.
        layouts: for the manifest.
        loose: by entry and name, tensors that are not cut evenly. Where their pieces lie, each writer has to say.
    """

    mine: Plan
    layouts: dict[str, tuple[str, ...]]
    loose: dict[str, dict[str, Loose]]


@dataclass(frozen=True, slots=True)
class Loose:
    """A tensor that is not cut evenly.

    Attributes:
        record: what the manifest says of it, but for its pieces.
        boxes: of each piece the file, and offset and shape in the tensor.
    """

    record: TensorRecord
    boxes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def placed(self, name: str, begins: Mapping[str, int]) -> TensorRecord:
        """Its record, where ``begins`` says of each file where its piece begins there."""
        pieces = (Piece(file, name, begins[file], shape, offset) for file, offset, shape in self.boxes)
        return msgspec.structs.replace(self.record, pieces=tuple(pieces))


def plan_files(
    captured: Mapping[str, CapturedEntry],
    cuts: Cuts,
    rank: int,
    members: Sequence[int],
    first: Mapping[str, Collection[str]],
) -> SharedPlan:
    """Share out the tensors of a state.

    Args:
        captured: the state, as this process sees it.
        cuts: who holds what of its tensors.
        rank: of this process, in the group.
        members: by rank in the group, the rank that meshes of DTensors know a process by.
        first: by entry, names of tensors that rank 0 has to write, for what it has is what counts.
    """
    load = [0] * len(members)
    places = {member: place for place, member in enumerate(members)}
    files: list[FilePlan] = []
    indexes: dict[str, bytes] = {}
    records: dict[str, dict[str, TensorRecord]] = {}
    layouts: dict[str, tuple[str, ...]] = {}
    loose: dict[str, dict[str, Loose]] = {}
    for entry, content in captured.items():
        sharing = _Sharing(entry, content, cuts, rank, places, load, first.get(entry, ()))
        whole = {file.name: layout_of(content, file.tensors, file.still) for file in sharing.whole}
        records[entry] = {**records_of(content, whole), **sharing.cut_records(layouts)}
        if sharing.loose:
            loose[entry] = sharing.loose_pieces()
        if len(whole) > 1 and len(whole) == sharing.count:
            indexes[index_name(entry)] = index_of(whole, content.aliases)
        for file in sharing.of(rank):
            layout = whole.get(file.name) or layout_of(content, file.tensors, file.still)
            files.append(FilePlan(file.name, entry, frozenset(file.tensors), layout, file.still))
    return SharedPlan(Plan(tuple(files), indexes if rank == 0 else {}, records), layouts, loose)


@dataclass(slots=True)
class _File:
    """A file and who writes it; its name is known when all files of the entry are.

    Of a file with cells it is known which tensors they belong to only where this process writes it.
    """

    writer: int
    tensors: set[str]
    still: bool
    name: str = ""


@dataclass(slots=True)
class _Sharing:
    """How the tensors of one entry are shared out: whole ones by their sizes, cells to those who have them."""

    entry: str
    content: CapturedEntry
    cuts: Cuts
    rank: int
    places: Mapping[int, int]
    load: list[int]
    first: Collection[str]
    whole: list[_File] = field(default_factory=list)
    cells: dict[tuple[_Kind, int], _File] = field(default_factory=dict)
    loose: dict[str, list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    _owners: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _chosen: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    _kinds: dict[str, _Kind] = field(default_factory=dict)
    _known: dict[tuple[_Kind, int], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = self.content.tensors
        frozen = [name for name, tensor in tensors.items() if tensor.frozen]
        stay = frozenset(frozen if _nbytes(tensors[name] for name in frozen) >= MIN_GROUP_BYTES else ())
        for still in (True, False):
            alike = [name for name in tensors if (name in stay) is still]
            self._share_whole([name for name in alike if _is_whole(tensors[name])], still)
            cut = in_files(name for name in alike if not _is_whole(tensors[name]))
            self._kinds.update((name, (still, number)) for number, names in enumerate(cut) for name in names)
        for number, (name, tensor) in enumerate(tensors.items()):
            if tensor.sharding is not None and name in self._kinds:
                self._share_cut(name, number, tensor.sharding)
        self._give_names()

    @property
    def count(self) -> int:
        """How many files there are."""
        return len(self.whole) + len(self.cells)

    def of(self, rank: int) -> list[_File]:
        """The files that ``rank`` writes."""
        return [file for file in (*self.whole, *self.cells.values()) if file.writer == rank]

    def cut_records(self, layouts: dict[str, tuple[str, ...]]) -> dict[str, TensorRecord]:
        """The records of tensors that are cut evenly; the layouts that they need are added."""
        records = {}
        keys: dict[tuple[_Kind, tuple[int, ...]], str] = {}
        for name, owners in self._owners.items():
            tensor = self.content.tensors[name]
            assert tensor.sharding is not None
            cell, _ = self.cuts.cells(tensor.sharding)
            assert cell is not None
            kind = self._kinds[name]
            key = keys.get((kind, owners))
            if key is None:
                key = keys[kind, owners] = f"{self.entry}-{len(keys) + 1}"
                layouts[key] = tuple(self.cells[kind, owner].name for owner in owners)
            records[name] = msgspec.structs.replace(_record(tensor), cell=cell, layout=key)
        return records

    def loose_pieces(self) -> dict[str, Loose]:
        """The others, and where their pieces are."""
        return {
            name: Loose(
                _record(self.content.tensors[name]),
                tuple((self.cells[self._kinds[name], writer].name, offset, shape) for writer, offset, shape in pieces),
            )
            for name, pieces in self.loose.items()
        }

    def _share_whole(self, names: list[str], still: bool) -> None:
        if not names:
            return
        tensors = self.content.tensors
        names.sort(key=lambda name: name not in self.first)  # those of rank 0 come first, and so lie together
        total = _nbytes(tensors[name] for name in names)
        parts = max(1, min(len(self.load), math.ceil(total / SPLIT_BYTES)))
        reached = 0
        shares: list[list[str]] = [[] for _ in range(parts)]
        for name in names:
            index = 0 if name in self.first else min(parts - 1, reached * parts // max(total, 1))
            shares[index].append(name)
            reached += _nbytes([tensors[name]])
        for share in itertools.chain.from_iterable(map(in_files, shares)):
            writer = 0 if not share.isdisjoint(self.first) else self.load.index(min(self.load))
            self.load[writer] += _nbytes(tensors[name] for name in share)
            self.whole.append(_File(writer, set(share), still))

    def _share_cut(self, name: str, number: int, sharding: Sharding) -> None:
        """Each cell is written by one of those that have it, in turn."""
        cell, owners = self.cuts.cells(sharding)
        if cell is None:
            self.loose[name] = [
                (self._one_of(ranks, name, number), offset, shape)
                for (offset, shape), ranks in self.cuts.boxes(sharding).items()
            ]
            writers = tuple(writer for writer, _, _ in self.loose[name])
        else:
            key = (id(owners), number % len(owners[0]))
            if key not in self._chosen:
                self._chosen[key] = tuple(self._one_of(holders, name, number) for holders in owners)
            writers = self._owners[name] = self._chosen[key]
        kind = self._kinds[name]
        if (kind, id(writers)) not in self._known:
            self._known[kind, id(writers)] = self.rank in writers
            for writer in writers:
                self.cells.setdefault((kind, writer), _File(writer, set(), still=kind[0]))
        if self._known[kind, id(writers)]:
            self.cells[kind, self.rank].tensors.add(name)

    def _one_of(self, holders: Sequence[int], name: str, number: int) -> int:
        """Who of those that hold a part of a tensor writes it, as a place in the group: it may have only some."""
        here = [self.places[holder] for holder in holders if holder in self.places]
        if not here:
            raise UnsupportedValueError(
                f"{self.entry}.{name}: a part of it lies with rank {', '.join(map(str, holders))} alone, which is not "
                "in the group that saves: save with a group (group=) whose processes hold all of it.",
                key=f"{self.entry}.{name}",
            )
        return here[number % len(here)]

    def _give_names(self) -> None:
        keys = sorted(self.cells, key=lambda key: (not key[0][0], key))  # what stays comes first
        files = [*self.whole, *map(self.cells.__getitem__, keys)]
        for number, file in enumerate(files, 1):
            file.name = data_file_name(self.entry) if len(files) == 1 else shard_name(self.entry, number, len(files))


def _is_whole(tensor: CapturedTensor) -> bool:
    """Whether one process alone can write it; what has no elements is written anywhere."""
    return tensor.sharding is None or 0 in tensor.shape


def _nbytes(tensors: Iterable[CapturedTensor]) -> int:
    return sum(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in tensors)


def _record(tensor: CapturedTensor) -> TensorRecord:
    """What the manifest says of a tensor, but for where it lies."""
    return TensorRecord(
        dtype=tensor.dtype, shape=tensor.shape, memory_format=tensor.memory_format, device=tensor.device
    )
