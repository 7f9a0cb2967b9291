"""What a process does while its machine may stop at any moment.

Each workload prepares a directory, and what it then does is what is recorded, killed, refused and cut short.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import holdfast
from holdfast import Checkpointer, Every, KeepLast, Run, classic
from holdfast.errors import CheckpointNotFoundError
from holdfast.format.names import CheckpointName
from holdfast.state import unchanged
from holdfast.storage import durable
from lab.judge import Judge, PathJudge, RunJudge, place_foreign
from lab.marks import Marks
from lab.states import fill, number_of, numbered


def name_of(step: int, generation: int = 1) -> str:
    """What a checkpoint is called."""
    return str(CheckpointName(step, generation))


def _nothing(directory: Path, marks: Marks) -> None:
    """Nothing is there before."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One.

    Attributes:
        name: what it is called.
        act: what is done to the directory; it says what it does.
        prepare: what was done before, when everything went well.
        judge: what must hold whenever it is cut short.
        run: where the run is, below the directory.
        ours: whether all that it does to the disk is done by Holdfast.
    """

    name: str
    act: Callable[[Path, Marks], None]
    prepare: Callable[[Path, Marks], None] = _nothing
    judge: Judge = field(default_factory=RunJudge)
    run: str = ""
    ours: bool = True


# ---------------------------------------------------------------------------------------------------------- the saves


def _save(run: Run, step: int, seed: int, marks: Marks) -> str:
    marks.may(name_of(step), seed)
    saved = run.save(numbered(seed), step=step)
    marks.must(saved.name, seed)
    return saved.name


def _three(directory: Path, marks: Marks) -> None:
    """Three checkpoints, and strangers' files."""
    run = Run(directory)
    for step in (1, 2, 3):
        _save(run, step, step, marks)
    place_foreign(directory)


_FIRST = "runs/first"


def _save_first(directory: Path, marks: Marks) -> None:
    _save(Run(directory / _FIRST), 1, 1, marks)


def _save_in_what_the_user_made(directory: Path, marks: Marks) -> None:
    """A script makes its directories itself, a moment before it saves, and syncs nothing."""
    (directory / _FIRST).mkdir(parents=True)
    _save_first(directory, marks)


def _save_beside(directory: Path, marks: Marks) -> None:
    run = Run(directory)
    _save(run, 4, 4, marks)
    _save(run, 5, 5, marks)


def _save_again(directory: Path, marks: Marks) -> None:
    run = Run(directory)
    _save(run, 3, 13, marks)
    _save(run, 3, 23, marks)


def _save_and_prune(directory: Path, marks: Marks) -> None:
    run = Run(directory)
    _save(run, 4, 4, marks)
    for step in (1, 2):
        marks.going(name_of(step))
    run.prune(KeepLast(2))


def _pin_and_prune(directory: Path, marks: Marks) -> None:
    run = Run(directory)
    run.pin(1)
    marks.pinned(name_of(1))
    run.pin(2)
    marks.pinned(name_of(2))
    run.add_metrics(run[2], {"loss": 0.5})
    marks.going(name_of(3))
    _save(run, 4, 4, marks)
    run.prune(KeepLast(1))


def _prepare_frozen(directory: Path, marks: Marks) -> None:
    # The backbone is small, so that many states can be tried.
    unchanged.MIN_GROUP_BYTES = 4096
    _three(directory, marks)


# ----------------------------------------------------------------------------------------------------- the checkpointer


def _train(directory: Path, marks: Marks, last: int, *, overlap: bool = False) -> None:
    """What a training loop does: a save at each step, in the background, of which two are kept."""
    state = numbered(0)
    with Checkpointer(directory, state, save=Every(steps=10**6), keep=KeepLast(2), overlap=overlap) as ckpt:
        known = [str(name) for name in Run(directory).names()]
        while ckpt.global_step < last:
            seed = 100 + ckpt.global_step + 1
            fill(state, seed)
            ckpt.step()
            marks.may(name_of(ckpt.global_step), seed)
            for name in known[:-1]:
                marks.going(name)
            handle = ckpt.save()
            if ckpt.global_step % 2 == 0:  # the others are on their way while the next step is done
                saved = handle.result(60)
                marks.must(saved.name, seed)
                known.append(saved.name)
            else:
                known.append(name_of(ckpt.global_step))
    marks.must(known[-1], 100 + last)


def _train_on(directory: Path, marks: Marks) -> None:
    _train(directory, marks, 6)


def _prepare_broken(directory: Path, marks: Marks) -> None:
    """The newest of two checkpoints is cut short."""
    run = Run(directory)
    _save(run, 1, 1, marks)
    newest = Path(run.save(numbered(2), step=2).path)
    os.truncate(newest / "model.safetensors", 5000)
    place_foreign(directory)


