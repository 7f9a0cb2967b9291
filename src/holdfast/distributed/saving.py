"""One checkpoint that all processes of a group write: begun together at the call, finished in the background.

1. At the call all meet. Each says in checksums what it has; the coordinator makes the temporary directory.
2. Each copies its part, and writes it when the training goes on. What it wrote it reports to the coordinator.
3. When all have reported, the coordinator writes the manifest, commits, and tells how that went.

Nothing is committed unless all have written their parts durably and nobody has given up waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from holdfast.checkpoint import Checkpoint, open, reopen_checkpoint  # noqa: A004 - the public name
from holdfast.distributed.agreement import Description, compare, describe, in_detail, refuse_differences
from holdfast.distributed.cuts import Cuts, Structure, Way
from holdfast.distributed.group import Group, again
from holdfast.distributed.messages import Failure, Mailbox, rank_error
from holdfast.distributed.planning import SharedPlan, plan_files
from holdfast.distributed.replicas import authoritative
from holdfast.errors import CheckpointNotFoundError, RankError, RankTimeoutError
from holdfast.format import manifest as manifests
from holdfast.format.names import RANKS_ENTRY, shard_name
from holdfast.format.records import FileRecord, TensorRecord
from holdfast.part import About, Contents, Costs, Identity, Part, commit
from holdfast.state.capture import CapturedEntry
from holdfast.state.image import StateImage
from holdfast.state.per_rank import fold, per_rank_entries
from holdfast.state.plan import FilePlan, Plan, layout_of, records_of
from holdfast.state.staging import Staging
from holdfast.state.unchanged import Source
from holdfast.storage.arena import Arena
from holdfast.storage.store import PendingCheckpoint, Store

Open = Callable[[], Checkpoint]
"""Opens a checkpoint that another process committed."""
_PAUSE_S = 0.05
_COMMIT, _GIVEN_UP = "commit", "given up"


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


class _Report(msgspec.Struct, frozen=True):
    """What a process wrote.

    Attributes:
        files: its files.
        own: the records of what is kept for this process alone.
        aliases: the same tensors under other names.
        begins: by entry and name of a tensor that is not cut evenly, and by file, where its piece begins.
        failure: why it has written nothing.
    """

    files: dict[str, FileRecord] = {}
    own: dict[str, TensorRecord] = {}
    aliases: dict[str, str] = {}
    begins: dict[str, dict[str, dict[str, int]]] = {}
    failure: Failure | None = None


class _Outcome(msgspec.Struct, frozen=True):
    """Under which name it was committed, or why it was not."""

    name: str = ""
    failure: Failure | None = None
    ranks: tuple[int, ...] = ()


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
        self._share_unchanged = share_unchanged
        self._number = 0
        self._structure: Structure | None = None
        self._digest = ""
        self._ways: dict[int, tuple[Way, ...]] = {}  # by rank, for the coordinator
        self._plan: SharedPlan | None = None
        self._compared = False
        self._linkable: dict[str, Source] = {}
        if last is not None and share_unchanged:
            self._linkable = {name: Source(last.name, name, record) for name, record in last.files.items()}

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

        begun = msgspec.convert(
            msgspec.to_builtins(self.group.agree(what, description, decide, failure=failure)), _Begun
        )
        if begun.differing:
            told = in_detail(common, begun.differing, self.exempt, thorough=not self._compared)
            self.group.agree(f"comparing what {what} is to save", told, refuse_differences)
        self._compared = True
        if self.group.is_coordinator and self._number > 1:  # nobody is at the save before any more
            last = self._number - 1
            self.group.forget([f"save/{last}/{key}" for key in (*range(self.group.size), "verdict", "outcome")])
        identity = Identity(begun.checkpoint_id, begun.created_at)
        save = SharedSave(self, self._number, about, identity, captured)
        save.take_part(lambda: self._planned(common, begun.ways), begun.directory, pending)
        return save

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
        if structure == self._structure and self._plan is not None:
            return None
        self._structure, self._plan = structure, None
        self._digest = structure.digest()
        return structure.ways

    def _all_ways(self, descriptions: Sequence[Description]) -> tuple[tuple[Way, ...], ...] | None:
        """For the coordinator: the ways of all, where one has others than at the last save."""
        told = {rank: other.ways for rank, other in enumerate(descriptions) if other.ways is not None}
        if not told:
            return None
        self._ways.update(told)
        return tuple(dict.fromkeys(self._ways[rank] for rank in sorted(self._ways)))

    def sources(self, plan: Plan) -> dict[str, Source]:
        """By name, the file of the checkpoint before that a file with frozen tensors may be linked to."""
        if not self._share_unchanged:
            return {}
        return {
            file.name: self._linkable[file.name]
            for file in plan.files
            if file.still
            and file.name in self._linkable
            and self._linkable[file.name].record.bytes == file.layout.nbytes
        }

    def committed(self, name: str, files: Mapping[str, FileRecord]) -> None:
        """Take checkpoint ``name`` for the one whose files the next save may link; ``files`` are this process's."""
        self._linkable = {file: Source(name, file, record) for file, record in files.items()}


