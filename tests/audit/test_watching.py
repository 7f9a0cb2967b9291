"""The instruments of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from holdfast.audit.records import IteratorMade
from holdfast.audit.watching import LoaderWatch, waiting_gradients


@pytest.fixture
def model() -> nn.Linear:
    """With gradients."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).backward()
    return model


def backward(model: nn.Module) -> None:
    """Another pass."""
    model(torch.ones(1, 2)).backward()


def zeroed(model: nn.Module) -> None:
    """Gradients are set to None, as usual, before the pass."""
    model.zero_grad()
    backward(model)


def filled_with_zeros(model: nn.Module) -> None:
    """Gradients are zeros, but there, before the pass."""
    model.zero_grad(set_to_none=False)
    backward(model)


def stepped(model: nn.Module) -> None:
    """An optimizer steps without another pass."""
    torch.optim.SGD(model.parameters()).step()


@pytest.mark.parametrize(
    ("step", "used"), [(backward, True), (stepped, True), (zeroed, False), (filled_with_zeros, False)]
)
def test_gradients_that_are_still_used(step: Callable[[nn.Module], None], used: bool, model: nn.Linear) -> None:
    """They are added to, or stepped with: then they are state. What is thrown away is not."""
    waiting: list[str] = []
    with waiting_gradients({"model": model}, waiting):
        step(model)

    assert sorted(waiting) == (["model.bias", "model.weight"] if used else [])


def test_gradients_of_zeros_hold_nothing(model: nn.Linear) -> None:
    """Adding to them is what a step without them does too."""
    model.zero_grad(set_to_none=False)
    waiting: list[str] = []
    with waiting_gradients({"model": model}, waiting):
        backward(model)

    assert waiting == []


def test_watching_gradients_changes_none(model: nn.Linear) -> None:
    """The sums are those that they would have been, and no hook stays."""
    with waiting_gradients({"model": model}, []):
        backward(model)

    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[2.0, 2.0]]
    assert not model.weight._backward_hooks


def test_iterators_over_loaders_are_noted() -> None:
    """The step, the loader in words, and which generators changed: none where the loader has its own."""
    watch = LoaderWatch()
    data = torch.arange(4)
    own = DataLoader(data, batch_size=2, generator=torch.Generator())
    shuffled = DataLoader(data, shuffle=True)
    with watch.watching():
        iter(shuffled)
        watch.step = 3
        iter(own)
    iter(own)  # nobody watches any more

    assert watch.made({}) == [
        IteratorMade(0, "DataLoader (4 samples, batches of 1, shuffled)", False, ("torch's CPU generator",)),
        IteratorMade(3, "DataLoader (4 samples, batches of 2)", False, ()),
    ]
