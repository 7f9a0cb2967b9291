"""Leaving a block in time, in one process, with a clock that is set by hand."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Checkpoint, Checkpointer, Every, KeepLast, Preempted, Preemption, Run
from holdfast.company import Asked
from holdfast.errors import SaveTimeoutError, StorageError, UnsupportedValueError, UsageError
from holdfast.handle import SaveReport
from holdfast.notices import Notified
from holdfast.preemption.leaving import PreemptionWatch, Saver
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending


class Clock:
    """Stands still unless it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now_s


class FakeSave:
    """A save that took some time."""

    def __init__(self, checkpoint: Checkpoint, seconds: float, failure: Exception | None = None) -> None:
        self._checkpoint = checkpoint
        self._seconds = seconds
        self._failure = failure

    def done(self) -> bool:
        """It is."""
        return True

    def failed(self) -> bool:
        """Whether it did."""
        return self._failure is not None

    def result(self, timeout: float | None = None) -> Checkpoint:
        """The checkpoint."""
        if self._failure is not None:
            raise self._failure
        return self._checkpoint

    def report(self, timeout: float | None = None) -> SaveReport:
        """What it cost."""
        return SaveReport(1, "background", 0.0, 0.0, 0.0, 0.0, 0.0, self._seconds, 0.0, 0, 0)


class World:
    """A watch with everything around it."""

    def __init__(self, path: Path, config: Preemption | None = None) -> None:
        run = Run(path)
        self.checkpoint = run.save({"x": 1}, step=1)
        self.newer = run.save({"x": 1}, step=2)
        self.clock = Clock()
        self.watch = PreemptionWatch(config or Preemption(grace_seconds=30.0), run, self.clock)
        self.calls: list[Any] = []
        self.saved: FakeSave | Checkpoint | None = None
        self.failure: Exception | None = None
        self.drained: list[Callable[[], None]] = []

    def measured(self, seconds: float) -> None:
        """Have one save behind it, which took so long."""
        self.watch.measure(FakeSave(self.checkpoint, seconds))

    def leave(self, *, background: bool = True) -> Preempted:
        """Be preempted and leave."""
        saver = Saver(
            saved=lambda: self.saved,
            save=self._save,
            drain=self._drain,
            check=lambda: None,
            patience_s=600.0,
            background=background,
        )
        with pytest.raises(Preempted) as caught:
            self.watch.leave(saver)
        return caught.value

    def _save(self, reason: str) -> FakeSave:
        self.calls.append(reason)
        return FakeSave(self.newer, 1.0, self.failure)

    def _drain(self, timeout_s: float) -> None:
        self.calls.append(timeout_s)
        if self.drained:
            self.drained.pop(0)()


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Thirty seconds of grace."""
    return World(tmp_path)


# ------------------------------------------------------------------------------------------------------ how it leaves


def test_what_is_waited_for(world: World) -> None:
    """The save under way and ours share what is left of the grace period, less the time to leave."""
    world.watch.request("SIGTERM")
    world.clock.now_s = 4.0
    world.drained = [lambda: setattr(world.clock, "now_s", 10.0)]
    left = world.leave()
    assert world.calls == [24.5, "preempted (SIGTERM)", 18.5]
    assert (left.code, left.reason, left.checkpoint) == (75, "SIGTERM", world.newer)
    assert world.watch.left


def test_less_time_while_it_waits(world: World) -> None:
    """A second signal, or a notice, may bring the deadline forward; and a person's interrupt becomes a preemption."""
    world.watch._tell_of_signal(signal.SIGINT)
    world.drained = [lambda: world.watch._tell_of_notice("the cloud: terminate", 11.0)]
    left = world.leave()
    assert world.calls == [600.0, "preempted (the cloud: terminate)", 10.0]
    assert (left.code, left.reason) == (75, "the cloud: terminate")


