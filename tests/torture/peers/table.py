"""What was measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peers.measuring import Measured
from peers.verdict import Harm, Tally

HEADINGS = ("", "states", *(harm.value for harm in Harm), "any")


def tables(measured: Sequence[Measured]) -> str:
    """All that was measured."""
    whole = [one for one in measured if not one.failure]
    parts = [
        "After a power cut that leaves anything that POSIX allows:",
        *_table((one, one.possible) for one in whole),
        "After a kill:",
        *_table((one, one.killed) for one in whole),
    ]
    for kind in sorted({kind for one in whole for kind in one.cuts}):
        parts.append(f"After real power cuts right behind an acknowledged save, on {kind}:")
        parts += _table((one, one.cuts[kind]) for one in whole if kind in one.cuts)
    parts += [f"- {one.name}: not recordable: {one.failure}" for one in measured if one.failure]
    return "\n".join(parts)


def _table(rows: Iterable[tuple[Measured, Tally]]) -> list[str]:
    lines = [
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'|'.join(['---', *['--:'] * (len(HEADINGS) - 1)])}|",
    ]
    for measured, tally in rows:
        numbers = [tally.states, *(tally.harms[harm] for harm in Harm), tally.harmed]
        lines.append(f"| {measured.name} ({measured.package}) | {' | '.join(f'{number:,}' for number in numbers)} |")
    return [*lines, ""]
