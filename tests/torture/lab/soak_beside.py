"""Who works on the run beside the trainer of a soak: a reader, a pruner, a second writer, and an inspector."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import holdfast
from holdfast import Checkpoint, Checkpointer, Run
from holdfast.errors import CheckpointNotFoundError, RunBusyError
from holdfast.format.names import CheckpointName, TemporaryName, is_trash, parse_aside
from lab.soak_resources import held
from lab.soak_training import KEPT_LAST, digest_of, digest_of_loaded, make_training, retention
from lab.soak_voice import Voice


def read(directory: Path, seed: int, voice: Voice) -> None:
    """List, load, restore and verify, for ever."""
    _quiet()
    rng = random.Random(seed)
    training = make_training(seed)
    run = Run(directory)
    while True:
        for checkpoint in list(run):
            how = rng.choice(("load", "restore", "verify", "verify", "tensor", "mmap"))
            try:
                if how == "verify":
                    _verify(checkpoint, rng.choice((0, 0, 0.01)), voice)
                elif how == "restore":
                    holdfast.restore(checkpoint, training.state)
                    voice.say("read", **_said_of(checkpoint), **asdict(digest_of(training)))
                elif how == "tensor":
                    checkpoint.read(rng.choice(sorted(checkpoint.tensors)))
                else:
                    loaded = holdfast.load(checkpoint.path, mmap=how == "mmap")
                    voice.say("read", **_said_of(checkpoint), contents=digest_of_loaded(loaded))
                    del loaded
            except CheckpointNotFoundError:
                how = "gone"  # removed since it was listed
            voice.say("looked", how=how)
        for broken in run.broken():
            voice.say("torn", name=str(broken.name), why=str(broken.error))
        voice.say("held", **asdict(held()))
        time.sleep(rng.random() * 0.05)


def _verify(checkpoint: Checkpoint, pause_s: float, voice: Voice) -> None:
    """Read every byte, more slowly than need be: who has begun to read must come to the end."""
    begun = False

    def progress(_: int) -> None:
        nonlocal begun
        begun = True
        time.sleep(pause_s)

    try:
        checkpoint.verify(progress)
    except CheckpointNotFoundError as error:
        if begun:
            voice.say("torn", name=checkpoint.name, why=f"removed while it was read: {error}")
        raise


def prune(directory: Path, seed: int, kept_every: int, voice: Voice) -> None:
    """Apply the trainer's retention, by the library and by the command, for ever."""
    _quiet()
    rng = random.Random(seed)
    keep = retention(kept_every)
    run = Run(directory)
    while True:
        if rng.random() < 0.05 and directory.exists():
            removed = _prune_by_command(directory, kept_every)
        else:
            report = run.prune(keep)
            removed = [checkpoint.name for checkpoint in report.removed]
            if report.busy:
                voice.say("busy", count=len(report.busy))
        if removed:
            voice.say("pruned", count=len(removed))
        if rng.random() < 0.1:
            run.store.clean()
        voice.say("held", **asdict(held()))
        time.sleep(rng.random() * 0.1)


def _prune_by_command(directory: Path, kept_every: int) -> list[str]:
    command = [sys.executable, "-m", "holdfast", "prune", str(directory), "--json", "--keep-last", str(KEPT_LAST)]
    command += ["--keep-best", "loss:min", "--keep-every-steps", str(kept_every)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"holdfast prune ended with {done.returncode}: {done.stdout}{done.stderr}")
    return [item["name"] for item in json.loads(done.stdout)["removed"]]


def intrude(directory: Path, seed: int, voice: Voice) -> None:
    """Try to write a run that has a writer."""
    _quiet()
    try:
        with Checkpointer(directory, make_training(seed).state, preemption=None):
            voice.say("let in")
    except RunBusyError:
        voice.say("refused")


def copy(directory: Path, seed: int, voice: Voice) -> None:
    """Save what the newest checkpoint holds once more, beside the trainer: another generation of its step."""
    _quiet()
    newest = Run(directory).latest()
    if newest is None:
        return
    training = make_training(seed)
    try:
        holdfast.restore(newest, training.state)
    except CheckpointNotFoundError:
        return
    saved = Run(directory).save(training.state, step=newest.step, epoch=newest.epoch)
    voice.say("acknowledged", **_said_of(saved))


def inspect(directory: Path, seed: int, voice: Voice) -> None:
    """Look at everything once, and say what is there."""
    _quiet()
    run = Run(directory)
    training = make_training(seed)
    names = run.store.names()
    for found in run.entries():
        if not isinstance(found, Checkpoint):
            voice.say("torn", name=str(found.name), why=str(found.error))
            continue
        try:
            holdfast.restore(found, training.state)
            found.verify()
        except CheckpointNotFoundError:  # the pruner was faster
            continue
        voice.say("read", **_said_of(found), **asdict(digest_of(training)))
        voice.say("seen", **_said_of(found), pinned=found.pinned, nbytes=found.nbytes)
    for name in names:
        temporary = TemporaryName.parse(name)
        if is_trash(name) or parse_aside(name) or temporary is not None:
            voice.say("litter", name=name, pid=0 if temporary is None else temporary.pid)
        elif CheckpointName.parse(name) is None and name != "events.jsonl":
            voice.say("stranger", name=name)
    voice.say("inspected")


def _said_of(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "name": checkpoint.name,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "loss": checkpoint.metrics.get("loss"),
    }


def _quiet() -> None:
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
