"""Tensors that stay what they are from save to save: they lie in files of their own, which the next save links.

What is expected to stay, and what really did, are two questions. Expected are parameters that take no gradients, and
tensors that nobody seems to have written to since the last save: same address, same version counter. That is a guess,
and a wrong one costs nothing but time. Whether a file may stand for a tensor is decided by its checksums alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.checkpoint import Checkpoint
from holdfast.format.records import FileRecord
from holdfast.state.capture import CapturedEntry, CapturedTensor
from holdfast.state.image import StateImage
from holdfast.state.plan import FilePlan, Plan, Planner, in_files
from holdfast.state.tensors import tensor_version

MIN_GROUP_BYTES = 2**20
"""Less than this is not worth a file of its own."""
MIN_RESTING_BYTES = 64 * 2**10
"""Smaller tensors are not looked at for having come to rest: there may be many, and they would save little."""
MAX_GROUPS = 8
"""More files than this are not made of one entry, however one tensor after the other comes to rest."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a committed checkpoint that another may link: where it is, and what it holds."""

    checkpoint: str
    file: str
    record: FileRecord


@dataclass(slots=True)
class _Entry:
    """What is known of one entry."""

    groups: list[frozenset[str]] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    files: dict[frozenset[str], Source] = field(default_factory=dict)


class Unchanged:
    """Remembers what stood still, over the saves of one run.

    Args:
        resumed: the checkpoint that the live objects were restored from: what it stored apart may be linked again.
    """

    def __init__(self, resumed: Checkpoint | None = None) -> None:
        self._entries: dict[str, _Entry] = {}
        if resumed is not None:
            self._remember(resumed)

    def settle(self, captured: Mapping[str, CapturedEntry], planner: Planner) -> tuple[Plan, dict[str, Source]]:
        """Plan a save, and find what of it lies on the disk already.

        Blocks as long as it takes to read, in memory, what is expected to be unchanged.

        Returns:
            The plan, and for those of its files that a file of the last checkpoint can stand for, that file.
        """
        for entry, content in captured.items():
            self._look(self._entries.setdefault(entry, _Entry()), content)
        verified: dict[tuple[str, frozenset[str]], Source] = {}
        while True:
            plan = planner.plan(captured, {entry: tuple(self._entries[entry].groups) for entry in captured})
            wrong = False
            for file in plan.files:
                source = self._source(file)
                if source is None or (file.entry, file.names) in verified:
                    continue
                image = StateImage(file.layout, file.tensors(captured))
                found = image.digests(source.record.chunk_bytes)
                if found == source.record.xxh3_128:
                    verified[file.entry, file.names] = source
                else:
                    self._note_moved(file, source, found)
                    wrong = True
            if not wrong:  # else what moved goes to another file, which changes the plan
                sources = {file.name: verified.get((file.entry, file.names)) for file in plan.files if file.still}
                return plan, {name: source for name, source in sources.items() if source is not None}

    def _source(self, plan: FilePlan) -> Source | None:
        """The file of the last checkpoint that may hold what ``plan`` is to hold, by the size of it."""
        source = self._entries[plan.entry].files.get(plan.names) if plan.still else None
        return source if source is not None and source.record.bytes == plan.layout.nbytes else None

    def _note_moved(self, plan: FilePlan, source: Source, found: Sequence[str]) -> None:
        """Take out of its group whatever has bytes in a chunk that differs: it is not expected to stay any more."""
        size = source.record.chunk_bytes
        differing = {index for index, (a, b) in enumerate(zip(found, source.record.xxh3_128, strict=True)) if a != b}
        moved = {
            tensor.name
            for tensor in plan.layout.tensors
            if not differing.isdisjoint(range(tensor.begin // size, (tensor.begin + tensor.nbytes - 1) // size + 1))
        }
        known = self._entries[plan.entry]
        known.moved |= moved or plan.names  # a header that differs: nothing of it is what it was
        known.groups = [group for group in (group - known.moved for group in known.groups) if group]

    def committed(self, plan: Plan, checkpoint: Checkpoint) -> None:
        """Take ``checkpoint`` for the one whose files the next save may link."""
        for known in self._entries.values():
            known.files = {}
        for file in plan.files:
            if file.still:
                self._entries[file.entry].files[file.names] = Source(
                    checkpoint.name, file.name, checkpoint.files[file.name]
                )

    def _look(self, known: _Entry, content: CapturedEntry) -> None:
        """Make a group of what has come to rest since the last look."""
        known.groups = [group for group in known.groups if group <= content.tensors.keys()]
        seen, known.seen = known.seen, {}
        still = set()
        for name, tensor in content.tensors.items():
            if tensor.frozen:
                still.add(name)
            elif tensor.value.nbytes >= MIN_RESTING_BYTES:
                now = known.seen[name] = _state_of(tensor)
                if seen.get(name) == now:
                    still.add(name)
        still -= known.moved.union(*known.groups)
        nbytes = sum(content.tensors[name].value.nbytes for name in still)
        if nbytes >= MIN_GROUP_BYTES and len(known.groups) < MAX_GROUPS:
            known.groups.append(frozenset(still))

    def _remember(self, checkpoint: Checkpoint) -> None:
        manifest = checkpoint.manifest
        for entry, records in manifest.tensors.items():
            if any(len(record.pieces) != 1 for record in records.values()):
                continue  # several processes saved it: its files are theirs, whatever stood still
            names: dict[str, set[str]] = {}
            for name, record in records.items():
                names.setdefault(record.pieces[0].file, set()).add(name)
            if len(in_files(records)) > 1:
                continue  # there are several because they are many
            # What may have moved lies in the last file. Where there is one file only, all of it may stand still.
            files = sorted(names)[: max(1, len(names) - 1)]
            known = _Entry()
            for file in files:
                group = frozenset(names[file])
                known.files[group] = Source(checkpoint.name, file, manifest.files[file])
                if len(names) > 1:
                    known.groups.append(group)
            self._entries[entry] = known


def _state_of(tensor: CapturedTensor) -> tuple[int, int]:
    return tensor.address, tensor_version(tensor.value)
