"""A run of the benchmarks on paper: the figures as JSON, the tables as Markdown, the picture as PNG."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.picture import draw
from benchmarks.report import Result, figures
from benchmarks.tables import tables_of, targets_table
from benchmarks.targets import Reached, reach_all

RESULTS = Path(__file__).parent / "results"
FIGURES, TABLES, PICTURE = "figures.json", "tables.md", "picture.png"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that one run measured, and where and how."""

    environment: Mapping[str, Any]
    scale: str
    rounds: int
    results: Mapping[str, Result]

    def markdown(self) -> str:
        """The tables, under a line that says what they depend on."""
        reached = reach_all(self.results)
        tables = [*([targets_table(reached)] if reached else []), *tables_of(self.results)]
        left_out = [
            f"Left out of `{workload}`: {who}. {why}.\n"
            for workload, result in self.results.items()
            for who, why in result.left_out.items()
        ]
        return "\n".join([self._head(), *(table.markdown() for table in tables), *left_out])

    def json(self) -> str:
        """All figures."""
        found = {
            "environment": self.environment,
            "scale": self.scale,
            "rounds": self.rounds,
            "targets": [_target(reached) for reached in reach_all(self.results)],
            "workloads": figures(self.results),
        }
        return json.dumps(found, indent=2) + "\n"

    def _head(self) -> str:
        place = self.environment
        versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items() if version)
        rounds = f"{self.rounds} round{'s' if self.rounds > 1 else ''}"
        return (
            f"Measured on {place['date']} at the {self.scale} scale in {rounds}: {place['cores']} cores of "
            f"{place['processor']}, {place['memory_bytes'] / 2**30:.0f} GiB, {place['file_system']}, "
            f"{place['system']}, Python {place['python']}, {versions}. Median (least to greatest), and how many "
            "times Holdfast's figure of the same round it is (the median of that); less is better.\n"
        )


def write(run: Run, directory: Path, tell: Callable[[str], None]) -> None:
    """Write the three files into a directory; ``tell`` is told where, and what is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FIGURES).write_text(run.json(), encoding="utf-8")
    (directory / TABLES).write_text(
        f"# Results\n\n![Holdfast beside its peers]({PICTURE})\n\n{run.markdown()}", encoding="utf-8"
    )
    if importlib.util.find_spec("matplotlib") is None:
        tell("no picture: the package matplotlib is not installed")
    else:
        draw(run.results, directory / PICTURE)
    tell(f"written: {directory}")


def _target(reached: Reached) -> dict[str, Any]:
    target = reached.target
    return {
        "promise": target.promise,
        "workload": target.workload,
        "measure": target.measure.name,
        "who": target.who,
        "against": reached.against,
        "at_least" if target.at_least else "at_most": target.limit,
        "median": reached.median,
        "least": reached.least,
        "greatest": reached.greatest,
        "met": reached.met,
    }
