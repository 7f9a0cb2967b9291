"""The checkpoints of one run: a directory looked at afresh at each question, for there is no index to go stale."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from holdfast.checkpoint import Checkpoint, open_checkpoint
from holdfast.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatVersionError,
    HoldfastError,
    StorageError,
    UsageError,
)
from holdfast.format import manifest as manifests
from holdfast.format import strict_json
from holdfast.format.manifest import Annotations
from holdfast.format.names import CheckpointName
from holdfast.storage.local import LocalStore
from holdfast.storage.store import StoredCheckpoint

_EVENTS_BYTES = 128 * 2**20
_LINE_BYTES = 2000  # for the time that a line takes, however short

_logger = logging.getLogger("holdfast")
_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What a process or its machine can run out of: that says nothing about the checkpoint that was to be read."""


class Retention(Protocol):
    """Decides what stays. A user's own policy needs only this method."""

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        """The names of those of ``checkpoints`` (oldest first) that stay, each with the reason, in words."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Something under a checkpoint's name that is not an intact checkpoint."""

    name: CheckpointName
    path: str
    error: HoldfastError


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a pruning did, or would do.

    Attributes:
        removed: checkpoints that went.
        kept: names of those that stayed, each with the reason.
        busy: names of those that would go but are being read, or were annotated meanwhile: the next pruning will see.
        broken: what is broken; never counted and never removed.
        dry_run: whether nothing was really removed.
    """

    removed: tuple[Checkpoint, ...]
    kept: dict[str, str]
    busy: tuple[str, ...]
    broken: tuple[Broken, ...]
    dry_run: bool


class Run:
    """The checkpoints of one run, oldest first. Reading needs no torch.

    It keeps nothing in memory: each call looks at the directory. Several processes may use one run at a time; two that
    save the same step get two generations of it.

    Args:
        path: the directory of the run; it need not exist yet.

    Raises:
        StorageError: ``path`` is something else than a directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.store = LocalStore(self.path)
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise StorageError(
                f"{self.path} is not a directory; a run is a directory of checkpoints. Choose another path.",
                path=self.path,
            )

    def __repr__(self) -> str:
        return f"Run({self.path!r})"

    def __iter__(self) -> Iterator[Checkpoint]:
        """The intact checkpoints, oldest first; records of tensors are not looked into until they are asked for."""
        for _, found in self._look(self.names(), whole=False):
            if isinstance(found, Checkpoint):
                yield found

    def __getitem__(self, step: int) -> Checkpoint:
        """The newest intact checkpoint of ``step``; CheckpointNotFoundError when there is none.

        StorageError when there is one that the file system does not give.
        """
        names = [name for name in self.names() if name.step == step]
        refused: StorageError | None = None
        for _, found in self._look(reversed(names)):
            if isinstance(found, Checkpoint):
                return found
            if isinstance(found.error, StorageError):
                refused = refused or found.error
            _warn_of(found)
        if refused is not None:
            raise refused
        steps = sorted({name.step for name in self.names()})
        raise CheckpointNotFoundError(
            f"{self.path} has no intact checkpoint of step {step}; it has steps {_shorten(steps)}.",
            path=self.path,
            step=step,
        )

    def names(self) -> list[CheckpointName]:
        """The names in use, oldest first, whatever stands under them."""
        return sorted(filter(None, map(CheckpointName.parse, self.store.names())))

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None. Broken ones are skipped with a warning and left where they are."""
        for checkpoint in self.newest_first():
            return checkpoint
        return None

    def newest_first(self) -> Iterator[Checkpoint]:
        """The intact checkpoints, newest first, with a warning for each broken one passed over."""
        for _, found in self._look(reversed(self.names())):
            if isinstance(found, Checkpoint):
                yield found
            else:
                _warn_of(found)

    def best(self, metric: str, mode: str) -> Checkpoint | None:
        """The intact checkpoint with the best ``metric``, or None when none has it.

        Args:
            metric: a name in ``metrics``.
            mode: ``"min"`` or ``"max"``.
        """
        ranked = ranked_by(metric, mode, list(self))
        return ranked[0] if ranked else None

    def broken(self) -> list[Broken]:
        """What stands under checkpoints' names and is not intact, oldest first."""
        return [found for _, found in self._look(self.names()) if isinstance(found, Broken)]

    def entries(self) -> list[Checkpoint | Broken]:
        """Everything under checkpoints' names, oldest first, in one look; records of tensors are not looked into."""
        return [found for _, found in self._look(self.names(), whole=False)]

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int = 0,
        metrics: Mapping[str, float] | None = None,
        reason: str = "save",
    ) -> Checkpoint:
        """Save ``state`` as the checkpoint of ``step``. Blocks until it is committed; see :func:`holdfast.save`.

        A step that has a checkpoint gets another generation of it; nothing is overwritten. Frozen parameters that the
        newest checkpoint holds in a file of their own are linked, not written again.
        """
        # torch is needed only here, not for reading a run
        from holdfast.part import About
        from holdfast.saving import encode_metrics, write
        from holdfast.state.capture import capture
        from holdfast.state.unchanged import Unchanged

        newest = self.latest()
        lineage = {} if newest is None else {"run_id": newest.run_id}
        about = About(step, epoch, encode_metrics(metrics), reason, **lineage)
        return write(self.store, capture(state), about, self.free_names(step), unchanged=Unchanged(newest))

    def prune(self, keep: Retention, *, dry_run: bool = False, protect: Iterable[str] = ()) -> PruneReport:
        """Remove the checkpoints that ``keep`` does not keep. Blocks.

        The newest, pinned ones, those in ``protect``, broken ones, and whatever is not a checkpoint always stay; so do
        those that somebody is reading, or pinned or measured since they were looked at.

        Args:
            keep: the policy, such as ``KeepLast(3) | KeepBest("val_loss", "min")``.
            dry_run: only say what would go.
            protect: names that stay in any case.
        """
        found = self.entries()
        intact = [item for item in found if isinstance(item, Checkpoint)]
        kept = _kept(intact, keep, protect)
        removed = []
        busy = []
        for checkpoint in intact:
            if checkpoint.name in kept:
                continue
            if dry_run or self.store.remove(checkpoint.name, functools.partial(_annotated_since, checkpoint)):
                removed.append(checkpoint)
            else:
                busy.append(checkpoint.name)
        broken = tuple(item for item in found if isinstance(item, Broken))
        return PruneReport(tuple(removed), kept, tuple(busy), broken, dry_run)

    def pin(self, step: int, pinned: bool = True) -> Checkpoint:
        """Keep the checkpoint of ``step`` whatever a retention policy says, or (``pinned=False``) no longer."""
        return self._annotate(self[step], lambda current: msgspec.structs.replace(current, pinned=pinned))

    def add_metrics(self, checkpoint: Checkpoint, metrics: Mapping[str, float]) -> Checkpoint:
        """Record metrics that were measured of a checkpoint after it was saved."""
        from holdfast.saving import encode_metrics

        encoded = encode_metrics(metrics)
        return self._annotate(
            checkpoint, lambda current: msgspec.structs.replace(current, metrics={**current.metrics, **encoded})
        )

    def events(self) -> list[dict[str, Any]]:
        """What is known of past saves, oldest first: when, why, and what each cost (see ``SaveReport``).

        Lines that cannot be read are left out; no checkpoint depends on them. Of a log longer than 8 MiB only the last
        events are given, as many as fit a bounded amount of memory: tens of thousands.
        """
        found: list[dict[str, Any]] = []
        left_bytes = _EVENTS_BYTES
        try:
            for line in self.store.log_lines():
                left_bytes -= _LINE_BYTES + strict_json.cost_bytes(line)
                if left_bytes < 0:
                    break
                with contextlib.suppress(ValueError):
                    found.append(strict_json.decode(line, dict[str, Any]))
        except ValueError as error:
            _logger.warning("%s: %s; what saves cost is not known.", self.path, error)
        return found[::-1]

    def _annotate(self, checkpoint: Checkpoint, change: Callable[[Annotations], Annotations]) -> Checkpoint:
        """Change what is there at that moment, which is not always what ``checkpoint`` was opened with."""

        def changed(stored: StoredCheckpoint) -> bytes:
            annotations = change(checkpoint.annotations_now(stored))
            return manifests.encode_annotations(
                msgspec.structs.replace(annotations, checkpoint_id=checkpoint.checkpoint_id)
            )

        self.store.annotate(checkpoint.name, changed)
        return open_checkpoint(self.store, checkpoint.name)

    def free_names(self, step: int) -> Iterator[str]:
        """The names that a checkpoint of ``step`` may get, in order: its generations that are not taken."""
        taken = [name.generation for name in self.names() if name.step == step]
        generation = max(taken, default=0) + 1
        while True:  # another process may take the same one meanwhile
            yield str(CheckpointName(step, generation))
            generation += 1

    def _look(
        self, names: Iterable[CheckpointName], *, whole: bool = True
    ) -> Iterator[tuple[CheckpointName, Checkpoint | Broken]]:
        for name in names:
            try:
                yield name, open_checkpoint(self.store, str(name), whole=whole)
            except CheckpointNotFoundError as error:
                # Removed since the directory was listed, or a directory without a manifest.
                if os.path.lexists(os.path.join(self.path, str(name))):
                    yield name, Broken(name, os.path.join(self.path, str(name)), error)
            except (CorruptCheckpointError, FormatVersionError, StorageError) as error:
                if isinstance(error, StorageError) and error.errno in _OUT_OF:
                    raise
                yield name, Broken(name, os.path.join(self.path, str(name)), error)


