"""The checkpoints of one run."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import holdfast
from holdfast import Checkpoint, KeepBest, KeepEvery, KeepLast, Run
from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError, UsageError
from holdfast.format import envelope
from holdfast.format import manifest as manifests
from holdfast.storage.local import LocalStore


def run_of(path: Path, *steps: int, losses: Sequence[float | None] = ()) -> Run:
    """A run with these steps, saved in this order; each holds its step."""
    run = Run(path / "run")
    for index, step in enumerate(steps):
        loss = losses[index] if index < len(losses) else None
        metrics = None if loss is None else {"loss": loss}
        run.save({"w": torch.tensor(float(step))}, step=step, epoch=step // 10, metrics=metrics)
    return run


def names(checkpoints: Any) -> list[str]:
    """Steps, with generations from the second."""
    return [f"{c.step}" if c.generation == 1 else f"{c.step}.g{c.generation}" for c in checkpoints]


def damage(checkpoint: Checkpoint, name: str = "w.safetensors") -> None:
    """Cut the last byte off a file."""
    file = Path(checkpoint.path, name)
    os.truncate(file, file.stat().st_size - 1)


def test_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    """Looking makes nothing."""
    run = Run(tmp_path / "a" / "run")
    assert (list(run), run.latest(), run.best("loss", "min"), run.broken()) == ([], None, None, [])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointNotFoundError, match="no intact checkpoint of step 3"):
        run[3]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_a_process_ran_out_of_is_no_damage(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is not passed over because a process has too many files open: an older one would be taken for it."""
    run = run_of(tmp_path, 1, 2)
    real = os.open

    def refuse(path: str, *args: Any, **kwargs: Any) -> int:
        if path == "step-000000000002":
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    for ask in (run.latest, run.broken, lambda: list(run), lambda: run[2], lambda: run.prune(KeepLast(1))):
        with pytest.raises(StorageError, match=os.strerror(code)):
            ask()
    monkeypatch.undo()
    assert names(run) == ["1", "2"]


def test_oldest_first_by_number(tmp_path: Path) -> None:
    """Steps are ordered as numbers."""
    run = run_of(tmp_path, 10, 9, 100, 10**12 - 1, 2)
    assert names(run) == ["2", "9", "10", "100", "999999999999"]
    assert names([run.latest()]) == ["999999999999"]
    assert names(run.newest_first()) == ["999999999999", "100", "10", "9", "2"]


def test_a_step_saved_again(tmp_path: Path) -> None:
    """The same step gets another generation; nothing is overwritten, and the higher one is the newer."""
    run = run_of(tmp_path, 5, 5, 4, *[5] * 9)
    assert names(run) == ["4", "5", *(f"5.g{g}" for g in range(2, 12))]
    assert (run[5].generation, run.latest().generation) == (11, 11)


def test_what_a_save_says(tmp_path: Path) -> None:
    """Step, epoch, metrics and reason; and all saves of a run belong to one run."""
    run = Run(tmp_path)
    first = run.save({"x": 1}, step=3, epoch=2, metrics={"loss": 0.5}, reason="by hand")
    second = run.save({"x": 1}, step=4)
    assert (first.step, first.epoch, first.metrics, first.reason) == (3, 2, {"loss": 0.5}, "by hand")
    assert first.run_id == second.run_id
    assert first.checkpoint_id != second.checkpoint_id
    assert holdfast.load(first.path) == {"x": 1}


def test_by_step(tmp_path: Path) -> None:
    """An unknown step says which there are."""
    run = run_of(tmp_path, *range(0, 100, 10))
    assert run[30].step == 30
    with pytest.raises(CheckpointNotFoundError) as caught:
        run[31]
    assert caught.value.step == 31
    assert "it has steps 0, 10, 20, ..., 70, 80, 90." in str(caught.value)


