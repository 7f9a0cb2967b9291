"""Settings that are known to change bits: suspects, where nothing better explains a divergence."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.audit.experiments import Evidence
from holdfast.audit.report import Cause

BENCHMARK = "cudnn.benchmark"
_OF_PROCESS = frozenset({"hash seed"})


def causes(evidence: Evidence) -> Iterator[Cause]:
    """Settings that the two processes do not share, and one that no two runs need share the effects of."""
    one, other = evidence.halves.whole.environment, evidence.halves.second.environment
    for name in sorted(one.keys() & other.keys() - _OF_PROCESS):
        if one[name] != other[name]:
            yield Cause(
                kind="setting",
                what=f"the processes do not share a setting: {name}",
                evidence=(f"{one[name]} in the uninterrupted run, {other[name]} in the resumed one",),
                advice="Set it to the same value at the beginning of every run.",
                certain=False,
            )
    if one.get(BENCHMARK) == "True":
        yield benchmark(certain=False, seen=())


def benchmark(*, certain: bool, seen: tuple[str, ...]) -> Cause:
    """Convolutions that try out algorithms, and take the one that was fastest this time."""
    return Cause(
        kind="benchmark",
        what="torch.backends.cudnn.benchmark is on: which algorithm is fastest is a matter of chance, "
        "and each rounds differently",
        evidence=seen,
        advice="Set torch.backends.cudnn.benchmark = False where bits must repeat.",
        certain=certain,
    )
