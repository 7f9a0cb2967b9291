"""Kills ranks of a training at random moments, has all start again, and looks at what came of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast import Run
from lab.ranks import Launch, Outcome
from lab.ranks_moments import Kill
from lab.ranks_training import Log


@dataclass(slots=True)
class Kills:
    """Where and how often ranks were killed.

    Args:
        launch: starts the ranks.
        rng: chooses.
        whole: what the training comes to when nobody is killed.
        usual: the same, saved by what is tried here: its counts say how many moments there are.
        kinds: of which kinds of moments to choose, and how often each.
        fresh: makes a directory.
        arguments: of the training.
    """

    launch: Launch
    rng: random.Random
    whole: Outcome
    usual: Outcome
    kinds: dict[str, float]
    fresh: Callable[[], Path]
    arguments: dict[str, Any]
    done: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def run(self, kills: int, *, a_round: int = 4) -> None:
        """Kill so often; about ``a_round`` of them in one training.

        Raises:
            AssertionError: a training that was continued is not the one that nobody disturbed, or what lies on the
                disk is not in order.
        """
        while self.done.total() < kills:
            directory, saved = self.fresh(), 0
            self.rounds += 1
            while True:
                killing = self.done.total() < kills
                rank, kill = self._choose(a_round)
                outcome = self._start(directory, {rank: kill} if killing else {})
                saved = self._look(directory, saved)
                if set(outcome.statuses) == {0}:
                    break
                assert killing, outcome.story()
                assert outcome.ranks[rank].status == -kill.number, (kill, outcome.story())
                self.done[kill.kind] += 1
            self._compare(outcome, directory)

    def _choose(self, a_round: int) -> tuple[int, Kill]:
        rank = self.rng.randrange(len(self.whole.ranks))
        there = self.usual.ranks[rank].counts
        kinds = [kind for kind in self.kinds if there.get(kind)]
        (kind,) = self.rng.choices(kinds, [self.kinds[kind] for kind in kinds])
        return rank, Kill(kind, self.rng.randint(1, max(1, 2 * there[kind] // (a_round + 1))))

    def _start(self, directory: Path, kills: dict[int, Kill]) -> Outcome:
        after_death = self.rng.choice(["kill", "leave"])
        store = self.rng.choice(["rank", "agent"])
        return self.launch(
            "train",
            directory,
            len(self.whole.ranks),
            kills=kills,
            after_death=after_death,
            store=store,
            **self.arguments,
        )

    def _look(self, directory: Path, before: int) -> int:
        """The newest step that is saved: every checkpoint that can be seen is intact, and none was lost."""
        run = Run(directory / "run")
        if self.arguments.get("saving", "holdfast") != "holdfast" or not (directory / "run").exists():
            return 0
        for checkpoint in run:
            checkpoint.verify()
        assert run.broken() == []
        newest = run.latest()
        after = 0 if newest is None else newest.step
        assert after >= before
        return after

    def _compare(self, outcome: Outcome, directory: Path) -> None:
        problems = list(differences(self.whole, outcome, directory))
        assert not problems, "\n".join([*problems, f"after {self.done}", outcome.story()])
        rests = [path.name for path in (directory / "run").iterdir() if path.name.startswith(".tmp")]
        assert rests == []


def differences(whole: Outcome, outcome: Outcome, directory: Path) -> Iterator[str]:
    """In what a training that ended, with its logs in ``directory``, is not the one that nobody disturbed."""
    undisturbed = Path(whole.results[0]["directory"])
    for rank, (expected, found) in enumerate(zip(whole.results, outcome.results, strict=True)):
        for part in ("gathered", "own"):
            names = [name for name in expected[part] if found[part].get(name) != expected[part][name]]
            if names:
                yield f"rank {rank}: {part}: {', '.join(names)}"
        if found["steps"] != expected["steps"]:
            yield f"rank {rank}: {found['steps']} steps, not {expected['steps']}"
        if Log.read(directory, rank) != Log.read(undisturbed, rank):
            yield f"rank {rank}: it saw other samples, or had other losses"
