"""Parts of a training run again, with one thing changed: what a diagnosis asks its questions with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from holdfast.audit.comparison import ABSENT, Divergence, compare
from holdfast.audit.interpreters import Interpreter
from holdfast.audit.records import Job, Outcome, Part, Thing, Where

_RUNS_THAT_AGREE = 4


@dataclass(frozen=True, slots=True)
class Halves:
    """The three parts of an audit."""

    whole: Outcome
    first: Outcome
    second: Outcome


class Laboratory:
    """Runs parts of one training, in two interpreters: one for what is not interrupted, one for what resumes.

    Args:
        stack: ends what is started here when it is closed.
        directory: for files and checkpoints.
        interpreters: the two.
        where: the function that builds the training.
        steps: before the save, and after it.
    """

    def __init__(
        self,
        stack: ExitStack,
        directory: str,
        interpreters: tuple[Interpreter, Interpreter],
        where: Where,
        steps: tuple[int, int],
    ) -> None:
        self.home, self.away = interpreters
        self.before, self.after = steps
        self.directory = directory
        self._where = where
        self._stack = stack
        self._threads = ThreadPoolExecutor(2)
        # Without waiting: when this is closed in the middle, they wait for interpreters that are only ended then.
        stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)
        self._count = 0

    def interpreter(self, name: str, variables: dict[str, str] | None = None) -> Interpreter:
        """A new interpreter."""
        return self._stack.enter_context(Interpreter(self.directory, name, variables))

    def job(self, part: Part, **changes: object) -> Job:
        """A part to run; ``changes`` are fields of :class:`Job`."""
        self._count += 1
        fixed = {"outcome": os.path.join(self.directory, f"{self._count}.outcome"), "directory": os.getcwd()}
        given = {"checkpoint": os.path.join(self.directory, "checkpoint"), **fixed, **changes}
        return Job(part, self._where, self.before, self.after, **given)  # type: ignore[arg-type]

    def halves(self, home: Interpreter, away: Interpreter, name: str = "checkpoint") -> Halves | Outcome:
        """The three parts; the outcome of the first that failed, if one did."""
        checkpoint = os.path.join(self.directory, name)
        jobs = [self.job("whole"), self.job("first half", checkpoint=checkpoint)]
        whole, first = home.run(jobs)
        failed = next((outcome for outcome in (whole, first) if outcome.failure), None)
        if failed is not None:
            return failed
        (second,) = away.run([self.job("second half", checkpoint=checkpoint)])
        return second if second.failure else Halves(whole, first, second)

    def together(self, *runs: tuple[Interpreter, Sequence[Job]]) -> list[list[Outcome]]:
        """Jobs for several interpreters, at the same time."""
        return list(self._threads.map(lambda run: run[0].run(run[1]), runs))


class Evidence:
    """What is known of a divergence: the parts as they were, and as they are with one thing changed.

    Experiments run when their result is first asked for; each runs once.

    Attributes:
        halves: the parts as they were audited.
        divergence: how the resumed one differs.
        whole: the run without interruption once more, watched.
        resumed: the second half once more, watched.
    """

    def __init__(self, laboratory: Laboratory, halves: Halves, divergence: Divergence) -> None:
        self._laboratory = laboratory
        self.halves = halves
        self.divergence = divergence
        self.before = laboratory.before
        jobs = (laboratory.job("whole", watch=True), laboratory.job("second half", watch=True))
        (self.whole,), (self.resumed,) = laboratory.together((laboratory.home, jobs[:1]), (laboratory.away, jobs[1:]))

    def cures(self, outcome: Outcome) -> bool:
        """Whether a resumed run does not differ any more."""
        return outcome.failure is None and compare(self.halves.whole, outcome) is None

    @cached_property
    def between_whole_runs(self) -> list[Divergence | None]:
        """How runs without interruption differ from each other."""
        runs = [self.halves.whole, self.halves.first, self.whole]
        return [compare(one, other) for i, one in enumerate(runs) for other in runs[i + 1 :]]

    @cached_property
    def replay_cures(self) -> bool:
        """Whether a resumed process is exact if it repeats the first steps before it restores."""
        laboratory = self._laboratory
        (outcome,) = laboratory.away.run([laboratory.job("second half", replay=True)])
        return self.cures(outcome)

    @cached_property
    def same_interpreter_cures(self) -> bool:
        """Whether the second half is exact in the interpreter of the first: with its hash order and random seeds."""
        laboratory = self._laboratory
        (outcome,) = laboratory.home.run([laboratory.job("second half")])
        return self.cures(outcome)

    @cached_property
    def same_hash_order_cures(self) -> bool:
        """Whether two new interpreters with the same hash order agree."""
        laboratory = self._laboratory
        home, away = (laboratory.interpreter(name, {"PYTHONHASHSEED": "0"}) for name in ("ordered-1", "ordered-2"))
        halves = laboratory.halves(home, away, "ordered")
        return isinstance(halves, Halves) and compare(halves.whole, halves.second) is None

    @cached_property
    def lost(self) -> list[tuple[Thing, Thing]]:
        """What ``step`` reaches outside the state and the resumed process has another value of."""
        found = {thing.name: thing for thing in self.resumed.watched.things}
        pairs = [
            (thing, found.get(thing.name, Thing(thing.name, thing.kind, ABSENT, savable=False)))
            for thing in self.whole.watched.things
        ]
        return [(thing, other) for thing, other in pairs if thing.leaf.digest != other.leaf.digest]

    def cured_by_saving(self, choices: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], bool]:
        """For each choice of things: whether the resumed run is exact once they are saved and restored as well."""
        laboratory = self._laboratory
        wanted = list(choices)
        entries = {f"audited-{i}": name for i, name in enumerate(dict.fromkeys(n for names in wanted for n in names))}
        checkpoint = os.path.join(laboratory.directory, "with-others")
        (first,) = laboratory.home.run([laboratory.job("first half", save_also=entries, checkpoint=checkpoint)])
        if first.failure is not None:
            return dict.fromkeys(wanted, False)
        jobs = [
            laboratory.job(
                "second half",
                checkpoint=checkpoint,
                restore_also={entry: name for entry, name in entries.items() if name in names},
            )
            for names in wanted
        ]
        outcomes = laboratory.away.run(jobs)
        return {names: self.cures(outcome) for names, outcome in zip(wanted, outcomes, strict=True)}

    def runs_agree(self, condition: str) -> tuple[bool, list[str]]:
        """Whether runs without interruption agree under a condition, and the operators that torch warned about.

        Two that agree may do so by chance, so two more are asked. A run that fails tells nothing.
        """
        laboratory = self._laboratory
        outcomes: list[Outcome] = []
        agree = True
        while agree and len(outcomes) < _RUNS_THAT_AGREE:
            outcomes += laboratory.home.run([laboratory.job("whole", condition=condition) for _ in range(2)])
            agree = not any(outcome.failure or compare(outcomes[0], outcome) for outcome in outcomes)
        return agree, list(dict.fromkeys(name for outcome in outcomes for name in outcome.operators))
