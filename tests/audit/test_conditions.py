"""What an experiment changes about its process, and puts back."""

from __future__ import annotations

import os
import secrets
import time
import uuid
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from holdfast.audit import conditions
from holdfast.audit.conditions import CONDITIONS, operators_named

READINGS: dict[str, tuple[str, Callable[[], object]]] = {
    "time": (conditions.CLOCK, lambda: time.time() + 0),  # looked up when it is read, as training code does
    "nanoseconds": (conditions.CLOCK, lambda: time.perf_counter_ns() + 0),
    "os.urandom": (conditions.ENTROPY, lambda: os.urandom(8)),
    "secrets": (conditions.ENTROPY, secrets.token_hex),
    "uuid": (conditions.ENTROPY, uuid.uuid4),
    "numpy": (conditions.ENTROPY, lambda: np.random.default_rng().random()),
}


@pytest.mark.parametrize(("condition", "reading"), READINGS.values(), ids=READINGS)
def test_what_changes_by_itself_is_steady(condition: str, reading: Callable[[], object]) -> None:
    """Each time the same, and only inside."""

    def readings() -> list[object]:
        with CONDITIONS[condition]():
            return [reading(), reading()]

    outside = reading()  # before the others: numpy seeds a generator of its own when it is first used
    first = readings()
    assert first == readings()
    assert outside not in first
    assert reading() not in first


def test_a_steady_clock_goes_on() -> None:
    """A loop that waits for a while ends."""
    with CONDITIONS[conditions.CLOCK]():
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass


def test_one_thread_stays_one() -> None:
    """Whatever the training asks for; afterwards it is as before."""
    before = torch.get_num_threads()
    with CONDITIONS[conditions.ONE_THREAD]():
        torch.set_num_threads(before + 1)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_benchmark_stays_off() -> None:
    """The same, for trying out algorithms."""
    torch.backends.cudnn.benchmark = True
    try:
        with CONDITIONS[conditions.NO_BENCHMARK]():
            torch.backends.cudnn.benchmark = True
            assert torch.backends.cudnn.benchmark is False
        torch.backends.cudnn.benchmark = True
        assert torch.backends.cudnn.benchmark is True
    finally:
        torch.backends.cudnn.benchmark = False


def test_operators_are_named_by_torchs_own_warnings() -> None:
    """Each once; other warnings go their way."""
    operators: list[str] = []
    with CONDITIONS[conditions.DETERMINISTIC](), operators_named(operators):
        for _ in range(2):
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    assert operators == ["put_"]
    assert not torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with operators_named(operators):
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in others] == ["something else"]
