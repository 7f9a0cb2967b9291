"""Objects that are alive and not in the state are named at the first save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from holdfast import Checkpointer
from holdfast.data import ResumableDataLoader
from holdfast.state.forgotten import forgotten


@pytest.fixture
def model() -> nn.Module:
    """A module."""
    return nn.Linear(2, 2)


def test_optimizers_of_the_state_s_parameters(model: nn.Module) -> None:
    """An optimizer is missed when it updates a parameter of the state, and only then."""
    optimizer = torch.optim.Adam(model.parameters())
    stranger = torch.optim.Adam(nn.Linear(2, 2).parameters())
    assert forgotten({"model": model}) == ["Adam of 2 parameters"]
    assert forgotten({"model": model, "optimizer": optimizer}) == []
    assert forgotten({"parts": {"deep": [model, (optimizer,)]}}) == []
    assert stranger.param_groups


def test_schedulers_of_such_optimizers(model: nn.Module) -> None:
    """A scheduler is missed when it drives an optimizer of the state; those inside another one are part of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    inner = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.StepLR(optimizer, 2)]
    scheduler = lr_scheduler.SequentialLR(optimizer, inner, milestones=[3])
    assert sorted(forgotten(state)) == ["ConstantLR of SGD", "SequentialLR of SGD", "StepLR of SGD"]
    assert forgotten({**state, "scheduler": scheduler}) == []


def test_plateau_is_a_scheduler_too(model: nn.Module) -> None:
    """ReduceLROnPlateau is missed as well."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)
    assert forgotten({"model": model, "optimizer": optimizer}) == ["ReduceLROnPlateau of SGD"]
    assert forgotten({"model": model, "optimizer": optimizer, "s": scheduler}) == []


def test_scalers(model: nn.Module) -> None:
    """A scaler in use is missed, one that is switched off is not."""
    scaler = torch.amp.GradScaler("cpu")
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert forgotten({"model": model}) == ["GradScaler"]
    assert forgotten({"model": model, "scaler": scaler}) == []
    assert not off.is_enabled()


class StatefulDataLoader:
    """Stands for the one of torchdata, which is recognized by its name."""

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""


def test_stateful_loaders(model: nn.Module) -> None:
    """A loader that knows its position is missed."""
    loader = StatefulDataLoader()
    assert forgotten({"model": model}) == ["StatefulDataLoader"]
    assert forgotten({"model": model, "loader": loader}) == []


@pytest.mark.parametrize(
    ("shuffle", "position", "expected"),
    [(True, 0, ["ResumableDataLoader"]), (False, 1, ["ResumableDataLoader"]), (False, 0, [])],
)
def test_loaders_of_our_own(model: nn.Module, shuffle: bool, position: int, expected: list[str]) -> None:
    """One that gives the same batches each time is for evaluations, unless the training is in the middle of it."""
    loader = ResumableDataLoader(range(4), shuffle=shuffle)
    iterator = iter(loader)
    for _ in range(position):
        next(iterator)
    assert forgotten({"model": model}) == expected


def test_dead_objects_are_not_missed(model: nn.Module) -> None:
    """What nobody holds any more is not named."""
    torch.optim.SGD(model.parameters(), lr=1.0)
    assert forgotten({"model": model}) == []


def test_what_only_a_circle_keeps_is_not_missed(model: nn.Module) -> None:
    """An optimizer that is gone, and that the collector has not found yet."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["circle"] = optimizer
    del optimizer
    assert forgotten({"model": model}) == []


def test_named_once_at_the_first_save(tmp_path: Path, model: nn.Module) -> None:
    """The warning names object and run; it points at the line that saved; the second save says nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Checkpointer(tmp_path / "run", {"model": model}) as ckpt:
        with pytest.warns(
            UserWarning, match="a SGD of 2 parameters is alive and not in the state of .*run: "
        ) as caught:
            ckpt.save()
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ckpt.save()
    assert optimizer.param_groups
