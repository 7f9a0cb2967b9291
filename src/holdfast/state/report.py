"""What a restore did, or would have had to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Misshapen:
    """A tensor that is there on both sides, but not alike.

    Attributes:
        name: ``entry/name``.
        live: dtype and shape of the live tensor.
        saved: dtype and shape in the checkpoint.
    """

    name: str
    live: str
    saved: str

    def __str__(self) -> str:
        return f"{self.name}: live {self.live}, saved {self.saved}"


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What :func:`holdfast.restore` did.

    Attributes:
        path: the checkpoint.
        step: its step.
        epoch: its epoch.
        restored: how many tensors and arrays took their saved values.
        missing: names that the live objects have and the checkpoint has not; they were left as they were.
        unexpected: names that the checkpoint has and the live objects have not; they were not used.
        misshapen: tensors of another shape; they were left as they were.
        converted: tensors whose saved values were converted to the live tensor's dtype.
        renames: likely pairs (saved name, live name) among unexpected and missing.
        fresh: parameters that an optimizer of the checkpoint did not know; they start without state.
        dropped: parameters that only the saved optimizer knew; their state was not used.
        skipped: entries of the checkpoint that are not in the state.
        notes: whatever else a user should know, in words.
    """

    path: str
    step: int
    epoch: int
    restored: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[Misshapen, ...] = ()
    converted: tuple[Misshapen, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    fresh: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether live objects and checkpoint differ in structure, so that a strict restore refuses."""
        return bool(self.missing or self.unexpected or self.misshapen or self.converted)

    def __str__(self) -> str:
        lines = [f"{self.path} (step {self.step}, epoch {self.epoch}): {self.restored} tensors match"]
        lines += _listed("in the live objects, but not in the checkpoint", self.missing)
        lines += _listed("in the checkpoint, but not in the live objects", self.unexpected)
        lines += _listed("of another shape", self.misshapen)
        lines += _listed("of another dtype", self.converted)
        lines += _listed("likely renamed", [f"{saved} -> {live}" for saved, live in self.renames])
        lines += _listed("new to the optimizer, starting without state", self.fresh)
        lines += _listed("known only to the saved optimizer", self.dropped)
        lines += _listed("note", self.notes)
        return "\n".join(lines)


@dataclass(slots=True)
class Findings:
    """A report while it is being made."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[Misshapen] = field(default_factory=list)
    converted: list[Misshapen] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)  # objects of which not one name matches

    def report(
        self, path: str, step: int, epoch: int, restored: int, skipped: Iterable[str], forms: Mapping[str, str]
    ) -> RestoreReport:
        """The report; ``forms`` gives dtype and shape of missing and unexpected names, to find renames."""
        return RestoreReport(
            path=path,
            step=step,
            epoch=epoch,
            restored=restored,
            missing=tuple(self.missing),
            unexpected=tuple(self.unexpected),
            misshapen=tuple(self.misshapen),
            converted=tuple(self.converted),
            renames=tuple(likely_renames(self.unexpected, self.missing, forms)),
            fresh=tuple(self.fresh),
            dropped=tuple(self.dropped),
            skipped=tuple(skipped),
            notes=tuple(self.notes),
        )


def likely_renames(saved: Sequence[str], live: Sequence[str], forms: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of names that may be one tensor: of the same dtype and shape, most similar names first, each name once."""
    scored = sorted(
        (
            (-difflib.SequenceMatcher(None, old, new, autojunk=False).ratio(), old, new)
            for old in saved[:_MOST_COMPARED]
            for new in live[:_MOST_COMPARED]
            if forms.get(old) == forms.get(new) is not None
        ),
    )
    pairs: dict[str, str] = {}
    for score, old, new in scored:
        if -score >= _SIMILAR and old not in pairs and new not in pairs.values():
            pairs[old] = new
    return sorted(pairs.items())


_SIMILAR = 0.5
_MOST_COMPARED = 200
_MOST_SHOWN = 12


def _listed(title: str, items: Sequence[object]) -> list[str]:
    if not items:
        return []
    shown = [f"    {item}" for item in items[:_MOST_SHOWN]]
    more = [f"    and {len(items) - _MOST_SHOWN} more"] if len(items) > _MOST_SHOWN else []
    return [f"  {title} ({len(items)}):", *shown, *more]
