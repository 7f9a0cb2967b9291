"""What a checkpoint is made of: what it says of itself, the files that a process writes, the manifest, the commit.

One process writes all of it, or several write a part each: see :mod:`holdfast.saving` and ``holdfast.distributed``.
"""

from __future__ import annotations

import datetime
import platform
import secrets
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast._version import __version__
from holdfast.errors import CheckpointExistsError, UnsupportedValueError
from holdfast.format import manifest as manifests
from holdfast.format.manifest import Manifest
from holdfast.format.names import check_step
from holdfast.format.records import FileRecord, TensorRecord
from holdfast.state.capture import CapturedEntry
from holdfast.state.plan import Plan
from holdfast.state.staging import LiveFile, Staging
from holdfast.state.unchanged import Source
from holdfast.storage.arena import Arena, BytesImage
from holdfast.storage.store import FileImage, PendingCheckpoint


@dataclass(frozen=True, slots=True)
class About:
    """What a checkpoint says of itself beside the state. Raises UsageError for what cannot be said."""

    step: int = 0
    epoch: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reason: str = "save"
    run_id: str = field(default_factory=lambda: secrets.token_hex(16))
    parent: str | None = None

    def __post_init__(self) -> None:
        check_step(self.step)
        check_step(self.epoch)


@dataclass(slots=True)
class Costs:
    """What a save took so far, in seconds and bytes."""

    stage_s: float = 0.0
    write_s: float = 0.0
    commit_s: float = 0.0
    bytes_written: int = 0
    bytes_linked: int = 0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to ``part``."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start_s)


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a checkpoint another one than any other."""

    checkpoint_id: str = field(default_factory=lambda: secrets.token_hex(16))
    created_at: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    )


class Part:
    """What a process writes of a checkpoint: files with tensors, staged where the training shall go on meanwhile.

    Until they are staged, it reads the live tensors. A part that is not written must be aborted.

    Args:
        pending: where to; whoever makes the part commits it, or aborts it, even where making it fails.
        plan: the files.
        sources: files of the checkpoint before that some of them can be linked to.
        captured: what is in them.
        checkpoint_id: of the checkpoint that they belong to.
    """

    def __init__(
        self,
        pending: PendingCheckpoint,
        plan: Plan,
        sources: Mapping[str, Source],
        captured: Mapping[str, CapturedEntry],
        checkpoint_id: str,
    ) -> None:
        self.costs = Costs()
        self.pending = pending
        self._indexes = plan.indexes
        self._staging: Staging | None = None
        self._linked: dict[str, FileRecord] = {}
        self._link(sources)
        self._live = {
            file.name: LiveFile(file.stamped(checkpoint_id), file.tensors(captured))
            for file in plan.files
            if file.name not in self._linked
        }

    def stage(self, arena: Arena, late: Container[int] = ()) -> Staging:
        """Copy what is to be written into ``arena``: nothing that is done to the tensors reaches it any more.

        Args:
            arena: where to; it belongs to this save until it is finished or aborted.
            late: addresses of tensors that are copied only in :meth:`copy_rest`, see :class:`Staging`.

        Raises:
            MemoryError: there is no room; it can be written without.
        """
        with self.costs.of("stage_s"):
            self._staging = Staging(self._live, arena, late)
        self._live = {}
        return self._staging

    def copy_rest(self) -> None:
        """Copy what was left for later. Blocks; an optimizer may be waiting for it.

        Raises:
            StrayWriteError: something else than an optimizer wrote it meanwhile.
        """
        if self._staging is not None:
            with self.costs.of("stage_s"):
                self._staging.finish()

    def write(self) -> dict[str, FileRecord]:
        """Write the files until they are durable; returns the record of each, linked ones too. Blocks."""
        with self.costs.of("write_s"):
            files = self.pending.write_files(self._images())
        self._live = {}
        self.costs.bytes_written = sum(record.bytes for record in files.values())
        self.costs.bytes_linked = sum(record.bytes for record in self._linked.values())
        return self._linked | files

    def _link(self, sources: Mapping[str, Source]) -> None:
        for name, source in sources.items():
            if self.pending.link_file(name, source.checkpoint, source.file, source.record.bytes):
                self._linked[name] = source.record

    def _images(self) -> dict[str, FileImage]:
        images: dict[str, FileImage] = {name: BytesImage(data) for name, data in self._indexes.items()}
        if self._staging is not None:
            return {**self._staging.images, **images}
        for name, file in self._live.items():
            image = images[name] = file.image()
            image.settle()
        return images


@dataclass(frozen=True, slots=True)
class Contents:
    """What a manifest says of a state beside its tensors."""

    trees: dict[str, Any]
    aliases: dict[str, dict[str, str]]

    @classmethod
    def of(cls, captured: Mapping[str, CapturedEntry]) -> Contents:
        """The plain values, and the names of tensors that are tied."""
        return cls(
            {entry: content.tree for entry, content in captured.items()},
            {entry: content.aliases for entry, content in captured.items() if content.aliases},
        )

    def manifest(
        self,
        identity: Identity,
        about: About,
        tensors: dict[str, dict[str, TensorRecord]],
        files: dict[str, FileRecord],
        *,
        layouts: dict[str, tuple[str, ...]] | None = None,
        world_size: int = 1,
    ) -> Manifest:
        """The manifest of a checkpoint of this state."""
        return Manifest(
            format=manifests.FORMAT,
            checkpoint_id=identity.checkpoint_id,
            run_id=about.run_id,
            parent=about.parent,
            step=about.step,
            epoch=about.epoch,
            created_at=identity.created_at,
            reason=about.reason,
            metrics=dict(about.metrics),
            state=self.trees,
            tensors=tensors,
            aliases=self.aliases,
            files=files,
            environment=environment_of(world_size),
            layouts=layouts or {},
        )


def commit(pending: PendingCheckpoint, names: Iterable[str], manifest: bytes, *, replace: bool = False) -> str:
    """Publish a save under the first of ``names`` that is free, and return that; CheckpointExistsError when none is."""
    publish: Callable[[str, bytes], None] = pending.replace if replace else pending.commit
    taken: CheckpointExistsError | None = None
    for name in names:
        try:
            publish(name, manifest)
        except CheckpointExistsError as error:
            taken = error
        else:
            return name
    assert taken is not None
    raise taken


def refuse_parts(captured: Mapping[str, CapturedEntry]) -> None:
    """Refuse tensors of which this process holds only a part: UnsupportedValueError."""
    for entry, content in captured.items():
        for name, tensor in content.tensors.items():
            if tensor.sharding is not None:
                raise UnsupportedValueError(
                    f"{entry}.{name}: this process holds only a part of it. A Checkpointer under the process group "
                    "saves the parts of all, and so does torch.distributed.checkpoint with "
                    "holdfast.distributed.HoldfastWriter.",
                    key=f"{entry}.{name}",
                )


def environment_of(world_size: int) -> dict[str, Any]:
    """Versions, and nothing that could tell on the user: no arguments, variables, paths or host names."""
    return {
        "holdfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "world_size": world_size,
    }


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
