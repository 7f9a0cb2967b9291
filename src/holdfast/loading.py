"""One checkpoint read: into new values, or into live objects."""

from __future__ import annotations

import fnmatch
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from holdfast.checkpoint import Checkpoint, open  # noqa: A004 - the public name
from holdfast.collector import collector_paused
from holdfast.errors import UsageError
from holdfast.format import tree
from holdfast.state.leaves import SavedArray, SavedLeaves, SavedTensor, fill, map_leaves
from holdfast.state.ranks import SavedRanks, decoded
from holdfast.state.report import RestoreReport
from holdfast.state.restore import restore_state

_ABSENT = object()


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    only: str | Iterable[str] | None = None,
    mmap: bool = False,
    rank: int | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into new values, nested as they were saved. Blocks; every byte is verified.

    A module comes back as the dictionary of its tensors, an optimizer as its state by parameter name. To continue a
    training, use :func:`restore`. No code or import is chosen by the checkpoint.

    Args:
        path: the directory of one checkpoint.
        device: where the tensors are put.
        only: one or more patterns, such as ``"model"``, ``"model/*"`` or ``"*/fc.weight"``; only the parts of the
            files that hold what matches are read. What does not match is left out.
        mmap: give tensors that lie in the files, which are read when somebody looks at them. **Nothing is verified**:
            a damaged byte goes unnoticed (``holdfast.open(path).verify()`` looks for one), and where the disk fails,
            or somebody cuts a file short, looking at a tensor kills the process (SIGBUS). Writing to a tensor changes
            a private copy, never the file. Tensors come in logical order, whatever their memory format was.
        rank: give also the entries that each rank kept for itself (generators, places in the data), as this one had
            them. They are left out by default.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: names file and tensors whose bytes are not those that were written.
        UsageError: a pattern matches nothing, or ``mmap`` is to give tensors elsewhere than on the CPU, or no ``rank``
            of this number saved it.
    """
    if mmap and torch.device(device).type != "cpu":
        raise UsageError(
            f"mmap=True gives tensors that lie in files; expected device='cpu', found {device!r}.", key="mmap"
        )
    with collector_paused():
        checkpoint = open(path)
        selection = _Selection(checkpoint, only)
        loaded = {}
        saved = {
            entry: decoded(checkpoint, entry, node, SavedLeaves(checkpoint, entry, device))
            for entry, node in checkpoint.manifest.state.items()
            if not entry.startswith("_")
        }
        if rank is not None:
            saved |= _values_of_rank(checkpoint, rank, device)
        for entry, whole in saved.items():
            value = selection.pruned(whole, entry, entry)
            if value is not _ABSENT:
                loaded[entry] = value
        selection.check()
        targets = _Targets(torch.device(device), map_leaves(checkpoint, _leaves(loaded)) if mmap else {})
        filled = {entry: targets.place(value) for entry, value in loaded.items()}
        fill(checkpoint, targets.copies, whole=only is None and not mmap)
    return filled


def restore(
    path: str | os.PathLike[str] | Checkpoint,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    generators: bool | None = None,
    only: Iterable[str] | None = None,
    override: Mapping[str, Any] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    per_rank: Literal["error", "reassign", "reseed"] = "error",
) -> RestoreReport:
    """Restore a checkpoint into live objects, in place. Blocks; every chunk is verified before its bytes are used.

    Where there are several processes, each calls it. Of tensors that are cut over them (``DTensor``), each fills what
    it holds, however they were cut when they were saved. Nothing is sent between them.

    The structure is compared before anything is touched. Tensors keep their identity and their device; plain values in
    ``state`` are replaced. Entries of the checkpoint that are not in ``state`` are left out and listed in the report.

    Args:
        path: the directory of one checkpoint, or the checkpoint.
        state: names to live objects, as they were given to :func:`save`.
        strict: refuse when a name is missing, unexpected, or of another shape or dtype. Otherwise restore what
            matches, convert dtypes, and report the rest; an object of which nothing matches is refused even so.
        generators: whether the global random-number generators are restored too, last. By default they are, unless
            ``only`` is given.
        only: the entries to restore, such as ``["model"]``; everything by default.
        override: values to set afterwards, by path: ``{"optimizer.lr": 1e-4}`` for all groups of an optimizer,
            ``"optimizer.param_groups[1].weight_decay"`` for one, ``"scheduler.T_max"`` for an attribute of a scheduler,
            ``"settings.temperature"`` for a plain value. With a learning rate, the schedulers of ``state`` are scaled
            by the same factor.
        rank: of this process; that of ``torch.distributed`` by default, 0 where that is not initialized.
        world_size: how many processes restore; likewise, or 1.
        per_rank: what becomes of what each rank kept for itself (generators, places in the data), where another number
            of ranks saved it. ``"error"`` refuses; ``"reassign"`` gives rank r what rank r had, and seeds the
            generators of further ranks anew; ``"reseed"`` seeds all of them anew. New seeds follow from the checkpoint
            and the rank. What is not taken over and is no generator stays as it was constructed; the report says so.

    Returns:
        What was restored and what was not.

    Raises:
        StateMismatchError: live objects and checkpoint differ, or the number of ranks does; nothing was touched.
        CorruptCheckpointError: damage was found while reading; live tensors may hold a mixture now.
        CheckpointNotFoundError: there is none.
        UsageError: ``only`` or ``override`` names what is not there; nothing was touched.
    """
    with collector_paused():
        place = _place(rank, world_size)
        checkpoint = path if isinstance(path, Checkpoint) else open(path)
        return restore_state(
            checkpoint,
            state,
            strict=strict,
            generators=only is None if generators is None else generators,
            only=None if only is None else chosen_entries(checkpoint, state, only),
            override=override,
            rank=place[0],
            world_size=place[1],
            per_rank=per_rank,
        )


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Which of how many processes this is."""
    if rank is None and world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise UsageError(
            f"rank={rank!r}, world_size={world_size!r}: expected both, the rank counted from 0, or neither.", key="rank"
        )
    return rank, world_size


