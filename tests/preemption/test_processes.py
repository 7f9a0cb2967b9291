"""Preemption: real signals to real processes, and what a user may say of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdfast import Preempted, Preemption, Run
from holdfast.errors import UsageError
from holdfast.notices import AwsNotice, GcpNotice

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


@dataclass
class Process:
    """One process of a run, as it looks from outside."""

    driver: subprocess.Popen[str]
    pid: int = 0
    status: int | None = None
    lines: list[str] = field(default_factory=list)

    def until(self, where: str) -> None:
        """Wait until it says ``where``."""
        while self._line() != where:
            assert self.status is None, self.lines

    def signal(self, name: str, *, group: bool = False) -> None:
        """Send it, or all of its group, a signal."""
        number = signal.Signals[name]
        if group:
            os.killpg(self.pid, number)
        else:
            os.kill(self.pid, number)

    def go_on(self) -> None:
        """Let it out of its pause."""
        assert self.driver.stdin is not None
        self.driver.stdin.write("\n")
        self.driver.stdin.flush()

    def end(self) -> int:
        """Wait for its end; its exit status, which is negative when a signal killed it."""
        while self.status is None:
            self._line()
        return self.status

    def said(self, what: str) -> list[str]:
        """The lines with ``what`` in them."""
        return [line for line in self.lines if what in line]

    def _line(self) -> str:
        assert self.driver.stdout is not None
        line = self.driver.stdout.readline()
        assert line, f"the driver ended with {self.driver.wait()}"
        if line.startswith('{"status"'):
            self.status = json.loads(line)["status"]
        self.lines.append(line.rstrip())
        return self.lines[-1]


class Trainer:
    """Starts processes, one at a time."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("preemption_driver.py")
        command = [sys.executable, str(script)]
        self._driver = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.running: Process | None = None

    def start(self, run: Path, **order: Any) -> Process:
        """A process that has begun."""
        process = self.running = Process(self._driver)
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps({"run": str(run), **order}) + "\n")
        self._driver.stdin.flush()
        while not (line := process._line()).startswith("pid "):
            pass
        process.pid = int(line.removeprefix("pid "))
        return process

    def preempt(self, run: Path, signals: Sequence[str], where: str = "in step 2", **order: Any) -> Process:
        """A process that got ``signals`` in its second step, and has ended."""
        process = self.start(run, **{"pause": [2], **order})
        process.until(where)
        for name in signals:
            process.signal(name)
        process.go_on()
        process.end()
        return process

    def close(self) -> None:
        """End the driver."""
        self._driver.communicate()


@pytest.fixture(scope="module")
def warm() -> Iterator[Trainer]:
    """A driver for all tests here."""
    made = Trainer()
    yield made
    made.close()


@pytest.fixture
def trainer(warm: Trainer) -> Iterator[Trainer]:
    """The driver; what a failed test has left running is killed."""
    yield warm
    if warm.running is not None and warm.running.status is None:
        warm.running.signal("SIGKILL", group=True)
        warm.running.end()


