"""One life of the trainer in a soak: it resumes, trains, saves, and says all that it may be held to."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from holdfast import Checkpoint, Checkpointer, Every, Preempted, Preemption, SaveHandle
from holdfast.errors import CheckpointNotFoundError, RunBusyError, StorageError
from holdfast.policies import SavePolicy
from lab.soak_faults import PatchedFaults
from lab.soak_resources import held
from lab.soak_training import Training, digest_of, make_training, retention
from lab.soak_voice import Voice

DONE, STORAGE, BUSY, PREEMPTED = 0, 4, 5, 75
"""How a life may end that nobody killed."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Life:
    """What one life of the trainer is like.

    Attributes:
        directory: of the run.
        number: of this life.
        training_seed: the same in all lives.
        seed: what is left to chance in this one.
        kept_every: as for the retention.
        save_every: steps.
        each_epoch: whether the end of each epoch is saved too; otherwise its metrics come late.
        overlap: as for the checkpointer.
        background: as for the checkpointer.
        workers: of the loader.
        steps: after so many the training is over.
        pinned: the step that is pinned already.
        fault_probability: for each change of the disk, now and then; 0 for none.
        pause_s: between steps.
        log: where warnings go.
    """

    directory: Path
    number: int
    training_seed: int
    seed: int
    kept_every: int
    save_every: int = 5
    each_epoch: bool = True
    overlap: bool = False
    background: bool = True
    workers: int = 0
    steps: int = sys.maxsize
    pinned: int | None = None
    fault_probability: float = 0.0
    pause_s: float = 0.003
    log: Path | None = None


