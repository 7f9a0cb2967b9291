"""Figures as tables for people: who in the rows, measures in the columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import measures
from benchmarks.measures import Measure
from benchmarks.report import Result, summary
from benchmarks.targets import Reached

BLOCKING = (measures.SAVE, measures.HOT, measures.COLD, measures.PEAK_SAVE, measures.PEAK_LOAD)
GROUPS: dict[str, dict[str, tuple[Measure, ...]]] = {
    "gpt2": {
        "blocking saves and loads": BLOCKING,
        "background saves": (measures.STALL, measures.FIRST_STALL, measures.DURABLE, measures.PEAK_BACKGROUND),
    },
    "many": {"blocking saves and loads": BLOCKING},
    "lora": {"two saves": (measures.FIRST_SAVE, measures.SECOND_SAVE, measures.SECOND_BYTES, measures.HOT)},
    "training": {"background saves": (measures.LOST, measures.WAITED, measures.LONGER)},
    "planning": {"the second save": (measures.PLAN,)},
    "spacing": {"saves spaced by what they cost": (measures.SHARE, measures.OF_BUDGET, measures.SAVES)},
}
"""Which measures of a workload share a table."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column says what a row is about."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As GitHub shows it, and readable as it is: the columns are aligned."""
        widths = [max(4, *map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        lines = [_line(cells, widths) for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, ""])


def tables_of(results: Mapping[str, Result]) -> list[Table]:
    """The tables of every workload: median, least and greatest, and how many times Holdfast's figure it is."""
    return [
        table_of(f"{name}{f', {result.nbytes / 1e6:,.0f} MB' if result.nbytes else ''}: {group}", result, chosen)
        for name, result in results.items()
        for group, chosen in GROUPS[name].items()
        if any(measure.name in result.samples for measure in chosen)
    ]


def targets_table(reached: Sequence[Reached]) -> Table:
    """Each target, and what was reached."""
    rows = []
    for row in reached:
        spread = f"{row.write(row.median)} ({row.write(row.least)} to {row.write(row.greatest)})"
        bound = f"at {'least' if row.target.at_least else 'most'} {row.write(row.target.limit)}{row.symbol}"
        rows.append((row.target.promise, row.against, bound, spread, "yes" if row.met else "no"))
    return Table("Targets", ("", "against", "target", "reached", "met"), tuple(rows))


def table_of(title: str, result: Result, chosen: Sequence[Measure]) -> Table:
    """Of some measures: median, least and greatest, and how many times Holdfast's figure it is."""
    present = [measure for measure in chosen if measure.name in result.samples]
    found = summary(result.samples)
    names = list(dict.fromkeys(name for measure in present for name in found[measure.name]))
    rows = tuple(
        (_emphasis(name), *(_cell(found[measure.name].get(name), measure) for measure in present))
        for name in _order(names)
    )
    return Table(title, ("", *(f"{measure.name}, {measure.unit.symbol}" for measure in present)), rows)


def _order(names: Sequence[str]) -> list[str]:
    """Holdfast first, the bare machine last; peers between them as they come."""
    return sorted(names, key=lambda name: (name not in measures.OWN, name in measures.BOUNDS))


def _emphasis(name: str) -> str:
    if name in measures.OWN:
        return f"**{name}**"
    return f"*{name}*" if name in measures.BOUNDS else name


def _cell(row: Mapping[str, float] | None, measure: Measure) -> str:
    if row is None:
        return ""
    write = measure.unit.write
    spread = f" ({write(row['least'])} to {write(row['greatest'])})" if row["least"] != row["greatest"] else ""
    ratio = f", {row['ratio']:,.2f}x" if "ratio" in row else ""
    return f"{write(row['median'])}{spread}{ratio}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join([first.strip().ljust(widths[0]), *others])} |"
