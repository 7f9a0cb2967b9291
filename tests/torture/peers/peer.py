"""What a peer is: it saves three numbered states in a row, and finds and loads what is left with its own means."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from lab.marks import Marks
from lab.states import number_of, numbered
from lab.workloads import Workload
from torch import Tensor, nn

import holdfast

LAST = 3
"""States 1, 2 and 3 are saved: one, one beside it, and one that makes a rotation remove the first."""

Tensors = dict[str, Tensor]


class Peer(Protocol):
    """A way to save a training.

    Attributes:
        name: in the table.
        package: whose version matters.
        keeps: how many checkpoints its rotation leaves; 1 where one path is overwritten, 0 where all stay.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def package(self) -> str:
        """See above."""

    @property
    def keeps(self) -> int:
        """See above."""

    def train(self, directory: Path, saves: Saves) -> None:
        """Save the states 1 to :data:`LAST`, and say so."""

    def name_of(self, number: int) -> str:
        """What :meth:`visible` calls the checkpoint of a state."""

    def visible(self, directory: Path) -> list[str]:
        """What is there by the peer's own rules, the newest last."""

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """The tensors of one; fails as the peer does."""


class Saves:
    """What a peer says of its saves.

    Args:
        marks: where it is heard.
        peer: whose saves.
    """

    def __init__(self, marks: Marks, peer: Peer) -> None:
        self._marks = marks
        self._peer = peer

    def begin(self, number: int) -> None:
        """The call begins that saves a state, and what its rotation removes may go from here on."""
        name, keeps = self._peer.name_of(number), self._peer.keeps
        if keeps == 1 and number > 1:
            self._marks.replacing(name, number)
        else:
            self._marks.may(name, number)
        if keeps > 1 and number > keeps:
            self._marks.going(self._peer.name_of(number - keeps))

    def acknowledge(self, number: int) -> None:
        """The call has returned."""
        self._marks.must(self._peer.name_of(number), number)

    @contextmanager
    def each(self, number: int) -> Iterator[Tensors]:
        """One save, begun and acknowledged; gives what is to be saved."""
        self.begin(number)
        yield tensors(number)
        self.acknowledge(number)


def workloads(*peers: Peer) -> dict[str, Workload]:
    """For the laboratory: what each peer does."""

    def workload(peer: Peer) -> Workload:
        def act(directory: Path, marks: Marks) -> None:
            os.dup2(2, 1)  # what a peer prints is no answer to an order
            peer.train(directory, Saves(marks, peer))

        return Workload(peer.name, act)

    return {peer.name: workload(peer) for peer in peers}


def tensors(number: int) -> Tensors:
    """A state as a flat dictionary, which every peer can save."""
    state = numbered(number)
    model = {name: tensor.detach() for name, tensor in state["model"].named_parameters()}
    return {**model, **state["moments"], "seed": torch.tensor([number])}


def number_in(loaded: Mapping[str, Tensor]) -> int | None:
    """The number of a state that was loaded; None when it is none, bit for bit."""
    if loaded.keys() != tensors(0).keys() or not 1 <= loaded["seed"][0] <= LAST:
        return None
    model = {name: loaded[name].detach() for name in ("backbone", "head")}
    moments = {name: loaded[name].detach() for name in ("first", "second")}
    return number_of({"model": model, "moments": moments, "plain": {"seed": int(loaded["seed"][0])}})


class Module(nn.Module):
    """A state as a module, for the peers that save modules."""

    def __init__(self) -> None:
        super().__init__()
        hold(self, tensors(0))

    def forward(self, value: Tensor) -> Tensor:
        """Not called: nothing is computed here, only saved."""
        return value


def hold(module: nn.Module, values: Tensors) -> None:
    """Give a module the tensors of a state."""
    for name, tensor in values.items():
        if tensor.is_floating_point():
            module.register_parameter(name, nn.Parameter(tensor.clone()))
        else:
            module.register_buffer(name, tensor.clone())


def installed(package: str) -> str:
    """The version of a package, without what its build adds to it."""
    return holdfast.__version__ if package == "holdfast" else version(package).partition("+")[0]
