"""Signals that a whole process group gets do not tear workers out of the training."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from holdfast.data import ResumableDataLoader, workers


def signal_workers(number: int) -> None:
    """As a scheduler does to every process of the job."""
    for child in torch.multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, number)


class FromElsewhere:
    """Sends signals from a process that is not the workers' parent, as a scheduler's is not."""

    def __call__(self, number: int) -> None:
        """Send it to every worker."""
        pids = [child.pid for child in torch.multiprocessing.active_children()]
        pid = os.fork()
        if pid == 0:
            for worker in pids:
                os.kill(worker, number)
            os._exit(0)
        os.waitpid(pid, 0)


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("send", [signal_workers, FromElsewhere()], ids=["by the trainer", "by another"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signalled_workers_deliver_every_batch(kit: SimpleNamespace, number: signal.Signals, send: Any) -> None:
    """Ten times, in mid-epoch; and they end with their loader."""
    expected = kit.batches(ResumableDataLoader(kit.Pictures(40), 2, seed=5))
    loader = ResumableDataLoader(kit.Pictures(40), 2, seed=5, num_workers=2)
    found = []
    for count, batch in enumerate(loader):
        if count % 2 == 0:
            send(number)
        found.append(batch.tolist())
    assert found == expected


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_a_worker_is_ready(
    kit: SimpleNamespace, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until the worker knows what to do with it; and the trainer's own are held back no longer than that."""
    monkeypatch.setattr(
        torch.utils.data._utils.signal_handling,
        "_set_worker_signal_handlers",  # the first thing that a worker does
        lambda: os.kill(os.getpid(), number),
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = ResumableDataLoader(kit.Pictures(8), 2, seed=5, num_workers=2)
    assert len(kit.batches(loader)) == 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_what_it_is_good_for(kit: SimpleNamespace) -> None:
    """A plain loader's workers die of it, and the trainer gets an error in the middle of a step."""

    class Slow(kit.Pictures):  # type: ignore[misc, name-defined]  # a class from a fixture
        def __getitem__(self, index: int) -> Any:
            signal.pause()

    iterator = iter(DataLoader(Slow(4), 2, num_workers=1))
    with pytest.raises(RuntimeError) as found:  # noqa: PT012 - whichever comes first
        FromElsewhere()(signal.SIGTERM)
        next(iterator)
    assert "killed by signal: Terminated" in reasons(found.value)


def reasons(error: BaseException | None) -> str:
    """An error and what it came from."""
    return "" if error is None else f"{error}\n{reasons(error.__cause__)}"


class Waiting:
    """Loads its first sample, and waits for ever in the second: outside of Python, no handler would run."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                time.sleep(1000)
        return index


def test_a_stuck_worker_ends_after_its_time_of_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm ends it, whatever it does; the trainer learns of it as of any worker that died."""
    monkeypatch.setattr(workers, "GRACE_S", 0.05)
    iterator = iter(ResumableDataLoader(Waiting(), num_workers=1))
    with pytest.raises(RuntimeError) as found:
        list(iterator)
    assert "killed by signal: Alarm clock" in reasons(found.value)


def test_the_user_s_own_start_comes_after_ours(kit: SimpleNamespace) -> None:
    """Who wants other handlers in workers sets them there."""

    class Handlers(kit.Pictures):  # type: ignore[misc, name-defined]  # a class from a fixture
        def __getitem__(self, index: int) -> list[bool]:
            return [signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGUSR1, signal.SIGUSR2)]

    def init(worker: int) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)

    loader = ResumableDataLoader(Handlers(2), None, num_workers=1, worker_init_fn=init)
    assert list(loader) == [[False, True]] * 2
