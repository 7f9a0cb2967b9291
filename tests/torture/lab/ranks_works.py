"""What a group of ranks can be told to do, by name; each rank calls the same function with the same arguments."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from holdfast import Checkpointer, Every, KeepLast
from holdfast.errors import HoldfastError
from holdfast.policies import Moment
from lab.ranks_standins import Apart
from lab.ranks_training import Log, Nothing, Training, settings_of


class StoppedError(Exception):
    """The training stops here, since it was told to."""


@dataclass(frozen=True, slots=True)
class EveryBatch:
    """Save after each batch, also where gradients wait for the next one."""

    def due(self, moment: Moment) -> str | None:
        """See :class:`holdfast.policies.SavePolicy`."""
        return "every batch" if moment.event in ("step", "batch") else None


def train(directory: Path, **arguments: Any) -> dict[str, Any]:
    """Train to the end, or up to where the arguments say; continues what lies in ``directory``.

    Args:
        directory: has the run's checkpoints in ``run``, and the log of each rank beside it.
        arguments: settings, and what :func:`checkpointer` and :func:`_loop` take.
    """
    settings, more = settings_of(arguments)
    rank = dist.get_rank()
    if rank in more.pop("absent", ()):
        signal.pause()
    loop = {name: more.pop(name) for name in ("metrics", "idle", "stop", "patient") if name in more}
    training = Training(settings)
    told: dict[str, Any] = {"caught": []}
    try:
        with checkpointer(directory / "run", training, **more) as ckpt:
            told["resumed"] = ckpt.global_step
            try:
                _loop(training, ckpt, Log(directory), told["caught"], **loop)
            finally:
                told["steps"] = ckpt.global_step
    except StoppedError:
        pass
    return told | _came_to(training)


def resume(directory: Path, **arguments: Any) -> dict[str, Any]:
    """Restore the newest checkpoint into a training that was constructed otherwise; nothing is trained or saved."""
    settings, more = settings_of({"seed": 99, **arguments})
    training = Training(settings)
    told: dict[str, Any] = {}
    try:
        with checkpointer(directory / "run", training, **more) as ckpt:
            told["resumed"] = ckpt.global_step
            raise StoppedError
    except StoppedError:
        pass
    return told | _came_to(training)


def _came_to(training: Training) -> dict[str, Any]:
    if isinstance(training.model, DistributedDataParallel):
        # The buffers of rank 0 count, as from the next forward on: whoever ended after a restart has them already.
        for buffer in training.model.buffers():
            dist.broadcast(buffer, 0)
    own_value = training.state.get("own")
    told = {} if own_value is None else {"own value": own_value.value}
    return told | {"gathered": training.gathered(), "own": training.own()}


def _loop(
    training: Training,
    ckpt: Any,
    log: Log,
    caught: list[str],
    *,
    metrics: Mapping[str, float] | None = None,
    idle: Mapping[str, int] | None = None,
    stop: int | None = None,
    patient: bool = False,
) -> None:
    """The training's loop.

    Args:
        training: what is trained.
        ckpt: what saves it.
        log: where each batch is noted.
        caught: what went wrong with saves, if that is not to end the training.
        metrics: by rank, what it says the loss is after each epoch.
        idle: by rank, before which step it stops doing anything, without ending.
        stop: after which step all stop.
        patient: go on after a save that failed.
    """
    rank = str(dist.get_rank())
    settings = training.settings
    for epoch in range(ckpt.epoch, settings.epochs):
        training.model.train()
        for position, batch in enumerate(training.loader, start=training.loader.position):
            last = ckpt.accumulated + 1 == settings.accumulate
            told = training.batch(batch, last=last)
            log.add({"epoch": epoch, "position": position, **told})
            if last:
                training.optimize()
            if idle and ckpt.global_step + 1 == idle.get(rank):
                signal.pause()
            with _caught(caught, patient):
                ckpt.step(**({} if last else {"accumulating": True}))
            if stop is not None and ckpt.global_step >= stop and last:
                raise StoppedError
        with _caught(caught, patient):
            ckpt.end_epoch({"val_loss": (metrics or {}).get(rank, 1.0 / (epoch + 1))})


@contextmanager
def _caught(caught: list[str], patient: bool) -> Iterator[None]:
    try:
        yield
    except HoldfastError as error:
        if not patient:
            raise
        caught.append(f"{type(error).__name__}: {error}")


def checkpointer(
    run: Path,
    training: Training,
    *,
    saving: str = "holdfast",
    save_steps: int = 1,
    minutes: float | None = None,
    every_batch: bool = False,
    values: Mapping[str, Any] | None = None,
    own_values: Mapping[str, Any] | None = None,
    forget: str = "",
    agree: bool = True,
    patience_s: float = 20.0,
    **more: Any,
) -> Any:
    """What saves a training.

    Args:
        run: the directory of its checkpoints.
        training: what is saved.
        saving: ``"holdfast"``, a :class:`holdfast.Checkpointer` on all ranks; ``"apart"``, :class:`Apart`;
            ``"nothing"``.
        save_steps: after how many steps.
        minutes: after how many minutes; instead.
        every_batch: after each batch; instead.
        values: by rank, a plain value of the state that ought to be the same everywhere.
        own_values: by rank, a plain value of the state that is each rank's own.
        forget: see :class:`Apart`.
        agree: see :class:`Apart`.
        patience_s: how long a rank waits for another.
        more: of the Checkpointer.
    """
    if saving == "nothing":
        return Nothing()
    if saving == "apart":
        return Apart(run, training, save_batches=save_steps, forget=forget, agree=agree)
    rank = str(dist.get_rank())
    state = training.state
    if values is not None:
        state["plain"] = {"deep": [values[rank]]}
    if own_values is not None:
        state["own"] = importlib.import_module("holdfast.distributed").PerRank({"deep": [own_values[rank]]})
    more["timeout_s"] = patience_s
    save: Any = Every(steps=save_steps) if minutes is None else Every(minutes=minutes)
    return Checkpointer(run, state, save=EveryBatch() if every_batch else save, keep=KeepLast(3), **more)


WORKS: dict[str, Callable[..., dict[str, Any]]] = {"train": train, "resume": resume}