def test_without_a_deadline(tmp_path: Path) -> None:
    """A save is waited for as at any end."""
    world = World(tmp_path, Preemption())
    world.watch.request("SIGTERM")
    world.leave()
    assert world.calls == [600.0, "preempted (SIGTERM)", 600.0]


def test_what_is_saved_is_not_saved_again(world: World) -> None:
    """Neither a save under way nor what was resumed from."""
    world.watch.request("SIGTERM")
    world.saved = FakeSave(world.newer, 1.0)
    assert world.leave().checkpoint == world.newer
    world.saved = world.checkpoint
    assert world.leave().checkpoint == world.checkpoint
    assert world.calls == [28.5, 28.5]


@pytest.mark.parametrize("failure", [StorageError("no space"), SaveTimeoutError("no answer")])
def test_a_save_that_fails(world: World, failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """It leaves all the same: the error says what is lost and what is left, and is the cause of the exception."""
    world.measured(1.0)
    world.watch.request("SIGTERM")
    world.failure = failure
    left = world.leave()
    assert (left.code, left.checkpoint, left.__cause__) == (75, None, failure)
    [error] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"is lost: {failure} The next start continues from {world.checkpoint.path}." in error


# -------------------------------------------------------------------------------------------------- what does not fit


def test_a_save_that_will_not_fit_is_tried(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """In the background nothing is lost by that."""
    world.measured(20.0)
    world.watch.request("SIGTERM")
    world.clock.now_s = 15.0
    assert world.leave().checkpoint == world.newer
    assert "a save takes 20.0 s, and 13.5 s are left: trying all the same" in caplog.text


def test_a_save_that_blocks_and_will_not_fit_is_not_begun(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It could not be given up; the checkpoint before is there."""
    world.measured(20.0)
    world.watch.request("SIGTERM")
    world.clock.now_s = 15.0
    assert world.leave(background=False).checkpoint is None
    assert world.calls == [13.5]
    assert "a save takes 20.0 s, 13.5 s are left, and a save that blocks cannot be given up" in caplog.text


def test_a_save_that_blocks_and_fits(world: World) -> None:
    """It is made."""
    world.measured(20.0)
    world.watch.request("SIGTERM")
    assert world.leave(background=False).checkpoint == world.newer


def slow_saves(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings ahead."""
    return [record.getMessage() for record in caplog.records if "the grace period is" in record.getMessage()]


def test_slow_saves_are_warned_of_ahead(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Once, at the first save that does not fit, with what to do."""
    world.measured(28.0)
    assert slow_saves(caplog) == []
    world.measured(29.0)
    world.measured(45.0)
    [warning] = slow_saves(caplog)
    assert "a save takes 29.0 s, the grace period is 30 s, of which 28.5 s can be used" in warning
    assert "--signal=USR1@SECONDS" in warning


def test_failed_saves_are_not_measured(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """They say nothing of how long a save takes."""
    world.watch.measure(FakeSave(world.checkpoint, 99.0, StorageError("no space")))
    assert slow_saves(caplog) == []


def test_earlier_processes_are_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On resuming the warning comes before the first save."""
    config = Preemption(grace_seconds=1e-9)
    with Checkpointer(tmp_path, {"x": 1}, preemption=None) as ckpt:
        ckpt.step()
    assert slow_saves(caplog) == []
    with Checkpointer(tmp_path, {"x": 1}, preemption=config):
        assert len(slow_saves(caplog)) == 1


# -------------------------------------------------------------------------------------------------- with a checkpointer


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Each block puts back what it found."""
    used = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in used]
    yield
    assert [signal.getsignal(number) for number in used] == before


def preempted_in(train: Callable[[Checkpointer], object], path: Path, **options: Any) -> Preempted:
    """How a block ends that must be left."""
    state = {"w": torch.zeros(3)}
    with (
        pytest.raises(Preempted) as caught,
        Checkpointer(path, state, save=Every(steps=100), keep=KeepLast(9), **options) as ckpt,
    ):
        train(ckpt)
    return caught.value


def preempted_step(ckpt: Checkpointer) -> None:
    """A step that a signal came in."""
    signal.raise_signal(signal.SIGTERM)
    ckpt.step()


def name_of(checkpoint: Checkpoint | None) -> str | None:
    """The name of what may be there."""
    return None if checkpoint is None else checkpoint.name


def saved(path: Path) -> list[tuple[int, int, str]]:
    """Step, epoch and reason of each checkpoint."""
    return [(checkpoint.step, checkpoint.epoch, checkpoint.reason) for checkpoint in Run(path)]


def test_a_signal(tmp_path: Path) -> None:
    """``preempted`` says so at once; the next step saves and leaves."""

    def train(ckpt: Checkpointer) -> None:
        ckpt.step()
        assert not ckpt.preempted
        signal.raise_signal(signal.SIGUSR1)
        assert ckpt.preempted
        ckpt.step()
        pytest.fail("went on")

    left = preempted_in(train, tmp_path)
    assert (left.reason, name_of(left.checkpoint)) == ("SIGUSR1", "step-000000000002")
    assert saved(tmp_path) == [(2, 0, "preempted (SIGUSR1)")]


@pytest.mark.parametrize("background", [True, False])
def test_a_request(tmp_path: Path, background: bool) -> None:
    """Anything may ask, from any thread, whatever listens to signals; metrics go with the checkpoint."""

    def train(ckpt: Checkpointer) -> None:
        ckpt.step()
        thread = threading.Thread(target=ckpt.request_preemption, args=("the scheduler",))
        thread.start()
        thread.join()
        ckpt.end_epoch({"loss": 0.5})
        pytest.fail("went on")

    preempted_in(train, tmp_path, preemption=None, background=background)
    assert saved(tmp_path) == [(1, 1, "preempted (the scheduler)")]
    assert Run(tmp_path).latest().metrics == {"loss": 0.5}


def test_off_the_main_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No signals there, which is said; everything else works."""
    left: list[Preempted] = []

    def train(ckpt: Checkpointer) -> None:
        ckpt.request_preemption("the framework")
        ckpt.step()

    thread = threading.Thread(target=lambda: left.append(preempted_in(train, tmp_path)))
    thread.start()
    thread.join()
    assert [item.reason for item in left] == ["the framework"]
    assert "this is not the main thread" in caplog.text


def test_preemption_that_is_turned_off(tmp_path: Path) -> None:
    """No handler is touched."""
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(tmp_path, {"x": 1}, preemption=None):
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_notice(tmp_path: Path) -> None:
    """What a cloud says has the same effect."""
    known = threading.Event()

    class Cloud:
        interval_s = 0.001
        asked = 0

        def check(self) -> Notified | None:
            self.asked += 1
            if self.asked == 3:  # what was told the time before has arrived
                known.set()
            return Notified("the cloud: terminate")

    def train(ckpt: Checkpointer) -> None:
        assert known.wait(60)
        ckpt.step()

    left = preempted_in(train, tmp_path, preemption=Preemption(notices=Cloud()))
    assert left.reason == "the cloud: terminate"
    assert saved(tmp_path) == [(1, 0, "preempted (the cloud: terminate)")]


def test_a_signal_while_a_save_begins(tmp_path: Path) -> None:
    """That save is the one: the same step waits for it and leaves."""

    class Signalling:
        def due(self, moment: Any) -> str | None:
            signal.raise_signal(signal.SIGTERM)
            return "due"

    with pytest.raises(Preempted) as caught, Checkpointer(tmp_path, {"x": 1}, save=Signalling()) as ckpt:
        ckpt.step()
    assert name_of(caught.value.checkpoint) == "step-000000000001"
    assert saved(tmp_path) == [(1, 0, "due")]


def test_a_signal_while_a_save_begins_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """The same holds there."""

    class Signalling:
        def due(self, moment: Any) -> str | None:
            signal.raise_signal(signal.SIGTERM)
            return "due"

    with pytest.raises(Preempted), Checkpointer(tmp_path, {"x": 1}, save=Signalling()) as ckpt:
        ckpt.end_epoch()
    assert saved(tmp_path) == [(0, 1, "due")]


def test_what_this_very_step_has_saved(tmp_path: Path) -> None:
    """A save that holds the present state is waited for; no second one is made."""

    def train(ckpt: Checkpointer) -> None:
        ckpt.step()
        ckpt.save()
        ckpt.request_preemption("a test")
        ckpt.leave_if_preempted()

    left = preempted_in(train, tmp_path)
    assert name_of(left.checkpoint) == "step-000000000001"
    assert saved(tmp_path) == [(1, 0, "asked for")]


def test_before_the_first_step_of_a_resumed_training(tmp_path: Path) -> None:
    """There is nothing to save that is not saved."""
    with Checkpointer(tmp_path, {"w": torch.zeros(3)}) as first:
        first.step()

    def train(ckpt: Checkpointer) -> None:
        ckpt.request_preemption("a test")
        ckpt.leave_if_preempted()

    assert name_of(preempted_in(train, tmp_path).checkpoint) == "step-000000000001"
    assert saved(tmp_path) == [(1, 0, "end of training")]


def test_nobody_asked(tmp_path: Path) -> None:
    """``leave_if_preempted`` does nothing."""
    with Checkpointer(tmp_path, {"x": 1}) as ckpt:
        ckpt.leave_if_preempted()
    assert saved(tmp_path) == []


def test_the_training_was_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No exception; the state is saved as at any end."""
    caplog.set_level(logging.INFO, "holdfast")
    with Checkpointer(tmp_path, {"x": 1}) as ckpt:
        ckpt.step()
        signal.raise_signal(signal.SIGTERM)
    assert saved(tmp_path) == [(1, 0, "end of training")]
    assert "preempted (SIGTERM), but the training was over and is saved" in caplog.text


def test_the_same_object_in_another_block(tmp_path: Path) -> None:
    """It begins afresh."""
    ckpt = Checkpointer(tmp_path, {"x": 1})

    def train() -> None:
        with ckpt:
            assert not ckpt.preempted
            signal.raise_signal(signal.SIGTERM)
            ckpt.step()

    for step in (1, 2):
        with pytest.raises(Preempted):
            train()
        assert Run(tmp_path).latest().step == step


def test_two_checkpointers(tmp_path: Path) -> None:
    """The inner one's leaving is not the outer one's: its save under way is finished."""

    def train(inner: Checkpointer) -> None:
        outer.step()
        outer.save()
        signal.raise_signal(signal.SIGTERM)
        inner.step()

    with pytest.raises(Preempted), Checkpointer(tmp_path / "outer", {"w": torch.zeros(3)}) as outer:
        raise preempted_in(train, tmp_path / "inner")
    assert saved(tmp_path / "inner") == [(1, 0, "preempted (SIGTERM)")]
    assert saved(tmp_path / "outer") == [(1, 0, "asked for")]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint before stays, the exit code too, and the error is told."""

    def train(ckpt: Checkpointer) -> None:
        ckpt.step()
        ckpt.save().result()

        def fail(store: LocalStore, step: int) -> Any:
            raise StorageError("no space")

        monkeypatch.setattr(LocalStore, "create", fail)
        signal.raise_signal(signal.SIGTERM)
        ckpt.step()

    left = preempted_in(train, tmp_path)
    assert (left.code, left.checkpoint) == (75, None)
    assert isinstance(left.__cause__, StorageError)
    assert "is lost: no space The next start continues from" in caplog.text
    assert saved(tmp_path) == [(1, 0, "asked for")]


def test_a_signal_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That save is finished first, and then ours is made: both are there."""
    write_files = LocalPending.write_files
    stopped, answers = threading.Event(), threading.Event()

    def write(pending: LocalPending, images: Any) -> Any:
        stopped.set()
        assert answers.wait(60)
        return write_files(pending, images)

    def train(ckpt: Checkpointer) -> None:
        monkeypatch.setattr(LocalPending, "write_files", write)
        ckpt.step()
        ckpt.save()
        assert stopped.wait(60)
        signal.raise_signal(signal.SIGTERM)
        threading.Thread(target=answers.set).start()
        ckpt.step()

    assert name_of(preempted_in(train, tmp_path).checkpoint) == "step-000000000002"
    assert saved(tmp_path) == [(1, 0, "asked for"), (2, 0, "preempted (SIGTERM)")]


def test_a_save_before_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and does not keep the last one from being made."""
    write_files = LocalPending.write_files
    stopped, answers = threading.Event(), threading.Event()

    def fail(pending: LocalPending, images: Any) -> Any:
        monkeypatch.setattr(LocalPending, "write_files", write_files)
        stopped.set()
        assert answers.wait(60)
        raise StorageError("the disk is gone")

    def train(ckpt: Checkpointer) -> None:
        monkeypatch.setattr(LocalPending, "write_files", fail)
        ckpt.step()
        ckpt.save()
        assert stopped.wait(60)
        ckpt.request_preemption("a test")
        threading.Thread(target=answers.set).start()
        ckpt.leave_if_preempted()

    assert name_of(preempted_in(train, tmp_path).checkpoint) == "step-000000000001"
    assert saved(tmp_path) == [(1, 0, "preempted (a test)")]


def test_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    """Starting again would not help, so this is an error as at any save."""
    with pytest.raises(UnsupportedValueError), Checkpointer(tmp_path, {"x": threading.Lock()}) as ckpt:
        preempted_step(ckpt)


def test_an_argument_that_cannot_mean_anything(tmp_path: Path) -> None:
    """Refused where it is constructed."""
    with pytest.raises(UsageError, match="preemption=: expected a Preemption or None, found 90"):
        Checkpointer(tmp_path, {"x": 1}, preemption=90)  # type: ignore[arg-type]


def test_outside_its_block(tmp_path: Path) -> None:
    """As for every call."""
    with pytest.raises(UsageError, match="inside its block"):
        Checkpointer(tmp_path, {"x": 1}).leave_if_preempted()


@pytest.mark.parametrize(
    ("mine", "others", "told"),
    [
        (None, Asked("SIGTERM on rank 1"), Asked("SIGTERM on rank 1")),
        (None, Asked("notice on rank 1", 100.0), Asked("notice on rank 1", 95.0)),
        (("SIGTERM", None, False), Asked("notice on rank 1", 100.0), Asked("SIGTERM", 95.0)),
        (("SIGINT", None, True), Asked("SIGTERM on rank 1"), Asked("SIGTERM on rank 1")),
        (("SIGINT", None, True), Asked("SIGINT on rank 1", None, True), Asked("SIGINT", None, True)),
        (("notice", 40.0, False), Asked("notice on rank 1", 100.0), Asked("notice", 38.0)),
    ],
    ids=repr,
)
def test_what_others_were_asked(tmp_path: Path, mine: Any, others: Asked, told: Asked) -> None:
    """All processes of a training leave for the same cause, and none has more time than the others."""
    watch = PreemptionWatch(None, Run(tmp_path), Clock())
    if mine is not None:
        reason, in_seconds, interrupt = mine
        watch._flag.put_up(reason, in_seconds=in_seconds, interrupt=interrupt)
    watch.adopt(others)
    assert watch.asked() == told


def test_what_was_asked_is_not_asked_twice(tmp_path: Path) -> None:
    """Hearing of one's own request takes nothing off the time."""
    clock = Clock()
    watch = PreemptionWatch(None, Run(tmp_path), clock)
    watch._flag.put_up("notice", in_seconds=100.0)
    asked = watch.asked()
    assert asked is not None
    clock.now_s = 1.0
    watch.adopt(asked)
    assert watch.asked() == Asked("notice", 94.0)
