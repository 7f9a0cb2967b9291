"""The training loop's side."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import Checkpointer, Every, KeepBest, KeepEvery, KeepLast, Run
from holdfast.errors import (
    MissingMetricError,
    RunBusyError,
    SaveTimeoutError,
    StateMismatchError,
    StorageError,
    UnsupportedValueError,
    UsageError,
)
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending

STEPS_PER_EPOCH = 5


class Training:
    """A small training with dropout, whose every number depends on every number before."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.losses: list[float] = []
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "losses": self.losses,
        }

    def step(self) -> None:
        """One optimizer step on random numbers."""
        self.optimizer.zero_grad()
        loss = self.model(torch.rand(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def run(self, ckpt: Checkpointer, epochs: int, stop_after: int | None = None) -> None:
        """The loop, within an epoch too; ``stop_after`` so many steps an exception leaves it."""
        done = 0
        for epoch in range(ckpt.epoch, epochs):
            while ckpt.global_step < (epoch + 1) * STEPS_PER_EPOCH:
                if done == stop_after:
                    raise StoppedError
                self.step()
                done += 1
                ckpt.step()
            self.scheduler.step()
            ckpt.end_epoch({"loss": self.losses[-1]})

    def values(self) -> Any:
        """Everything, as plain numbers."""
        return (
            {name: tensor.tolist() for name, tensor in self.model.state_dict().items()},
            str(self.optimizer.state_dict()),
            str(self.scheduler.state_dict()),
            self.losses,
            torch.get_rng_state().tolist(),
        )


class StoppedError(Exception):
    """Stands for a machine that is taken away."""


def steps(path: Path) -> list[int]:
    """The steps that a run has."""
    return [checkpoint.step for checkpoint in Run(path)]


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5, 6, 13])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, stop_after: int) -> None:
    """StoppedError after any number of steps, again and again, bit for bit."""
    whole = Training()
    with Checkpointer(tmp_path / "whole", whole.state) as ckpt:
        whole.run(ckpt, 4)
    expected = whole.values()
    for attempt in range(30):
        part = Training()
        if steps(tmp_path / "part"):
            torch.rand(attempt)  # another process has drawn other numbers; the saved ones come back
        try:
            with Checkpointer(tmp_path / "part", part.state, save=Every(steps=2) | Every(epochs=1)) as ckpt:
                part.run(ckpt, 4, stop_after=stop_after + attempt)
        except StoppedError:
            continue
        break
    assert part.values() == expected
    assert ckpt.global_step == 4 * STEPS_PER_EPOCH


def test_saving_never_changes_training(tmp_path: Path) -> None:
    """With a save at every step, the numbers are those of a training without any."""
    plain = Training()
    for _ in range(3):
        for _ in range(STEPS_PER_EPOCH):
            plain.step()
        plain.scheduler.step()
    expected = plain.values()
    saved = Training()
    with Checkpointer(tmp_path / "run", saved.state, save=Every(steps=1), keep=KeepLast(100)) as ckpt:
        saved.run(ckpt, 3)
    assert saved.values() == expected
    assert len(steps(tmp_path / "run")) == 3 * STEPS_PER_EPOCH + 1  # and one at the end, of the last epoch's end


# ------------------------------------------------------------------------------------------------------------ counting


def test_where_it_is(tmp_path: Path) -> None:
    """Steps and epochs are counted over all processes; the checkpoints know both."""
    training = Training()
    with Checkpointer(tmp_path, training.state, save=Every(epochs=1)) as ckpt:
        assert (ckpt.epoch, ckpt.global_step, ckpt.resumed_from) == (0, 0, None)
        training.run(ckpt, 2)
        assert (ckpt.epoch, ckpt.global_step) == (2, 10)
    assert [(c.step, c.epoch, c.reason) for c in Run(tmp_path)] == [(5, 1, "every epoch"), (10, 2, "every epoch")]
    again = Training()
    with Checkpointer(tmp_path, again.state, save=Every(epochs=1)) as ckpt:
        assert (ckpt.epoch, ckpt.global_step) == (2, 10)
        assert ckpt.resumed_from is not None
        assert ckpt.resumed_from.step == 10
        assert ckpt.report is not None
        assert ckpt.report.restored > 0


