"""What is measured: the names, the units, and what the bare machine's figures are called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """How a figure is written; figures themselves are in seconds, bytes or as a ratio."""

    symbol: str
    factor: float
    decimals: int

    def write(self, figure: float) -> str:
        """The number without its symbol."""
        return f"{figure * self.factor:,.{self.decimals}f}"


SECONDS = Unit("s", 1.0, 3)
MILLISECONDS = Unit("ms", 1e3, 1)
MEGABYTES = Unit("MB", 1e-6, 1)
TIMES = Unit("times", 1.0, 3)
PERCENT = Unit("%", 1e2, 2)
COUNT = Unit("saves", 1.0, 0)


@dataclass(frozen=True, slots=True)
class Measure:
    """One quantity of which less is better."""

    name: str
    unit: Unit


SAVE = Measure("durable save", SECONDS)
HOT = Measure("hot load", SECONDS)
COLD = Measure("cold load", SECONDS)
STALL = Measure("stall of a background save", MILLISECONDS)
FIRST_STALL = Measure("stall of the first background save", MILLISECONDS)
DURABLE = Measure("background save until durable", SECONDS)
PEAK_SAVE = Measure("peak memory of a save", MEGABYTES)
PEAK_LOAD = Measure("peak memory of a load", MEGABYTES)
PEAK_BACKGROUND = Measure("peak memory of background saves", MEGABYTES)
LOST = Measure("training time lost per background save", SECONDS)
WAITED = Measure("wait of the optimizer's steps for it", MILLISECONDS)
LONGER = Measure("optimizer's step after it, longer by", MILLISECONDS)
FIRST_SAVE = Measure("first save", SECONDS)
SECOND_SAVE = Measure("second save", SECONDS)
SECOND_BYTES = Measure("bytes of the second save, per changed byte", TIMES)
PLAN = Measure("plan of an unchanged structure", MILLISECONDS)
SHARE = Measure("share of the training time that saves took", PERCENT)
OF_BUDGET = Measure("of the share that they were allowed", TIMES)
SAVES = Measure("saves", COUNT)

MEASURES = {
    measure.name: measure
    for measure in (
        SAVE,
        HOT,
        COLD,
        STALL,
        FIRST_STALL,
        DURABLE,
        PEAK_SAVE,
        PEAK_LOAD,
        PEAK_BACKGROUND,
        LOST,
        WAITED,
        LONGER,
        FIRST_SAVE,
        SECOND_SAVE,
        SECOND_BYTES,
        PLAN,
        SHARE,
        OF_BUDGET,
        SAVES,
    )
}
"""Every measure by its name, in the order of the tables."""

HOLDFAST, OVERLAP, BLOCKING = "holdfast", "holdfast, overlap", "holdfast, blocking"
OWN = (HOLDFAST, OVERLAP, BLOCKING)

BUDGETS = (0.05, 0.1)
"""Shares of the training time that saves may take: enough to be seen above the noise of a minute's training."""


def budget(share: float) -> str:
    """Who saves under it."""
    return f"holdfast, overhead={share:g}"


RAW_DIRECT = "raw: O_DIRECT"
RAW_WRITE = "raw: write + fsync"
RAW_COPY = "raw: memory copy"
RAW_COPY_2 = "raw: memory copy, 2 threads"
NO_SAVE = "no save"
BOUNDS = (RAW_DIRECT, RAW_WRITE, RAW_COPY, RAW_COPY_2, NO_SAVE)
"""Names of what is no peer: what the machine gives without any file format."""
