"""The processes that load data: started so that signals do not tear them out of a training that wants to end in order.

A scheduler that preempts a job signals every process of it, and so does Ctrl-C. The trainer decides what to do then;
its workers must go on feeding it until it has. PyTorch's workers end at the first signal, which raises a
``RuntimeError`` in the middle of the trainer's step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import util
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info

GRACE_S = 60.0  # how long a worker lives after SIGTERM
_IGNORED = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_HANDLED = (*_IGNORED, signal.SIGTERM)


class WorkerStart:
    """What a worker does first; goes to it as its ``worker_init_fn``.

    Args:
        then: the user's own ``worker_init_fn``.
    """

    def __init__(self, then: Callable[[int], object] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        """Runs in the worker."""
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _live_on_for_a_while)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        info = get_worker_info()
        # A worker_init_fn expects to find the user's dataset there, to shard it. WorkerInfo is frozen.
        object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]  # in a worker it is not None
        if self._then is not None:
            self._then(worker)


def _live_on_for_a_while(number: int, frame: FrameType | None) -> None:
    """A worker's answer to SIGTERM. What the alarm does ends the process even where it is stuck outside of Python."""
    if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)


class Workers:
    """The workers of one loader, as the trainer sees them.

    A trainer that ends while its workers live ends them with SIGTERM and waits, and they would live on for their time
    of grace. So they are killed before that: they only read.

    Args:
        init: the user's ``worker_init_fn``.
    """

    def __init__(self, init: Callable[[int], object] | None) -> None:
        self._processes: list[Any] = []
        self.start = WorkerStart(init)

    @contextlib.contextmanager
    def being_started(self) -> Iterator[None]:
        """Worker processes that are started inside take their first signal when they know what to do with it."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def watch(self, processes: Iterable[Any]) -> None:
        """These are the workers now."""
        self._processes = list(processes)
        if self._processes:
            _end_at_exit(self)

    def end(self) -> None:
        """End them; the process is about to end itself."""
        for process in self._processes:
            # PyTorch watches its workers, and raises for one that was killed; these are meant to be.
            with contextlib.suppress(RuntimeError):
                process.kill()
                process.join()


_started: weakref.WeakSet[Workers] = weakref.WeakSet()
_registered_in: list[int] = []


def _end_at_exit(workers: Workers) -> None:
    """Before multiprocessing ends its children, which waits for them however long they take."""
    _started.add(workers)
    if _registered_in != [os.getpid()]:  # a child begins without the finalizers of its parent
        _registered_in[:] = [os.getpid()]
        util.Finalize(None, _end_all, args=(os.getpid(),), exitpriority=10)


def _end_all(pid: int) -> None:
    for workers in list(_started):
        if pid == os.getpid():
            workers.end()