def _fall_back(directory: Path, marks: Marks) -> None:
    """Continue from the one before the broken one, and come past its step again."""
    state = numbered(0)
    with Checkpointer(directory, state, save=Every(steps=10**6), keep=KeepLast(2)) as ckpt:
        assert ckpt.global_step == 1, "it did not fall back to the intact one"
        for _ in range(2):
            seed = 200 + ckpt.global_step + 1
            fill(state, seed)
            ckpt.step()
            marks.may(name_of(ckpt.global_step), seed)
            if ckpt.global_step == 3:
                marks.going(name_of(1))
            marks.must(ckpt.save().result(60).name, seed)


# --------------------------------------------------------------------------------------------------- several processes


@contextmanager
def _beside(work: Callable[[int], None]) -> Iterator[None]:
    """Another process works meanwhile; it is given a descriptor from which nothing comes until it should end."""
    end, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(hold)
            work(end)
            status = 0
        except BaseException:  # noqa: BLE001 - it is a process of its own, and its parent learns of it by the status
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(end)
    try:
        yield
    finally:
        os.close(hold)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the process beside this one ended with {status}"


def _two_writers(directory: Path, marks: Marks) -> None:
    def other(_: int) -> None:
        run = Run(directory)
        _save(run, 4, 34, marks)
        _save(run, 5, 35, marks)

    run = Run(directory)
    with _beside(other):
        _save(run, 4, 4, marks)
        run.store.clean()
        _save(run, 5, 5, marks)


def _reader_beside(directory: Path, marks: Marks) -> None:
    def read(end: int) -> None:
        os.set_blocking(end, False)
        while not _ended(end):
            for checkpoint in Run(directory):
                try:
                    found = number_of(holdfast.load(checkpoint.path))
                except CheckpointNotFoundError:
                    continue  # removed since it was listed
                assert found is not None, f"{checkpoint.name} was read wrongly beside its removal"

    run = Run(directory)
    with _beside(read):
        for step in (4, 5, 6):
            _save(run, step, step, marks)
            for name in run.names()[:-1]:
                marks.going(str(name))
            run.prune(KeepLast(1))


def _ended(end: int) -> bool:
    try:
        return os.read(end, 1) == b""
    except BlockingIOError:
        return False


# ------------------------------------------------------------------------------------------------------- the tutorials


def _tutorial(directory: Path, marks: Marks, epoch: int, seed: int) -> None:
    classic.save_rotating_checkpoint({**numbered(seed), "epoch": epoch}, directory / f"model_{epoch}", keep_last=2)
    marks.must(f"model_{epoch}", seed)


def _prepare_tutorial(directory: Path, marks: Marks) -> None:
    _tutorial(directory, marks, 1, 1)


def _replace(directory: Path, marks: Marks) -> None:
    marks.replacing("model_1", 11)
    _tutorial(directory, marks, 1, 11)
    for epoch in (2, 3):
        marks.may(f"model_{epoch}", epoch)
        if epoch == 3:
            marks.going("model_1")
        _tutorial(directory, marks, epoch, epoch)


def _prepare_no_exchange(directory: Path, marks: Marks) -> None:
    """On a file system without renameat2, such as NFS."""
    durable._renameat2 = lambda *_: False
    _prepare_tutorial(directory, marks)


_IN_A_RUN = RunJudge(foreign=True)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("first save", _save_first, judge=RunJudge(place=_FIRST), run=_FIRST),
        Workload(
            "first save in the user's directory",
            _save_in_what_the_user_made,
            judge=RunJudge(place=_FIRST),
            run=_FIRST,
            ours=False,
        ),
        Workload("save beside others", _save_beside, _three, _IN_A_RUN),
        Workload("the same step again", _save_again, _three, _IN_A_RUN),
        Workload("retention", _save_and_prune, _three, _IN_A_RUN),
        Workload("pins and metrics", _pin_and_prune, _three, _IN_A_RUN),
        Workload("frozen data linked", _save_and_prune, _prepare_frozen, _IN_A_RUN),
        Workload("background saves", _train_on, _three, _IN_A_RUN),
        Workload("fall-back", _fall_back, _prepare_broken, RunJudge(broken=frozenset({name_of(2)}), foreign=True)),
        Workload("two writers", _two_writers, _three, _IN_A_RUN),
        Workload("a reader beside", _reader_beside, _three, _IN_A_RUN),
        Workload("replacing", _replace, _prepare_tutorial, PathJudge()),
        Workload("replacing without exchange", _replace, _prepare_no_exchange, PathJudge()),
    )
}
