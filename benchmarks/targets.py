"""What Holdfast is to reach, as ratios within the rounds of one run, and what it reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks import measures
from benchmarks.measures import HOLDFAST, OVERLAP, Measure
from benchmarks.report import Result

PEERS: Final = "the fastest peer"
STATE: Final = "the state"


@dataclass(frozen=True, slots=True)
class Target:
    """One bound.

    Attributes:
        promise: what is bounded, in words.
        workload: in which workload.
        measure: which of its measures.
        limit: the bound: a ratio, or a figure of the measure where there is nothing to compare with.
        against: with whose figure of the same round to compare: the names of some, of whom the fastest counts;
            :data:`PEERS`; :data:`STATE`, the bytes of the state; or nothing.
        who: whose figure is bounded.
        at_least: the speed is compared instead of the time, and must not be lower.
    """

    promise: str
    workload: str
    measure: Measure
    limit: float
    against: tuple[str, ...] | Literal["the fastest peer", "the state"] | None = None
    who: str = HOLDFAST
    at_least: bool = False


TARGETS = (
    Target("durable blocking save", "gpt2", measures.SAVE, 0.6, PEERS),
    Target("bandwidth of a durable blocking save", "gpt2", measures.SAVE, 0.8, (measures.RAW_DIRECT,), at_least=True),
    Target("stall of `save()`", "gpt2", measures.STALL, 1.3, (measures.RAW_COPY, measures.RAW_COPY_2)),
    Target("stall of `save()` with overlap", "gpt2", measures.STALL, 0.005, who=OVERLAP),
    Target("wait of the optimizer's steps, with overlap", "training", measures.WAITED, 0.005, who=OVERLAP),
    Target("training time lost per background save", "training", measures.LOST, 0.5, PEERS),
    Target("training time lost, with overlap", "training", measures.LOST, 0.5, PEERS, who=OVERLAP),
    Target("cold load, verified", "gpt2", measures.COLD, 0.5, PEERS),
    Target("hot load, verified", "gpt2", measures.HOT, 1.0, ("safetensors",)),
    Target("20,000 small tensors: save", "many", measures.SAVE, 0.6, ("safetensors",)),
    Target("20,000 small tensors: hot load", "many", measures.HOT, 0.6, ("safetensors",)),
    Target("20,000 small tensors: cold load", "many", measures.COLD, 0.6, ("safetensors",)),
    Target("second save of a LoRA-like state, bytes per changed byte", "lora", measures.SECOND_BYTES, 1.05),
    Target("peak memory of a blocking save", "gpt2", measures.PEAK_SAVE, 64e6),
    Target("peak memory of a load", "gpt2", measures.PEAK_LOAD, 64e6),
    # One state; the hundredth is for the headers of its files and the stacks of threads.
    Target("peak memory of background saves", "gpt2", measures.PEAK_BACKGROUND, 1.01, STATE),
    Target("plan for 500 tensors", "planning", measures.PLAN, 0.001, who="holdfast, 500 tensors"),
    Target("plan for 20,000 tensors", "planning", measures.PLAN, 0.020, who="holdfast, 20,000 tensors"),
    *(
        Target(f"budget of `Every(overhead={share:g})`", "spacing", measures.OF_BUDGET, 1.0, who=measures.budget(share))
        for share in measures.BUDGETS
    ),
)


@dataclass(frozen=True, slots=True)
class Reached:
    """What was reached of one target: the median, the least and the greatest over the rounds."""

    target: Target
    against: str
    median: float
    least: float
    greatest: float

    @property
    def met(self) -> bool:
        """Whether the median keeps the bound."""
        return self.median >= self.target.limit if self.target.at_least else self.median <= self.target.limit

    @property
    def symbol(self) -> str:
        """The unit of an absolute figure, to be put after it."""
        absolute = self.target.against is None and self.target.measure.unit is not measures.TIMES
        return f" {self.target.measure.unit.symbol}" if absolute else ""

    def write(self, figure: float) -> str:
        """A figure as it is printed."""
        return self.target.measure.unit.write(figure) if self.symbol else f"{figure:.2f}"


def reach_all(results: Mapping[str, Result]) -> list[Reached]:
    """Every target that this run measured."""
    return [reached for target in TARGETS if (reached := reach(target, results)) is not None]


def reach(target: Target, results: Mapping[str, Result]) -> Reached | None:
    """What was reached of one target; None where this run did not measure it."""
    result = results.get(target.workload)
    by_name = result.samples.get(target.measure.name, {}) if result else {}
    own = by_name.get(target.who)
    if result is None or own is None:
        return None
    against, others = "", [1.0] * len(own)
    if target.against == STATE:
        against, others = STATE, [float(result.nbytes)] * len(own)
    elif target.against is not None:
        found = _fastest(target.against, by_name)
        if found is None:
            return None
        against, others = found, by_name[found]
    # A peer that lost nothing in a round gives no ratio there.
    ratios = [
        (other / mine) if target.at_least else (mine / other)
        for mine, other in zip(own, others, strict=True)
        if other > 0 and (mine > 0 or not target.at_least)
    ]
    return Reached(target, against, statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def _fastest(names: tuple[str, ...] | str, by_name: Mapping[str, list[float]]) -> str | None:
    """The one with the least median, of some names or of all peers."""
    own = (*measures.OWN, *measures.BOUNDS)
    candidates = [name for name in by_name if name not in own] if names == PEERS else [n for n in names if n in by_name]
    return min(candidates, key=lambda name: statistics.median(by_name[name]), default=None)