@pytest.fixture(scope="module")
def final(warm: Trainer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a training that nobody disturbs ends with."""
    process = warm.start(tmp_path_factory.mktemp("undisturbed") / "run")
    assert process.end() == 0
    [line] = process.said("final ")
    return line


def saved(run: Path) -> list[tuple[int, str]]:
    """Step and reason of each checkpoint."""
    return [(checkpoint.step, checkpoint.reason) for checkpoint in Run(run)]


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal(trainer: Trainer, tmp_path: Path, final: str, name: str) -> None:
    """One checkpoint, of exactly the step that it came in; exit code 75; resumed, it ends as if nothing had been."""
    assert trainer.preempt(tmp_path, [name]).status == 75
    assert saved(tmp_path) == [(2, f"preempted ({name})")]
    resumed = trainer.start(tmp_path)
    assert resumed.end() == 0
    assert resumed.said("final ") == [final]


def test_a_signal_before_the_end_of_an_epoch(trainer: Trainer, tmp_path: Path, final: str) -> None:
    """``end_epoch`` leaves too, with the epoch counted."""
    process = trainer.start(tmp_path, pause_in_epoch=1)
    process.until("in epoch 1")
    process.signal("SIGTERM")
    process.go_on()
    assert process.end() == 75
    assert [(c.step, c.epoch) for c in Run(tmp_path)] == [(3, 1)]
    resumed = trainer.start(tmp_path)
    assert (resumed.end(), resumed.said("final ")) == (0, [final])


def test_several_signals(trainer: Trainer, tmp_path: Path) -> None:
    """One save; the first reason counts."""
    assert trainer.preempt(tmp_path, ["SIGUSR1", "SIGTERM", "SIGTERM"]).status == 75
    assert len(saved(tmp_path)) == 1


def test_a_save_is_due_at_the_same_step(trainer: Trainer, tmp_path: Path) -> None:
    """There is one all the same."""
    assert trainer.preempt(tmp_path, ["SIGTERM"], every=1).status == 75
    assert saved(tmp_path) == [(1, "every step"), (2, "preempted (SIGTERM)")]


def test_an_exit_code(trainer: Trainer, tmp_path: Path) -> None:
    """The user's own."""
    assert trainer.preempt(tmp_path, ["SIGUSR1"], preemption={"exit_code": 85}).status == 85


def test_a_signal_that_is_not_listed(trainer: Trainer, tmp_path: Path) -> None:
    """It does what it always did."""
    process = trainer.preempt(tmp_path, ["SIGUSR1"], preemption={"signals": ["SIGTERM"]})
    assert process.status == -signal.SIGUSR1
    assert saved(tmp_path) == []


def test_an_interrupt(trainer: Trainer, tmp_path: Path) -> None:
    """The first Control-C saves at the next step, says so at once, and ends with the exit code that shells expect."""
    process = trainer.start(tmp_path, pause=[2])
    process.until("in step 2")
    process.signal("SIGINT")
    process.until("saving at the next step, then stopping; once more stops at once")
    process.go_on()
    assert process.end() == 130
    assert saved(tmp_path) == [(2, "preempted (SIGINT)")]


def test_two_interrupts(trainer: Trainer, tmp_path: Path) -> None:
    """The second Control-C is an ordinary one: nothing is saved."""
    process = trainer.start(tmp_path, pause=[2])
    process.until("in step 2")
    process.signal("SIGINT")
    process.until("saving at the next step, then stopping; once more stops at once")
    process.signal("SIGINT")
    assert process.end() == -signal.SIGINT
    assert process.said("KeyboardInterrupt")
    assert saved(tmp_path) == []


def test_what_comes_after_the_loop_is_not_reached(trainer: Trainer, tmp_path: Path) -> None:
    """``except Exception`` does not swallow it; ``finally`` runs."""
    process = trainer.preempt(tmp_path, ["SIGTERM"], scenario="swallowing")
    assert process.status == 75
    assert process.lines[-2] == "finally"
    assert process.said("swallowed") == process.said("final ") == []


def test_a_signal_when_the_training_is_over(trainer: Trainer, tmp_path: Path) -> None:
    """Everything is done, so it is a success: saved as at any end, exit code 0."""
    process = trainer.start(tmp_path, pause_at_end=True)
    process.until("at the end")
    process.signal("SIGTERM")
    process.go_on()
    assert process.end() == 0
    assert saved(tmp_path) == [(6, "end of training")]


def test_a_signal_in_an_evaluation(trainer: Trainer, tmp_path: Path) -> None:
    """``leave_if_preempted`` saves and leaves between two steps."""
    process = trainer.start(tmp_path, scenario="evaluating")
    process.until("evaluating")
    process.signal("SIGTERM")
    process.go_on()
    assert process.end() == 75
    assert process.said("batch") == ["batch 0", "batch 1"]
    assert saved(tmp_path) == [(1, "preempted (SIGTERM)")]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_to_loader_workers_too(trainer: Trainer, tmp_path: Path, name: str) -> None:
    """A scheduler signals all processes; those of a loader go on, and so the training reaches its next step."""
    process = trainer.start(tmp_path, scenario="loading")
    process.until("workers are at work")
    process.signal(name, group=True)
    process.go_on()
    assert process.end() == (130 if name == "SIGINT" else 75)
    assert saved(tmp_path) == [(2, f"preempted ({name})")]
    assert process.said("RuntimeError") == []


def test_loader_workers_that_get_sigterm(trainer: Trainer, tmp_path: Path) -> None:
    """They die, as torch wants it; what is said then points to the page that tells the way out."""
    process = trainer.start(tmp_path, scenario="loading")
    process.until("workers are at work")
    process.signal("SIGTERM", group=True)
    assert process.end() == 1  # torch does not wait for the next step
    [warning] = process.said("left the block before the next step could save")
    assert "preempted (SIGTERM), but RuntimeError left" in warning
    assert "the next start continues from the beginning" in warning
    assert "docs/preemption.md" in warning


# ---------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("busy", [False, True], ids=["ours hangs", "the one before hangs"])
def test_a_save_that_does_not_fit(trainer: Trainer, tmp_path: Path, busy: bool) -> None:
    """It is given up in time: the checkpoint before is named and stays, and no half one is to be seen."""
    process = trainer.start(tmp_path, scenario="hanging", busy=busy, drain_s=0.1, preemption={"grace_seconds": 1.5})
    process.until("the disk hangs")
    process.signal("SIGTERM")
    process.go_on()
    assert process.end() == 75
    first = tmp_path / "step-000000000001"
    [error] = process.said("is lost")
    assert error.endswith(f"The next start continues from {first}.")
    assert process.said("while an exception was leaving") == []  # the end of the block has not waited once more
    assert [path.name for path in tmp_path.glob("step-*")] == [first.name]
    assert list(tmp_path.glob(".tmp-*")) != []
    resumed = trainer.start(tmp_path)
    assert resumed.end() == 0
    assert Run(tmp_path).latest().step == 6
    assert list(tmp_path.glob(".tmp-*")) == []


# -------------------------------------------------------------------------------------------------------------- Slurm


@dataclass(frozen=True)
class Slurm:
    """A Slurm that does nothing but remember."""

    record: Path
    env: dict[str, str]

    def asked(self) -> list[str]:
        """The arguments of each call of ``scontrol``."""
        return self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """The first task of job 4711."""
    record, bin_dir = tmp_path / "record", tmp_path / "bin"
    bin_dir.mkdir()
    scontrol = bin_dir / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$RECORD"\necho "$COMPLAINT" >&2\nexit ${FAIL:-0}\n', encoding="utf-8")
    scontrol.chmod(0o755)
    path = f"{bin_dir}{os.pathsep}{os.environ['PATH']}"
    return Slurm(record, {"PATH": path, "RECORD": str(record), "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("signals", "procid", "requeued"),
    [
        (["SIGUSR1"], "0", ["requeue 4711"]),
        (["SIGUSR1"], "1", []),
        (["SIGINT"], "0", []),
        (["SIGINT", "SIGTERM"], "0", ["requeue 4711"]),
    ],
)
def test_requeueing(
    trainer: Trainer, tmp_path: Path, slurm: Slurm, signals: list[str], procid: str, requeued: list[str]
) -> None:
    """The first task puts the job back, and only it; a person who interrupts wants it stopped."""
    env = {**slurm.env, "SLURM_PROCID": procid}
    process = trainer.preempt(tmp_path / "run", signals, preemption={"requeue": True}, env=env)
    assert process.status == (130 if signals == ["SIGINT"] else 75)
    assert slurm.asked() == requeued
    assert len(saved(tmp_path / "run")) == 1


def test_requeueing_that_fails(trainer: Trainer, tmp_path: Path, slurm: Slurm) -> None:
    """It is said, with what Slurm said; checkpoint and exit code are as they would have been."""
    env = {**slurm.env, "FAIL": "1", "COMPLAINT": "Job is not requeueable"}
    process = trainer.preempt(tmp_path / "run", ["SIGTERM"], preemption={"requeue": True}, env=env)
    assert process.status == 75
    [error] = process.said("scontrol requeue 4711: exit code 1")
    assert "Job is not requeueable" in error
    assert saved(tmp_path / "run") == [(2, "preempted (SIGTERM)")]


def test_requeueing_without_scontrol(trainer: Trainer, tmp_path: Path, slurm: Slurm) -> None:
    """The same where the command is not there."""
    env = {**slurm.env, "PATH": str(tmp_path)}
    process = trainer.preempt(tmp_path / "run", ["SIGTERM"], preemption={"requeue": True}, env=env)
    assert process.status == 75
    assert process.said("ERROR scontrol requeue 4711: ")


def test_no_requeueing_unless_asked_for(trainer: Trainer, tmp_path: Path, slurm: Slurm) -> None:
    """In a job, too."""
    assert trainer.preempt(tmp_path / "run", ["SIGTERM"], env=slurm.env).status == 75
    assert slurm.asked() == []


def test_requeueing_outside_a_job(trainer: Trainer, tmp_path: Path) -> None:
    """A warning at the start, not a surprise at the end."""
    process = trainer.start(tmp_path, preemption={"requeue": True}, env={"SLURM_JOB_ID": ""})
    assert process.end() == 0
    assert process.said("WARNING requeue=True, but this is no Slurm job")


# ------------------------------------------------------------------------------------------------------ what is typed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": "SIGTERM"}, r"Preemption\(signals=\): expected a tuple such as .*; found 'SIGTERM'"),
        ({"signals": ("TERM",)}, "expected names such as .SIGTERM., or numbers of signals; found 'TERM'"),
        ({"signals": (12345,)}, "or numbers of signals; found 12345"),
        ({"signals": (True,)}, "or numbers of signals; found True"),
        ({"signals": ("SIGKILL",)}, "expected signals that a process can handle; found 'SIGKILL'"),
        ({"grace_seconds": 0}, "expected a positive number of seconds, or None; found 0"),
        ({"grace_seconds": True}, "expected a positive number of seconds, or None; found True"),
        ({"grace_seconds": "90"}, "expected a positive number of seconds, or None; found '90'"),
        ({"exit_code": 256}, "expected a whole number from 0 to 255; found 256"),
        ({"exit_code": 7.5}, "expected a whole number from 0 to 255; found 7.5"),
        ({"requeue": "yes"}, "expected True or False; found 'yes'"),
        ({"notices": AwsNotice}, r"such as AwsNotice\(\); found <class 'holdfast.notices.AwsNotice'>"),
        ({"notices": ["aws"]}, r"something with a method check\(\), such as AwsNotice\(\); found 'aws'"),
        ({"notices": 3}, r"something with a method check\(\), such as AwsNotice\(\); found 3"),
    ],
)
def test_options_that_cannot_mean_anything(options: Any, message: str) -> None:
    """Refused where it is constructed."""
    with pytest.raises(UsageError, match=message):
        Preemption(**options)


def test_options_that_mean_something() -> None:
    """Names and numbers, each signal once; one notice or several."""
    config = Preemption(signals=("SIGTERM", 15, "SIGHUP"), notices=AwsNotice())
    assert config.numbers == (signal.SIGTERM, signal.SIGHUP)
    assert config.asked == (AwsNotice(),)
    assert Preemption(notices=[AwsNotice(), GcpNotice()]).asked == (AwsNotice(), GcpNotice())
    assert Preemption() == Preemption()


def test_the_exception() -> None:
    """It ends the interpreter, says why, and is no error."""
    raised = Preempted(75, "SIGTERM", None)
    assert (raised.code, raised.reason, raised.checkpoint) == (75, "SIGTERM", None)
    assert str(raised) == "preempted (SIGTERM); exit code 75"
    assert isinstance(raised, SystemExit)
    assert not isinstance(raised, Exception)
