"""One checkpoint written: captured state to files, files to a commit."""

from __future__ import annotations

import datetime
import math
import os
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
from holdfast.checkpoint import Checkpoint, reopen_checkpoint
from holdfast.collector import collector_paused
from holdfast.errors import CheckpointExistsError, UsageError
from holdfast.format import manifest as manifests
from holdfast.format import tree
from holdfast.format.manifest import Manifest
from holdfast.format.names import CheckpointName, check_step
from holdfast.format.records import FileRecord
from holdfast.state.capture import CapturedEntry, capture
from holdfast.state.plan import Plan, Planner
from holdfast.state.staging import LiveFile, Staging
from holdfast.state.unchanged import Source, Unchanged
from holdfast.storage.arena import Arena, BytesImage
from holdfast.storage.local import LocalStore
from holdfast.storage.store import FileImage, Store


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


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int = 0,
    epoch: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Save ``state`` as one durable checkpoint at exactly ``path``. Blocks until it is committed.

    Tensors are read where they are, a few megabytes at a time: do not change them in another thread meanwhile. The
    random-number generators of Python, numpy and torch are saved without being named.

    Args:
        path: the directory to make; it must not exist.
        state: names to modules, optimizers, schedulers, tensors, arrays, generators, plain containers of such, or
            anything with ``state_dict`` and ``load_state_dict``. Each name becomes the name of a file.
        step: optimizer steps done.
        epoch: the epoch in which training continues from here.
        metrics: numbers measured of this state.

    Returns:
        The checkpoint, reopened under its name.

    Raises:
        CheckpointExistsError: there is something at ``path``.
        UnsupportedValueError: a value cannot be written exactly; nothing was written.
        UsageError: a name, step, epoch or metric is out of its range, or ``path`` is what a run calls another step.
        StorageError, DiskFullError: the file system refused; nothing is left at ``path``.
    """
    absolute = os.path.abspath(os.fspath(path))
    if os.path.lexists(absolute):
        raise CheckpointExistsError(
            f"{absolute} exists already and was left as it is; save to another path, or keep a series with Run.",
            path=absolute,
        )
    about = About(step, epoch, encode_metrics(metrics))
    directory, name = os.path.split(absolute)
    _check_name(name, step)
    return write(LocalStore(directory), capture(state), about, [name])


def _check_name(name: str, step: int) -> None:
    """Refuse the name that a run gives to another step: what is saved there could not be opened."""
    named = CheckpointName.parse(name)
    if named is not None and named.step != step:
        raise UsageError(
            f"{name} is what a run calls a checkpoint of step {named.step}; found step={step}. Give step={named.step}, "
            "or choose a name of your own.",
            key="step",
        )


def encode_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """``metrics`` as the manifest holds them: numbers and text; tensors and arrays of one element give theirs.

    Raises:
        UsageError: a name is not text, or a value is no number.
    """
    encoded = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or name.startswith("$"):
            raise UsageError(
                f"metrics: expected names as text that do not start with '$', found {name!r}.", key=str(name)
            )
        plain = value
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            plain = value.item()
        if not isinstance(plain, (bool, int, float, str)):
            raise UsageError(
                f"metrics[{name!r}]: expected a number or text, found {type(value).__qualname__}.", key=name
            )
        encoded[name] = tree.encode(plain, f"metrics.{name}", tree.OpaqueLeaves())
    return encoded


def write(
    store: Store,
    captured: Mapping[str, CapturedEntry],
    about: About,
    names: Iterable[str],
    *,
    replace: bool = False,
    unchanged: Unchanged | None = None,
) -> Checkpoint:
    """Write and commit a captured state. Blocks.

    Args:
        store: where to.
        captured: what :func:`holdfast.state.capture.capture` returned.
        about: what the checkpoint says of itself; its metrics encoded.
        names: names to try, in order, until one is free.
        replace: take the first name even where it is taken, atomically.
        unchanged: what stood still at the saves before, so that it is not written again.
    """
    return Save(store, captured, about, unchanged=unchanged).finish(names, replace=replace)


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


_planner = Planner()


class Save:
    """A save under way: begun at the call, staged where the training shall go on meanwhile, then finished.

    Until it is staged, it reads the live tensors. One that is not finished must be aborted.

    Args:
        store: where to.
        captured: what is saved.
        about: what the checkpoint says of itself.
        unchanged: what stood still at the saves before; files that hold what is still the same are linked at once.
    """

    def __init__(
        self,
        store: Store,
        captured: Mapping[str, CapturedEntry],
        about: About,
        *,
        unchanged: Unchanged | None = None,
    ) -> None:
        self.costs = Costs()
        self._store = store
        self._about = about
        self._unchanged = unchanged
        self._id = secrets.token_hex(16)
        self._created_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        self._trees = {entry: content.tree for entry, content in captured.items()}
        self._aliases = {entry: content.aliases for entry, content in captured.items() if content.aliases}
        self._staging: Staging | None = None
        self._linked: dict[str, FileRecord] = {}
        self._plan, sources = _planned(captured, unchanged)
        self._pending = store.create(about.step)
        try:
            self._link(sources)
            self._live = {
                file.name: LiveFile(file.stamped(self._id), file.tensors(captured))
                for file in self._plan.files
                if file.name not in self._linked
            }
        except BaseException:
            self.abort()
            raise

    def stage(self, arena: Arena, late: Container[int] = ()) -> Staging:
        """Copy what is to be written into ``arena``: nothing that is done to the tensors reaches it any more.

        Args:
            arena: where to; it belongs to this save until it is finished or aborted.
            late: addresses of tensors that are copied only in :meth:`copy_rest`, see :class:`Staging`.

        Raises:
            MemoryError: there is no room; the save can be finished without.
        """
        with self.costs.of("stage_s"):
            self._staging = Staging(self._live, arena, late)
        self._live = {}
        return self._staging

    def copy_rest(self) -> None:
        """Copy what was left for later. Blocks; an optimizer may be waiting for it.

        Raises:
            StrayWriteError: something else than an optimizer wrote it meanwhile. The save is aborted.
        """
        if self._staging is not None:
            try:
                with self.costs.of("stage_s"):
                    self._staging.finish()
            except BaseException:
                self.abort()
                raise

    def finish(self, names: Iterable[str], *, replace: bool = False) -> Checkpoint:
        """Write, and commit under the first of ``names`` that is free. Blocks. What was left is copied by now."""
        try:
            with self.costs.of("write_s"):
                files = self._pending.write_files(self._images())
            self._live = {}
            with self.costs.of("commit_s"):
                manifest = manifests.encode(self._manifest(self._linked | files))
                checkpoint = reopen_checkpoint(self._store, self._commit(names, manifest, replace), manifest)
        except BaseException:
            self.abort()
            raise
        self.costs.bytes_written = len(manifest) + sum(record.bytes for record in files.values())
        self.costs.bytes_linked = sum(record.bytes for record in self._linked.values())
        if self._unchanged is not None:
            self._unchanged.committed(self._plan, checkpoint)
        return checkpoint

    def abort(self) -> None:
        """Remove what was written so far. Does nothing once it is committed."""
        self._pending.abort()

    def _link(self, sources: Mapping[str, Source]) -> None:
        for name, source in sources.items():
            if self._pending.link_file(name, source.checkpoint, source.file, source.record.bytes):
                self._linked[name] = source.record

    def _images(self) -> dict[str, FileImage]:
        images: dict[str, FileImage] = {name: BytesImage(data) for name, data in self._plan.indexes.items()}
        if self._staging is not None:
            return {**self._staging.images, **images}
        for name, file in self._live.items():
            image = images[name] = file.image()
            image.settle()
        return images

    def _commit(self, names: Iterable[str], manifest: bytes, replace: bool) -> str:
        publish: Callable[[str, bytes], None] = self._pending.replace if replace else self._pending.commit
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

    def _manifest(self, files: dict[str, FileRecord]) -> Manifest:
        return Manifest(
            format=manifests.FORMAT,
            checkpoint_id=self._id,
            run_id=self._about.run_id,
            parent=self._about.parent,
            step=self._about.step,
            epoch=self._about.epoch,
            created_at=self._created_at,
            reason=self._about.reason,
            metrics=dict(self._about.metrics),
            state=self._trees,
            tensors=self._plan.records,
            aliases=self._aliases,
            files=files,
            environment=_environment(),
        )


def _planned(captured: Mapping[str, CapturedEntry], unchanged: Unchanged | None) -> tuple[Plan, dict[str, Source]]:
    with collector_paused():
        if unchanged is not None:
            return unchanged.settle(captured, _planner)
        return _planner.plan(captured), {}


def _environment() -> dict[str, Any]:
    """Versions, and nothing that could tell on the user: no arguments, variables, paths or host names."""
    return {
        "holdfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "world_size": 1,
    }
