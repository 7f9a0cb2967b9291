"""One checkpoint that all processes of a group write: begun together at the call, finished in the background.

1. At the call all meet. Each says in checksums what it has; the coordinator makes the temporary directory.
2. Each copies its part, and writes it when the training goes on. What it wrote it reports to the coordinator.
3. When all have reported, the coordinator writes the manifest, commits, and tells how that went.

Nothing is committed unless all have written their parts durably and nobody has given up waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from holdfast.checkpoint import Checkpoint
from holdfast.distributed.agreement import Description, compare, describe, in_detail, refuse_differences
from holdfast.distributed.committing import forget
from holdfast.distributed.cuts import Cuts, Structure, Way
from holdfast.distributed.group import Group
from holdfast.distributed.planning import SharedPlan, plan_files
from holdfast.distributed.replicas import authoritative
from holdfast.distributed.share import Links, SharedSave
from holdfast.format.names import RANKS_ENTRY
from holdfast.part import About, Identity
from holdfast.state.capture import CapturedEntry
from holdfast.state.per_rank import fold, per_rank_entries
from holdfast.storage.store import PendingCheckpoint, Store


class _Begun(msgspec.Struct, frozen=True):
    """What the coordinator made, and what all have to know.

    Attributes:
        directory: where to write.
        checkpoint_id: of the checkpoint to be.
        created_at: likewise.
        ways: the ways in which processes know tensors to be cut, each different list once; None where they are as
            they were at the last save.
        differing: entries that differ, and have to be compared; nothing was made.
    """

    directory: str = ""
    checkpoint_id: str = ""
    created_at: str = ""
    ways: tuple[tuple[Way, ...], ...] | None = None
    differing: tuple[str, ...] = ()


class SharedSaves:
    """Makes the saves of a run that several processes write.

    Args:
        group: the processes.
        members: by rank in the group, the rank that meshes know a process by.
        store: the run's.
        state: the live objects.
        last: the checkpoint of this run that they were restored from.
        share_unchanged: link the files of frozen tensors that are what they were.
    """

    def __init__(
        self,
        group: Group,
        members: Sequence[int],
        store: Store,
        state: Mapping[str, Any],
        *,
        last: Checkpoint | None = None,
        share_unchanged: bool = True,
    ) -> None:
        self.group = group
        self.members = members
        self.store = store
        self.exempt = authoritative(state)
        self._state = state
        self._number = 0
        self._begun = 0  # the last that all began
        self._structure: Structure | None = None
        self._digest = ""
        self._ways: dict[int, tuple[Way, ...]] = {}  # by rank, for the coordinator
        self._plan: SharedPlan | None = None
        self._compared = False
        self._links = Links(last, share_unchanged=share_unchanged)

    def begin(self, capture: Callable[[], Mapping[str, CapturedEntry]], about: About) -> SharedSave:
        """Begin a save, together. Blocks until all processes are here.

        Raises:
            RankError: a process cannot take part.
            RankTimeoutError: one did not come.
            RanksDifferError: what should be alike differs; it names keys and ranks.
        """
        captured: Mapping[str, CapturedEntry] = {}
        common: dict[str, CapturedEntry] = {}
        description, failure = None, None
        self._number += 1
        try:
            captured = fold(capture(), per_rank_entries(self._state), self.group.rank, self.group.size)
            common = {entry: content for entry, content in captured.items() if entry != RANKS_ENTRY}
            ways = self._look_at(common)
            description = describe(common, self._digest, ways, self.exempt, thorough=not self._compared)
        except Exception as error:  # noqa: BLE001 - all raise it
            failure = error
        what = f"saving step {about.step}"
        pending: list[PendingCheckpoint] = []

        def decide(said: list[Any]) -> _Begun:
            descriptions = [msgspec.convert(other, Description) for other in said]
            differing = compare(descriptions)
            if differing:
                return _Begun(differing=tuple(differing))
            pending.append(self.store.create(about.step))
            identity = Identity()
            return _Begun(pending[0].name, identity.checkpoint_id, identity.created_at, self._all_ways(descriptions))

        try:
            told = self.group.agree(what, description, decide, failure=failure)
        except BaseException:
            for made in pending:
                made.abort()
            raise
        begun = msgspec.convert(msgspec.to_builtins(told), _Begun)
        if begun.differing:
            self._tell_differences(common, begun.differing, what)
        self._compared = True
        if self.group.is_coordinator and self._begun:  # nobody is at the save before any more
            forget(self.group, self._begun)
        self._begun = self._number
        identity = Identity(begun.checkpoint_id, begun.created_at)
        save = SharedSave(self.group, self.store, self._links, self._number, about, identity, captured)
        save.take_part(lambda: self._planned(common, begun.ways), begun.directory, pending)
        return save

    def _tell_differences(self, common: Mapping[str, CapturedEntry], entries: Sequence[str], what: str) -> None:
        """Raise, on all, what differs in some entries: RanksDifferError."""
        told, failure = None, None
        try:
            told = in_detail(common, entries, self.exempt, thorough=not self._compared)
        except Exception as error:  # noqa: BLE001 - all raise it
            failure = error
        self.group.agree(f"comparing what {what} is to save", told, refuse_differences, failure=failure)

    def _planned(self, common: Mapping[str, CapturedEntry], ways: Sequence[Sequence[Way]] | None) -> SharedPlan:
        if ways is not None:
            assert self._structure is not None
            cuts = Cuts(self._structure, ways)
            self._plan = plan_files(common, cuts, self.group.rank, self.members, self.exempt)
        assert self._plan is not None
        return self._plan

    def _look_at(self, common: Mapping[str, CapturedEntry]) -> list[Way] | None:
        """Learn what there is to save: the ways in which it is cut, where that or anything about it has changed."""
        structure = Structure(common)
        same = structure == self._structure and self._plan is not None
        self._structure = structure  # even so: it knows the tensors of this save by their addresses
        if same:
            return None
        self._plan = None
        self._digest = structure.digest()
        return structure.ways

    def _all_ways(self, descriptions: Sequence[Description]) -> tuple[tuple[Way, ...], ...] | None:
        """For the coordinator: the ways of all, where one has others than at the last save."""
        told = {rank: other.ways for rank, other in enumerate(descriptions) if other.ways is not None}
        if not told:
            return None
        self._ways.update(told)
        return tuple(dict.fromkeys(self._ways[rank] for rank in sorted(self._ways)))
