"""Which checkpoint a training continues from, and what happens when it is broken."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.checkpoint import Checkpoint, open  # noqa: A004 - the public name
from holdfast.collector import collector_paused
from holdfast.company import Alone, Company
from holdfast.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatVersionError,
    StorageError,
    UsageError,
)
from holdfast.loading import chosen_entries
from holdfast.policies import KeepBest
from holdfast.progress import Progress, origin_of
from holdfast.run import Broken, Retention, Run, ranked_by
from holdfast.state.report import RestoreReport
from holdfast.state.restore import restore_state

_logger = logging.getLogger("holdfast")

PerRankPolicy = Literal["error", "reassign", "reseed"]

Source = str | int | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Resume:
    """From which checkpoint a training continues, and what shall be otherwise from there on.

    Args:
        source: ``"latest"``, ``"never"``, ``"best:<metric>"``, a step, or the path of a checkpoint or run to start
            from. A path counts only as long as the run has no checkpoint of its own.
        override: values to set after the restore, by path, as for :func:`holdfast.restore`:
            ``{"optimizer.lr": 1e-4}`` reaches the optimizer and its schedulers. Each is set once: a process that
            continues from a checkpoint saved under the same override leaves it as it has become since.
        only: entries to start from, such as ``["model"]`` for fine-tuning. Everything else starts as it was
            constructed, step and epoch at 0, with fresh generators. For a path, and only until the run has checkpoints
            of its own, which are resumed whole.
        strict: with ``only``: refuse a model that differs. Otherwise what matches is restored, such as all but a new
            head.

    Raises:
        UsageError: the parts contradict each other.
    """

    source: Source = "latest"
    override: Mapping[str, Any] = field(default_factory=dict)
    only: Sequence[str] | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.source, bool) or not isinstance(self.source, (str, int, os.PathLike)):
            raise UsageError(
                f"resume: expected 'latest', 'never', 'best:<metric>', a step or a path, found {self.source!r}.",
                key="resume",
            )
        if not isinstance(self.override, Mapping):
            raise UsageError(
                f"Resume(override=): expected paths to values, such as {{'optimizer.lr': 1e-4}}, found "
                f"{self.override!r}.",
                key="override",
            )
        if self.only is not None and not self.is_elsewhere:
            raise UsageError(
                f"Resume(only=): it starts a new run from the path of another one's checkpoint; found "
                f"{self.source!r}, which continues this run, and that is done whole.",
                key="only",
            )
        if not self.strict and self.only is None:
            raise UsageError(
                "Resume(strict=False): a training that goes on exactly needs everything; say with only= what to start "
                "from.",
                key="strict",
            )

    @property
    def is_elsewhere(self) -> bool:
        """Whether the source is a path, which may be that of another run."""
        if not isinstance(self.source, str):
            return isinstance(self.source, os.PathLike)
        return self.source not in ("latest", "never") and not self.source.startswith("best:")


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a training continues: all None for a new run; ``run_id`` alone when only the run existed.

    Attributes:
        checkpoint: what was restored.
        report: how.
        run_id: the id of the run that goes on; None when a new one begins.
        progress: how far the training is.
    """

    checkpoint: Checkpoint | None = None
    report: RestoreReport | None = None
    run_id: str | None = None
    progress: Progress = field(default_factory=Progress)


def resume_run(
    run: Run,
    state: Mapping[str, Any],
    resume: Resume,
    keep: Retention,
    company: Company = Alone(),  # noqa: B008 - it has no state
    per_rank: PerRankPolicy = "error",
) -> Resumed:
    """Restore into ``state`` the first intact checkpoint of those that ``resume`` asks for.

    Args:
        run: the run to continue.
        state: the live objects.
        resume: from where, and with what changes.
        keep: its retention policy, which knows the mode of each metric.
        company: the processes of the training: all restore the same checkpoint.
        per_rank: see :func:`holdfast.restore`.

    Raises:
        CorruptCheckpointError: there were candidates, and not one is intact.
        StorageError: there were candidates, and not one can be read.
    """
    if resume.source == "never":
        company.decided("looking for checkpoints", lambda: _refuse_existing(run))
        return Resumed()
    failure: CorruptCheckpointError | None = None
    for opened in company.candidates(lambda: _candidates(run, resume.source, keep)):
        candidate: Checkpoint | None = None
        try:
            with company.all_succeed("resuming"):
                candidate = opened()
                resumed = _resume_from(candidate, run, state, resume, company, per_rank)
        except CorruptCheckpointError as error:
            path = run.path if candidate is None else candidate.path
            _logger.warning("not resuming from %s, which is left as it is: %s", path, error)
            failure = failure or error
        else:
            return resumed
    if failure is not None:
        raise _nothing_intact(run, failure)
    return Resumed()