def test_what_is_not_saved_yet_is_saved_at_the_end(tmp_path: Path) -> None:
    """Leaving the block normally saves; nothing is saved twice."""
    training = Training()
    with Checkpointer(tmp_path, training.state, save=Every(epochs=10)) as ckpt:
        training.run(ckpt, 2)
    assert [(c.step, c.reason, c.metrics) for c in Run(tmp_path)] == [
        (10, "end of training", {"loss": training.losses[-1]})
    ]
    with Checkpointer(tmp_path, Training().state, save=Every(epochs=10)):
        pass
    assert len(list(Run(tmp_path))) == 1


def test_an_exception_saves_nothing(tmp_path: Path) -> None:
    """The state may be in the middle of a step; the exception passes through."""
    training = Training()
    with pytest.raises(StoppedError), Checkpointer(tmp_path, training.state, save=Every(steps=3)) as ckpt:
        training.run(ckpt, 2, stop_after=5)
    assert steps(tmp_path) == [3]


def test_two_policies_due_at_one_step(tmp_path: Path) -> None:
    """The end of an epoch at a step that was just saved makes a generation, and resuming takes the later state."""
    training = Training()
    with Checkpointer(tmp_path, training.state, save=Every(steps=5) | Every(epochs=1), keep=KeepLast(9)) as ckpt:
        training.run(ckpt, 2)
    found = [(c.step, c.generation, c.epoch, c.metrics) for c in Run(tmp_path)]
    first, second = training.losses[4], training.losses[9]
    assert found == [(5, 1, 0, {}), (5, 2, 1, {"loss": first}), (10, 1, 1, {}), (10, 2, 2, {"loss": second})]
    again = Training()
    with Checkpointer(tmp_path, again.state) as ckpt:
        assert ckpt.epoch == 2
        assert again.values() == training.values()


def test_a_save_when_asked(tmp_path: Path) -> None:
    """Whatever the policy says; the handle gives the checkpoint."""
    training = Training()
    with Checkpointer(tmp_path, training.state) as ckpt:
        training.step()
        assert ckpt.step() is None
        handle = ckpt.save({"loss": 0.5}, reason="before the risky part")
        checkpoint = handle.result(timeout=60)
        assert (checkpoint.step, checkpoint.metrics, checkpoint.reason) == (1, {"loss": 0.5}, "before the risky part")
        assert handle.done()
    assert steps(tmp_path) == [1]


def test_steps_return_their_save(tmp_path: Path) -> None:
    """``step`` and ``end_epoch`` return the save they began, if any."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=2) | Every(epochs=1)) as ckpt:
        handles = [ckpt.step(), ckpt.step(), ckpt.end_epoch()]
        assert [None if handle is None else handle.result().name for handle in handles] == [
            None,
            "step-000000000002",
            "step-000000000002.g2",
        ]


# ------------------------------------------------------------------------------------------------------------- lineage


def test_lineage(tmp_path: Path) -> None:
    """Checkpoints of one run share its id; each names the one that its process had resumed from."""
    ids = []
    for epochs in (1, 2, 3):
        training = Training()
        with Checkpointer(tmp_path, training.state, save=Every(epochs=1), keep=KeepLast(9)) as ckpt:
            training.run(ckpt, epochs)
        ids.append(Run(tmp_path).latest().checkpoint_id)
    found = list(Run(tmp_path))
    assert [c.parent for c in found] == [None, ids[0], ids[1]]
    assert len({c.run_id for c in found}) == 1


# ----------------------------------------------------------------------------------------------------------- retention


def test_keeping_the_last_and_the_best(tmp_path: Path) -> None:
    """A worse value after a resume does not replace the best, which stays however old it is."""
    losses = [5.0, 1.0, 4.0, 3.0, float("nan"), 2.0, 1.0]
    for epochs in (2, 5, 7):  # three processes
        with Checkpointer(tmp_path, {"x": 1}, save=Every(epochs=1), keep=KeepLast(2) | KeepBest("loss", "min")) as ckpt:
            for epoch in range(ckpt.epoch, epochs):
                ckpt.step()
                ckpt.end_epoch({"loss": losses[epoch]})
    assert steps(tmp_path) == [2, 6, 7]
    assert Run(tmp_path).best("loss", "min").step == 2


def test_a_missing_metric(tmp_path: Path) -> None:
    """Policy and metric are named, and the epoch does not count."""
    keep = KeepLast(1) | KeepBest("val_loss", "min")
    with Checkpointer(tmp_path, {"x": 1}, save=Every(epochs=1), keep=keep) as ckpt:
        ckpt.step()
        with pytest.raises(MissingMetricError) as caught:
            ckpt.end_epoch({"loss": 0.5})
        assert caught.value.key == "val_loss"
        assert "KeepBest(metric='val_loss'" in str(caught.value)
        assert "'val_loss'" in str(caught.value)
        assert "the metrics given are: loss" in str(caught.value)
        assert ckpt.epoch == 0
        ckpt.end_epoch({"val_loss": 0.5})
    assert Run(tmp_path).best("val_loss", "min").epoch == 1


def test_metrics_belong_to_their_step(tmp_path: Path) -> None:
    """A save after the next step has none, so it is no candidate for the best."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(epochs=1) | Every(steps=3), keep=KeepLast(9)) as ckpt:
        for _ in range(2):
            ckpt.step()
            ckpt.step()
            ckpt.end_epoch({"loss": 1.0})
    assert [(c.step, c.metrics) for c in Run(tmp_path)] == [(2, {"loss": 1.0}), (3, {}), (4, {"loss": 1.0})]