def test_broken_ones_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest intact one is found, with a warning that names the broken file; the broken one stays."""
    run = run_of(tmp_path, 1, 2, 3)
    damage(run[3])
    with caplog.at_level(logging.WARNING, "holdfast"):
        assert run.latest().step == 2
    assert "step-000000000003" in caplog.text
    assert "w.safetensors" in caplog.text
    assert names(run) == ["1", "2"]
    assert [(item.name.step, "w.safetensors" in str(item.error)) for item in run.broken()] == [(3, True)]
    assert Path(run.path, "step-000000000003").exists()
    with pytest.raises(CheckpointNotFoundError):
        run[3]


def test_an_older_generation_of_a_broken_step(tmp_path: Path) -> None:
    """Asking for a step gives its newest intact generation."""
    run = run_of(tmp_path, 3, 3)
    damage(run[3])
    assert run[3].generation == 1


def test_strangers(tmp_path: Path) -> None:
    """What is not named as a checkpoint is not looked at; what is named so and is none is listed as broken."""
    run = run_of(tmp_path, 1)
    for name in ("step-1", "step-000000000001.g1", "step-000000000002.bak", "logs", ".hidden", "step-x"):
        Path(run.path, name).mkdir()
    Path(run.path, "step-000000000009").mkdir()
    Path(run.path, "step-000000000009", "weights.bin").write_bytes(b"mine")
    Path(run.path, "notes.txt").write_text("mine")
    before = sorted(Path(run.path).iterdir())
    assert names(run) == ["1"]
    assert [item.name.step for item in run.broken()] == [9]
    assert run.prune(KeepLast(1)).removed == ()
    assert sorted(Path(run.path).iterdir()) == before


def test_a_run_that_is_a_file(tmp_path: Path) -> None:
    """A clear error, and the file stays."""
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StorageError, match="is not a directory; a run is a directory of checkpoints") as caught:
        Run(tmp_path / "run")
    assert caught.value.path == str(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------------- best


@pytest.mark.parametrize(
    ("losses", "mode", "expected"),
    [
        ((3, 1, 2), "min", 2),
        ((3, 1, 2), "max", 1),
        ((1, 1), "min", 1),
        ((float("nan"), 4), "min", 2),
        ((float("nan"), 4), "max", 2),
        ((None, 4), "min", 2),
        ((float("nan"),), "max", None),
        ((None,), "max", None),
    ],
)
def test_best(tmp_path: Path, losses: Sequence[float | None], mode: str, expected: int | None) -> None:
    """Not a number never wins, of equals the earliest does, and what was not measured is no candidate."""
    run = run_of(tmp_path, *range(1, len(losses) + 1), losses=losses)
    best = run.best("loss", mode)
    assert (None if best is None else best.step) == expected


def test_best_is_intact(tmp_path: Path) -> None:
    """A broken checkpoint is not the best."""
    run = run_of(tmp_path, 1, 2, losses=(0.1, 0.2))
    damage(run[1])
    assert run.best("loss", "min").step == 2


def test_best_needs_a_mode(tmp_path: Path) -> None:
    """Which is better is never guessed."""
    with pytest.raises(UsageError, match="expected 'min' or 'max', found 'best'"):
        run_of(tmp_path).best("loss", "best")


# ---------------------------------------------------------------------------------------------------------- retention


def test_prune(tmp_path: Path) -> None:
    """What no policy keeps goes; the report says why the others stay."""
    run = run_of(tmp_path, 1, 2, 3, 4, 5, losses=(0.5, 0.1, 0.5, 0.5, 0.5))
    report = run.prune(KeepLast(2) | KeepBest("loss", "min"))
    assert names(report.removed) == ["1", "3"]
    assert report.kept == {
        "step-000000000002": "best loss",
        "step-000000000004": "last 2",
        "step-000000000005": "last 2",
    }
    assert (report.busy, report.broken, report.dry_run) == ((), (), False)
    assert names(run) == ["2", "4", "5"]
    assert sorted(path.name for path in Path(run.path).glob("[!.]*")) == sorted(report.kept)


def test_dry_run(tmp_path: Path) -> None:
    """It says the same and removes nothing."""
    run = run_of(tmp_path, 1, 2, 3)
    planned = run.prune(KeepLast(1), dry_run=True)
    assert (names(planned.removed), planned.dry_run) == (["1", "2"], True)
    assert names(run) == ["1", "2", "3"]
    assert names(run.prune(KeepLast(1)).removed) == ["1", "2"]


class KeepNothing:
    """A user's own policy, and a careless one."""

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        """Nothing."""
        return {}


