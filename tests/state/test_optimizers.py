"""Optimizers: their state follows parameter names, keeps its types, and continues training bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import StateMismatchError, UnsupportedValueError

Parameters = Any
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, maximize=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "Adam, tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
NOT_DENSE = {"Optimizer", "SparseAdam"}  # the base class; and one for sparse gradients, tested below


class Net(nn.Module):
    """Two matrices, so that Muon takes them too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self.second(self.first(x).tanh())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Steps on the same numbers each time."""
    for step in range(start, start + steps):
        x = torch.rand(4, 3, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def made(kind: str, seed: int) -> tuple[Net, torch.optim.Optimizer]:
    """A model and its optimizer."""
    torch.manual_seed(seed)
    model = Net()
    return model, OPTIMIZERS[kind](model.parameters())


def same(a: Any, b: Any) -> bool:
    """Equal in structure, type and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_all_of_torch() -> None:
    """An optimizer that torch adds has to be added here."""
    known = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    assert known - {name.split(",")[0] for name in OPTIMIZERS} == NOT_DENSE


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on(tmp_path: Path, kind: str, steps: int) -> None:
    """Saved after some steps or none, restored into a fresh one: state and parameters are equal, then and later."""
    model, optimizer = made(kind, 0)
    train(model, optimizer, steps)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other, live = made(kind, 1)
    report = holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert (report.fresh, report.dropped, report.notes) == ((), (), ())
    assert same(live.state_dict(), optimizer.state_dict())
    for pair in ((model, optimizer), (other, live)):
        train(*pair, 3, steps)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(live.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", ["Adam", "SGD, momentum", "Adam, tensor rate"])
def test_in_place(tmp_path: Path, kind: str) -> None:
    """State that is there takes the saved values where it is, so that what was captured from it stays valid."""
    model, optimizer = made(kind, 0)
    train(model, optimizer, 2)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    slots = [slot for state in optimizer.state.values() for slot in state.values() if isinstance(slot, torch.Tensor)]
    before = [slot.clone() for slot in slots]
    train(model, optimizer, 2)
    holdfast.restore(tmp_path / "x", {"model": model, "optimizer": optimizer})
    now = [slot for state in optimizer.state.values() for slot in state.values() if isinstance(slot, torch.Tensor)]
    assert all(a is b for a, b in zip(slots, now, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_sparse_gradients(tmp_path: Path) -> None:
    """SparseAdam, whose state is dense."""

    def step(model: nn.Embedding, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()

    model = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    step(model, optimizer)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other = nn.Embedding(4, 2, sparse=True)
    live = torch.optim.SparseAdam(other.parameters())
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    for pair in ((model, optimizer), (other, live)):
        step(*pair)
    assert torch.equal(model.weight, other.weight)
    assert same(live.state_dict(), optimizer.state_dict())


def test_exact_types(tmp_path: Path) -> None:
    """State in float32 beside parameters in bfloat16 keeps every bit, which torch's own loading rounds away."""
    model = Net().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.rand(parameter.shape), "step": 5, "seen": torch.ones(())}
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other = Net().to(torch.bfloat16)
    live = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert same(live.state_dict(), optimizer.state_dict())
    assert {
        slot.dtype for state in live.state.values() for slot in state.values() if isinstance(slot, torch.Tensor)
    } == {torch.float32}


# -------------------------------------------------------------------------------------------------------------- names


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """The first moment of each parameter that has one, by name."""
    return {
        name: optimizer.state[parameter]["exp_avg"].flatten().tolist()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, list[float]]]:
    """A checkpoint of a Net with Adam after three steps, and its moments."""
    model, optimizer = made("Adam", 0)
    train(model, optimizer, 3)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    return tmp_path / "x", moments(model, optimizer)


def test_the_names_in_the_file(saved: tuple[Path, Any]) -> None:
    """The file says which moment belongs to which parameter."""
    assert [name for name in holdfast.open(saved[0]).tensors if name.startswith("optimizer/")] == [
        f"optimizer/state.model.{layer}.weight.{slot}"
        for layer in ("first", "second")
        for slot in ("step", "exp_avg", "exp_avg_sq")
    ]


ARRANGEMENTS: dict[str, Callable[[Net], Any]] = {
    "reordered": lambda m: [m.second.weight, m.first.weight],
    "regrouped": lambda m: [{"params": [m.second.weight], "lr": 0.5}, {"params": [m.first.weight]}],
    "an empty group": lambda m: [{"params": []}, {"params": [m.first.weight, m.second.weight]}],
    "named": lambda m: list(m.named_parameters()),
}


@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_moments_follow_names(saved: tuple[Path, Any], kind: str) -> None:
    """However parameters are ordered and grouped."""
    path, expected = saved
    model = Net()
    optimizer = torch.optim.Adam(ARRANGEMENTS[kind](model), lr=0.1)
    report = holdfast.restore(path, {"model": model, "optimizer": optimizer})
    assert moments(model, optimizer) == expected
    assert (report.fresh, report.dropped) == ((), ())


def test_a_frozen_parameter(saved: tuple[Path, Any]) -> None:
    """Its moments are dropped and reported; the others are restored."""
    path, expected = saved
    model = Net()
    model.first.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    report = holdfast.restore(path, {"model": model, "optimizer": optimizer})
    assert moments(model, optimizer) == {"second.weight": expected["second.weight"]}
    assert report.dropped == ("optimizer: model.first.weight",)


def test_an_added_parameter(saved: tuple[Path, Any]) -> None:
    """It starts without state and is reported; the others go on."""
    path, expected = saved
    model = Net()
    model.third = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    report = holdfast.restore(path, {"model": model, "optimizer": optimizer}, strict=False)
    assert moments(model, optimizer) == expected
    assert report.fresh == ("optimizer: model.third.weight",)
    model.third(model(torch.rand(1, 3))).sum().backward()
    optimizer.step()
    assert optimizer.state[model.third.weight]["step"].item() == 1
    assert optimizer.state[model.first.weight]["step"].item() == 4


def test_not_one_name_in_common(saved: tuple[Path, Any]) -> None:
    """An optimizer that would start wholly afresh is refused."""
    path, _ = saved
    model, adapter = Net(), nn.Linear(1, 1)
    optimizer = torch.optim.Adam(adapter.parameters())
    with pytest.raises(StateMismatchError, match="not one name of optimizer"):
        holdfast.restore(path, {"model": model, "optimizer": optimizer}, strict=False)


def test_several_optimizers(tmp_path: Path) -> None:
    """Each its own, over parts of two models."""

    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        first, second = Net(), Net()
        return {
            "generator": first,
            "discriminator": second,
            "g": torch.optim.Adam(first.parameters(), lr=0.1),
            "d": torch.optim.SGD([*second.parameters(), first.first.weight], lr=0.2, momentum=0.5),
        }

    state, live = make(0), make(1)
    train(state["generator"], state["g"], 2)
    train(state["discriminator"], state["d"], 2)
    holdfast.save(tmp_path / "x", state)
    holdfast.restore(tmp_path / "x", live)
    for name in ("g", "d"):
        assert same(live[name].state_dict(), state[name].state_dict())


def test_groups_of_different_options(tmp_path: Path) -> None:
    """Options of each group, the user's own among them, come back by the parameters that they are for."""

    def make() -> tuple[Net, torch.optim.Optimizer]:
        model = Net()
        groups = [
            {"params": [model.first.weight], "lr": 0.5, "note": "first"},
            {"params": [model.second.weight], "betas": (0.5, 0.6)},
        ]
        return model, torch.optim.Adam(groups, lr=0.1)

    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.25
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other, live = make()
    live.param_groups.reverse()
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert [(g["lr"], g["betas"], g.get("note")) for g in live.param_groups] == [
        (0.1, (0.5, 0.6), None),
        (0.25, (0.9, 0.999), "first"),
    ]


def test_a_tied_parameter(tmp_path: Path) -> None:
    """One parameter of two names has one state."""

    def make() -> tuple[Net, torch.optim.Optimizer]:
        model = Net()
        model.second = nn.Linear(3, 4, bias=False)
        model.second.weight = model.first.weight
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    model, optimizer = make()
    (model.first(torch.rand(1, 3)) + model.second(torch.rand(1, 3))).sum().backward()
    optimizer.step()
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other, live = make()
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert same(live.state_dict(), optimizer.state_dict())
    assert len(live.state) == 1


def test_without_a_module(tmp_path: Path) -> None:
    """Parameters that stand in the state themselves have their names there; without any, positions serve."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    assert list(holdfast.save(tmp_path / "a", {"w": weight, "o": optimizer}).tensors)[1] == "o/state.w.step"
    assert next(iter(holdfast.save(tmp_path / "b", {"o": optimizer}).tensors)) == "o/state.#0.0.step"
    for name, state in (("a", {"w": nn.Parameter(torch.zeros(2))}), ("b", {})):
        parameter = state.get("w", nn.Parameter(torch.zeros(2)))
        live = torch.optim.Adam([parameter])
        holdfast.restore(tmp_path / name, {**state, "o": live})
        assert same(live.state_dict(), optimizer.state_dict())


def test_a_parameter_that_nobody_saves(tmp_path: Path) -> None:
    """An optimizer some of whose parameters are not in the state is refused at the save: their values would be lost."""
    model, stray = Net(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([*model.parameters(), stray])
    with pytest.raises(UnsupportedValueError, match=r"optimizer\.param_groups\[0\]\.params\[2\].*would be lost"):
        holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})


def test_hooks_and_own_loading(tmp_path: Path) -> None:
    """An optimizer with its own ``load_state_dict`` is given the state as torch numbers it."""
    seen: list[Any] = []

    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            seen.append(sorted(state_dict["state"]))
            super().load_state_dict(state_dict)

    model = Net()
    optimizer = Own(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other = Net()
    live = Own(other.parameters(), lr=0.5, momentum=0.9)
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert seen == [[0, 1]]
    assert same(live.state_dict(), optimizer.state_dict())


def test_a_restore_takes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State is created from the checkpoint, not by a dummy step, which would change parameters and gradients."""
    model, optimizer = made("Adam", 0)
    train(model, optimizer, 2)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    other, live = made("Adam", 1)
    monkeypatch.setattr(type(live), "step", lambda *_: pytest.fail("took a step"))
    holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert all(parameter.grad is None for parameter in other.parameters())


def bare(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Save an optimizer's state by the names within its module, as torch's get_optimizer_state_dict gives it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    packed = optimizer.state_dict()
    groups = [{**group, "params": [*names.values()]} for group in packed["param_groups"]]
    state = {name: dict(optimizer.state[parameter]) for parameter, name in names.items()}
    holdfast.save(path, {"model": model, "optimizer": {"state": state, "param_groups": groups}})
    return state


def test_names_within_the_module(tmp_path: Path) -> None:
    """They are understood where nothing else has them."""
    model, optimizer = made("AdamW", 0)
    train(model, optimizer, 2)
    state = bare(tmp_path / "x", model, optimizer)
    other, live = made("AdamW", 1)
    report = holdfast.restore(tmp_path / "x", {"model": other, "optimizer": live})
    assert (report.fresh, report.dropped) == ((), ())
    for name, parameter in other.named_parameters():
        assert torch.equal(live.state[parameter]["exp_avg"], state[name]["exp_avg"])


def test_names_within_two_modules_are_not_guessed(tmp_path: Path) -> None:
    """One name for two parameters of an optimizer says nothing."""
    model, optimizer = made("AdamW", 0)
    train(model, optimizer, 2)
    bare(tmp_path / "x", model, optimizer)
    one, other = Net(), Net()
    live = torch.optim.AdamW([*one.parameters(), *other.parameters()])
    with pytest.raises(StateMismatchError, match="not one name"):
        holdfast.restore(tmp_path / "x", {"model": one, "other": other, "optimizer": live}, strict=False)
