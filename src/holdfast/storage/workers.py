"""Several threads over one list of tasks. What they do (copies, checksums, system calls) runs outside Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def default_threads() -> int:
    """How many threads a transfer takes: one a core, but three at least, since they wait for the disk in turn.

    Where several processes do the same at once, three of all of them wait for it.
    """
    return min(8, max(-(-3 // neighbours()), cores()))


def cores() -> int:
    """How many cores there are for this process: what helps where nobody waits for a disk."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // neighbours())


def neighbours() -> int:
    """How many processes of one training run on this machine, as ``torchrun`` tells each of them."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() and len(told) < 6 else 1


def in_parallel(
    tasks: Iterable[T], make_worker: Callable[[], Callable[[T], None]], threads: int, count: int | None = None
) -> None:
    """Do every task, each once, in order of their beginning; returns when all are done.

    The first exception ends the work: no further task is begun, and it is raised when those under way have ended.

    Args:
        tasks: what to do.
        make_worker: called in each thread, to make what does its tasks and owns what they need.
        threads: how many at most; one task alone is done by the caller's own thread.
        count: how many tasks there are, where they are made one by one: there may be a million.
    """
    if count is None:
        tasks = list(tasks)
        count = len(tasks)
    if min(threads, count) > 1:
        _Pool(iter(tasks), make_worker).run(min(threads, count))
    elif count:
        work = make_worker()
        for task in tasks:
            work(task)


class _Pool:
    def __init__(self, tasks: Iterator[T], make_worker: Callable[[], Callable[[T], None]]) -> None:
        self._tasks = tasks
        self._make_worker = make_worker
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def run(self, count: int) -> None:
        """One of the threads is the caller's."""
        threads = [threading.Thread(target=self._drain, name=f"holdfast-{i}", daemon=True) for i in range(1, count)]
        started = []
        try:
            for thread in threads:
                started.append(thread)  # first, for an interrupt may come between
                try:
                    thread.start()
                except RuntimeError:  # no more threads to be had: fewer do it too
                    break
            self._drain()
        except BaseException as error:  # noqa: BLE001 - raised again below
            self._fail(error)
        finally:
            # Nobody may go on while a thread still works in buffers and files that are about to be let go of.
            for thread in started:
                while thread.is_alive():
                    try:
                        thread.join()
                    except KeyboardInterrupt as error:
                        self._fail(error)
        if self._failure is not None:
            raise self._failure

    def _drain(self) -> None:
        try:
            work = self._make_worker()
            while True:
                with self._lock:
                    if self._failure is not None:
                        return
                    task = next(self._tasks, self)
                if task is self:
                    return
                work(task)  # type: ignore[arg-type]  # self marks the end, and is no task
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
