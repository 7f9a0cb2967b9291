"""Things that ``step`` uses and nobody saves: the new process has them as they were built."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.audit.experiments import Evidence
from holdfast.audit.records import Thing
from holdfast.audit.report import Cause

_MOST_TRIED_ALONE = 6
_MOST_SUSPECTS = 5

Lost = tuple[Thing, Thing]


def causes(evidence: Evidence, *, explained: bool) -> Iterator[Cause]:
    """What is lost, tried one by one: with it saved as well, is the resumed run exact?

    Args:
        evidence: what is known.
        explained: whether a cause is known already; then what cannot be shown to matter is not named.
    """
    found = [pair for pair in evidence.lost if _may_matter(pair[0], evidence)]
    culprits = _culprits([pair for pair in found if all(thing.savable for thing in pair)], evidence)
    if culprits:  # with these saved the run is exact, so that nothing else can be missing
        yield from culprits
        return
    yield from _iterators(found, evidence)
    yield from _forgotten(evidence, explained)
    if not explained:
        suspects = [pair for pair in found if pair[0].savable][:_MOST_SUSPECTS]
        yield from (_cause(pair, evidence, _replayed(evidence), certain=False) for pair in suspects)


def _may_matter(thing: Thing, evidence: Evidence) -> bool:
    """Not gradients that the next step sets to zero anyway; nor what stands among the values that were not restored."""
    if thing.kind == "gradients":
        return bool(evidence.whole.watched.waiting)
    divergence = evidence.divergence
    named = {difference.name for difference in divergence.differences} if divergence.at == "restored" else set()
    return thing.name not in named


def _culprits(savable: list[Lost], evidence: Evidence) -> list[Cause]:
    """Those whose saving makes the resumed run exact: each by itself if one does, else all together if they do."""
    if not savable:
        return []
    everything = tuple(thing.name for thing, _ in savable)
    alone = [(thing.name,) for thing, _ in savable[:_MOST_TRIED_ALONE]]
    cured = evidence.cured_by_saving(dict.fromkeys([*alone, everything]))
    found = [pair for pair in savable if cured.get((pair[0].name,))]
    if found:
        return [
            _cause(pair, evidence, "with this saved and restored as well, the resumed run is exact") for pair in found
        ]
    if cured[everything]:
        names = ", ".join(f"`{name}`" for name in everything)
        together = f"with all of {names} saved and restored as well, the resumed run is exact"
        return [_cause(pair, evidence, together) for pair in savable]
    return []


def _cause(pair: Lost, evidence: Evidence, experiment: str, *, certain: bool = True) -> Cause:
    thing = pair[0]
    kind, what, advice = _WORDS[thing.kind]
    words = {"name": thing.name, "form": thing.leaf.form, "owner": thing.name.removesuffix(".training")}
    seen = [_waiting(evidence.whole.watched.waiting) if thing.kind == "gradients" else _values(pair, evidence.before)]
    seen += [experiment] if experiment else []
    if kind == "forgotten":
        seen += [f"alive and not in the state: {item}" for item in _same_kind(thing, evidence.whole.watched.forgotten)]
    return Cause(kind, what.format(**words), tuple(seen), advice.format(**words), certain)


def _values(pair: Lost, step: int) -> str:
    one, other = (thing.leaf.shown for thing in pair)
    if one and other:
        return f"after step {step} it was {one}; in the resumed process it is {other}"
    digests = " and ".join(f"{thing.leaf.digest[:12]}..." for thing in pair)
    return f"its value after step {step} and in the resumed process are not the same (digests {digests})"


def _waiting(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"gradients from before the save were used after it: those of {', '.join(names[:3])}{more}"


def _same_kind(thing: Thing, forgotten: list[str]) -> list[str]:
    return [item for item in forgotten if item.partition(" ")[0] == thing.leaf.form]


def _replayed(evidence: Evidence) -> str:
    """What repeating the first steps does; empty when it does nothing."""
    replayed = f"with steps 1 to {evidence.before} repeated before the restore, the resumed run is exact"
    return replayed if evidence.replay_cures else ""


def _iterators(found: list[Lost], evidence: Evidence) -> Iterator[Cause]:
    for thing, _ in found:
        if thing.kind == "iterator" and evidence.replay_cures:
            yield Cause(
                kind="iterator",
                what=f"`{thing.name}`, an iterator ({thing.leaf.form}) that step() uses, starts over: "
                "its position is in no checkpoint",
                evidence=("it stands at another position in the resumed process", _replayed(evidence)),
                advice="Put something that knows its position into the state: a loader with state_dict() "
                "(holdfast.data.ResumableDataLoader), or a counter from which the iterator is made.",
            )


def _forgotten(evidence: Evidence, explained: bool) -> Iterator[Cause]:
    """Optimizers, schedulers and scalers that are alive and belong to the training, whatever variable holds them."""
    for item in evidence.whole.watched.forgotten:
        yield Cause(
            kind="forgotten",
            what=f"{item} is alive and not in the state",
            evidence=(_replayed(evidence),) if evidence.replay_cures else (),
            advice="Put it into the state.",
            certain=evidence.replay_cures and not explained,
        )


_WORDS: dict[str, tuple[str, str, str]] = {
    "variable": (
        "variable",
        "`{name}` ({form}) is used by step() and is not in the state",
        "Keep it in a dictionary or an object with state_dict() that is in the state.",
    ),
    "attribute": (
        "attribute",
        "`{name}` ({form}) is used by step(), and no state_dict() holds it",
        "Return it from state_dict() and set it in load_state_dict(), or keep it in the state.",
    ),
    "generator": (
        "variable",
        "`{name}` ({form}) is drawn from by step() and is not in the state",
        "Put the generator into the state.",
    ),
    "object": (
        "forgotten",
        "`{name}` ({form}) is used by step() and is not in the state",
        'Put it into the state: {{..., "{name}": {name}}}.',
    ),
    "buffer": (
        "buffer",
        "`{name}` ({form}) is a buffer with persistent=False: no state_dict() holds it",
        "Register it with persistent=True if its value is not always the same.",
    ),
    "mode": (
        "mode",
        "`{owner}` is in another mode: train() or eval() is not part of a state_dict()",
        "Call {owner}.train() at the beginning of each step, or after the restore.",
    ),
    "gradients": (
        "gradients",
        "gradients were waiting when it was saved: the save fell into an accumulation",
        "Save after an optimizer step only; or let Checkpointer.step(accumulating=True) save the gradients as well.",
    ),
}
