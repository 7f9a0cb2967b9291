"""Which data file each captured tensor goes to, and where in it. Made once for a structure, and used again."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from holdfast.format import safetensors
from holdfast.format.dtypes import DTYPES
from holdfast.format.names import data_file_name, index_name, shard_name
from holdfast.format.records import Piece, TensorRecord
from holdfast.format.safetensors import Layout
from holdfast.state.capture import CapturedEntry, CapturedTensor

Groups = Mapping[str, Sequence[frozenset[str]]]
"""By entry, the names of tensors that get files of their own: those that are expected to stay what they are."""

MAX_TENSORS_A_FILE = 45_000
"""The header of a file names them all, and readers take no header that is too long: of more there are more files."""
MAX_NAMES_BYTES = 8 * 2**20
"""Likewise, of all their names together; names that are not plain ASCII count three times."""
_NO_ID = "0" * 32
_ID_KEY = "holdfast_checkpoint_id"
_ID_AT = len(b"12345678" + b'{"__metadata__":{"holdfast_checkpoint_id":"')


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One data file.

    Attributes:
        name: what it is called.
        entry: whose tensors it holds.
        names: which.
        layout: where everything lies in it.
        still: whether its tensors are expected to stay what they are. Its bytes say nothing of the checkpoint then, so
            that the next one can have the same file.
    """

    name: str
    entry: str
    names: frozenset[str]
    layout: Layout
    still: bool

    def tensors(self, captured: Mapping[str, CapturedEntry]) -> Mapping[str, CapturedTensor]:
        """Its tensors, of what was captured."""
        found = captured[self.entry].tensors
        return found if len(found) == len(self.names) else {name: found[name] for name in self.names}

    def stamped(self, checkpoint_id: str) -> Layout:
        """The layout, its header naming the checkpoint to which the file belongs."""
        if self.still:
            return self.layout
        prefix = self.layout.prefix
        stamped = prefix[:_ID_AT] + checkpoint_id.encode() + prefix[_ID_AT + len(_NO_ID) :]
        return dataclasses.replace(self.layout, prefix=stamped)


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of a checkpoint.

    Attributes:
        files: those with data.
        indexes: by name, the contents of those that say which tensor lies in which file.
        records: for the manifest: by entry and name, what each tensor is and where it lies.
    """

    files: tuple[FilePlan, ...]
    indexes: dict[str, bytes]
    records: dict[str, dict[str, TensorRecord]]


class Planner:
    """Makes plans, and keeps the last one: most saves have the structure of the one before."""

    def __init__(self) -> None:
        self._last: tuple[object, Plan] | None = None

    def plan(self, captured: Mapping[str, CapturedEntry], groups: Groups | None = None) -> Plan:
        """The plan for what was captured, those of ``groups`` in files of their own."""
        groups = {} if groups is None else groups
        structure = _structure(captured, groups)
        last = self._last
        if last is not None and last[0] == structure:
            return last[1]
        made = _make(captured, groups)
        self._last = structure, made
        return made


def _structure(captured: Mapping[str, CapturedEntry], groups: Groups) -> object:
    """Everything that a plan depends on."""
    return [
        (
            entry,
            [(item.name, item.shape, item.dtype, item.device, item.memory_format) for item in content.tensors.values()],
            content.aliases,
            list(groups.get(entry, ())),
        )
        for entry, content in captured.items()
    ]


def _make(captured: Mapping[str, CapturedEntry], groups: Groups) -> Plan:
    files: list[FilePlan] = []
    indexes: dict[str, bytes] = {}
    records: dict[str, dict[str, TensorRecord]] = {}
    for entry, content in captured.items():
        own = _files(entry, content, groups.get(entry, ()))
        files += own
        layouts = {file.name: file.layout for file in own}
        records[entry] = records_of(content, layouts)
        if len(own) > 1:
            indexes[index_name(entry)] = index_of(layouts, content.aliases)
    return Plan(tuple(files), indexes, records)


def _files(entry: str, content: CapturedEntry, groups: Sequence[frozenset[str]]) -> list[FilePlan]:
    rest = frozenset(content.tensors).difference(*groups)
    parts = [
        (part, still)
        for group, still in [*((group, True) for group in groups), (rest, False)]
        for part in in_files(name for name in content.tensors if name in group)
    ]
    names = (
        [data_file_name(entry)]
        if len(parts) == 1
        else [shard_name(entry, number, len(parts)) for number in range(1, len(parts) + 1)]
    )
    return [
        FilePlan(name, entry, part, layout_of(content, part, still), still)
        for name, (part, still) in zip(names, parts, strict=True)
    ]


def in_files(names: Iterable[str]) -> list[frozenset[str]]:
    """The names of tensors, no more of them together than a file may hold."""
    files: list[list[str]] = []
    left_bytes = 0
    for name in names:
        written = msgspec.json.encode(name)
        nbytes = len(written) if written.isascii() and b"\\" not in written else 3 * len(written)
        if not files or len(files[-1]) >= MAX_TENSORS_A_FILE or nbytes > left_bytes:
            files.append([])
            left_bytes = MAX_NAMES_BYTES
        files[-1].append(name)
        left_bytes -= nbytes
    return [frozenset(file) for file in files]


def layout_of(content: CapturedEntry, names: Container[str], still: bool) -> Layout:
    """How a file of some tensors of an entry is laid out, with what this process holds of each."""
    stored = []
    for name, tensor in content.tensors.items():
        if name in names:
            dtype = DTYPES[tensor.dtype]
            held = tensor.shape if 0 in tensor.shape else tuple(tensor.value.shape)
            stored.append((name, dtype.code, dtype.stored_shape(held)))
    # Tied names go into the metadata as safetensors.torch.save_model writes them, so that load_model ties them again.
    aliases = {alias: name for alias, name in content.aliases.items() if name in names}
    own = {"format": "pt"} if still else {_ID_KEY: _NO_ID, "format": "pt"}
    return safetensors.plan(stored, {**own, **{alias: name for alias, name in aliases.items() if alias not in own}})


def records_of(content: CapturedEntry, layouts: Mapping[str, Layout]) -> dict[str, TensorRecord]:
    """The records of those tensors of an entry that lie whole in files laid out like this."""
    records = {}
    places = {tensor.name: (file, tensor.begin) for file, layout in layouts.items() for tensor in layout.tensors}
    for name, tensor in content.tensors.items():
        if name in places:
            file, begin = places[name]
            records[name] = TensorRecord(
                dtype=tensor.dtype,
                shape=tensor.shape,
                pieces=(Piece(file=file, name=name, begin=begin, shape=tensor.shape),),
                memory_format=tensor.memory_format,
                device=tensor.device,
            )
    return records


def index_of(layouts: Mapping[str, Layout], aliases: Mapping[str, str]) -> bytes:
    """``*.safetensors.index.json`` as transformers writes it and reads it."""
    places = {tensor.name: file for file, layout in layouts.items() for tensor in layout.tensors}
    places |= {alias: places[name] for alias, name in aliases.items()}
    total = sum(tensor.nbytes for layout in layouts.values() for tensor in layout.tensors)
    return msgspec.json.encode({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