def test_metrics_for_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    """An epoch that ends at a step just saved gives its metrics to that checkpoint, which may be the best then."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=2), keep=KeepLast(1) | KeepBest("loss", "min")) as ckpt:
        for loss in (0.1, 0.5, 0.4):
            ckpt.step()
            ckpt.step()
            ckpt.end_epoch({"loss": loss})
    assert [(c.step, c.metrics) for c in Run(tmp_path)] == [(2, {"loss": 0.1}), (6, {"loss": 0.4})]


def test_metrics_that_nothing_can_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A best that can never be chosen is told once, with the way out."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=100), keep=KeepBest("loss", "min")) as ckpt:
        for _ in range(2):
            ckpt.step()
            ckpt.end_epoch({"loss": 1.0})
    told = [record.getMessage() for record in caplog.records if "cannot choose" in record.getMessage()]
    assert len(told) == 1
    assert "Add Every(epochs=1) to save=" in told[0]


def test_what_was_saved_is_not_removed_at_once(tmp_path: Path) -> None:
    """A policy that does not keep the newest cannot remove what was just saved."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1), keep=KeepEvery(steps=10)) as ckpt:
        for _ in range(12):
            ckpt.step()
    assert steps(tmp_path) == [10, 12]


# ------------------------------------------------------------------------------------------------------------ messages


def test_one_line_on_resume_and_on_each_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a person wants to know, through logging: where, step, epoch, size, time, why."""
    caplog.set_level(logging.INFO, "holdfast")
    for epochs in (1, 2):
        training = Training()
        with Checkpointer(tmp_path / "run", training.state, save=Every(epochs=1)) as ckpt:
            training.run(ckpt, epochs)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    path = tmp_path / "run"
    assert [message.partition("): ")[0] for message in messages] == [
        f"starting a new run in {path}",
        f"saved {path}/step-000000000005: step 5, epoch 1 (every epoch",
        f"resumed {path}/step-000000000005: step 5, epoch 1",
        f"saved {path}/step-000000000010: step 10, epoch 2 (every epoch",
    ]
    assert "training stood still for" in messages[1]


def test_resuming_within_an_epoch_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the position in the data may be lost, the message says what that means."""
    caplog.set_level(logging.INFO, "holdfast")
    with Checkpointer(tmp_path, {"x": 1}) as ckpt:
        ckpt.step()
        ckpt.step()
    with Checkpointer(tmp_path, {"x": 1}):
        pass
    assert "step 2, epoch 0, 2 steps into it" in caplog.text


# --------------------------------------------------------------------------------------------------------- what fails