class SharedSave:
    """A save under way, as :class:`holdfast.saving.Save` is one."""

    def __init__(
        self,
        saves: SharedSaves,
        number: int,
        about: About,
        identity: Identity,
        captured: Mapping[str, CapturedEntry],
    ) -> None:
        self.costs = Costs()
        self._saves = saves
        self._group = saves.group
        self._number = number
        self._about = about
        self._identity = identity
        self._captured = captured
        self._contents = Contents.of({entry: content for entry, content in captured.items() if entry != RANKS_ENTRY})
        self._own = captured[RANKS_ENTRY]
        self._own_records: dict[str, TensorRecord] = {}
        self._part: Part | None = None
        self._failure: Exception | None = None
        self._what = f"saving step {about.step}"

    def take_part(self, plan: Callable[[], SharedPlan], directory: str, pending: Sequence[PendingCheckpoint]) -> None:
        """Prepare what this process writes. What fails in it is raised by all, when the save has ended.

        Args:
            plan: makes the plan.
            directory: where to write, made by the coordinator.
            pending: on the coordinator, what it made.
        """
        try:
            place = pending[0] if pending else self._joined(directory)
            self._plan = plan()
            own = _own_file(self._own, self._group.rank, self._group.size)
            self._own_records = records_of(self._own, {own.name: own.layout})
            self._mine = Plan((*self._plan.mine.files, own), self._plan.mine.indexes, {})
            sources = self._unchanged(self._mine, self._captured)
            self._part = Part(place, self._mine, sources, self._captured, self._identity.checkpoint_id)
            self.costs = self._part.costs
        except Exception as error:  # noqa: BLE001 - reported, and raised by all
            self._failure = error
            if pending:
                pending[0].abort()
        self._captured = {}

    def stage(self, arena: Arena, late: Container[int] = ()) -> Staging:
        """See :meth:`holdfast.part.Part.stage`."""
        if self._part is None:
            return Staging({}, arena, late)
        return self._part.stage(arena, late)

    def copy_rest(self) -> None:
        """See :meth:`holdfast.part.Part.copy_rest`. Where it fails, the save fails, for all."""
        if self._part is not None:
            try:
                self._part.copy_rest()
            except Exception as error:  # noqa: BLE001 - reported, and raised by all
                self._failure = error

    def finish(self, names: Iterable[str]) -> Checkpoint | Open:
        """Write, report, and wait until it is known how the save went. Blocks; sends no more than a few messages.

        Returns:
            The checkpoint; where another process committed it, what opens it.

        Raises:
            RankError: a process could not do its part; nothing was committed.
            RankTimeoutError: a process did not report.
        """
        mailbox = self._group.mailbox()
        report = self._report()
        try:
            mailbox.send(f"save/{self._number}/{self._group.rank}", report)
            if report.failure is not None:
                mailbox.settle(self._key("verdict"), _GIVEN_UP)
            if self._group.is_coordinator:
                return self._commit(mailbox, names)
            return self._learn(mailbox, report)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give it up. What this process wrote is removed by the coordinator, if that lives."""
        if self._part is not None:
            self._part.pending.abort()

    # ------------------------------------------------------------------------------------------------- this process

    def _joined(self, directory: str) -> PendingCheckpoint:
        """The directory that the coordinator made: it may take a moment until another machine sees it."""
        deadline_s = time.monotonic() + self._group.timeout_s
        while True:
            try:
                return self._saves.store.join(directory)
            except CheckpointNotFoundError as error:
                if time.monotonic() >= deadline_s:
                    raise RankTimeoutError(
                        f"{error} It was made by rank 0: all processes of the group have to write to one directory of "
                        "a file system that they share.",
                        ranks=[self._group.rank],
                    ) from error
            time.sleep(_PAUSE_S)

    def _unchanged(self, plan: Plan, captured: Mapping[str, CapturedEntry]) -> dict[str, Source]:
        """Files with frozen tensors that hold what the last checkpoint's hold."""
        found = self._saves.sources(plan)
        return {
            file.name: found[file.name]
            for file in plan.files
            if file.name in found
            and StateImage(file.layout, file.tensors(captured)).digests(found[file.name].record.chunk_bytes)
            == found[file.name].record.xxh3_128
        }

    def _report(self) -> _Report:
        try:
            if self._failure is not None:
                raise self._failure
            assert self._part is not None
            files = self._part.write()
            if not self._group.is_coordinator:
                self._part.pending.leave()
        except Exception as error:  # noqa: BLE001 - raised by all
            return _Report(failure=Failure.of(self._group.rank, error))
        begins: dict[str, dict[str, dict[str, int]]] = {}
        for file in self._mine.files:
            for tensor in file.layout.tensors:
                if tensor.name in self._plan.loose.get(file.entry, ()):
                    begins.setdefault(file.entry, {}).setdefault(tensor.name, {})[file.name] = tensor.begin
        return _Report(files, self._own_records, self._own.aliases, begins)

    # ------------------------------------------------------------------------------------------------- all together

    def _commit(self, mailbox: Mailbox, names: Iterable[str]) -> Checkpoint:
        try:
            checkpoint = self._publish(mailbox, names)
        except Exception as error:
            mailbox.settle(self._key("verdict"), _GIVEN_UP)
            self.abort()
            failure = error
            if not isinstance(error, RankError):
                failure = rank_error(f"{self._what}: nothing was committed", [Failure.of(0, error)])
            outcome = _Outcome(failure=Failure.of(0, failure), ranks=getattr(failure, "ranks", ()))
            mailbox.send(self._key("outcome"), outcome)
            if failure is error:
                raise
            raise failure from error
        mailbox.send(self._key("outcome"), _Outcome(checkpoint.name))
        return checkpoint

    def _publish(self, mailbox: Mailbox, names: Iterable[str]) -> Checkpoint:
        keys = [f"save/{self._number}/{rank}" for rank in range(self._group.size)]
        reports = [msgspec.convert(report, _Report) for report in mailbox.receive_all(keys, self._what)]
        failures = [report.failure for report in reports if report.failure is not None]
        if failures:
            raise rank_error(f"{self._what}: nothing was committed", failures)
        if mailbox.settle(self._key("verdict"), _COMMIT) != _COMMIT:
            raise RankTimeoutError(f"{self._what}: a process gave up waiting for the others; nothing was committed")
        with self.costs.of("commit_s"):
            manifest = self._manifest(reports)
            assert self._part is not None
            name = commit(self._part.pending, names, manifest)
            checkpoint = reopen_checkpoint(self._saves.store, name, manifest)
        self.costs.bytes_written += len(manifest)
        self._saves.committed(name, reports[0].files)
        return checkpoint

    def _manifest(self, reports: Sequence[_Report]) -> bytes:
        tensors = {entry: dict(records) for entry, records in self._plan.mine.records.items()}
        for entry, loose in self._plan.loose.items():
            for name, pieces in loose.items():
                begins = {
                    file: begin
                    for report in reports
                    for file, begin in report.begins.get(entry, {}).get(name, {}).items()
                }
                tensors[entry][name] = pieces.placed(name, begins)
        tensors[RANKS_ENTRY] = {name: record for report in reports for name, record in report.own.items()}
        own = {alias: name for report in reports for alias, name in report.aliases.items()}
        contents = Contents(
            {**self._contents.trees, RANKS_ENTRY: self._own.tree},
            self._contents.aliases | ({RANKS_ENTRY: own} if own else {}),
        )
        return manifests.encode(
            contents.manifest(
                self._identity,
                self._about,
                tensors,
                {name: record for report in reports for name, record in report.files.items()},
                layouts=self._plan.layouts,
                world_size=self._group.size,
            )
        )

    def _learn(self, mailbox: Mailbox, report: _Report) -> Open:
        # The coordinator waits for the others as long as always, and then has to tell.
        try:
            found = mailbox.receive(self._key("outcome"), 0, self._what, 2 * mailbox.timeout_s)
        except RankTimeoutError:
            if mailbox.settle(self._key("verdict"), _GIVEN_UP) != _COMMIT:
                raise
            found = mailbox.receive(self._key("outcome"), 0, self._what)
        outcome = msgspec.convert(found, _Outcome)
        if outcome.failure is not None:
            raise again(outcome.failure, outcome.ranks) from self._failure
        self._saves.committed(outcome.name, report.files)
        path = os.path.join(self._saves.store.path, outcome.name)
        return lambda: open_elsewhere(path, self._identity.checkpoint_id, self._group.timeout_s)

    def _key(self, name: str) -> str:
        return f"save/{self._number}/{name}"


def _own_file(own: CapturedEntry, rank: int, size: int) -> FilePlan:
    """The file of what is kept for one process."""
    names = frozenset(own.tensors)
    return FilePlan(shard_name(RANKS_ENTRY, rank + 1, size), RANKS_ENTRY, names, layout_of(own, names, False), False)


def open_elsewhere(path: str, checkpoint_id: str, timeout_s: float) -> Checkpoint:
    """A checkpoint that another process committed: it may take a moment until another machine sees it.

    Raises:
        RankTimeoutError: it did not come to be seen.
        CorruptCheckpointError, StorageError: it cannot be read.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            checkpoint = open(path)
            if checkpoint.checkpoint_id == checkpoint_id:
                return checkpoint
            found = f"it has the id {checkpoint.checkpoint_id}, expected {checkpoint_id}"
        except CheckpointNotFoundError as error:
            found = str(error)
        if time.monotonic() >= deadline_s:
            raise RankTimeoutError(
                f"rank 0 sees {path}, and this process did not within {timeout_s:g} s: {found}. All processes of the "
                "group have to see one file system.",
                path=path,
            )
        time.sleep(_PAUSE_S)
