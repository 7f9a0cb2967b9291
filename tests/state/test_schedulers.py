"""Every scheduler goes on with the learning rates of an uninterrupted training, whatever order things are made in."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

import holdfast
from holdfast.errors import UsageError

# A nested SequentialLR steps its first part before any optimizer does.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")

Optimizer = torch.optim.Optimizer


class Factor:
    """A callable object: LambdaLR keeps its attributes in its state, and keeps plain functions out of it."""

    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, epoch: int) -> float:
        """The factor."""
        return self.base**epoch


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (e + 1)]),
    "LambdaLR of objects": lambda o: lr_scheduler.LambdaLR(o, [Factor(0.8), Factor(0.9)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.7)], milestones=[5]
    ),
    "SequentialLR, nested": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.SequentialLR(
                o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.7)], milestones=[2]
            ),
            lr_scheduler.StepLR(o, 2),
        ],
        milestones=[8],
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, mode="exp_range"),
    "CyclicLR of a function": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.1, step_size_up=3, scale_fn=lambda x: 0.5
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
}
BEFORE, AFTER = 6, 9
# SWALR goes to a rate that the user gave as such; ReduceLROnPlateau has none that others are computed from.
SCALED = [
    (kind, option)
    for kind in SCHEDULERS
    for option in ("lr", "initial_lr")
    if kind != "SWALR" and (kind, option) != ("ReduceLROnPlateau", "initial_lr")
]


def test_all_of_torch() -> None:
    """A scheduler that torch adds has to be added here."""
    known = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler)
    }
    tested = {name.split(",")[0].split(" ")[0] for name in SCHEDULERS}
    assert known - tested <= {"LRScheduler", "_LRScheduler"}


def make_optimizer(model: nn.Module) -> Optimizer:
    """Two groups of different rates."""
    first, second = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.25}], lr=0.1, momentum=0.9)


def advance(optimizer: Optimizer, scheduler: Any, steps: int, start: int) -> list[Any]:
    """Some steps; the rates and momenta after each."""
    seen = []
    for step in range(start, start + steps):
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 if step < 2 else 2.0)
        else:
            scheduler.step()
        seen.append([(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups])
    return seen


def save(path: Path, kind: str) -> list[Any]:
    """Save in the middle; return what comes after."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    scheduler = SCHEDULERS[kind](optimizer)
    advance(optimizer, scheduler, BEFORE, 0)
    holdfast.save(path, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    return advance(optimizer, scheduler, AFTER, BEFORE)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(
    "order", ["at once", "scheduler first", "optimizer first", "optimizer before the scheduler is made"]
)
def test_the_next_rates(tmp_path: Path, kind: str, order: str) -> None:
    """In any order of construction and restore, the rates and momenta are those of the uninterrupted training."""
    expected = save(tmp_path / "x", kind)
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    if order == "optimizer before the scheduler is made":
        holdfast.restore(tmp_path / "x", {"model": model, "optimizer": optimizer})
        scheduler = SCHEDULERS[kind](optimizer)
        holdfast.restore(tmp_path / "x", {"scheduler": scheduler})
    else:
        scheduler = SCHEDULERS[kind](optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        if order == "scheduler first":
            state = {"scheduler": scheduler, "optimizer": optimizer, "model": model}
        if order == "optimizer first":
            holdfast.restore(tmp_path / "x", {"model": model, "optimizer": optimizer})
            state = {"scheduler": scheduler}
        holdfast.restore(tmp_path / "x", state)
    assert advance(optimizer, scheduler, AFTER, BEFORE) == expected


@pytest.mark.parametrize(("kind", "option"), SCALED)
def test_a_rate_that_is_overridden_scales_the_schedule(tmp_path: Path, kind: str, option: str) -> None:
    """Each later rate of the group is what it would have been, times the same factor; the other group's stay."""
    expected = save(tmp_path / "x", kind)
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    scheduler = SCHEDULERS[kind](optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    holdfast.restore(tmp_path / "x", state)
    wanted = float(optimizer.param_groups[1][option]) / 8

    holdfast.restore(tmp_path / "x", state, override={f"optimizer.param_groups[1].{option}": wanted})

    assert float(optimizer.param_groups[1][option]) == wanted
    rates = [[rate for rate, _ in groups] for groups in advance(optimizer, scheduler, AFTER, BEFORE)]
    assert [first for first, _ in rates] == [groups[0][0] for groups in expected]
    assert [second for _, second in rates] == pytest.approx([groups[1][0] / 8 for groups in expected])


def test_a_rate_of_zero_cannot_be_scaled(tmp_path: Path) -> None:
    """Nothing says what a schedule becomes whose rate is 0 now; the error names the rate that does."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    holdfast.save(tmp_path / "x", state)

    with pytest.raises(UsageError, match=r"the rate is 0 .* Override optimizer\.initial_lr"):
        holdfast.restore(tmp_path / "x", state, override={"optimizer.lr": 1.0})
    holdfast.restore(tmp_path / "x", state, override={"optimizer.initial_lr": 2.0})

    assert advance(optimizer, scheduler, 2, 0)[-1] == [(pytest.approx(0.4), 0.9)] * 2


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_its_state(tmp_path: Path, kind: str) -> None:
    """The whole state, types included, but functions."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    scheduler = SCHEDULERS[kind](optimizer)
    advance(optimizer, scheduler, BEFORE, 0)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    other = nn.Linear(2, 2)
    live = make_optimizer(other)
    restored = SCHEDULERS[kind](live)
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live, "scheduler": restored})
    assert str(restored.state_dict()) == str(scheduler.state_dict())


def test_milestones_stay_a_counter(tmp_path: Path) -> None:
    """With whole numbers as keys."""
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    scheduler = SCHEDULERS["MultiStepLR"](optimizer)
    holdfast.save(tmp_path / "x", {"scheduler": scheduler})
    restored = lr_scheduler.MultiStepLR(optimizer, [99])
    holdfast.restore(tmp_path / "x", {"scheduler": restored})
    assert type(restored.milestones) is collections.Counter
    assert restored.milestones == collections.Counter({2: 1, 5: 2})


def test_rates_that_are_tensors(tmp_path: Path) -> None:
    """They stay tensors, the very same, so that a compiled step sees the restored value."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler.optimizer.step()
    scheduler.step()
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    rate = torch.tensor(9.0)
    live = torch.optim.SGD(model.parameters(), lr=rate)
    restored = lr_scheduler.ExponentialLR(live, 0.5)
    holdfast.restore(tmp_path / "x", {"model": model, "optimizer": live, "scheduler": restored})
    assert live.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
    live.step()
    restored.step()
    assert rate.item() == 0.125


def test_an_intended_change_after_a_restore(tmp_path: Path) -> None:
    """What is set after the restore holds: nothing comes back later."""
    save(tmp_path / "x", "StepLR")
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    holdfast.restore(tmp_path / "x", {"model": model, "optimizer": optimizer})
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_gradient_scalers(tmp_path: Path) -> None:
    """Scale, growth and how long it has been growing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 16.0
    holdfast.save(tmp_path / "x", {"scaler": scaler})
    live = torch.amp.GradScaler("cpu")
    holdfast.restore(tmp_path / "x", {"scaler": live})
    assert live.state_dict() == scaler.state_dict()


def test_averaged_models(tmp_path: Path) -> None:
    """An EMA goes on as if it had not been interrupted."""

    def ema(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)

    def change(model: nn.Module, average: AveragedModel) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        average.update_parameters(model)

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = ema(model)
    change(model, average)
    change(model, average)
    holdfast.save(tmp_path / "x", {"model": model, "ema": average})
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    live = ema(other)
    holdfast.restore(tmp_path / "x", {"model": other, "ema": live})
    assert int(live.n_averaged) == 2
    for pair in ((model, average), (other, live)):
        change(*pair)
    expected = average.state_dict()
    assert {name: tensor.tolist() for name, tensor in live.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
