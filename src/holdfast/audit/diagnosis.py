"""Why two runs differ: which questions are asked, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.audit.causes import data, interpreter, lost, restored, settings, unrepeatable
from holdfast.audit.comparison import Divergence
from holdfast.audit.experiments import Evidence
from holdfast.audit.report import Cause


def diagnose(evidence: Evidence) -> tuple[Divergence, bool, tuple[Cause, ...]]:
    """The divergence to report, whether runs without interruption agree, and the causes, certain ones first."""
    unlike = [found for found in evidence.between_whole_runs if found is not None]
    if unlike:
        return min(unlike, key=lambda found: found.step), False, _ordered(unrepeatable.causes(evidence))
    return evidence.divergence, True, _ordered(_of_resuming(evidence))


def _of_resuming(evidence: Evidence) -> Iterator[Cause]:
    """Causes that lie between the save and the restored process."""
    of_interpreter = list(interpreter.causes(evidence))
    if of_interpreter:  # then whatever else the processes do not share is a consequence
        yield from of_interpreter
        return
    found = [*restored.causes(evidence), *data.causes(evidence)]
    found += lost.causes(evidence, explained=any(cause.certain for cause in found))
    yield from found
    if not any(cause.certain for cause in found):
        suspects = list(settings.causes(evidence))
        yield from suspects
        yield from [] if found or suspects else [_unknown(evidence)]


def _ordered(causes: Iterator[Cause]) -> tuple[Cause, ...]:
    return tuple(sorted(causes, key=lambda cause: not cause.certain))


def _unknown(evidence: Evidence) -> Cause:
    if evidence.replay_cures:
        where = "so what is missing lives in the process, outside the state and outside what step() visibly uses"
        seen = f"with steps 1 to {evidence.before} repeated before the restore, the resumed run is exact, {where}"
    else:
        seen = f"with steps 1 to {evidence.before} repeated before the restore, the resumed run differs all the same"
    failures = [
        f"a watched run failed while {run.failure.doing}: {run.failure.message}"
        for run in (evidence.whole, evidence.resumed)
        if run.failure
    ]
    return Cause(
        kind="unknown",
        what="no cause was found",
        evidence=("runs without an interruption agree with each other", seen, *failures),
        advice="Look at what the first different value is computed from. Leaving parts out of step() until the "
        "difference is gone finds it quickest.",
        certain=False,
    )
