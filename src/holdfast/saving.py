"""One checkpoint written: captured state to files, files to a commit."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint import Checkpoint, reopen_checkpoint
from holdfast.collector import collector_paused
from holdfast.errors import CheckpointExistsError, UsageError
from holdfast.format import manifest as manifests
from holdfast.format import tree
from holdfast.format.names import CheckpointName
from holdfast.part import About, Contents, Identity, Part, commit, refuse_parts
from holdfast.state.capture import CapturedEntry, capture
from holdfast.state.plan import Plan, Planner
from holdfast.state.staging import Staging
from holdfast.state.unchanged import Source, Unchanged
from holdfast.storage.arena import Arena
from holdfast.storage.local import LocalStore
from holdfast.storage.store import Store


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
    check_name(name, step)
    return write(LocalStore(directory), capture(state), about, [name])


def check_name(name: str, step: int) -> None:
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


_planner = Planner()


class Save:
    """A save under way: begun at the call, staged where the training shall go on meanwhile, then finished.

    One that is not finished must be aborted.

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
        refuse_parts(captured)
        self._store = store
        self._about = about
        self._unchanged = unchanged
        self._identity = Identity()
        self._contents = Contents.of(captured)
        self._plan, sources = _planned(captured, unchanged)
        pending = store.create(about.step)
        try:
            self._part = Part(pending, self._plan, sources, captured, self._identity.checkpoint_id)
        except BaseException:
            pending.abort()
            raise
        self.costs = self._part.costs

    def stage(self, arena: Arena, late: Container[int] = ()) -> Staging:
        """See :meth:`Part.stage`."""
        return self._part.stage(arena, late)

    def copy_rest(self) -> None:
        """See :meth:`Part.copy_rest`. Where it fails, the save is aborted."""
        try:
            self._part.copy_rest()
        except BaseException:
            self.abort()
            raise

    def finish(self, names: Iterable[str], *, replace: bool = False) -> Checkpoint:
        """Write, and commit under the first of ``names`` that is free. Blocks. What was left is copied by now."""
        try:
            files = self._part.write()
            with self.costs.of("commit_s"):
                manifest = manifests.encode(
                    self._contents.manifest(self._identity, self._about, self._plan.records, files)
                )
                name = commit(self._part.pending, names, manifest, replace=replace)
                checkpoint = reopen_checkpoint(self._store, name, manifest)
        except BaseException:
            self.abort()
            raise
        self.costs.bytes_written += len(manifest)
        if self._unchanged is not None:
            self._unchanged.committed(self._plan, checkpoint)
        return checkpoint

    def abort(self) -> None:
        """Remove what was written so far. Does nothing once it is committed."""
        self._part.pending.abort()


def _planned(captured: Mapping[str, CapturedEntry], unchanged: Unchanged | None) -> tuple[Plan, dict[str, Source]]:
    with collector_paused():
        if unchanged is not None:
            return unchanged.settle(captured, _planner)
        return _planner.plan(captured), {}