@dataclass(slots=True)
class Trainer:
    """Lives a life."""

    life: Life
    voice: Voice
    _rng: random.Random = field(init=False)
    _training: Training = field(init=False)
    _faults: PatchedFaults = field(init=False)
    _under_way: list[SaveHandle] = field(default_factory=list)
    _pinned: int | None = None

    def __post_init__(self) -> None:
        self._rng = random.Random(self.life.seed)
        self._pinned = self.life.pinned
        self._faults = PatchedFaults(
            self.life.seed, self.life.fault_probability, lambda what: self.voice.say("injected", what=what)
        )

    def live(self) -> int:
        """Train until something ends it; returns the exit status."""
        self._log()
        if self.life.fault_probability:
            self._faults.install()
        self._training = make_training(self.life.training_seed, self.life.workers)
        ckpt = self._checkpointer()
        try:
            with ckpt:
                self._begin(ckpt)
                self._train(ckpt)
                self._faults.on = False
            self._acknowledge()
            self.voice.say("over", step=ckpt.global_step, epoch=ckpt.epoch)
        except Preempted as preempted:
            self._acknowledge()
            self.voice.say("preempted", step=ckpt.global_step, epoch=ckpt.epoch, saved=preempted.checkpoint is not None)
            if preempted.checkpoint is not None:
                self._say_acknowledged(preempted.checkpoint)
            return PREEMPTED
        except RunBusyError as error:
            self.voice.say("busy", why=str(error))
            return BUSY
        except StorageError as error:
            self._acknowledge()
            self._say_error("ended by", error)
            return STORAGE
        return DONE

    def _checkpointer(self) -> Checkpointer:
        life = self.life
        save: SavePolicy = Every(steps=life.save_every)
        return Checkpointer(
            life.directory,
            self._training.state,
            save=save | Every(epochs=1) if life.each_epoch else save,
            keep=retention(life.kept_every),
            overlap=life.overlap,
            background=life.background,
            preemption=Preemption(),
            config={"seed": life.training_seed},
            drain_s=120,
        )

    def _begin(self, ckpt: Checkpointer) -> None:
        source = ckpt.resumed_from
        self.voice.say(
            "begun",
            resumed=None if source is None else source.name,
            step=ckpt.global_step,
            epoch=ckpt.epoch,
            **asdict(digest_of(self._training)),
        )

    def _train(self, ckpt: Checkpointer) -> None:
        last = ckpt.global_step + self.life.steps
        while True:
            for _ in self._training.epoch():
                self._faults.on = self._rng.random() < 0.2
                self._submit(ckpt, ckpt.step)
                self._say_state(ckpt)
                if self._rng.random() < 0.08:
                    self._pin(ckpt)
                if self._rng.random() < 0.02:
                    self._save_now(ckpt)
                self._acknowledge()
                self._say_held()
                if ckpt.global_step >= last:
                    return
                time.sleep(self.life.pause_s)
            loss = self._training.measure()
            self._training.scheduler.step()
            self._submit(ckpt, lambda: ckpt.end_epoch({"loss": loss}))  # noqa: B023 - called at once
            self._say_state(ckpt, loss)
            self._acknowledge()

    def _say_state(self, ckpt: Checkpointer, loss: float | None = None) -> None:
        self.voice.say("state", step=ckpt.global_step, epoch=ckpt.epoch, loss=loss, **asdict(digest_of(self._training)))

    def _submit(self, ckpt: Checkpointer, call: Callable[[], SaveHandle | None]) -> None:
        """Tell the checkpointer; go on after most errors of the disk, as the documentation says that one may."""
        handle = self._tolerating(call)
        if handle is not None:
            self._under_way.append(handle)

    def _save_now(self, ckpt: Checkpointer) -> None:
        self._submit(ckpt, lambda: ckpt.save(reason="now and then"))
        if self._under_way and self._rng.random() < 0.5:
            with contextlib.suppress(StorageError):  # the next call raises it too
                self._under_way[-1].result(120)

    def _pin(self, ckpt: Checkpointer) -> None:
        """Pin some checkpoint, the oldest and the next to go too; what was pinned before no longer."""
        self._faults.on = False
        try:
            if self._pinned is not None:
                self.voice.say("unpinning", step=self._pinned)
                with contextlib.suppress(CheckpointNotFoundError):
                    ckpt.run.pin(self._pinned, False)
                self._pinned = None
            names = ckpt.run.names()
            if names:
                checkpoint = ckpt.run.pin(self._rng.choice(names).step)
                self._pinned = checkpoint.step
                self.voice.say("pinned", name=checkpoint.name, step=checkpoint.step)
        except CheckpointNotFoundError:
            self.voice.say("too late to pin")
        except StorageError as error:
            self._say_error("pin", error)

    def _tolerating(self, call: Callable[[], _T]) -> _T | None:
        try:
            return call()
        except StorageError as error:
            if self._rng.random() < 0.2:
                raise
            self._say_error("went on after", error)
            return None

    def _acknowledge(self) -> None:
        """Say which saves are durable by now."""
        while self._under_way and self._under_way[0].done():
            handle = self._under_way.pop(0)
            if not handle.failed():
                self._say_acknowledged(handle.result(0))

    def _say_acknowledged(self, checkpoint: Checkpoint) -> None:
        self.voice.say(
            "acknowledged",
            name=checkpoint.name,
            step=checkpoint.step,
            epoch=checkpoint.epoch,
            loss=checkpoint.metrics.get("loss"),
        )

    def _say_held(self) -> None:
        """Only while nothing is under way, which makes the moments equal."""
        if all(thread.name != "holdfast-writer" for thread in threading.enumerate()):
            with contextlib.suppress(OSError):  # injected
                self.voice.say("held", **asdict(held()))

    def _say_error(self, how: str, error: StorageError) -> None:
        code = "?" if error.errno is None else errno.errorcode.get(error.errno, str(error.errno))
        self.voice.say("error", how=how, what=f"{type(error).__name__} {code}", why=str(error))

    def _log(self) -> None:
        """Warnings into a file, whatever becomes of its own writes."""
        logging.raiseExceptions = False
        logger = logging.getLogger("holdfast")
        logger.handlers = [logging.NullHandler() if self.life.log is None else logging.FileHandler(self.life.log)]
        logger.handlers[0].setFormatter(logging.Formatter(f"life {self.life.number}: %(levelname)s %(message)s"))
        logger.propagate = False
