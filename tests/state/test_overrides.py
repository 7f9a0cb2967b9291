"""Values that are set after a restore: where each belongs, and what is refused before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import CorruptCheckpointError, UsageError


def training(lr: float | torch.Tensor = 0.1) -> dict[str, Any]:
    """A model, an optimizer of two groups, a scheduler and plain values."""
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    settings = {"temperature": 0.7, "names": ["a", "b"], "on": True, "note": None}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "settings": settings, "limit": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of it."""
    holdfast.save(tmp_path / "x", training())
    return tmp_path / "x"


def options(state: dict[str, Any], name: str) -> list[Any]:
    """An option of each group."""
    return [group[name] for group in state["optimizer"].param_groups]


def test_an_option_of_every_group(path: Path) -> None:
    """The entry and the option's name reach all groups."""
    state = training()

    holdfast.restore(path, state, override={"optimizer.weight_decay": 0.25, "optimizer.betas": (0.8, 0.9)})

    assert options(state, "weight_decay") == [0.25, 0.25]
    assert options(state, "betas") == [(0.8, 0.9)] * 2


def test_an_option_of_one_group(path: Path) -> None:
    """With the group's number."""
    state = training()

    holdfast.restore(path, state, override={"optimizer.param_groups[0].weight_decay": 0.25})

    assert options(state, "weight_decay") == [0.25, 0.5]


def test_the_learning_rate_reaches_the_scheduler(path: Path) -> None:
    """The rate is set, and the rates that the scheduler computes from follow."""
    state = training()

    report = holdfast.restore(path, state, override={"optimizer.lr": 0.02})

    assert options(state, "lr") == [0.02, 0.02]
    assert state["scheduler"].base_lrs == pytest.approx([0.02, 0.02])
    assert report.notes == ("optimizer.lr: 0.1 -> 0.02, and with it StepLR",)


def test_without_a_scheduler_only_the_rate_is_set(path: Path) -> None:
    """There is nothing else to scale."""
    state = training()
    del state["scheduler"]

    report = holdfast.restore(path, state, override={"optimizer.lr": 0.02})

    assert options(state, "lr") == [0.02, 0.02]
    assert "optimizer.lr: 0.1 -> 0.02" in report.notes


def test_a_rate_that_is_a_tensor_stays_that_tensor(tmp_path: Path) -> None:
    """A compiled step holds the tensor."""
    holdfast.save(tmp_path / "x", training(torch.tensor(0.1)))
    state = training(torch.tensor(0.1))
    held = options(state, "lr")[0]

    holdfast.restore(tmp_path / "x", state, override={"optimizer.lr": 0.5})

    assert options(state, "lr")[0] is held
    assert held.item() == 0.5


def test_an_attribute_of_a_scheduler(path: Path) -> None:
    """By its name in the scheduler's state."""
    state = training()

    report = holdfast.restore(path, state, override={"scheduler.step_size": 7})

    assert state["scheduler"].step_size == 7
    assert report.notes == ("scheduler.step_size: 3 -> 7",)


def test_plain_values(path: Path) -> None:
    """In containers, in lists, and an entry itself; what was None takes anything."""
    state = training()
    override = {"settings.temperature": 1, "settings.names[1]": "c", "limit": 5, "settings.note": "x"}

    holdfast.restore(path, state, override=override)

    assert state["settings"] == {"temperature": 1, "names": ["a", "c"], "on": True, "note": "x"}
    assert state["limit"] == 5


BAD = {
    "no entry": ("optimiser.lr", 0.1, "no entry of the state begins it; they are: model, optimizer"),
    "no option": ("optimizer.momentum", 0.1, r"expected an option of the 2 group\(s\) of AdamW: lr, betas"),
    "parameters": ("optimizer.params", [], "expected an option"),
    "no such group": ("optimizer.param_groups[2].lr", 0.1, "expected an option of the 2 group"),
    "an optimizer itself": ("optimizer", 0.1, "expected an option"),
    "no attribute": ("scheduler.T_max", 3, "StepLR has no 'T_max'; it has: step_size"),
    "a weight": ("model.weight", 0.0, "expected an option of an optimizer, .* found Linear"),
    "no key": ("settings.heat", 0.1, "leads nowhere; there are: temperature, names, on, note"),
    "no index": ("settings.names[2]", "c", "leads nowhere; there are: 2 items"),
    "below a value": ("settings.temperature.unit", 1, "found float"),
    "text for a number": ("optimizer.lr", "0.1", "expected a float as it is there, found '0.1'"),
    "a bool for a number": ("settings.temperature", True, "expected a float as it is there, found True"),
    "a number for a bool": ("settings.on", 1, "expected a bool as it is there, found 1"),
    "a path that is no text": (3, 1, "expected paths as text"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_leads_nowhere_is_refused_before_anything_is_touched(path: Path, name: str) -> None:
    """The error says what there is."""
    key, value, words = BAD[name]
    state = training()
    before = state["model"].weight.clone()

    with pytest.raises(UsageError, match=words):
        holdfast.restore(path, state, override={key: value})

    assert torch.equal(state["model"].weight, before)


def test_a_container_that_cannot_change(tmp_path: Path) -> None:
    """A tuple is read-only, and the error says so."""
    holdfast.save(tmp_path / "x", {"pair": (1, 2)})

    with pytest.raises(UsageError, match="tuple is read-only"):
        holdfast.restore(tmp_path / "x", {"pair": (1, 2)}, override={"pair[0]": 3})


def test_an_entry_with_dots_in_its_name(tmp_path: Path) -> None:
    """The longest entry that begins the path is meant."""
    state: dict[str, Any] = {"a": {"b": 1}, "a.b": {"c": 2}}
    holdfast.save(tmp_path / "x", state)

    holdfast.restore(tmp_path / "x", state, override={"a.b.c": 3})

    assert state == {"a": {"b": 1}, "a.b": {"c": 3}}


def test_only_some_entries(path: Path) -> None:
    """The others stay as they were, and so do the generators."""
    state = training()
    rate = state["optimizer"].param_groups[1]
    rate["lr"] = 7.0
    generator = torch.get_rng_state()

    report = holdfast.restore(path, state, only=["model"])

    assert torch.equal(state["model"].weight, holdfast.load(path)["model"]["weight"])
    assert rate["lr"] == 7.0
    assert torch.equal(torch.get_rng_state(), generator)
    assert report.restored == 2


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Damage in an entry that is not wanted does not matter; in one that is, it does."""
    state = {"a": torch.ones(3), "b": torch.ones(3)}
    holdfast.save(tmp_path / "x", state)
    with (tmp_path / "x" / "b.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")

    holdfast.restore(tmp_path / "x", state, only=["a"])

    with pytest.raises(CorruptCheckpointError, match=r"b\.safetensors"):
        holdfast.restore(tmp_path / "x", state, only=["b"])


@pytest.mark.parametrize("only", [["modell"], ["model", "ema"], "modell"])
def test_only_what_neither_has(path: Path, only: Any) -> None:
    """A name that is missing on either side is refused."""
    with pytest.raises(UsageError, match="expected entries that both have"):
        holdfast.restore(path, training(), only=only)