def test_the_newest_always_stays(tmp_path: Path) -> None:
    """Whatever a policy says: even the newest generation of a step."""
    run = run_of(tmp_path, 1, 2, 2)
    assert run.prune(KeepNothing()).kept == {"step-000000000002.g2": "newest"}
    assert names(run) == ["2.g2"]


def test_broken_ones_do_not_count(tmp_path: Path) -> None:
    """Three broken ones are not the last three: the newest intact one stays, and so do they."""
    run = run_of(tmp_path, 1, 2, 3, 4)
    for step in (2, 3, 4):
        damage(run[step])
    report = run.prune(KeepLast(3))
    assert names(report.removed) == []
    assert report.kept == {"step-000000000001": "last 3"}
    assert [item.name.step for item in report.broken] == [2, 3, 4]
    assert len(run.names()) == 4


def test_pinned_ones_stay(tmp_path: Path) -> None:
    """A pin holds against every policy until it is taken off; the checkpoint itself does not change."""
    run = run_of(tmp_path, 1, 2, 3)
    manifest = Path(run[1].path, "manifest.json").read_bytes()
    assert run.pin(1).pinned
    assert run.prune(KeepLast(1)).kept == {"step-000000000001": "pinned", "step-000000000003": "last 1"}
    assert Path(run[1].path, "manifest.json").read_bytes() == manifest
    assert not run.pin(1, pinned=False).pinned
    assert names(run.prune(KeepLast(1)).removed) == ["1"]


def test_protected_ones_stay(tmp_path: Path) -> None:
    """The checkpoint just saved may be older than others of the run: after a rewind."""
    run = run_of(tmp_path, 1, 2, 3)
    assert run.prune(KeepLast(1), protect=["step-000000000001"]).kept == {
        "step-000000000001": "in use",
        "step-000000000003": "last 1",
    }


def test_what_is_pinned_while_a_pruning_runs_stays(tmp_path: Path) -> None:
    """So does what was measured meanwhile, which may make it the best: the removal was decided without it."""
    run = run_of(tmp_path, 1, 2, 3, 4)

    class Slow:
        def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
            Run(run.path).pin(1)
            Run(run.path).add_metrics(checkpoints[1], {"loss": 0.5})
            return {checkpoints[-1].name: "newest"}

    report = run.prune(Slow())
    assert (names(report.removed), report.busy) == (["3"], ("step-000000000001", "step-000000000002"))
    assert [(c.step, c.pinned, c.metrics) for c in run] == [(1, True, {}), (2, False, {"loss": 0.5}), (4, False, {})]


def test_a_pin_and_metrics_do_not_undo_each_other(tmp_path: Path) -> None:
    """Each changes what is there when its turn comes, not what was there when its checkpoint was opened."""
    run = run_of(tmp_path, 1)
    opened = run[1]
    run.pin(1)
    assert run.add_metrics(opened, {"loss": 0.5}).pinned


def test_a_policy_that_names_strangers(tmp_path: Path) -> None:
    """A name that is no checkpoint's changes nothing."""

    class Odd:
        def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
            return {"step-000000000077": "odd", checkpoints[0].name: "first"}

    run = run_of(tmp_path, 1, 2, 3)
    assert names(run.prune(Odd()).removed) == ["2"]