def ranked_by(metric: str, mode: str, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those of ``checkpoints`` (oldest first) that have a number for ``metric``, best first.

    Not a number never wins, and neither does an infinity in the wrong direction; of equals the earliest comes first.
    """
    if mode not in ("min", "max"):
        raise UsageError(f"mode: expected 'min' or 'max', found {mode!r}.", key="mode")
    sign = 1 if mode == "min" else -1
    measured = []
    for checkpoint in checkpoints:
        value = checkpoint.metrics.get(metric)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            measured.append((sign * value, checkpoint))
    return [checkpoint for _, checkpoint in sorted(measured, key=lambda pair: pair[0])]


def _kept(intact: Sequence[Checkpoint], keep: Retention, protect: Iterable[str]) -> dict[str, str]:
    kept = dict(keep.keep(intact))
    for checkpoint in intact:
        if checkpoint.pinned:
            kept[checkpoint.name] = "pinned"
    for name in protect:
        kept.setdefault(name, "in use")
    if intact:
        kept.setdefault(intact[-1].name, "newest")
    return kept


def _annotated_since(checkpoint: Checkpoint, stored: StoredCheckpoint) -> bool:
    """Whether something is known of a checkpoint, such as a pin, that was not when its removal was decided."""
    return checkpoint.annotations_now(stored) != checkpoint.annotations


def _warn_of(broken: Broken) -> None:
    _logger.warning("skipping %s, which is left as it is: %s", broken.path, broken.error)


def _shorten(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown) if len(shown) <= 8 else ", ".join([*shown[:3], "...", *shown[-3:]])
