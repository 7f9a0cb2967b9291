"""What an experiment changes about a process, to see whether a divergence goes away with it.

Each condition is a context manager; inside, the training is built and run.
"""

from __future__ import annotations

import itertools
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

CLOCK = "clock"
ENTROPY = "entropy"
ONE_THREAD = "one thread"
DETERMINISTIC = "deterministic algorithms"
NO_BENCHMARK = "no benchmark"

_TICK_NS = 1_000_000
_NO_PROMISE = "does not have a deterministic implementation"


@contextmanager
def steady_clock() -> Iterator[None]:
    """A clock that ticks once whenever somebody looks at it, the same in every process."""
    ticks = itertools.count(1_000_000_000_000_000_000, _TICK_NS)
    names = ("time", "monotonic", "perf_counter", "process_time")
    before = {name: getattr(time, name) for stem in names for name in (stem, f"{stem}_ns")}
    for name in before:
        reading: Callable[[], float] = (lambda: next(ticks)) if name.endswith("_ns") else (lambda: next(ticks) / 1e9)
        setattr(time, name, reading)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(time, name, original)


@contextmanager
def steady_entropy() -> Iterator[None]:
    """Random bytes of the operating system, the same in every process: ``os.urandom``, ``secrets``, ``uuid``."""
    generator = random.Random(0)
    before = os.urandom, random._urandom  # type: ignore[attr-defined]  # the one that SystemRandom and secrets use
    os.urandom = random._urandom = generator.randbytes  # type: ignore[attr-defined]
    try:
        yield
    finally:
        os.urandom, random._urandom = before  # type: ignore[attr-defined]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each operator, whatever the training asks for."""
    before, ask = torch.get_num_threads(), torch.set_num_threads
    torch.set_num_threads(1)
    torch.set_num_threads = lambda nthreads: None
    try:
        yield
    finally:
        torch.set_num_threads = ask
        torch.set_num_threads(before)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Torch's own deterministic algorithms, and a warning for each operator that has none."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def no_benchmark() -> Iterator[None]:
    """Convolutions do not try out algorithms, whatever the training asks for."""
    flags = type(torch.backends.cudnn)
    before = vars(flags)["benchmark"]
    torch.backends.cudnn.benchmark = False
    setattr(flags, "benchmark", property(lambda module: False, lambda module, value: None))  # noqa: B010 - mypy
    try:
        yield
    finally:
        setattr(flags, "benchmark", before)  # noqa: B010 - mypy


CONDITIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    CLOCK: steady_clock,
    ENTROPY: steady_entropy,
    ONE_THREAD: one_thread,
    DETERMINISTIC: deterministic_algorithms,
    NO_BENCHMARK: no_benchmark,
}


@contextmanager
def operators_named(operators: list[str]) -> Iterator[None]:
    """Collect into ``operators`` the names of those that torch warns do not promise the same bits each time."""
    show = warnings.showwarning

    def collect(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        name, found, _ = str(message).partition(_NO_PROMISE)
        if not found:
            show(message, category, filename, lineno, *rest)
        elif name.strip() not in operators:
            operators.append(name.strip())

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_NO_PROMISE}.*")
        warnings.showwarning = collect  # type: ignore[assignment]  # the rest is the file and the line of text
        torch.set_warn_always(True)  # else each operator warns once in a process
        try:
            yield
        finally:
            torch.set_warn_always(False)
