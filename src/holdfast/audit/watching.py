"""Instruments of a diagnosis: which iterators are made over loaders, and which gradients outlive the save."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from holdfast.audit.digests import GENERATOR_NAMES, tensor_leaf
from holdfast.audit.records import IteratorMade
from holdfast.state import rng
from holdfast.state.kinds import Kind, live_objects


class LoaderWatch:
    """Notes each iterator that is made over a DataLoader: in which step, and what it drew.

    Attributes:
        step: the step under way; whoever runs the training counts it here.
    """

    def __init__(self) -> None:
        self.step = 0
        self._made: list[tuple[int, Any, tuple[str, ...]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every loader of this process."""
        kind = dataloader._BaseDataLoaderIter
        original = kind.__init__

        @functools.wraps(original)
        def watched(iterator: Any, loader: Any, *rest: Any) -> None:
            before = rng.capture_global()
            original(iterator, loader, *rest)
            after = rng.capture_global()
            drew = tuple(GENERATOR_NAMES.get(key, key) for key in after if after[key] != before.get(key))
            self._made.append((self.step, loader, drew))

        kind.__init__ = watched  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            kind.__init__ = original  # type: ignore[method-assign]

    def made(self, state: Mapping[str, Any]) -> list[IteratorMade]:
        """What was noted; ``state`` tells which loaders are saved."""
        saved = {id(value) for _, value, _ in live_objects(state)}
        return [IteratorMade(step, _describe(loader), id(loader) in saved, drew) for step, loader, drew in self._made]


def _describe(loader: Any) -> str:
    parts = []
    try:
        parts.append(f"{len(loader.dataset)} samples")
    except TypeError:  # a stream has no length
        parts.append("a stream")
    if loader.batch_size is not None:
        parts.append(f"batches of {loader.batch_size}")
    if isinstance(loader.sampler, torch.utils.data.RandomSampler):
        parts.append("shuffled")
    return f"{type(loader).__qualname__} ({', '.join(parts)})"


@contextmanager
def waiting_gradients(state: Mapping[str, Any], waiting: list[str]) -> Iterator[None]:
    """Collect into ``waiting`` the parameters whose gradients of now are still used in this block.

    They are used when a backward pass adds to them, or an optimizer steps with them. Those that are set to None or to
    zero before that are not.
    """
    parameters = {
        f"{path}.{name}": parameter
        for path, module, kind in live_objects(state)
        if kind is Kind.MODULE
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.count_nonzero())
    }
    before = {name: tensor_leaf(parameter.grad).digest for name, parameter in parameters.items()}

    def look(name: str, *_: Any) -> None:
        digest = before.pop(name, None)
        gradient = parameters[name].grad
        if digest is not None and gradient is not None and tensor_leaf(gradient).digest == digest:
            waiting.append(name)

    def look_at_all(*_: Any) -> None:
        for name in list(before):
            look(name)

    handles: list[Any] = [register_optimizer_step_pre_hook(look_at_all)]
    handles += [
        parameter.register_hook(_hook(look, name)) for name, parameter in parameters.items() if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(look: Callable[[str], None], name: str) -> Callable[[torch.Tensor], None]:
    """A hook that looks before the new gradient is added, and leaves it as it is."""
    return lambda gradient: look(name)
