"""A soak: one run, trained for minutes while everything happens to it that happens in years.

    python tests/torture/soak.py --minutes 30

A trainer is killed, preempted and restarted at random moments, errors of the disk are injected into it, a reader loads
and verifies, a pruner prunes, and others try to write the same run; a training that nobody interrupts says what the
state must be at each step. It ends with a summary and the exit status 0, or with the first promise that was broken, and
1.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch is imported
    os.environ[variable] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples")]  # the laboratory, and what the examples compare by

from lab import soak_beside as beside
from lab.soak_faults import Injector, has_strace
from lab.soak_ledger import Checkpoints, PromiseError, States
from lab.soak_mutants import MUTANTS
from lab.soak_resources import Growth, Held, MemoryLimit
from lab.soak_trainer import BUSY, DONE, PREEMPTED, STORAGE, Life, Trainer
from lab.soak_training import FROZEN_BYTES, make_training
from lab.soak_voice import Message, Process, Voice, start

from holdfast import loading, saving  # noqa: F401 - for the processes that are forked
from holdfast.state import unchanged

MEMORY_BYTES = 768 * 2**20
"""For trainer, reader, pruner and whoever comes beside them, who share what was imported before they were forked."""
PATIENCE_S = 120.0
"""A trainer that says nothing for so long hangs."""


@dataclass(slots=True)
class Plan:
    """What happens to one life of the trainer, in seconds from its start; None for never."""

    ends_s: float
    ending: tuple[int, ...]
    inject_s: float | None = None
    inject_for_s: float = 0.0
    intrude_s: float | None = None
    copy_s: float | None = None


@dataclass(slots=True)
class Soak:
    """Conducts it.

    Args:
        directory: for the run and all else; made new.
        seconds: for how long.
        seed: of all that is left to chance.
        tell: called with what happens, in words.
    """

    directory: Path
    seconds: float
    seed: int
    tell: Callable[[str], None] = lambda _: None
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    growths: dict[str, Growth] = field(default_factory=dict)
    _rng: random.Random = field(init=False)
    _states: States = field(init=False)
    _checkpoints: Checkpoints = field(init=False)
    _limit: MemoryLimit = field(init=False)
    _run: Path = field(init=False)
    _kept_every: int = field(init=False)
    _processes: list[Process] = field(default_factory=list)
    _ended: list[Process] = field(default_factory=list)
    _reference: Process | None = None
    _trainer: Process | None = None
    _injector: Injector | None = None
    _seen: dict[str, Message] = field(default_factory=dict)
    _litter: dict[str, Message] = field(default_factory=dict)
    _must_be_newest: Message | None = None
    _may_fail: bool = False
    _let_in_at_s: float | None = None
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._run = self.directory / "run"
        self._kept_every = max(60, int(4 * self.seconds))
        self._states = States()
        self._checkpoints = Checkpoints(self._kept_every)
        self._limit = MemoryLimit(MEMORY_BYTES, f"holdfast-soak-{os.getpid()}")

    # ------------------------------------------------------------------------------------------------- the whole of it

    def soak(self) -> None:
        """Do it. Raises PromiseError."""
        try:
            self._begin()
            until = time.monotonic() + self.seconds
            while time.monotonic() < until:
                self._live(*self._draw(until - time.monotonic()))
            self._end()
        finally:
            if self._injector is not None:
                self._injector.end()
            for process in self._processes:
                process.close()
            self.peak_bytes = self._limit.peak_bytes()
            self._limit.close()

    def _begin(self) -> None:
        unchanged.MIN_GROUP_BYTES = FROZEN_BYTES // 2  # what is frozen here is small, and shall be shared
        make_training(self.seed)  # imports what is imported late, for all that are forked
        reference = Life(
            self.directory / "reference", 0, self.seed, 0, 1, save_every=10**9, each_epoch=False, pause_s=0
        )
        self._reference = self._start("reference", lambda voice: Trainer(reference, voice).live())
        self._start("reader", lambda voice: beside.read(self._run, self.seed, voice))
        self._start("pruner", lambda voice: beside.prune(self._run, self.seed, self._kept_every, voice))

    def _end(self) -> None:
        """With everybody else gone, one more start must leave nothing but what the retention keeps."""
        for process in list(self._processes):
            if process is not self._reference:
                self._hear(process)
                process.close()
                self._processes.remove(process)
        life = self._life(self.counts["lives"], save_every=5, steps=30)
        self._live(life, Plan(PATIENCE_S, ()))
        self._inspect()
        if self._litter:
            raise PromiseError(f"left by dead processes, and still there after the last start: {[*self._litter]}")
        until = time.monotonic() + PATIENCE_S
        while not self._states.settle():
            self._listen()
            if time.monotonic() > until:
                raise PromiseError("the uninterrupted training does not come so far")
        for role, growth in self.growths.items():
            problem = growth.problem()
            if problem is not None:
                raise PromiseError(f"the {role} holds more and more: {problem}")

    # ----------------------------------------------------------------------------------------------------- one life

    def _draw(self, left_s: float) -> tuple[Life, Plan]:
        """What the next life is like, and what happens to it."""
        rng = self._rng
        number = self.counts["lives"]
        long = number % 12 == 5
        ends_s = min(left_s, self.seconds / 8, 45.0) if long else min(left_s, rng.expovariate(1 / 1.5))
        ending: tuple[int, ...] = rng.choice(
            [(signal.SIGKILL,)] * 6 + [(signal.SIGTERM,)] * 3 + [(signal.SIGTERM, signal.SIGKILL)]
        )
        fault = rng.random()
        by_strace = fault < 0.25 and has_strace() and not long
        pinned = [item["step"] for item in self._seen.values() if item["pinned"]]
        life = self._life(
            number,
            save_every=rng.randint(2, 9),
            each_epoch=rng.random() < 0.6,
            overlap=number % 2 == 1,
            background=number % 2 == 1 or rng.random() < 0.8,
            workers=0 if by_strace else rng.choice((0, 0, 0, 2)),  # which would suffer from what is injected
            steps=rng.randint(20, 200) if rng.random() < 0.1 else sys.maxsize,
            pinned=pinned[0] if pinned else None,
            fault_probability=0.0 if by_strace or fault > 0.5 else rng.choice((0.002, 0.02, 0.1)),
        )
        plan = Plan(
            ends_s,
            ending,
            inject_s=rng.random() * ends_s if by_strace else None,
            inject_for_s=rng.uniform(0.2, 3),
            intrude_s=rng.random() * ends_s if rng.random() < 0.25 else None,
            copy_s=rng.random() * ends_s if rng.random() < 0.15 else None,
        )
        return life, plan

    def _life(self, number: int, **what: object) -> Life:
        return Life(
            directory=self._run,
            number=number,
            training_seed=self.seed,
            seed=self._rng.randrange(2**32),
            kept_every=self._kept_every,
            log=self.directory / "trainer.log",
            **what,  # type: ignore[arg-type]
        )

    def _live(self, life: Life, plan: Plan) -> None:
        """Let the trainer live once, and look at what it left."""
        self._inspect()
        self.tell(f"{life}\n  {plan}")
        self.counts["lives"] += 1
        self.growths["trainer"] = Growth()
        self._must_be_newest = None
        self._may_fail = life.fault_probability > 0
        self._let_in_at_s = None
        self._trainer = trainer = self._start("trainer", lambda voice: Trainer(life, voice).live())
        begin_s = heard_s = time.monotonic()
        signals = list(plan.ending)
        sent: list[int] = []
        while not trainer.ended():
            now_s = time.monotonic()
            heard_s = now_s if self._listen() else heard_s
            if now_s - heard_s > PATIENCE_S:
                raise PromiseError(f"the trainer says nothing for {PATIENCE_S} s; its last words: {[*trainer.said]}")
            self._do_beside(plan, now_s - begin_s)
            if signals and now_s - begin_s > plan.ends_s + 0.05 * len(sent) * self._rng.random():
                trainer.signal(signals[0])
                sent.append(signals.pop(0))
        self._hear(trainer)
        self._stop_injecting()
        self._finish_others()
        self._processes.remove(trainer)
        trainer.close()
        self._judge_end(life, trainer, sent)

    def _do_beside(self, plan: Plan, at_s: float) -> None:
        trainer = self._trainer
        assert trainer is not None
        begun = "begun" in trainer.said
        if plan.inject_s is not None and at_s > plan.inject_s and begun and self._injector is None:
            plan.inject_s = None
            self._may_fail = True
            self._injector = Injector(trainer.pid, self._rng, self.directory / "strace.out")
            plan.inject_for_s += at_s
        if self._injector is not None and at_s > plan.inject_for_s:
            self._stop_injecting()
        if plan.intrude_s is not None and at_s > plan.intrude_s and begun:
            plan.intrude_s = None
            self._start("intruder", lambda voice: beside.intrude(self._run, self.seed, voice))
        if plan.copy_s is not None and at_s > plan.copy_s and begun:
            plan.copy_s = None
            self._start("second writer", lambda voice: beside.copy(self._run, self.seed, voice))

    def _stop_injecting(self) -> None:
        if self._injector is not None:
            self.injected += self._injector.end()
            self._injector = None

    def _finish_others(self) -> None:
        """Wait for those who came beside, so that nobody writes while the run is looked at."""
        until = time.monotonic() + PATIENCE_S
        while [process for process in self._processes if process.role in ("intruder", "second writer")]:
            self._listen()
            if time.monotonic() > until:
                raise PromiseError("a second writer hangs")

    def _judge_end(self, life: Life, trainer: Process, sent: Sequence[int]) -> None:
        status = trainer.status
        self.tell(f"  ended with {status} after {sent}; saw {self._states.furthest}")
        allowed = {-number for number in sent}
        allowed |= {PREEMPTED} if signal.SIGTERM in sent else set()
        allowed |= {DONE} if life.steps < sys.maxsize else set()
        allowed |= {STORAGE} if self._may_fail else set()
        allowed |= set() if self._let_in_at_s is None else {BUSY}
        if status not in allowed:
            raise PromiseError(
                f"the trainer ended with {status}, after signals {sent}: {trainer.said.get('busy', life)}"
            )
        names = {PREEMPTED: "preemptions", DONE: "ends", STORAGE: "ended by errors", -signal.SIGKILL: "kills"}
        self.counts[names.get(status or 0, "ends before it listened")] += 1
        over = trainer.said.get("over")
        preempted = trainer.said.get("preempted")
        if status == DONE:
            self._must_be_newest = over
        elif status == PREEMPTED and preempted is not None:
            if preempted["saved"]:
                self._must_be_newest = preempted
            elif not self._may_fail:
                raise PromiseError(f"preempted and not saved, with nothing in the way: {preempted}")
        problem = self.growths["trainer"].problem()
        if problem is not None:
            raise PromiseError(f"the trainer holds more and more within one life: {problem}; {life}")

    # --------------------------------------------------------------------------------------------- looking at the run

    def _inspect(self) -> None:
        """While nobody trains, everything that must be there is, and is what it must be."""
        self._seen, self._litter = {}, {}
        inspector = self._start("inspector", lambda voice: beside.inspect(self._run, self.seed, voice))
        until = time.monotonic() + PATIENCE_S
        while inspector in self._processes:
            self._listen()
            if time.monotonic() > until:
                raise PromiseError("the inspector hangs")
        if "inspected" not in inspector.said:
            raise PromiseError("the inspector did not come to its end")
        self._checkpoints.inspect(self._seen, self.counts["starts"], self._litter)
        if self._must_be_newest is not None:
            place = self._must_be_newest["step"], self._must_be_newest["epoch"]
            if place not in {(item["step"], item["epoch"]) for item in self._seen.values()}:
                raise PromiseError(f"not saved at the end, and nothing was raised: step and epoch {place}")
        self.counts["inspections"] += 1

    # ---------------------------------------------------------------------------------------------------- listening

    def _start(self, role: str, work: Callable[[Voice], int | None]) -> Process:
        def limited(voice: Voice) -> int | None:
            if role not in ("reference", "inspector"):
                self._limit.join()
            return work(voice)

        process = start(role, limited, [other.connection for other in self._processes])
        self._processes.append(process)
        return process

    def _listen(self) -> bool:
        """Hear everybody; whether the trainer said anything."""
        wanted = [p for p in self._processes if p is not self._reference or self._states.behind()]
        ready, _, _ = select.select([p.connection for p in wanted], [], [], 0.01)
        heard = False
        for process in wanted:
            ended = process.ended()
            if process.connection in ready or ended:
                heard |= self._hear(process) and process is self._trainer
            if ended and process is not self._trainer:
                self._forget(process)
        return heard

    def _forget(self, process: Process) -> None:
        self._processes.remove(process)
        process.close()
        if process.status != 0 or process.role in ("reference", "reader", "pruner"):
            raise PromiseError(f"the {process.role} ended with {process.status}")

    def _hear(self, process: Process) -> bool:
        messages = process.hear()
        for message in messages:
            kind = message["kind"]
            if kind == "failed":
                raise PromiseError(f"the {process.role} failed: {message['why']}")
            getattr(self, "_hear_" + process.role.replace(" ", "_"))(kind, message)
        return bool(messages)

    def _hear_reference(self, kind: str, message: Message) -> None:
        if kind in ("begun", "state"):
            self._states.learn(message)

    def _hear_trainer(self, kind: str, message: Message) -> None:
        if kind == "begun":
            self.counts["starts"] += 1
            if message["resumed"] != self._checkpoints.newest:
                raise PromiseError(f"resumed from {message['resumed']}, the newest is {self._checkpoints.newest}")
            self._states.compare("resumed", message)
        elif kind == "state":
            self.counts["steps"] += message["loss"] is None
            self._states.compare("trained", message)
            self._check_alone()
        elif kind == "acknowledged":
            self.counts["acknowledged"] += 1
            self._checkpoints.saved(message)
        elif kind == "held":
            self._hold("trainer", message)
        elif kind == "injected":
            self.injected[message["what"]] += 1
        elif kind == "error":
            self.errors[f"{message['how']} {message['what']}"] += 1
            if not self._may_fail:
                raise PromiseError(f"an error of the disk that nobody injected: {message}")
        elif kind == "pinned":
            self.counts["pinned"] += 1
            self._checkpoints.pinned = {message["name"]: message["step"]}
        elif kind == "unpinning":
            self._checkpoints.pinned = {}

    def _hear_reader(self, kind: str, message: Message) -> None:
        if kind == "read":
            self._states.compare("read", message)
        elif kind == "looked":
            self.counts[f"read: {message['how']}"] += 1
        elif kind == "torn":
            raise PromiseError(f"torn, and seen by a reader: {message}")
        elif kind == "held":
            self._hold("reader", message)

    def _hear_pruner(self, kind: str, message: Message) -> None:
        if kind == "held":
            self._hold("pruner", message)
        else:
            self.counts[f"pruner: {kind}"] += message["count"]

    def _hear_intruder(self, kind: str, message: Message) -> None:
        self.counts[f"intruders {kind}"] += 1
        if kind == "let in":
            self._let_in_at_s = message["at_s"]
            self._check_alone()

    def _hear_second_writer(self, kind: str, message: Message) -> None:
        self.counts["copies by a second writer"] += 1
        self._checkpoints.saved(message)

    def _hear_inspector(self, kind: str, message: Message) -> None:
        if kind == "read":
            self._states.compare("inspected", message)
        elif kind == "seen":
            self._seen[message["name"]] = message
        elif kind == "litter":
            self._litter[message["name"]] = message
        elif kind in ("torn", "stranger"):
            raise PromiseError(f"{kind}: {message}")

    def _check_alone(self) -> None:
        """Who was let in must not have come between two steps of the trainer's one block."""
        said = {} if self._trainer is None else self._trainer.said
        if self._let_in_at_s is None or "begun" not in said or "state" not in said:
            return
        if said["begun"]["at_s"] < self._let_in_at_s < said["state"]["at_s"]:
            raise PromiseError("another writer was let in beside the trainer")

    def _hold(self, role: str, message: Message) -> None:
        growth = self.growths.setdefault(role, Growth())
        growth.samples.append(Held(message["descriptors"], message["memory_bytes"]))

    # ------------------------------------------------------------------------------------------------------ at the end

    def summary(self) -> str:
        """What happened, in lines."""
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f} MB"
        lines = [f"count: soak {name} {count}" for name, count in sorted(self.counts.items())]
        lines += [f"count: soak states compared {self._states.compared}"]
        lines += [f"injected: {what}, {count} times" for what, count in sorted(self.injected.items())]
        lines += [f"came out: {what}, {count} times" for what, count in sorted(self.errors.items())]
        lines += [f"checkpoints at most: {self._checkpoints.most}, {self._checkpoints.most_bytes / 1e6:.1f} MB"]
        for role, growth in self.growths.items():
            most = growth.most()
            lines += [f"{role}: at most {most.descriptors} descriptors, {most.memory_bytes / 1e6:.0f} MB of its own"]
        lines += [f"memory: at most {peak} together; limit: {self._limit.how}"]
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, and say how it went."""
    options = parse(argv)
    if options.mutant is not None:
        MUTANTS[options.mutant]()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="holdfast-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    soak = Soak(directory, options.minutes * 60, options.seed)
    if options.verbose:
        soak.tell = lambda what: print(what, flush=True)
    try:
        soak.soak()
    except PromiseError as broken:
        print(f"{soak.summary()}\nBROKEN: {broken}", flush=True)
        print(f"again: --seed {options.seed}; look at {directory}/run and {directory}/trainer.log", flush=True)
        return 1
    print(f"{soak.summary()}\nall promises were kept for {options.minutes:g} minutes (seed {options.seed})", flush=True)
    shutil.rmtree(directory)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)), help="by default another each time")
    parser.add_argument("--directory", type=Path, help="an empty one; removed when all went well")
    parser.add_argument("--mutant", choices=MUTANTS, help="break Holdfast in this way first, to see it noticed")
    parser.add_argument("--verbose", action="store_true", help="say what happens to each life of the trainer")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
