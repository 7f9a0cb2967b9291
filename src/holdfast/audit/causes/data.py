"""The data starts over, or beginning it anew draws from the generators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from holdfast.audit.experiments import Evidence
from holdfast.audit.records import IteratorMade
from holdfast.audit.report import Cause


def causes(evidence: Evidence) -> Iterator[Cause]:
    """Iterators that the resumed run made over a DataLoader in a step in which the other run made none."""
    for made in _only_resumed(evidence):
        seen = (
            f"step {made.step} made a new iterator over it in the resumed run; "
            "in the uninterrupted run that step went on with the one it had"
        )
        if not made.in_state:
            yield _starts_over(made, seen, evidence)
        if made.drew:
            yield _draws(made, seen)


def _only_resumed(evidence: Evidence) -> list[IteratorMade]:
    others = Counter((made.step, made.loader) for made in evidence.whole.watched.iterators)
    found = []
    for made in evidence.resumed.watched.iterators:
        key = (made.step, made.loader)
        if made.step > evidence.before and not others[key]:
            found.append(made)
        others[key] -= 1
    return found


def _starts_over(made: IteratorMade, seen: str, evidence: Evidence) -> Cause:
    replayed = f"with steps 1 to {evidence.before} repeated before the restore, and so at the right place in the data"
    return Cause(
        kind="data",
        what=f"the data starts over: nobody saves how far a {made.loader} has come",
        evidence=(seen, f"{replayed}, the resumed run is exact") if evidence.replay_cures else (seen,),
        advice="Put a loader that knows its position into the state (holdfast.data.ResumableDataLoader), "
        "or save at the end of an epoch only.",
    )


def _draws(made: IteratorMade, seen: str) -> Cause:
    return Cause(
        kind="generator",
        what=f"making an iterator over a {made.loader} draws from {' and '.join(made.drew)}",
        evidence=(seen, f"{' and '.join(made.drew)} changed while it was made"),
        advice="Use holdfast.data.ResumableDataLoader, which draws nothing from the global generators; "
        "or give the loader a generator of its own, DataLoader(..., generator=...), and put it into the state.",
    )
