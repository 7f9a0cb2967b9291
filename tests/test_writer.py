"""Saves under way."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from holdfast import Checkpoint, Run, SaveHandle
from holdfast.errors import StorageError
from holdfast.saving import About
from holdfast.state.capture import capture
from holdfast.storage.local import LocalStore
from holdfast.writer import BlockingWriter


def test_a_save_that_succeeds(tmp_path: Path) -> None:
    """It is committed when submit returns, and what follows a commit is done."""
    run = Run(tmp_path)
    committed: list[Checkpoint] = []
    writer = BlockingWriter(run, committed.append)
    handle = writer.submit(capture({"w": torch.ones(2)}), About(step=3))
    assert handle.done()
    assert handle.result().path == run[3].path
    assert [checkpoint.path for checkpoint in committed] == [run[3].path]
    writer.drain()
    writer.check()


def test_a_save_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is raised once by check, each time by the handle, and nothing that follows a commit is done."""
    committed: list[Checkpoint] = []
    writer = BlockingWriter(Run(tmp_path), committed.append)

    def fail(store: LocalStore, step: int) -> None:
        raise StorageError("no")

    monkeypatch.setattr(LocalStore, "create", fail)
    handle = writer.submit(capture({"w": 1}), About(step=3))
    assert handle.done()
    for _ in range(2):
        with pytest.raises(StorageError, match="no"):
            handle.result()
    with pytest.raises(StorageError, match="no"):
        writer.check()
    writer.check()
    assert committed == []


def test_a_failure_after_the_commit(tmp_path: Path) -> None:
    """The checkpoint is safe, so its handle says so; that the rest failed is raised by check."""

    def fail(checkpoint: Checkpoint) -> None:
        raise StorageError("retention")

    run = Run(tmp_path)
    writer = BlockingWriter(run, fail)
    handle = writer.submit(capture({"w": 1}), About(step=3))
    assert handle.result().step == 3
    with pytest.raises(StorageError, match="retention"):
        writer.check()
    assert run[3].step == 3


def test_waiting_for_a_save() -> None:
    """A save that does not end in time is still under way."""
    future: Future[Checkpoint] = Future()
    handle = SaveHandle(future)
    assert not handle.done()
    with pytest.raises(TimeoutError):
        handle.result(timeout=0)
