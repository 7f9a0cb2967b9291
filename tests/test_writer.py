"""Saves under way: one at a time, in the background, and nothing about them gets lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast import Checkpoint, Run, SaveHandle
from holdfast.errors import SaveTimeoutError, StorageError
from holdfast.handle import SaveReport
from holdfast.part import About
from holdfast.state.capture import CapturedEntry, capture
from holdfast.state.unchanged import Unchanged
from holdfast.storage import memory
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending
from holdfast.writer import Writer

WAIT_S = 60.0


class Gate:
    """Holds every save back before it writes its files, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.failure: Exception | None = None
        write_files = LocalPending.write_files

        def held(pending: LocalPending, images: Any) -> Any:
            self.reached.set()
            assert self.open.wait(WAIT_S)
            if self.failure is not None:
                raise self.failure
            return write_files(pending, images)

        monkeypatch.setattr(LocalPending, "write_files", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A closed gate; it opens at the end of the test in any case."""
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@pytest.fixture(params=[True, False], ids=["background", "blocking"])
def background(request: pytest.FixtureRequest) -> bool:
    """Both kinds of writer."""
    return bool(request.param)


def nothing(checkpoint: Checkpoint) -> None:
    """Nothing follows a commit."""


def capturing(state: dict[str, Any]) -> Callable[[], dict[str, CapturedEntry]]:
    """What a writer is given."""
    return lambda: capture(state)


def test_a_save_that_succeeds(tmp_path: Path, background: bool) -> None:
    """When it has ended it is committed, and what follows a commit is done."""
    run = Run(tmp_path)
    committed: list[Checkpoint] = []
    writer = Writer(run, committed.append, background=background)
    handle = writer.save(capturing({"w": torch.ones(2)}), About(step=3))
    writer.drain()
    writer.check()
    assert (handle.done(), handle.failed(), handle.step) == (True, False, 3)
    assert handle.result().path == run[3].path
    assert [checkpoint.path for checkpoint in committed] == [run[3].path]


def test_a_save_that_fails(tmp_path: Path, gate: Gate, background: bool) -> None:
    """The failure is raised once by check, each time by the handle; nothing that follows a commit is done or left."""
    committed: list[Checkpoint] = []
    writer = Writer(Run(tmp_path), committed.append, background=background)
    gate.failure = StorageError("no")
    gate.open.set()
    handle = writer.save(capturing({"w": torch.ones(1)}), About(step=3))
    writer.drain()
    assert (handle.done(), handle.failed()) == (True, True)
    for ask in (handle.result, handle.report, writer.check):
        with pytest.raises(StorageError, match="no"):
            ask()
    writer.check()
    assert (committed, list(tmp_path.iterdir())) == ([], [])


def test_a_save_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    """What the file system refuses at the call is a failure like any other."""

    def fail(store: LocalStore, step: int) -> None:
        raise StorageError("no")

    monkeypatch.setattr(LocalStore, "create", fail)
    writer = Writer(Run(tmp_path), nothing, background=background)
    handle = writer.save(capturing({"w": 1}), About(step=3))
    assert handle.failed()
    with pytest.raises(StorageError, match="no"):
        writer.check()


def test_a_failure_after_the_commit(tmp_path: Path, background: bool) -> None:
    """The checkpoint is safe, so its handle says so; that the rest failed is raised by check."""

    def fail(checkpoint: Checkpoint) -> None:
        raise StorageError("retention")

    run = Run(tmp_path)
    writer = Writer(run, fail, background=background)
    handle = writer.save(capturing({"w": 1}), About(step=3))
    assert handle.result(WAIT_S).step == 3
    writer.drain()
    with pytest.raises(StorageError, match="retention"):
        writer.check()
    assert run[3].step == 3


def test_the_call_returns_before_anything_is_written(tmp_path: Path, gate: Gate) -> None:
    """And what is done to the state afterwards, by whatever means, does not reach the checkpoint."""
    tensor, array, plain = torch.zeros(1000), torch.zeros(5).numpy(), [1, 2]
    writer = Writer(Run(tmp_path), nothing)
    handle = writer.save(capturing({"t": tensor, "a": array, "plain": plain}), About(step=1))
    assert (handle.done(), writer.busy()) == (False, True)
    tensor.data.fill_(1)
    tensor.numpy()[5:] = 2
    array[:] = 3
    plain.append(3)
    gate.open.set()
    loaded = holdfast.load(handle.result(WAIT_S).path)
    assert (loaded["t"].unique().tolist(), loaded["a"].tolist(), loaded["plain"]) == ([0.0], [0.0] * 5, [1, 2])


def test_one_at_a_time(tmp_path: Path, gate: Gate) -> None:
    """The next save waits for the one before, whose memory it uses, and captures the state only then."""
    writer = Writer(Run(tmp_path), nothing)
    first = writer.save(capturing({"w": torch.ones(3)}), About(step=1))
    ended: list[bool] = []
    opener = threading.Thread(target=lambda: (gate.reached.wait(WAIT_S), gate.open.set()))
    opener.start()

    def capture_second() -> dict[str, CapturedEntry]:
        ended.append(first.done())
        return capture({"w": torch.zeros(3)})

    second = writer.save(capture_second, About(step=2))
    opener.join()
    assert ended == [True]
    assert holdfast.load(first.result(WAIT_S).path)["w"].tolist() == [1, 1, 1]
    assert holdfast.load(second.result(WAIT_S).path)["w"].tolist() == [0, 0, 0]


def test_waiting_for_a_save(tmp_path: Path, gate: Gate) -> None:
    """One that does not end in time is still under way, and ends when it can."""
    writer = Writer(Run(tmp_path), nothing)
    handle = writer.save(capturing({"w": torch.ones(1)}), About(step=1))
    with pytest.raises(TimeoutError):
        handle.result(timeout=0)
    with pytest.raises(SaveTimeoutError, match=r"still being written after 0\.01 s"):
        writer.drain(0.01)
    gate.open.set()
    writer.drain(WAIT_S)
    assert handle.result().step == 1


def test_without_memory_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once, and saves from where the tensors are."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    writer = Writer(Run(tmp_path), nothing)
    handles = [writer.save(capturing({"w": torch.full((3,), float(step))}), About(step=step)) for step in (1, 2)]
    assert [handle.done() for handle in handles] == [True, True]
    assert [handle.report().mode for handle in handles] == ["blocking", "blocking"]
    assert [holdfast.load(handle.result().path)["w"].tolist() for handle in handles] == [[1.0] * 3, [2.0] * 3]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "saves block until they are durable" in told[0]


def test_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, the save ends at the call."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    handle = Writer(Run(tmp_path), nothing).save(capturing({"w": torch.ones(1)}), About(step=1))
    assert handle.done()
    assert handle.result().step == 1


def test_memory_made_ahead(tmp_path: Path) -> None:
    """Warming up makes the memory that the first save needs, and no save waits for another making of it."""
    writer = Writer(Run(tmp_path), nothing)
    writer.warm_up(21 * 2**20)
    writer.drain()
    assert writer._arena is not None
    made = writer._arena.nbytes
    writer.save(capturing({"w": torch.ones(5 * 2**20)}), About(step=1)).result(WAIT_S)
    assert (writer._arena.nbytes, made >= 21 * 2**20) == (made, True)
    writer.drain()
    writer.close()
    assert writer._arena.nbytes == 0


# -------------------------------------------------------------------------------------------------------------- costs


def test_what_a_save_cost(tmp_path: Path, background: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The report, the line in the log and the line in events.jsonl say the same."""
    caplog.set_level(logging.INFO, "holdfast")
    run = Run(tmp_path)
    writer = Writer(run, nothing, background=background)
    handle = writer.save(capturing({"w": torch.ones(1000)}), About(step=7, reason="because"))
    report = handle.report(WAIT_S)
    writer.drain()
    mode = "background" if background else "blocking"
    assert (report.step, report.mode, report.bytes_linked) == (7, mode, 0)
    manifest = (tmp_path / "step-000000000007" / "manifest.json").stat().st_size
    assert report.bytes_written == handle.result().nbytes + manifest
    assert (report.stage_s > 0) == background
    assert min(report.stall_s, report.capture_s, report.plan_s, report.write_s, report.commit_s) > 0
    assert report.bandwidth == report.bytes_written / report.write_s
    (event,) = run.events()
    assert {
        key: event[key] for key in ("event", "checkpoint", "reason", "step", "mode", "write_s", "bytes_written")
    } == {
        "event": "save",
        "checkpoint": "step-000000000007",
        "reason": "because",
        "step": 7,
        "mode": mode,
        "write_s": report.write_s,
        "bytes_written": report.bytes_written,
    }
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"saved {handle.result().path}: step 7, epoch 0 (because): ")
    assert f"{mode}: training stood still for" in line


