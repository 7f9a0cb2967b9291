"""What two interpreters do not share: the order of sets, and the seeds that nobody set."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.audit.experiments import Evidence
from holdfast.audit.report import Cause

_SAME = "in the interpreter that ran the first half, the second half is exact; in a new one it is not"


def causes(evidence: Evidence) -> Iterator[Cause]:
    """Causes of a divergence that is gone when both halves run in one interpreter."""
    if not evidence.same_interpreter_cures:
        return
    if evidence.same_hash_order_cures:
        yield Cause(
            kind="hash order",
            what="something depends on the order of a set, or on hash(): text has another hash in each process",
            evidence=(_SAME, "in new interpreters with PYTHONHASHSEED=0 the resumed run is exact", *_orders(evidence)),
            advice="Sort where a set is turned into a list: sorted(names). Or set PYTHONHASHSEED for every start.",
        )
        return
    unlike = _unlike_generators(evidence)
    if unlike:
        yield Cause(
            kind="unseeded",
            what=f"building the training draws from {' and '.join(unlike)} before anything seeds it",
            evidence=(_SAME, f"{' and '.join(unlike)} had another state in each process when the training was built"),
            advice="Seed the generators before anything is built: random.seed, numpy.random.seed, torch.manual_seed.",
        )


def _orders(evidence: Evidence) -> Iterator[str]:
    """The things that came out in another order."""
    names = [f"`{one.name}`" for one, _ in evidence.lost if one.kind in ("variable", "attribute")]
    if names:
        yield f"{', '.join(names[:3])} came out different in the new process"


def _unlike_generators(evidence: Evidence) -> list[str]:
    """The generators that the build drew from, and whose states were not the same in both processes."""
    whole, second = evidence.halves.whole, evidence.halves.second
    begun, built, other = whole.point("begun", 0), whole.point("built", 0), second.point("built", 0)
    if begun is None or built is None or other is None:
        return []
    return [
        name
        for name, leaf in built.generators.items()
        if leaf != begun.generators.get(name) and leaf != other.generators.get(name)
    ]
