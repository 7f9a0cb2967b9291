"""DCP's StorageWriter on format 1."""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
import weakref
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from holdfast.checkpoint import reopen_checkpoint
from holdfast.collector import collector_paused
from holdfast.distributed.dcp import messages
from holdfast.distributed.dcp.assembling import Assembled, assemble
from holdfast.distributed.dcp.messages import Message
from holdfast.distributed.dcp.writing import Share, Written, box_bytes, shares, write
from holdfast.errors import CheckpointExistsError, UsageError
from holdfast.format import manifest as manifests
from holdfast.format.manifest import Manifest
from holdfast.format.names import CheckpointName
from holdfast.format.records import FileRecord
from holdfast.part import About, environment_of
from holdfast.saving import check_name, encode_metrics
from holdfast.storage.arena import BytesImage
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending


class HoldfastWriter(StorageWriter):
    """Lets ``torch.distributed.checkpoint`` write checkpoints in Holdfast's format, durably.

        dcp.save(state_dict, storage_writer=HoldfastWriter("checkpoints/1000", step=1000))

    Every rank writes files of its own into one hidden directory. The coordinator writes the manifest and renames the
    directory when all have reported: what is there under its name is whole. Where a rank fails, every rank raises DCP's
    ``CheckpointException``, which holds the error, and nothing is left. Nothing is pickled: a value that cannot be
    written exactly fails with ``UnsupportedValueError``, which names the path to it.

    One writer may serve several saves, one after the other. It may be handed to another process between them.

    Args:
        path: the directory to make, on a file system that all ranks reach; it must not exist. ``checkpoint_id`` of
            ``dcp.save`` takes its place.
        step: optimizer steps done. By default what ``path`` says, where it is named as a run names its checkpoints,
            otherwise 0.
        epoch: the epoch in which training continues from here.
        metrics: numbers measured of this state.

    Raises:
        UsageError: an argument is out of its range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._path = os.path.abspath(os.fspath(path))
        self._step = step
        self._about = About(step or 0, epoch, encode_metrics(metrics))
        self._is_coordinator = False
        self._rank: int | None = None
        self._message: Message | None = None
        self._pending: LocalPending | None = None
        self._abort: weakref.finalize[Any, Any] | None = None

    @property
    def checkpoint_id(self) -> str:
        """The directory of the next checkpoint."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save, to ``checkpoint_id`` if one is given."""
        self._give_up()
        if checkpoint_id:
            self._path = os.path.abspath(os.fspath(checkpoint_id))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn whether this rank is the one that commits."""
        self._give_up()
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False makes of one save as many checkpoints as there are ranks; a checkpoint of "
                "Holdfast is whole. Leave it out.",
                key="use_collectives",
            )
        self._is_coordinator = is_coordinator
        self._rank = kwargs.get("rank")

    def storage_meta(self) -> StorageMeta | None:
        """What planners are told of the checkpoint."""
        return StorageMeta(checkpoint_id=self._path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """``plan`` as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the checkpoint, and say who writes which files. On the coordinator only.

        Raises:
            CheckpointExistsError: there is something at the path.
            UsageError: the path is what a run calls another step.
            StorageError, DiskFullError: the file system refused.
        """
        directory, name = os.path.split(self._path)
        step = self._resolved_step(name)
        if os.path.lexists(self._path):
            raise CheckpointExistsError(
                f"{self._path} exists already and was left as it is; save to another path.", path=self._path
            )
        check_name(name, step)
        self._pending = LocalStore(directory).create(step)
        self._abort = weakref.finalize(self, self._pending.abort)
        self._message = Message(self._pending.name, secrets.token_hex(16), len(plans))
        messages.post(self._path, self._message)
        return [dataclasses.replace(plan, storage_data=share) for plan, share in zip(plans, shares(plans), strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, durably. Blocks.

        Raises:
            UnsupportedValueError: a value cannot be written exactly.
            UsageError: the planner gives no values, or the coordinator saves elsewhere.
            StorageError, DiskFullError: the file system refused.
        """
        written = self._write_own(plan, planner) if self._is_coordinator else self._write_joined(plan, planner)
        # One result for each item, as DCP wants them; the first has all there is to say.
        results = [WriteResult(item.index, box_bytes(item), None) for item in plan.items]
        results[:1] = [dataclasses.replace(result, storage_data=written) for result in results[:1]]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_own(self, plan: SavePlan, planner: SavePlanner) -> Written:
        assert self._pending is not None
        assert self._message is not None
        try:
            return write(self._pending, plan, planner, self._share(plan, self._message), self._message.checkpoint_id)
        except BaseException:
            if self._message.world_size == 1:
                self._give_up()
            raise  # where there are others, they are writing still, and would wonder where the directory went

    def _write_joined(self, plan: SavePlan, planner: SavePlanner) -> Written:
        if not plan.items:
            return Written()
        message = messages.fetch(self._path)
        pending = LocalStore(os.path.dirname(self._path)).join(message.pending)
        try:
            written = write(pending, plan, planner, self._share(plan, message), message.checkpoint_id)
            pending.leave()
        except BaseException:
            pending.abort()
            raise
        return written

    def _share(self, plan: SavePlan, message: Message) -> Share:
        """Which files this rank writes: as its plan says, unless that is one that was kept since other circumstances.

        A planner keeps its plans over storage writers of other kinds, and over process groups of other sizes.
        """
        share = plan.storage_data
        if isinstance(share, Share) and share.world_size == message.world_size and self._rank in (None, share.rank):
            return share
        return Share(self._rank or 0, message.world_size, frozenset())

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks wrote. Blocks; on the coordinator only.

        Raises:
            UsageError: the ranks did not write all of it, or names are used twice.
            StorageError, DiskFullError: the file system refused.
        """
        pending = self._pending
        assert pending is not None
        directory, name = os.path.split(self._path)
        try:
            with collector_paused():
                parts = [result.storage_data for written in results for result in written if result.storage_data]
                made = assemble(metadata, parts)
                files = made.files | pending.write_files(
                    {index: BytesImage(data) for index, data in made.indexes.items()}
                )
                data = manifests.encode(self._manifest(made, files, name))
            pending.commit(name, data)
            reopen_checkpoint(LocalStore(directory), name, data)
        finally:
            self._give_up()  # does nothing to what is committed
        metadata.storage_meta = self.storage_meta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` may be a path."""
        return "://" not in os.fspath(checkpoint_id)

    def _resolved_step(self, name: str) -> int:
        named = CheckpointName.parse(name)
        if self._step is not None or named is None:
            return self._about.step
        return named.step

    def _manifest(self, made: Assembled, files: dict[str, FileRecord], name: str) -> Manifest:
        assert self._message is not None
        return Manifest(
            format=manifests.FORMAT,
            checkpoint_id=self._message.checkpoint_id,
            run_id=self._about.run_id,
            parent=None,
            step=self._resolved_step(name),
            epoch=self._about.epoch,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            reason=self._about.reason,
            metrics=dict(self._about.metrics),
            state=made.state,
            tensors=made.tensors,
            aliases=made.aliases,
            files=files,
            environment=environment_of(self._message.world_size),
        )

    def _give_up(self) -> None:
        """Remove the rest of a save that failed, if there is one.

        DCP does not say when another rank failed: then that is done when the next save begins, or when the writer is
        forgotten, or at the end of the interpreter.
        """
        if self._abort is not None:
            self._abort()
            messages.withdraw(self._path)
        self._abort = self._pending = self._message = None