def test_a_report_in_words() -> None:
    """One line; what was linked only where something was."""
    report = SaveReport(
        step=1,
        mode="background",
        stall_s=0.0123,
        waited_s=0.0,
        capture_s=0.002,
        plan_s=0.001,
        stage_s=0.01,
        write_s=0.5,
        commit_s=0.004,
        bytes_written=1_000_000,
        bytes_linked=0,
    )
    assert str(report) == (
        "1.0 MB written at 2 MB/s; background: training stood still for 12.3 ms; "
        "staging 0.010 s, writing 0.500 s, commit 0.004 s"
    )


def test_a_log_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No save fails for that: it is told, and the checkpoint is there."""
    (tmp_path / "events.jsonl").mkdir()
    writer = Writer(Run(tmp_path), nothing)
    assert writer.save(capturing({"w": torch.ones(1)}), About(step=1)).result(WAIT_S).step == 1
    writer.drain()
    writer.check()
    assert "events.jsonl" in caplog.text


def test_a_torn_log(tmp_path: Path) -> None:
    """Lines that are no events are left out, and so is one without an end."""
    assert Run(tmp_path).events() == []
    (tmp_path / "events.jsonl").write_text('{"event": "save"}\nnot json\n{"event": "sa')
    assert Run(tmp_path).events() == [{"event": "save"}]


def test_linked_bytes_are_told_apart(tmp_path: Path) -> None:
    """What had not changed is not counted as written."""
    writer = Writer(Run(tmp_path), nothing, unchanged=Unchanged())
    state = {"still": torch.ones(2**19), "moving": torch.ones(10)}
    for step in (1, 2, 3):
        state["moving"].add_(1)
        handle = writer.save(capturing(state), About(step=step))
        handle.result(WAIT_S)
    report = handle.report()
    assert report.bytes_linked == handle.result().files["still.safetensors"].bytes
    assert report.bytes_written < 20_000
    assert "MB linked" in str(report)


def test_a_handle_of_its_own() -> None:
    """A handle knows nothing but its future."""
    from concurrent.futures import Future

    future: Future[Checkpoint] = Future()
    handle = SaveHandle(5, future, lambda: pytest.fail("there is no report"))
    assert (handle.step, handle.done(), handle.failed()) == (5, False, False)
    with pytest.raises(TimeoutError):
        handle.report(timeout=0)
