"""What a step reaches outside its state."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from holdfast.audit.surroundings import describe, places

COUNTER = {"steps": 0}


class Net(nn.Module):
    """A module of the user's, with things that no ``state_dict()`` holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.passes = 0
        self.register_buffer("saved", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1), persistent=False)


class Trainer:
    """An object of the user's."""

    def __init__(self) -> None:
        self.count = 0
        self.parts = {"noise": random.Random(0), "strange": object()}
        self.itself = self

    def step(self) -> None:
        """Uses itself."""

    def __call__(self) -> None:
        """Uses itself as well."""


def in_a_closure() -> Callable[[], Any]:
    """Variables of every kind."""
    tensor, array, number, words = torch.zeros(2), np.zeros(2), 0, ["a"]
    noise, optimizer = np.random.default_rng(0), torch.optim.SGD([torch.zeros(1)])
    rows = iter([1, 2])
    unassigned: Any

    def step() -> Any:
        def inner() -> Any:
            return words, noise, optimizer, COUNTER, unassigned

        return tensor, array, number, rows, inner

    if False:
        unassigned = 0
    return step


def names(step: Callable[[], Any], state: dict[str, Any] | None = None) -> dict[str, str]:
    """What is found, by name: its kind."""
    return {place.name: place.kind for place in places(step, state or {})}


def test_variables_of_the_function_and_of_those_inside_it() -> None:
    """Tensors, arrays, numbers, containers, generators, optimizers, iterators, and globals."""
    assert names(in_a_closure()) == {
        "array": "variable",
        "noise": "generator",
        "number": "variable",
        "optimizer": "object",
        "rows": "iterator",
        "tensor": "variable",
        "words": "variable",
        "COUNTER": "variable",
    }


def test_what_is_in_the_state_is_not_found() -> None:
    """Neither its objects nor their parts, nor the containers that hold them."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    weight, groups, history = model.weight, optimizer.param_groups, [0.5]
    state = {"model": model, "optimizer": optimizer, "progress": {"history": history}}

    def step() -> Any:
        return model, optimizer, weight, groups, history, state

    assert names(step, state) == {"model: gradients": "gradients", "model.training": "mode"}


@pytest.mark.parametrize("make", [lambda trainer: trainer.step, lambda trainer: trainer], ids=["method", "callable"])
def test_attributes_of_the_object_that_steps(make: Callable[[Trainer], Callable[[], Any]]) -> None:
    """Also those in its containers, where a container cannot be saved as a whole."""
    found = names(make(Trainer()))

    assert {name.partition(".")[2]: kind for name, kind in found.items()} == {
        "count": "attribute",
        "parts['noise']": "generator",
    }


def test_arguments_of_a_partial_and_defaults() -> None:
    """A value given ahead is a variable too."""

    def step(scale: float, *, seen: list[int], more: float = 2.0) -> None:
        pass

    found = names(functools.partial(step, 1.0, seen=[]))

    assert found == {"partial.args[0]": "variable", "seen": "variable", "more": "variable"}


def test_what_a_module_keeps_to_itself() -> None:
    """Attributes of the user's classes, buffers that are not persistent, gradients and the mode."""
    net = Net()

    assert names(lambda: None, {"net": net}) == {
        "net.scale": "buffer",
        "net.passes": "attribute",
        "net: gradients": "gradients",
        "net.training": "mode",
    }


def test_the_generator_of_a_loader() -> None:
    """It shuffles, and nobody saves it."""
    loader = DataLoader([1, 2], generator=torch.Generator())

    assert names(lambda: loader) == {"loader.generator": "generator"}


def test_variables_of_one_name_are_told_apart() -> None:
    """Each function may have its own; one that two functions share is one."""

    def counting(start: int) -> Callable[[], Any]:
        count = start
        return lambda: (count, COUNTER)

    one, other = counting(1), counting(2)
    found = [(place.name, place.value) for place in places(lambda: (one(), other(), one), {})]

    assert found == [("count", 1), ("COUNTER", COUNTER), ("count #2", 2)]


def test_functions_of_libraries_are_not_followed() -> None:
    """What they use is their own business."""
    assert names(lambda: (random.choice, nn.functional.relu, torch)) == {}


def test_another_value_can_be_put_in_place() -> None:
    """In closures, globals, objects and modules."""
    number, net, trainer = 0, Net(), Trainer()

    def step() -> Any:
        return number, trainer

    found = {place.name: place for place in places(step, {"net": net})}
    new: dict[str, Any] = {
        "number": 5,
        "trainer.count": 6,
        "net.scale": torch.full((1,), 7.0),
        "net.training": [False, False],
        "net: gradients": {"inner.weight": torch.full((2, 2), 8.0)},
    }
    for name, value in new.items():
        put = found[name].put
        assert put is not None
        put(value)

    assert (number, trainer.count, net.scale.item(), net.training) == (5, 6, 7.0, False)
    assert net.inner.weight.grad is not None
    assert net.inner.weight.grad.unique().tolist() == [8.0]
    assert net.inner.bias.grad is None


def numbers() -> Iterator[int]:
    """Some."""
    yield from range(3)


@pytest.mark.parametrize(
    "iterator",
    [iter([1, 2]), numbers(), iter(DataLoader([1, 2]))],
    ids=["list", "generator", "loader"],
)
def test_an_iterator_shows_that_it_moved(iterator: Iterator[int]) -> None:
    """Without being moved by the look."""

    def step() -> Any:
        return iterator

    def position() -> str:
        (thing,) = (describe(place) for place in places(step, {}))
        assert thing is not None
        assert not thing.savable
        return thing.leaf.digest

    first, again = position(), position()
    assert next(iterator) is not None
    assert (first == again, first == position()) == (True, False)
