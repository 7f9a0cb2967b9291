"""Gradients that wait for an optimizer step are saved when they are asked for, and restored when they were saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast.format.names import GRADIENTS_ENTRY
from holdfast.part import About
from holdfast.saving import write
from holdfast.state.capture import capture
from holdfast.storage.local import LocalStore


class Tied(nn.Module):
    """Two names for one parameter, one that is frozen, and one that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.second(self.first(x))


def save(path: Path, state: dict[str, object], *, gradients: bool = True) -> Path:
    """A checkpoint, with the gradients of its parameters or without."""
    write(LocalStore(str(path)), capture(state, gradients=gradients), About(), ["saved"])
    return path / "saved"


def with_gradients(seed: int = 0) -> Tied:
    """A model after a backward."""
    torch.manual_seed(seed)
    model = Tied()
    model(torch.rand(2, 3)).square().sum().backward()
    return model


def gradients(model: nn.Module) -> dict[str, list[float] | None]:
    """The gradient of each parameter."""
    return {
        name: None if parameter.grad is None else parameter.grad.flatten().tolist()
        for name, parameter in model.named_parameters()
    }


def test_they_come_back(tmp_path: Path) -> None:
    """Each parameter has its gradient again, bit for bit; those without have none."""
    saved = with_gradients()
    path = save(tmp_path, {"model": saved})
    model = Tied()

    holdfast.restore(path, {"model": model})

    assert gradients(model) == gradients(saved)
    assert model.unused.grad is None


def test_a_tied_parameter_gets_one_gradient(tmp_path: Path) -> None:
    """It is saved once, and is one tensor again."""
    path = save(tmp_path, {"model": with_gradients()})
    model = Tied()

    holdfast.restore(path, {"model": model})

    assert model.first.weight.grad is model.second.weight.grad
    assert sum("weight" in name for name in holdfast.open(path).manifest.tensors[GRADIENTS_ENTRY]) == 1


def test_a_gradient_that_is_there_is_filled_in_place(tmp_path: Path) -> None:
    """Whoever holds the gradient tensor, such as a bucket view, goes on holding the right one."""
    saved = with_gradients(0)
    path = save(tmp_path, {"model": saved})
    model = with_gradients(1)
    held = model.first.bias.grad

    holdfast.restore(path, {"model": model})

    assert model.first.bias.grad is held
    assert gradients(model) == gradients(saved)


def test_they_take_the_device_and_dtype_of_their_own(tmp_path: Path) -> None:
    """A gradient of a bfloat16 parameter is one of bfloat16."""
    saved = with_gradients().bfloat16()
    saved(torch.rand(2, 3).bfloat16()).sum().backward()
    path = save(tmp_path, {"model": saved})
    model = Tied().bfloat16()

    holdfast.restore(path, {"model": model})

    assert model.first.weight.grad is not None
    assert model.first.weight.grad.dtype == torch.bfloat16
    assert gradients(model) == gradients(saved)


def test_a_tensor_of_the_state_has_a_gradient_too(tmp_path: Path) -> None:
    """A parameter need not belong to a module."""
    scale = torch.ones(2, requires_grad=True)
    (scale * torch.tensor([2.0, 3.0])).sum().backward()
    path = save(tmp_path, {"scale": scale})
    restored = torch.zeros(2, requires_grad=True)

    holdfast.restore(path, {"scale": restored})

    assert restored.grad is not None
    assert restored.grad.tolist() == [2.0, 3.0]


def test_without_being_asked_for_they_are_not_saved(tmp_path: Path) -> None:
    """After a step they are worth nothing, and would take as much room as the model."""
    path = save(tmp_path, {"model": with_gradients()}, gradients=False)
    model = Tied()

    holdfast.restore(path, {"model": model})

    assert set(gradients(model).values()) == {None}
    assert [file.name for file in path.iterdir() if "gradients" in file.name] == []


def test_what_was_not_saved_leaves_gradients_alone(tmp_path: Path) -> None:
    """A restore from a checkpoint without gradients changes none."""
    path = save(tmp_path, {"model": with_gradients(0)}, gradients=False)
    model = with_gradients(1)
    before = gradients(model)

    holdfast.restore(path, {"model": model})

    assert gradients(model) == before


def test_those_of_entries_that_are_not_restored_are_left_out(tmp_path: Path) -> None:
    """``only`` counts for gradients too."""
    path = save(tmp_path, {"a": with_gradients(0), "b": with_gradients(1)})
    a, b = Tied(), Tied()

    holdfast.restore(path, {"a": a, "b": b}, only=["a"])

    assert a.first.bias.grad is not None
    assert set(gradients(b).values()) == {None}


def test_they_are_verified_like_everything_else(tmp_path: Path) -> None:
    """A byte that flips in a gradient is found before anything is restored from it."""
    path = save(tmp_path, {"model": with_gradients()})
    with (path / f"{GRADIENTS_ENTRY}.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")

    with pytest.raises(holdfast.errors.CorruptCheckpointError, match=r"_gradients\.safetensors"):
        holdfast.restore(path, {"model": Tied()})


def test_load_gives_what_the_user_saved(tmp_path: Path) -> None:
    """Gradients are not among the entries of a loaded state."""
    path = save(tmp_path, {"model": with_gradients()})

    assert list(holdfast.load(path)) == ["model"]