def test_a_reader_keeps_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that somebody reads is left for the next time."""
    run = run_of(tmp_path, 1, 2)
    reading, done = threading.Event(), threading.Event()
    seen = []

    def progress(nbytes: int) -> None:
        reading.set()
        done.wait(30)

    reader = threading.Thread(target=lambda: seen.append(run[1].verify(progress)))
    reader.start()
    assert reading.wait(30)
    report = run.prune(KeepLast(1))
    done.set()
    reader.join()
    assert (report.busy, report.removed) == (("step-000000000001",), ())
    assert names(run) == ["1", "2"]
    assert names(run.prune(KeepLast(1)).removed) == ["1"]


def test_keep_every(tmp_path: Path) -> None:
    """Milestones stay for ever, whatever else goes."""
    run = run_of(tmp_path, *range(1, 13))
    run.prune(KeepEvery(steps=5) | KeepLast(1))
    assert names(run) == ["5", "10", "12"]


# -------------------------------------------------------------------------------------------------------- annotations


def test_metrics_that_arrive_later(tmp_path: Path) -> None:
    """They join those of the save, win over them, and count for the best."""
    run = run_of(tmp_path, 1, 2, losses=(0.5, 0.4))
    found = run.add_metrics(run[1], {"f1": 0.9})
    found = run.add_metrics(found, {"loss": 0.1})
    assert found.metrics == {"loss": 0.1, "f1": 0.9}
    assert run.best("loss", "min").step == 1
    run[1].verify()


def test_annotations_are_no_part_of_the_state(tmp_path: Path) -> None:
    """Losing them loses no state; nothing but the annotation goes."""
    run = run_of(tmp_path, 1, losses=(0.5,))
    run.pin(1)
    Path(run[1].path, "annotations.json").unlink()
    assert (run[1].pinned, run[1].metrics) == (False, {"loss": 0.5})
    run[1].verify()


def test_a_copy_is_whole(tmp_path: Path) -> None:
    """A checkpoint can be copied, moved into another run and deleted alone."""
    run = run_of(tmp_path, 1, 2)
    other = tmp_path / "other"
    shutil.copytree(run[2].path, other / "step-000000000002")
    shutil.rmtree(run[1].path)
    assert holdfast.load(Run(other)[2].path) == {"w": torch.tensor(2.0)}
    assert names(run) == ["2"]


def test_nothing_is_remembered(tmp_path: Path) -> None:
    """Another process may save and remove meanwhile: each question looks at the disk."""
    run, other = run_of(tmp_path, 1), Run(tmp_path / "run")
    other.save({"w": 1}, step=2)
    assert names(run) == ["1", "2"]
    LocalStore(other.path).remove("step-000000000001")
    assert names(run) == ["2"]


def test_a_listing_does_not_look_into_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, metrics, sizes and retention need no record of a tensor, so a run of thousands is listed at once."""
    run = run_of(tmp_path, 1, 2, losses=(0.5, 0.25))
    monkeypatch.setattr(manifests, "decode", lambda *_: pytest.fail("looked into the tensors"))
    assert [(c.step, c.epoch, c.metrics, c.reason, c.pinned) for c in run] == [
        (1, 0, {"loss": 0.5}, "save", False),
        (2, 0, {"loss": 0.25}, "save", False),
    ]
    assert names(run.prune(KeepLast(1)).removed) == ["1"]


def test_records_that_cannot_be(tmp_path: Path) -> None:
    """Sealed by somebody who knows the checksum: not the newest, and refused by name when its tensors are asked for."""
    run = run_of(tmp_path, 1, 2)
    file = Path(run[2].path, "manifest.json")
    inner = msgspec.json.decode(envelope.unseal("manifest", file.read_bytes()))
    inner["tensors"]["w"]["w"]["shape"] = [-1]
    file.write_bytes(envelope.seal("manifest", msgspec.json.encode(inner)))
    assert run.latest().step == 1
    assert [item.name.step for item in run.broken()] == [2]
    listed = list(run)[-1]
    with pytest.raises(CorruptCheckpointError, match="w/w: impossible shape"):
        listed.verify()
    with pytest.raises(CorruptCheckpointError, match="w/w: impossible shape"):
        holdfast.restore(listed, {"w": torch.tensor(0.0)})