def _values_of_rank(checkpoint: Checkpoint, rank: int, device: str | torch.device) -> dict[str, Any]:
    """The entries of the user's that each rank kept for itself, as one rank had them."""
    ranks = SavedRanks.of(checkpoint)
    world_size = 0 if ranks is None else ranks.world_size
    if ranks is None or not 0 <= rank < world_size:
        raise UsageError(
            f"rank={rank}: expected one of the ranks that saved {checkpoint.path} and kept something for themselves; "
            f"there are {world_size}, counted from 0.",
            key="rank",
        )
    return {entry: value for entry, value in ranks.values(rank, device).items() if not entry.startswith("_")}


def chosen_entries(checkpoint: Checkpoint, state: Mapping[str, Any], only: Iterable[str]) -> frozenset[str]:
    """The entries that are to be restored; UsageError where a name of ``only`` is not in both."""
    names = [only] if isinstance(only, str) else list(only)
    ranks = SavedRanks.of(checkpoint)
    every = [*checkpoint.manifest.state, *(() if ranks is None else sorted(ranks.entries))]
    saved = [entry for entry in every if not entry.startswith("_")]
    for name in names:
        if name not in state or name not in saved:
            raise UsageError(
                f"only={name!r}: expected entries that both have; the state has {', '.join(state)}, and "
                f"{checkpoint.path} has {', '.join(saved)}.",
                key=name,
            )
    return frozenset(names)


class _Selection:
    """Which leaves of a state match the patterns of ``only``."""

    def __init__(self, checkpoint: Checkpoint, only: str | Iterable[str] | None) -> None:
        self._checkpoint = checkpoint
        self._patterns = None if only is None else [only] if isinstance(only, str) else list(only)
        self._matched: set[str] = set()

    def pruned(self, value: Any, entry: str, path: str) -> Any:
        """``value`` without the leaves that do not match; ``_ABSENT`` when nothing is left."""
        if self._patterns is None or self._matches(entry, path):
            return value
        if isinstance(value, dict):
            items = {key: self.pruned(item, entry, tree.child(path, key)) for key, item in value.items()}
            kept = {key: item for key, item in items.items() if item is not _ABSENT}
            return kept or _ABSENT
        if type(value) in (list, tuple):
            parts = [self.pruned(item, entry, f"{path}[{index}]") for index, item in enumerate(value)]
            # Positions stay what they were: what does not match leaves a None.
            return (
                _ABSENT if all(p is _ABSENT for p in parts) else type(value)(None if p is _ABSENT else p for p in parts)
            )
        return _ABSENT

    def check(self) -> None:
        """Refuse patterns that matched nothing."""
        for pattern in self._patterns or ():
            if pattern not in self._matched:
                entries = ", ".join(entry for entry in self._checkpoint.manifest.state if not entry.startswith("_"))
                raise UsageError(
                    f"only={pattern!r} matches nothing in {self._checkpoint.path}; its entries are: {entries}.",
                    key=pattern,
                )

    def _matches(self, entry: str, path: str) -> bool:
        inner = path[len(entry) :].removeprefix(".")
        name = f"{entry}/{inner}" if inner else entry
        found = [
            pattern
            for pattern in self._patterns or ()
            if fnmatch.fnmatchcase(name, pattern) or pattern.removesuffix("/*") == name
        ]
        self._matched.update(found)
        return bool(found)


def _leaves(value: Any) -> Iterator[SavedTensor | SavedArray]:
    """The saved tensors and arrays in a decoded value."""
    if isinstance(value, (SavedTensor, SavedArray)):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            yield from _leaves(item)


class _Targets:
    """Makes a new tensor or array for each saved one that is not made yet; tied ones get one and the same."""

    def __init__(self, device: torch.device, made: dict[str, Any]) -> None:
        self._device = device
        self._made = made
        self.copies: list[tuple[SavedTensor | SavedArray, Any]] = []

    def place(self, value: Any) -> Any:
        """``value`` with new tensors in place of saved ones, to be filled by ``copies``."""
        # Most values are in lists and dictionaries, and there may be half a million: these come first.
        kind = type(value)
        if kind is list:
            return [self.place(item) for item in value]
        if kind is tuple:
            return tuple(self.place(item) for item in value)
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = self.place(item)
        elif isinstance(value, SavedTensor):
            return self._make(value, lambda: value.new(self._device))
        elif isinstance(value, SavedArray):
            return self._make(value, value.new)
        elif isinstance(value, deque):
            for index, item in enumerate(value):
                value[index] = self.place(item)
        return value

    def _make(self, saved: SavedTensor | SavedArray, new: Callable[[], Any]) -> Any:
        if saved.key not in self._made:
            self._made[saved.key] = new()
            self.copies.append((saved, self._made[saved.key]))
        return self._made[saved.key]
