"""How far a training is: what its loop counts, and each checkpoint remembers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint import Checkpoint


@dataclass(slots=True)
class Progress:
    """The counters of a training loop.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        steps_in_epoch: optimizer steps done since the last epoch ended.
        accumulated: batches whose gradients wait for the next optimizer step.
        origin: of a training that began with another run's checkpoint: its ``run_id``, ``checkpoint_id`` and ``step``.
        overrides: what was changed on resuming, so that it is not changed again at each restart.
    """

    step: int = 0
    epoch: int = 0
    steps_in_epoch: int = 0
    accumulated: int = 0
    origin: dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def saved_in(cls, checkpoint: Checkpoint) -> Progress:
        """How far the training was that ``checkpoint`` was saved by."""
        loop = checkpoint.loop
        return cls(
            step=checkpoint.step,
            epoch=checkpoint.epoch,
            steps_in_epoch=int(loop.get("steps_in_epoch", 0)),
            accumulated=int(loop.get("accumulated", 0)),
            origin=loop.get("origin"),
            overrides=dict(loop.get("overrides", {})),
        )

    def entry(self) -> dict[str, Any]:
        """What is saved beside the step and the epoch, which each checkpoint says of itself."""
        loop: dict[str, Any] = {"steps_in_epoch": self.steps_in_epoch, "accumulated": self.accumulated}
        if self.origin is not None:
            loop["origin"] = self.origin
        if self.overrides:
            loop["overrides"] = self.overrides
        return loop

    def count_step(self) -> None:
        """The optimizer made a step."""
        self.step += 1
        self.steps_in_epoch += 1
        self.accumulated = 0

    def count_batch(self) -> None:
        """A batch added its gradients to those that wait for the next step of the optimizer."""
        self.accumulated += 1

    def count_epoch(self) -> None:
        """An epoch ended."""
        self.epoch += 1
        self.steps_in_epoch = 0


def origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a new run remembers of the checkpoint of another one that it begins with."""
    return {
        "run_id": checkpoint.run_id,
        "checkpoint_id": checkpoint.checkpoint_id,
        "step": checkpoint.step,
    }