def test_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails at the call is raised there; what was durable stays; training goes on, and the next save succeeds."""
    create = LocalStore.create
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1), keep=KeepLast(1)) as ckpt:
        ckpt.step()

        def fail(store: LocalStore, step: int) -> Any:
            raise StorageError("no space")

        monkeypatch.setattr(LocalStore, "create", fail)
        with pytest.raises(StorageError, match="no space"):
            ckpt.step()
        assert steps(tmp_path) == [1]
        monkeypatch.setattr(LocalStore, "create", create)
        ckpt.step()
    assert (ckpt.global_step, steps(tmp_path)) == (3, [3])


def test_a_failed_save_is_made_up_for_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be saved is still unsaved, and saved on leaving."""
    create = LocalStore.create

    def fail(store: LocalStore, step: int) -> Any:
        raise StorageError("no space")

    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1)) as ckpt:
        monkeypatch.setattr(LocalStore, "create", fail)
        with pytest.raises(StorageError):
            ckpt.step()
        monkeypatch.setattr(LocalStore, "create", create)
    assert [(c.step, c.reason) for c in Run(tmp_path)] == [(1, "end of training")]


def test_a_failure_at_the_end_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last save fails: the block raises, and the run is released."""

    def fail(store: LocalStore, step: int) -> Any:
        raise StorageError("no space")

    monkeypatch.setattr(LocalStore, "create", fail)
    with pytest.raises(StorageError, match="no space"), Checkpointer(tmp_path, {"x": 1}) as ckpt:
        ckpt.step()
    monkeypatch.undo()
    with Checkpointer(tmp_path, {"x": 1}):
        pass


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """The first save names the value; nothing is written."""
    with (
        pytest.raises(UnsupportedValueError, match=r"config\.f"),
        Checkpointer(tmp_path, {"config": {"f": print}}, save=Every(steps=1)) as ckpt,
    ):
        ckpt.step()
    assert steps(tmp_path) == []


def test_another_model(tmp_path: Path) -> None:
    """A checkpoint that does not fit stops on entry: it does not start anew over it, and nothing is touched."""
    with Checkpointer(tmp_path, {"model": nn.Linear(1, 1)}) as ckpt:
        ckpt.step()
    model = nn.Linear(1, 2)
    before = model.weight.tolist()
    with pytest.raises(StateMismatchError, match="weight: live"), Checkpointer(tmp_path, {"model": model}):
        pytest.fail("entered")
    assert model.weight.tolist() == before
    assert steps(tmp_path) == [1]


# ------------------------------------------------------------------------------------------------- in the background


class Disk:
    """A disk that stops, and answers again when it is told to; it may fail too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stopped = threading.Event()
        self.answers = threading.Event()
        self.failure: Exception | None = None
        write_files = LocalPending.write_files

        def write(pending: LocalPending, images: Any) -> Any:
            self.stopped.set()
            assert self.answers.wait(60)
            if self.failure is not None:
                raise self.failure
            return write_files(pending, images)

        monkeypatch.setattr(LocalPending, "write_files", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk that has stopped; it answers at the end of the test in any case."""
    made = Disk(monkeypatch)
    yield made
    made.answers.set()


def test_training_goes_on_while_the_disk_does_not(tmp_path: Path, disk: Disk) -> None:
    """A save holds what was there at its call; the steps after it do not wait."""
    state = {"w": torch.zeros(3)}
    with Checkpointer(tmp_path, state, save=Every(steps=100), keep=KeepLast(9)) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        for _ in range(5):
            state["w"].add_(1)
            ckpt.step()
        assert not handle.done()
        disk.answers.set()
    assert [(c.step, c.read("w/w").tolist()) for c in Run(tmp_path)] == [(1, [0.0] * 3), (6, [5.0] * 3)]


def fail_in_the_background(ckpt: Checkpointer, disk: Disk) -> None:
    """Have a save fail after its call has returned."""
    disk.failure = StorageError("the disk is gone")
    ckpt.step()
    handle = ckpt.save()
    disk.answers.set()
    with pytest.raises(StorageError, match="the disk is gone"):
        handle.result(60)
    disk.failure = None


@pytest.mark.parametrize("call", ["step", "end_epoch", "save"])
def test_a_background_failure_is_raised_at_the_next_call(tmp_path: Path, disk: Disk, call: str) -> None:
    """Once; and what it did not save is saved at the end."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=100)) as ckpt:
        fail_in_the_background(ckpt, disk)
        with pytest.raises(StorageError, match="the disk is gone"):
            getattr(ckpt, call)()
        assert steps(tmp_path) == []
    assert steps(tmp_path) == [ckpt.global_step]


def test_a_background_failure_is_raised_at_the_end(tmp_path: Path, disk: Disk) -> None:
    """The block cannot end as if all were well."""
    disk.failure = StorageError("the disk is gone")
    disk.answers.set()
    with (
        pytest.raises(StorageError, match="the disk is gone"),
        Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1)) as ckpt,
    ):
        ckpt.step()


