"""Handlers of signals, and who else has some."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch.utils.data
from torch.utils.data._utils import worker

from holdfast.preemption.signals import Signals

Handler = Callable[[int, FrameType | None], Any]
Fork = Callable[[Callable[[], object]], int]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What a test did to handlers is undone."""
    used = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in used}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told() -> list[str]:
    """What was told of."""
    return []


def listen(told: list[str], *numbers: signal.Signals) -> Signals:
    """Installed handlers for ``numbers``."""
    signals = Signals(numbers, lambda number: told.append(number.name))
    signals.install()
    return signals


def recorder(calls: list[str], name: str) -> Handler:
    """A handler that remembers its calls."""
    return lambda number, frame: calls.append(f"{name} {signal.Signals(number).name}")


def test_earlier_handlers_are_called_and_put_back(told: list[str]) -> None:
    """After we have been told; after the block it is as it was."""
    earlier = recorder(told, "earlier")
    signal.signal(signal.SIGUSR1, earlier)
    signals = listen(told, signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert told == ["SIGUSR1", "earlier SIGUSR1"]
    signals.restore()
    assert signal.getsignal(signal.SIGUSR1) is earlier


def test_default_actions_are_not_taken_and_put_back(told: list[str]) -> None:
    """A signal that would kill does not."""
    signals = listen(told, signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signals.restore()
    assert told == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ignored_signals_stay_ignored(told: list[str]) -> None:
    """Such as under nohup."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signals = listen(told, signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    signals.restore()
    assert (told, signal.getsignal(signal.SIGUSR1)) == ([], signal.SIG_IGN)


def test_handlers_in_c_are_left_alone(
    told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They could be neither called nor put back; it is said."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    listen(told, signal.SIGUSR1)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert "SIGUSR1 has a handler that is not Python's" in caplog.text


def test_nested(told: list[str]) -> None:
    """Both are told; the inner one's end leaves the outer one listening."""
    outer = Signals([signal.SIGUSR1], lambda number: told.append("outer"))
    inner = Signals([signal.SIGUSR1], lambda number: told.append("inner"))
    outer.install()
    inner.install()
    signal.raise_signal(signal.SIGUSR1)
    assert told == ["inner", "outer"]
    inner.restore()
    signal.raise_signal(signal.SIGUSR1)
    assert told == ["inner", "outer", "outer"]
    outer.restore()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_handler_that_came_later_stays(told: list[str]) -> None:
    """Whoever replaced ours keeps theirs; calling ours from there does what there was before."""
    signal.signal(signal.SIGUSR1, recorder(told, "earlier"))
    signals = listen(told, signal.SIGUSR1)
    ours: Any = signal.getsignal(signal.SIGUSR1)

    def later(number: int, frame: FrameType | None) -> None:
        told.append("later")
        ours(number, frame)

    signal.signal(signal.SIGUSR1, later)
    signals.restore()
    signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is later
    assert told == ["later", "earlier SIGUSR1"]


def test_installed_again(told: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The next block begins afresh: its first interrupt is a first one."""
    signals = listen(told, signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    signals.restore()
    signals.install()
    signal.raise_signal(signal.SIGINT)
    signals.restore()
    assert told == ["SIGINT", "SIGINT"]


# ---------------------------------------------------------------------------------------------------------- interrupts


def test_interrupts(told: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The first is told, to the person too; the second is Python's own."""
    signals = listen(told, signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert told == ["SIGINT"]
    assert capfd.readouterr().err == "\nsaving at the next step, then stopping; once more stops at once\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signals.restore()
    assert (told, signal.getsignal(signal.SIGINT)) == (["SIGINT"], signal.default_int_handler)


def test_interrupts_with_an_earlier_handler(told: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """It is called each time; the second time it alone."""
    signal.signal(signal.SIGINT, recorder(told, "earlier"))
    signals = listen(told, signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    signals.restore()
    assert told == ["SIGINT", "earlier SIGINT", "earlier SIGINT"]


def test_other_signals_may_come_twice(told: list[str]) -> None:
    """Schedulers repeat themselves."""
    signals = listen(told, signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signals.restore()
    assert told == ["SIGTERM", "SIGTERM"]


# ------------------------------------------------------------------------------------------------------ other threads


def test_off_the_main_thread(told: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is installed, and a warning says what follows from that and what to do."""

    def enter_and_leave() -> None:
        listen(told, signal.SIGTERM, signal.SIGUSR1).restore()

    thread = threading.Thread(target=enter_and_leave)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "SIGTERM, SIGUSR1 will end the training without a save" in record.getMessage()
    assert "ckpt.request_preemption(reason)" in record.getMessage()


def test_nothing_to_listen_to_off_the_main_thread(told: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Who asked for no signals needs no warning."""
    thread = threading.Thread(target=listen, args=(told,))
    thread.start()
    thread.join()
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------------ forked children


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_child_is_killed_as_ever(told: list[str], number: signal.Signals, in_a_fork: Fork) -> None:
    """The default action is taken, and the parent goes on listening."""
    signals = listen(told, number)
    assert in_a_fork(lambda: signal.raise_signal(number)) == -number
    signal.raise_signal(number)
    signals.restore()
    assert told == [number.name]


def test_a_child_is_interrupted_as_ever(told: list[str], in_a_fork: Fork) -> None:
    """By the first SIGINT."""
    signals = listen(told, signal.SIGINT)
    assert in_a_fork(lambda: signal.raise_signal(signal.SIGINT)) == 42
    signals.restore()


def test_a_child_has_the_earlier_handlers(told: list[str], in_a_fork: Fork) -> None:
    """They are called there, and nobody is told."""
    signal.signal(signal.SIGUSR1, recorder(told, "earlier"))
    signals = listen(told, signal.SIGUSR1)

    def child() -> None:
        signal.raise_signal(signal.SIGUSR1)
        assert told == ["earlier SIGUSR1"]

    assert in_a_fork(child) == 0
    signals.restore()


WORKER_SIGNALS = [
    (signal.SIGUSR1, 0),
    (signal.SIGUSR2, 0),
    (signal.SIGINT, 0),
    (signal.SIGTERM, -signal.SIGTERM),
]


@pytest.mark.parametrize(("number", "status"), WORKER_SIGNALS)
def test_a_loader_worker(told: list[str], number: signal.Signals, status: int, in_a_fork: Fork) -> None:
    """It ignores what is meant for the trainer; SIGTERM ends it."""
    signals = listen(told, number)

    def work() -> None:
        worker._worker_info = object()  # type: ignore[assignment]
        signal.raise_signal(number)

    assert in_a_fork(work) == status
    signals.restore()


def test_a_loader_worker_that_has_just_begun(told: list[str], in_a_fork: Fork) -> None:
    """Before it has set itself up it is a worker already."""
    signals = listen(told, signal.SIGUSR1)

    def work() -> None:
        multiprocessing.current_process()._target = worker._worker_loop  # type: ignore[attr-defined]
        assert torch.utils.data.get_worker_info() is None
        signal.raise_signal(signal.SIGUSR1)

    assert in_a_fork(work) == 0
    signals.restore()
