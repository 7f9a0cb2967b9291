"""What an audit found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from holdfast.audit.comparison import Difference, Divergence
from holdfast.audit.records import Leaf

_MOST_NAMED = 6


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a training diverges.

    Attributes:
        kind: a word to look it up by, in docs/audit.md.
        what: the cause, in one sentence.
        evidence: what was observed, a sentence each.
        advice: what to do.
        certain: whether the evidence leaves no other explanation; otherwise it is a suspect.
    """

    kind: str
    what: str
    evidence: tuple[str, ...] = ()
    advice: str = ""
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Counts:
    """How much was compared.

    Attributes:
        leaves: values of the state, at each moment.
        nbytes: bytes of the state, over all moments.
        moments: after the restore and after each step.
        generators: names of the global generators.
        seconds: how long it took.
    """

    leaves: int = 0
    nbytes: int = 0
    moments: int = 0
    generators: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Whether a training resumes exactly, and if it does not, where it diverges and why.

    Attributes:
        target: the function that builds the training.
        before: steps before the save.
        after: steps after the restore.
        counts: how much was compared.
        divergence: the first moment at which the runs differ; None when they do not.
        repeatable: whether two runs without any interruption are the same. Where they are not, resuming is not to
            blame for the divergence, and cannot be judged.
        causes: why they differ, certain causes first.
        notes: what the restore had to say.
    """

    target: str
    before: int
    after: int
    counts: Counts = field(default_factory=Counts)
    divergence: Divergence | None = None
    repeatable: bool = True
    causes: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every bit was the same."""
        return self.divergence is None

    @property
    def title(self) -> str:
        """The verdict, in one line."""
        if self.divergence is None:
            return f"{self.target} resumes exactly"
        if not self.repeatable:
            return f"{self.target} does not repeat itself, even without an interruption"
        return f"{self.target} does not resume exactly"

    def facts(self) -> Iterator[tuple[str, str]]:
        """What was run and compared, as pairs of a word and a sentence."""
        total = self.before + self.after
        steps = f"{total} steps without interruption; {_steps(self.before)}, save, new process, restore"
        yield "run", f"{steps}, {_steps(self.after)}"
        counts = self.counts
        generators = f"{len(counts.generators)} generators"
        what = f"{counts.leaves} values of the state, {generators} and the loss, at {counts.moments} moments"
        yield "compared", f"{what}: {counts.nbytes:,} bytes, bit by bit"
        yield "took", f"{counts.seconds:.1f} s"
        for note in self.notes:
            yield "note", note

    def others(self) -> str:
        """What else differs at the first divergence, shortened; empty when there is nothing else."""
        names = [item.name for item in self.divergence.differences[1:]] if self.divergence else []
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return ", ".join(names[:_MOST_NAMED]) + more

    def sides(self) -> tuple[str, str]:
        """What the two runs that differ are called."""
        return ("uninterrupted", "resumed") if self.repeatable else ("one run", "another run")

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        divergence = self.divergence
        return {
            "target": self.target,
            "exact": self.exact,
            "repeatable": self.repeatable,
            "before": self.before,
            "after": self.after,
            "leaves": self.counts.leaves,
            "bytes": self.counts.nbytes,
            "moments": self.counts.moments,
            "generators": list(self.counts.generators),
            "seconds": self.counts.seconds,
            "divergence": divergence
            and {
                "at": divergence.at,
                "step": divergence.step,
                "differences": [_difference(item) for item in divergence.differences],
            },
            "causes": [
                {
                    "kind": cause.kind,
                    "certain": cause.certain,
                    "what": cause.what,
                    "evidence": list(cause.evidence),
                    "advice": cause.advice,
                }
                for cause in self.causes
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [self.title, "", *(f"  {word:<9} {text}" for word, text in self.facts())]
        if self.divergence is not None:
            first = self.divergence.first
            expected, found = self.sides()
            lines += ["", f"  first difference: {self.divergence.moment}, {first.name}"]
            lines += [f"    {expected:<14} {first.expected}", f"    {found:<14} {first.found}"]
            lines += [f"  differs as well: {self.others()}"] if self.others() else []
        for cause in self.causes:
            lines += ["", f"  {'cause' if cause.certain else 'possible cause'} ({cause.kind}): {cause.what}"]
            lines += [f"    - {sentence}" for sentence in cause.evidence]
            lines += [f"    > {cause.advice}"] if cause.advice else []
        return "\n".join(lines)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _difference(item: Difference) -> dict[str, Any]:
    return {"name": item.name, "expected": _side(item.expected), "found": _side(item.found)}


def _side(leaf: Leaf) -> dict[str, str]:
    return {"form": leaf.form, "value": leaf.shown, "xxh3_128": leaf.digest}