def test_an_exception_is_not_hidden_by_a_failed_save(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """What leaves the block is the training's own exception; the failure is logged."""

    def train() -> None:
        with Checkpointer(tmp_path, {"x": 1}) as ckpt:
            fail_in_the_background(ckpt, disk)
            raise StoppedError

    with pytest.raises(StoppedError):
        train()
    assert "the disk is gone" in caplog.text


def test_an_exception_leaves_the_save_under_way_to_end(tmp_path: Path, disk: Disk) -> None:
    """It was whole when it was copied."""

    def train() -> None:
        with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1)) as ckpt:
            ckpt.step()
            disk.answers.set()
            raise StoppedError

    with pytest.raises(StoppedError):
        train()
    assert steps(tmp_path) == [1]


def test_a_disk_that_never_answers(tmp_path: Path, disk: Disk) -> None:
    """The end waits for it as long as it was told to, and then says so."""
    with pytest.raises(SaveTimeoutError), Checkpointer(tmp_path, {"x": 1}, drain_s=0.01) as ckpt:
        ckpt.step()


def test_saves_that_are_skipped(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for, a save that is due while one is under way is left out and counted; one that is asked for waits."""
    caplog.set_level(logging.INFO, "holdfast")
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1), keep=KeepLast(9), when_busy="skip") as ckpt:
        assert ckpt.step() is not None
        assert disk.stopped.wait(60)
        assert [ckpt.step(), ckpt.step(), ckpt.skipped] == [None, None, 2]
        disk.answers.set()
        assert ckpt.save().result(60).step == 3
    assert steps(tmp_path) == [1, 3]
    assert "no save at step 3, since one is under way (2 skipped so far)" in caplog.text


def test_saves_that_wait(tmp_path: Path, disk: Disk) -> None:
    """By default none is left out."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1), keep=KeepLast(9)) as ckpt:
        ckpt.step()
        opener = threading.Thread(target=lambda: (disk.stopped.wait(60), disk.answers.set()))
        opener.start()
        ckpt.step()
        opener.join()
    assert (steps(tmp_path), ckpt.skipped) == ([1, 2], 0)


def test_late_metrics_wait_for_their_checkpoint(tmp_path: Path, disk: Disk) -> None:
    """Metrics of a step whose save is under way belong to that checkpoint."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=2), keep=KeepLast(1) | KeepBest("loss", "min")) as ckpt:
        ckpt.step()
        ckpt.step()
        opener = threading.Thread(target=lambda: (disk.stopped.wait(60), disk.answers.set()))
        opener.start()
        ckpt.end_epoch({"loss": 0.5})
        opener.join()
        assert [(c.step, c.metrics) for c in Run(tmp_path)] == [(2, {"loss": 0.5})]


def test_a_fork_during_a_save(tmp_path: Path, disk: Disk, in_a_fork: Callable[..., int]) -> None:
    """A child, such as a loader's worker, cannot save, never hangs, and leaves the run to its parent."""

    def child() -> None:
        for call in (ckpt.step, ckpt.end_epoch, ckpt.save):
            with pytest.raises(UsageError, match="was forked from the one that writes the run"):
                call()
        assert ckpt.__exit__(None, None, None) is False

    with Checkpointer(tmp_path, {"w": torch.ones(3)}, save=Every(steps=1)) as ckpt:
        ckpt.step()
        assert disk.stopped.wait(60)
        assert in_a_fork(child) == 0
        with pytest.raises(RunBusyError), Checkpointer(tmp_path, {"x": 1}):
            pytest.fail("the child let go of the run")
        disk.answers.set()
    assert steps(tmp_path) == [1]


def test_a_loader_with_workers(tmp_path: Path) -> None:
    """Workers forked while saves are written neither disturb them nor save themselves."""
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    with Checkpointer(tmp_path, {"w": torch.ones(3)}, save=Every(steps=1), keep=KeepLast(99)) as ckpt:
        for _ in range(2):
            for _ in torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork"):
                ckpt.step()
            ckpt.end_epoch()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 8]


