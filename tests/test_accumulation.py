"""Saves between two optimizer steps: the gradients that wait are part of the training, and go on waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import Checkpointer, Every, Run
from holdfast.policies import Moment

ACCUMULATE = 3
BATCHES = 7  # the last window is not full


class AtEveryBatch:
    """A save policy."""

    def due(self, moment: Moment) -> str | None:
        """Always."""
        return "every batch"


AT_EVERY_BATCH = AtEveryBatch()


class StopError(Exception):
    """A process ends here."""


def run_process(path: Path, *, stop_after: int | None = None, save: Any = AT_EVERY_BATCH, **options: Any) -> nn.Module:
    """One process of a training with dropout; it ends after so many batches of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer, "batches": {"done": 0}}
    with Checkpointer(path, state, save=save, **options) as ckpt:
        for batch in range(state["batches"]["done"], BATCHES):  # type: ignore[index]
            loss = model(torch.full((8, 4), float(batch))).square().mean()
            (loss / ACCUMULATE).backward()
            state["batches"]["done"] += 1  # type: ignore[index]
            if ckpt.accumulated + 1 < ACCUMULATE:
                ckpt.step(accumulating=True)
            else:
                optimizer.step()
                optimizer.zero_grad()
                ckpt.step()
            if stop_after is not None and batch + 1 == stop_after:
                raise StopError
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step()
    return model


def weights(model: nn.Module) -> list[list[float]]:
    """Every parameter."""
    return [parameter.flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("overlap", [False, True])
def test_interrupted_after_any_batch_it_ends_the_same(tmp_path: Path, overlap: bool) -> None:
    """In the middle of a window and at its end, bit for bit."""
    expected = weights(run_process(tmp_path / "whole", overlap=overlap))

    for batch in range(1, BATCHES + 1):
        path = tmp_path / f"stopped-after-{batch}"
        with pytest.raises(StopError):
            run_process(path, stop_after=batch, overlap=overlap)
        assert weights(run_process(path, overlap=overlap)) == expected, batch


def test_interrupted_after_every_batch_it_ends_the_same(tmp_path: Path) -> None:
    """A process for each batch, one after the other."""
    expected = weights(run_process(tmp_path / "whole"))

    for batch in range(1, BATCHES + 1):
        with pytest.raises(StopError):
            run_process(tmp_path / "run", stop_after=batch)

    assert weights(run_process(tmp_path / "run")) == expected


def test_a_batch_is_not_a_step(tmp_path: Path) -> None:
    """``global_step`` counts steps of the optimizer; ``accumulated`` the batches since."""
    with Checkpointer(tmp_path / "run", {"x": torch.zeros(1)}) as ckpt:
        seen = []
        for accumulating in (True, True, False, True):
            ckpt.step(accumulating=accumulating)
            seen.append((ckpt.global_step, ckpt.accumulated))

    assert seen == [(0, 1), (0, 2), (1, 0), (1, 1)]


def test_policies_by_steps_do_not_save_in_between(tmp_path: Path) -> None:
    """A step whose number is due is saved once, not again at each batch that follows it."""
    with Checkpointer(tmp_path / "run", {"x": torch.zeros(1)}, save=Every(steps=1)) as ckpt:
        handles = [ckpt.step(accumulating=accumulating) for accumulating in (False, True, True, False)]

    assert [handle is not None for handle in handles] == [True, False, False, True]


def test_saves_of_one_step_are_generations_of_it(tmp_path: Path) -> None:
    """The newest is the one with most of the gradients."""
    with pytest.raises(StopError):
        run_process(tmp_path / "run", stop_after=5)

    assert [(name.step, name.generation) for name in Run(tmp_path / "run").names()] == [(1, 1), (1, 2), (1, 3)]
    newest = Run(tmp_path / "run").latest()
    assert newest is not None
    assert newest.loop["accumulated"] == 2


def test_only_saves_in_between_hold_gradients(tmp_path: Path) -> None:
    """At a step's end nothing waits, whatever lies in ``.grad``."""
    with pytest.raises(StopError):
        run_process(tmp_path / "run", stop_after=4)

    held = {checkpoint.loop["accumulated"]: list(checkpoint.files) for checkpoint in Run(tmp_path / "run")}
    assert {number: "_gradients.safetensors" in files for number, files in held.items()} == {0: False, 1: True, 2: True}


def test_gradients_that_wait_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """A window may reach into the next epoch."""
    weight = torch.ones(2, requires_grad=True)
    with Checkpointer(tmp_path / "run", {"weight": weight}, save=Every(epochs=1)) as ckpt:
        (weight * 3).sum().backward()
        ckpt.step(accumulating=True)
        ckpt.end_epoch()

    restored = torch.zeros(2, requires_grad=True)
    with Checkpointer(tmp_path / "run", {"weight": restored}) as ckpt:
        assert (ckpt.epoch, ckpt.global_step, ckpt.accumulated) == (1, 0, 1)
    assert restored.grad is not None
    assert restored.grad.tolist() == [3.0, 3.0]