def _resume_from(
    checkpoint: Checkpoint,
    run: Run,
    state: Mapping[str, Any],
    resume: Resume,
    company: Company,
    per_rank: PerRankPolicy,
) -> Resumed:
    own = checkpoint.path.startswith(run.path + os.sep)
    only = None if own else resume.only
    if only is not None:
        progress = Progress(origin=origin_of(checkpoint))
        override = resume.override
    else:
        progress = Progress.saved_in(checkpoint)
        override = {path: value for path, value in resume.override.items() if not _is_set(progress, path, value)}
        if not own:
            progress.origin = origin_of(checkpoint)
    with collector_paused():
        report = restore_state(
            checkpoint,
            state,
            strict=only is None or resume.strict,
            generators=only is None,
            only=None if only is None else chosen_entries(checkpoint, state, only),
            override=override,
            rank=company.rank,
            world_size=company.size,
            per_rank=per_rank,
            fill=company.fill,
        )
    progress.overrides = dict(resume.override)
    _note_differences(report)
    return Resumed(checkpoint, report, checkpoint.run_id if own else None, progress)


def _is_set(progress: Progress, path: str, value: Any) -> bool:
    """Whether the training was under this very override already when the checkpoint was saved."""
    return (
        path in progress.overrides
        and type(progress.overrides[path]) is type(value)
        and (progress.overrides[path] == value)
    )


def _candidates(run: Run, resume: Source, keep: Retention) -> Iterator[Checkpoint]:
    if resume == "latest":
        yield from _newest_first(run)
    elif isinstance(resume, int):
        _warn_of_later(run, resume)
        yield run[resume]
    elif isinstance(resume, str) and resume.startswith("best:"):
        yield from _best_first(run, resume, keep)
    else:
        found = False
        for checkpoint in _newest_first(run):
            found = True
            yield checkpoint
        if not found:
            yield _elsewhere(resume)


def _newest_first(run: Run) -> Iterator[Checkpoint]:
    """Intact checkpoints, newest first. One from the future stops the search: it is not broken, it is out of reach."""
    failure: CorruptCheckpointError | StorageError | None = None
    found = False
    for entry in reversed(run.entries()):
        if isinstance(entry, Checkpoint):
            found = True
            yield entry
        elif isinstance(entry.error, FormatVersionError):
            raise entry.error
        else:
            _logger.warning("not resuming from %s, which is left as it is: %s", entry.path, entry.error)
            failure = failure or _loss(entry)
    if failure is not None and not found:
        raise failure if isinstance(failure, StorageError) else _nothing_intact(run, failure)


def _loss(broken: Broken) -> CorruptCheckpointError | StorageError | None:
    """A directory without a manifest never was a checkpoint; anything else was one, or may be: it cannot be read."""
    return broken.error if isinstance(broken.error, (CorruptCheckpointError, StorageError)) else None


def _nothing_intact(run: Run, failure: CorruptCheckpointError) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{run.path} has checkpoints, but none that can be resumed from is intact. The newest failure:\n{failure}\n"
        "Restore one from a copy, or start anew in another directory. Nothing was removed.",
        damage=failure.damage,
        path=run.path,
    )


def _best_first(run: Run, resume: str, keep: Retention) -> Iterator[Checkpoint]:
    _, metric, *rest = resume.split(":")
    mode = rest[0] if rest else _mode_of(metric, keep)
    if mode is None:
        raise UsageError(
            f"resume={resume!r}: no KeepBest({metric!r}, ...) in keep= says which is better; "
            f"write 'best:{metric}:min' or 'best:{metric}:max'.",
            key="resume",
        )
    ranked = ranked_by(metric, mode, list(run))
    if not ranked and run.names():
        raise CheckpointNotFoundError(f"{run.path} has no checkpoint with the metric {metric!r}.", path=run.path)
    yield from ranked


def _mode_of(metric: str, keep: object) -> str | None:
    for policy in getattr(keep, "policies", (keep,)):
        if isinstance(policy, KeepBest) and policy.metric == metric:
            return policy.mode
    return None


def _elsewhere(resume: Source) -> Checkpoint:
    """The checkpoint at a path, or the newest of the run there."""
    path = os.fspath(str(resume) if isinstance(resume, int) else resume)
    try:
        return open(path)
    except CheckpointNotFoundError:
        newest = Run(path).latest() if os.path.isdir(path) else None
        if newest is None:
            raise
        return newest


def _refuse_existing(run: Run) -> None:
    newest = run.latest()
    if newest is not None:
        raise CheckpointExistsError(
            f"{run.path} has checkpoints up to step {newest.step}: a training from step 0 would never become the "
            "newest of them. Use another directory, or remove these.",
            path=run.path,
            step=newest.step,
        )


def _warn_of_later(run: Run, step: int) -> None:
    later = sorted({name.step for name in run.names() if name.step > step})
    if later:
        _logger.warning(
            "resuming %s at step %d although it goes up to step %d: until this training passes that step, 'latest' "
            "still means the older branch. To leave it behind, start a new run from this checkpoint.",
            run.path,
            step,
            later[-1],
        )


def _note_differences(report: RestoreReport) -> None:
    for note in report.notes:
        _logger.warning("%s: %s", report.path, note)
    if report.skipped:
        _logger.warning("%s: not in the state, and so not restored: %s", report.path, ", ".join(report.skipped))
    if report.fresh:
        _logger.warning("%s: starting without optimizer state: %s", report.path, ", ".join(report.fresh))
