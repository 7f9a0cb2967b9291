"""Whoever loads something else than was saved does not compete: bit for bit, also what was saved in the background."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from benchmarks.background import BackgroundPeer, Session
from benchmarks.files import remove
from benchmarks.peers import Peer
from benchmarks.training import Training
from benchmarks.workloads import Tensors, Workload


class WrongResultError(Exception):
    """Something else was loaded than was saved."""


class Named(Protocol):
    """Anybody who is compared."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def package(self) -> str:
        """The package that must be installed."""


N = TypeVar("N", bound=Named)


def qualify(peers: Sequence[N], check: Callable[[N], None], left_out: MutableMapping[str, str]) -> list[N]:
    """Those who pass a check; of the others it is noted why they are left out."""
    passed = []
    for peer in peers:
        try:
            check(peer)
        except WrongResultError as error:
            left_out[peer.name] = str(error)
        else:
            passed.append(peer)
    return passed


def check_blocking(peer: Peer, saved: Workload, live: Workload, path: Path) -> None:
    """A save and a load, into tensors that were cleared."""
    clear(live)
    try:
        peer.save(saved, path)
        peer.load(live, path)
    finally:
        remove(path)
    compare(saved.tensors, live.tensors)


def check_background(peer: BackgroundPeer, saved: Workload, live: Workload, directory: Path) -> None:
    """What is loaded must be what was there at the call of ``save()``, though all is changed while it is written."""

    def change(session: Session) -> None:
        with session.guard():
            saved.change()
        session.stepped()

    _check_saves(peer, saved, live, directory, change)


def check_training(peer: BackgroundPeer, training: Training, live: Workload, directory: Path) -> None:
    """What is loaded must be what was there at the call of ``save()``, though the training went on."""

    def train(session: Session) -> None:
        for _ in range(training.steps):
            training.step(session.guard())
            session.stepped()

    _check_saves(peer, training.workload, live, directory, train)


def _check_saves(
    peer: BackgroundPeer, saved: Workload, live: Workload, directory: Path, go_on: Callable[[Session], None]
) -> None:
    try:
        with peer.open(saved, directory) as session:
            for _ in range(2):
                expected = {name: tensor.clone() for name, tensor in saved.tensors.items()}
                wait = session.save()
                go_on(session)
                wait()
                clear(live)
                session.load(live)
                compare(expected, live.tensors)
    finally:
        remove(directory)


@torch.no_grad()
def clear(live: Workload) -> None:
    """Forget every value, so that none can be left from before."""
    for tensor in live.tensors.values():
        tensor.zero_()


def compare(expected: Tensors, loaded: Tensors) -> None:
    """Bit for bit.

    Raises:
        WrongResultError: a loaded tensor is not the expected one.
    """
    differing = [name for name in expected if not torch.equal(expected[name], loaded[name])]
    if differing:
        raise WrongResultError(
            f"{len(differing)} of {len(expected)} tensors were loaded with other values than they were saved with, "
            f"{differing[0]} for one"
        )
