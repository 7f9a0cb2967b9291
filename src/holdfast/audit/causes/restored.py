"""Values that a restore did not bring back as they were saved."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.audit.comparison import Difference
from holdfast.audit.experiments import Evidence
from holdfast.audit.report import Cause

_MOST_NAMED = 3
_METHODS = "Compare {kind}.state_dict() with {kind}.load_state_dict(): what the one returns, the other must set."


def causes(evidence: Evidence) -> Iterator[Cause]:
    """One cause for each object that differs right after the restore, before any step."""
    if evidence.divergence.at != "restored":
        return
    by_object: dict[str, list[Difference]] = {}
    for difference in evidence.divergence.differences:
        by_object.setdefault(_owner(difference.name, evidence), []).append(difference)
    for name, differences in by_object.items():
        kind = evidence.whole.watched.kinds.get(name, "")
        yield Cause(
            kind="restore",
            what=f"`{name}`{f' ({kind})' if kind else ''} did not take back what was saved of it",
            evidence=tuple(_seen(difference, evidence.before) for difference in differences[:_MOST_NAMED]),
            advice=_METHODS.format(kind=kind) if kind else "Look for what changes it while the state is restored.",
        )


def _owner(name: str, evidence: Evidence) -> str:
    """The longest path of an object of the state that ``name`` lies under; else its entry."""
    paths = [path for path in evidence.whole.watched.kinds if name == path or name.startswith((f"{path}.", f"{path}["))]
    return max(paths, key=len, default=name.partition(".")[0].partition("[")[0])


def _seen(difference: Difference, step: int) -> str:
    return f"{difference.name}: {difference.expected} after step {step}, {difference.found} after the restore"