# ------------------------------------------------------------------------------------------------------ one at a time


def test_two_in_one_process(tmp_path: Path) -> None:
    """The second is refused with the way out; the first goes on; after it the run is free."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1)) as ckpt:
        with pytest.raises(RunBusyError), Checkpointer(tmp_path, {"x": 1}):
            pytest.fail("entered")
        ckpt.step()
    with Checkpointer(tmp_path, {"x": 1}) as ckpt:
        assert ckpt.global_step == 1


def test_two_processes(tmp_path: Path) -> None:
    """Another process is refused too, and what the first saved is untouched."""
    script = f"""
import holdfast
try:
    with holdfast.Checkpointer({str(tmp_path)!r}, {{"x": 2}}) as ckpt:
        ckpt.step()
except holdfast.errors.RunBusyError as error:
    print(error)
"""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1)) as ckpt:
        ckpt.save().result()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout
    assert holdfast.load(Run(tmp_path)[0].path) == {"x": 1}


# ------------------------------------------------------------------------------------------------------------- misuse


def test_outside_its_block(tmp_path: Path) -> None:
    """Every call outside says how to use it."""
    ckpt = Checkpointer(tmp_path, {"x": 1})
    for call in (ckpt.step, ckpt.end_epoch, ckpt.save):
        with pytest.raises(UsageError, match="inside its block"):
            call()
    with ckpt, pytest.raises(UsageError, match="in use already"):
        ckpt.__enter__()
    with pytest.raises(UsageError, match="inside its block"):
        ckpt.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": KeepLast(1)}, "save=: expected a save policy"),
        ({"save": 5}, "save=: expected a save policy"),
        ({"keep": Every(steps=1)}, "keep=: expected a retention policy"),
        ({"keep": 3}, "keep=: expected a retention policy such as KeepLast.3., found 3"),
        ({"overlap": True, "background": False}, "overlap=True: only saves in the background overlap"),
        ({"when_busy": "drop"}, "when_busy=: expected 'wait' or 'skip', found 'drop'"),
        ({"drain_s": 0}, "drain_s=: expected a positive number of seconds, found 0"),
    ],
)
def test_options_that_cannot_mean_anything(tmp_path: Path, options: Any, message: str) -> None:
    """Refused where it is constructed."""
    with pytest.raises(UsageError, match=message):
        Checkpointer(tmp_path, {"x": 1}, **options)


@pytest.mark.parametrize("metrics", [{"loss": "low", 3: 1}, {"loss": [1, 2]}, {"loss": torch.ones(2)}])
def test_bad_metrics(tmp_path: Path, metrics: Any) -> None:
    """They are refused by name, and neither epoch nor block is lost."""
    with Checkpointer(tmp_path, {"x": 1}, save=Every(epochs=1)) as ckpt:
        with pytest.raises(UsageError, match="metrics"):
            ckpt.end_epoch(metrics)
        assert ckpt.epoch == 0
        ckpt.end_epoch({"loss": torch.tensor(0.5)})
    assert Run(tmp_path).latest().metrics == {"loss": 0.5}


def test_user_policies(tmp_path: Path) -> None:
    """A class with ``due``, and one with ``keep``, are policies."""

    class Odd:
        def due(self, moment: Any) -> str | None:
            return "odd" if moment.event == "step" and moment.step % 2 else None

    class Third:
        def keep(self, checkpoints: Any) -> dict[str, str]:
            return {c.name: "third" for c in checkpoints if c.step % 3 == 0}

    with Checkpointer(tmp_path, {"x": 1}, save=Odd(), keep=Third() | KeepLast(1)) as ckpt:
        for _ in range(8):
            ckpt.step()
    assert [(c.step, c.reason) for c in Run(tmp_path)] == [(3, "odd"), (8, "end of training")]
