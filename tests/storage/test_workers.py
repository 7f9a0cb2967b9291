"""Several threads over one list of tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.storage.workers import default_threads, in_parallel


def alive() -> list[str]:
    """The threads of transfers that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("holdfast")]


@given(st.integers(0, 40), st.integers(0, 6))
def test_each_task_is_done_once(tasks: int, threads: int) -> None:
    """However many there are of either, and no thread is left."""
    done: list[int] = []
    in_parallel(range(tasks), lambda: done.append, threads)
    assert (sorted(done), alive()) == (list(range(tasks)), [])


def test_one_thread_does_them_in_order() -> None:
    """The order of the tasks is the order in which they begin."""
    done: list[int] = []
    in_parallel(iter([3, 1, 2]), lambda: done.append, 1)
    assert done == [3, 1, 2]


def test_they_are_done_side_by_side() -> None:
    """Three threads do three tasks that wait for each other."""
    meeting = threading.Barrier(3, timeout=60)
    in_parallel(range(3), lambda: lambda task: (meeting.wait(), None)[1], 3)
    assert meeting.broken is False


def test_no_more_threads_than_asked_for() -> None:
    """Of two threads, each does one of two tasks that meet; four tasks are done by the same two."""
    meeting = threading.Barrier(2, timeout=60)
    seen: set[int] = set()

    def work(task: int) -> None:
        seen.add(threading.get_ident())
        meeting.wait()

    in_parallel(range(4), lambda: work, 2)
    assert len(seen) == 2


def test_each_thread_makes_its_own_worker() -> None:
    """A worker owns a buffer: it is used by the thread that made it, and by no other."""
    meeting = threading.Barrier(3, timeout=60)
    pairs: list[tuple[int, int]] = []

    def make_worker() -> Callable[[int], None]:
        maker = threading.get_ident()
        meeting.wait()  # all three are made, whichever thread is the quickest
        return lambda task: pairs.append((maker, threading.get_ident()))

    in_parallel(range(30), make_worker, 3)
    assert [maker for maker, _ in pairs] == [user for _, user in pairs]


@pytest.mark.parametrize(("tasks", "threads"), [(1, 4), (4, 1), (4, 0)])
def test_where_one_thread_is_enough_it_is_the_callers(tasks: int, threads: int) -> None:
    """A small file costs no thread, and one worker."""
    made: list[int] = []
    used: list[int] = []

    def make_worker() -> Callable[[int], None]:
        made.append(threading.get_ident())
        return lambda task: used.append(threading.get_ident())

    in_parallel(range(tasks), make_worker, threads)
    me = threading.get_ident()
    assert (made, used) == ([me], [me] * tasks)


def test_without_tasks_no_worker_is_made() -> None:
    """Nothing is allocated for nothing."""
    made: list[int] = []
    in_parallel([], lambda: made.append(1), 3)  # type: ignore[arg-type,return-value,func-returns-value]
    assert made == []


class FirstError(Exception):
    """Raised first."""


class LaterError(Exception):
    """Raised when the first had been raised already."""


class Pair:
    """Two tasks at the same time: the helper's fails, and when it has, the caller's goes on as ``afterwards`` says."""

    def __init__(self, afterwards: Callable[[], None]) -> None:
        self.begun: list[int] = []
        self._afterwards = afterwards
        self._meeting = threading.Barrier(2, timeout=60)
        self._helper: threading.Thread | None = None

    def work(self, task: int) -> None:
        """Do a task."""
        self.begun.append(task)
        helping = threading.current_thread() is not threading.main_thread()
        if helping:
            self._helper = threading.current_thread()
        self._meeting.wait()
        if helping:
            raise FirstError
        assert self._helper is not None
        self._helper.join()
        self._afterwards()


def test_the_first_failure_is_raised() -> None:
    """What goes wrong afterwards may only follow from it."""

    def fail_later() -> None:
        raise LaterError

    pair = Pair(fail_later)
    with pytest.raises(FirstError):
        in_parallel(range(2), lambda: pair.work, 2)


def test_no_task_is_begun_after_a_failure() -> None:
    """Nobody writes on to a disk that is full: the task under way is ended, and that is all."""
    pair = Pair(lambda: None)
    with pytest.raises(FirstError):
        in_parallel(range(10), lambda: pair.work, 2)
    assert sorted(pair.begun) == [0, 1]


def test_a_failure_of_the_caller_waits_for_the_others() -> None:
    """Buffers and files are let go of when it is raised: nobody may use them any more."""
    failing = threading.Event()
    meeting = threading.Barrier(2, timeout=60)
    ended: list[bool] = []

    def work(task: int) -> None:
        meeting.wait()
        if threading.current_thread() is threading.main_thread():
            failing.set()
            raise FirstError
        ended.append(failing.wait(60))

    with pytest.raises(FirstError):
        in_parallel(range(2), lambda: work, 2)
    assert (ended, alive()) == ([True], [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_kind_of_exception_is_raised(error: type[BaseException], threads: int) -> None:
    """Ctrl-C and an empty memory too, out of any thread."""

    def work(task: int) -> None:
        if task == 5:
            raise error

    with pytest.raises(error):
        in_parallel(range(10), lambda: work, threads)
    assert alive() == []


def test_a_worker_that_cannot_be_made() -> None:
    """No memory for a buffer, say: the error is raised, nothing hangs."""

    def make_worker() -> Callable[[int], None]:
        raise MemoryError

    with pytest.raises(MemoryError):
        in_parallel(range(10), make_worker, 3)
    assert alive() == []


@pytest.mark.parametrize("possible", [0, 1])
def test_fewer_threads_than_asked_for(monkeypatch: pytest.MonkeyPatch, possible: int) -> None:
    """Where no more can be started, those that could be do all of it."""
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == possible:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    done: list[int] = []
    in_parallel(range(20), lambda: done.append, 3)
    assert (sorted(done), len(started)) == (list(range(20)), possible)


def test_the_usual_number_of_threads() -> None:
    """Enough to have one waiting for the disk while another works, and not one for each of a hundred cores."""
    assert 3 <= default_threads() <= 8


def still_working() -> list[str]:
    """The threads that were left."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("holdfast-")]


def test_an_interrupt_while_threads_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody goes on before every thread has ended."""
    start, begun = threading.Thread.start, threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(range(3), lambda: lambda task: begun.set(), 2)
    assert still_working() == []


def test_an_interrupt_while_threads_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same at the end."""
    join = threading.Thread.join
    interrupts = [KeyboardInterrupt()]
    both, interrupted = threading.Barrier(2, timeout=60), threading.Event()

    def join_later(thread: threading.Thread, timeout: float | None = None) -> None:
        if interrupts:
            interrupted.set()
            raise interrupts.pop()
        join(thread, timeout)

    def work(task: int) -> None:
        both.wait()
        if threading.current_thread() is not threading.main_thread():
            assert interrupted.wait(60)

    monkeypatch.setattr(threading.Thread, "join", join_later)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(range(2), lambda: work, 2)
    assert still_working() == []
