"""What one process does of a save that several make together: it writes its part, and reports it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from holdfast.checkpoint import Checkpoint, reopen_checkpoint
from holdfast.company import Open
from holdfast.distributed.committing import Ending, Report, open_elsewhere, seen_in_time
from holdfast.distributed.group import Group
from holdfast.distributed.messages import Failure
from holdfast.distributed.planning import SharedPlan
from holdfast.errors import CheckpointNotFoundError, RankTimeoutError
from holdfast.format import manifest as manifests
from holdfast.format.names import RANKS_ENTRY, shard_name
from holdfast.format.records import FileRecord, TensorRecord
from holdfast.part import About, Contents, Costs, Identity, Part, commit
from holdfast.state.capture import CapturedEntry
from holdfast.state.image import StateImage
from holdfast.state.plan import FilePlan, Plan, layout_of, records_of
from holdfast.state.staging import Staging
from holdfast.state.unchanged import Source
from holdfast.storage.arena import Arena
from holdfast.storage.store import PendingCheckpoint, Store


class Links:
    """The files of frozen tensors that the last checkpoint has, and that the next one may link.

    Args:
        last: the checkpoint that was restored from; None where there is none, or nothing shall be linked from it.
        share_unchanged: whether to link at all.
    """

    def __init__(self, last: Checkpoint | None, *, share_unchanged: bool) -> None:
        self._share_unchanged = share_unchanged
        self._linkable: dict[str, Source] = {}
        if last is not None and share_unchanged:
            self._linkable = {name: Source(last.name, name, record) for name, record in last.files.items()}

    def unchanged(self, plan: Plan, captured: Mapping[str, CapturedEntry]) -> dict[str, Source]:
        """By name, files with frozen tensors that hold what the last checkpoint's hold. Blocks while they are read."""
        found: dict[str, Source] = {}
        for file in plan.files:
            source = self._linkable.get(file.name) if file.still and self._share_unchanged else None
            if source is None or source.record.bytes != file.layout.nbytes:
                continue
            digests = StateImage(file.layout, file.tensors(captured)).digests(source.record.chunk_bytes)
            if digests == source.record.xxh3_128:
                found[file.name] = source
        return found

    def committed(self, name: str, files: Mapping[str, FileRecord]) -> None:
        """Take checkpoint ``name`` for the one whose files the next save may link; ``files`` are this process's."""
        self._linkable = {file: Source(name, file, record) for file, record in files.items()}


class SharedSave:
    """A save under way, as :class:`holdfast.saving.Save` is one.

    Args:
        group: the processes.
        store: the run's.
        links: the files that need not be written again.
        number: of the save; all count alike.
        about: what the checkpoint says of itself.
        identity: likewise; the same for all.
        captured: what this process has, with what it keeps for itself.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        links: Links,
        number: int,
        about: About,
        identity: Identity,
        captured: Mapping[str, CapturedEntry],
    ) -> None:
        self.costs = Costs()
        self._group = group
        self._store = store
        self._links = links
        self._number = number
        self._about = about
        self._identity = identity
        self._captured = captured
        self._contents = Contents.of({entry: content for entry, content in captured.items() if entry != RANKS_ENTRY})
        self._own = captured[RANKS_ENTRY]
        self._own_records: dict[str, TensorRecord] = {}
        self._place: PendingCheckpoint | None = None
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
            self._place = place = pending[0] if pending else self._joined(directory)
            self._plan = plan()
            own = _own_file(self._own, self._group.rank, self._group.size)
            self._own_records = records_of(self._own, {own.name: own.layout})
            self._mine = Plan((*self._plan.mine.files, own), self._plan.mine.indexes, {})
            sources = self._links.unchanged(self._mine, self._captured)
            self._part = Part(place, self._mine, sources, self._captured, self._identity.checkpoint_id)
            self.costs = self._part.costs
        except Exception as error:  # noqa: BLE001 - reported, and raised by all
            self._failure = error  # the directory stays until all have reported: the others look for it
        self._captured = {}

    def stage(self, arena: Arena, late: Container[int] = ()) -> Staging:
        """See :meth:`holdfast.part.Part.stage`. Where it fails, unless for want of memory, the save fails, for all."""
        if self._part is not None:
            try:
                return self._part.stage(arena, late)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - reported, and raised by all
                self._failure = error
        return Staging({}, arena, late)

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
        try:
            ending = Ending(self._group, self._number, self._what)
            report = self._report()
            ending.tell(report)
            if self._group.is_coordinator:
                checkpoint = ending.lead(lambda reports: self._publish(reports, names))
                self._links.committed(checkpoint.name, report.files)
                return checkpoint
            name = ending.learn(self._failure)
        except BaseException:
            self.abort()
            raise
        self._links.committed(name, report.files)
        path = os.path.join(self._store.path, name)
        checkpoint_id, timeout_s, now_s = self._identity.checkpoint_id, self._group.timeout_s, time.monotonic()
        return lambda: open_elsewhere(path, checkpoint_id, timeout_s, since_s=now_s)

    def abort(self) -> None:
        """Give it up. What this process wrote is removed by the coordinator, if that lives."""
        if self._place is not None:
            self._place.abort()

    # ------------------------------------------------------------------------------------------------- this process

    def _joined(self, directory: str) -> PendingCheckpoint:
        """The directory that the coordinator made: it may take a moment until another machine sees it."""
        timeout_s = self._group.timeout_s / 2  # the others shall hear of it before they give up
        try:
            return seen_in_time(lambda: self._store.join(directory), timeout_s)
        except CheckpointNotFoundError as error:
            raise RankTimeoutError(
                f"{error} It was made by rank 0: all processes of the group have to write to one directory of a file "
                "system that they share.",
                ranks=[self._group.rank],
            ) from error

    def _report(self) -> Report:
        try:
            if self._failure is not None:
                raise self._failure
            assert self._part is not None
            files = self._part.write()
            if not self._group.is_coordinator:
                self._part.pending.leave()
        except Exception as error:  # noqa: BLE001 - raised by all
            return Report(failure=Failure.of(self._group.rank, error))
        begins: dict[str, dict[str, dict[str, int]]] = {}
        for file in self._mine.files:
            for tensor in file.layout.tensors:
                if tensor.name in self._plan.loose.get(file.entry, ()):
                    begins.setdefault(file.entry, {}).setdefault(tensor.name, {})[file.name] = tensor.begin
        return Report(files, self._own_records, self._own.aliases, begins)

    # ------------------------------------------------------------------------------------------------- all together

    def _publish(self, reports: Sequence[Report], names: Iterable[str]) -> Checkpoint:
        """For the coordinator: commit what all have written."""
        with self.costs.of("commit_s"):
            manifest = self._manifest(reports)
            assert self._part is not None
            name = commit(self._part.pending, names, manifest)
            checkpoint = reopen_checkpoint(self._store, name, manifest)
        self.costs.bytes_written += len(manifest)
        return checkpoint

    def _manifest(self, reports: Sequence[Report]) -> bytes:
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


def _own_file(own: CapturedEntry, rank: int, size: int) -> FilePlan:
    """The file of what is kept for one process."""
    names = frozenset(own.tensors)
    return FilePlan(shard_name(RANKS_ENTRY, rank + 1, size), RANKS_ENTRY, names, layout_of(own, names, False), False)
