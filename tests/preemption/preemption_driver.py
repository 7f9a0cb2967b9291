"""Runs a small training again and again, each time in a process of its own that is there to be signalled.

    python tests/preemption/preemption_driver.py

Each line on standard input is an order, a JSON object, for one process: ``run`` is the directory, ``pause`` lists the
steps in which it stops until it gets a line, ``preemption`` are arguments of :class:`holdfast.Preemption`, ``env`` goes
to the environment, and ``scenario`` chooses something else than the plain loop. It prints ``pid N`` first, and what it
is about to do whenever it stops. When it has ended, the last line is a JSON object with its exit status. Standard error
goes the same way.

The processes are forks of this one, which imports what they need and does nothing else: importing PyTorch takes longer
than the training. Each leads a session of its own, so that its group can be signalled.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import signal
import sys
import threading
from typing import Any

import torch
import torch._dynamo
from torch import nn

import holdfast.classic  # noqa: F401
from holdfast import Checkpointer, Every, KeepLast, Preemption
from holdfast.storage.local_pending import LocalPending

STEPS_PER_EPOCH = 3
EPOCHS = 2


class Training:
    """A few steps with dropout, whose every number depends on every number before."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        """One optimizer step on random numbers."""
        self.optimizer.zero_grad()
        self.model(torch.rand(4, 3)).square().mean().backward()
        self.optimizer.step()

    def digest(self) -> str:
        """A fingerprint of everything."""
        values = [tensor.tolist() for tensor in self.model.state_dict().values()]
        everything = repr((values, self.optimizer.state_dict(), torch.get_rng_state().tolist()))
        return hashlib.sha256(everything.encode()).hexdigest()


def stop(where: str) -> None:
    """Say where it is, and go on when told to."""
    print(where, flush=True)
    sys.stdin.readline()


def plain(ckpt: Checkpointer, training: Training, order: dict[str, Any]) -> None:
    """The ordinary loop."""
    for epoch in range(ckpt.epoch, EPOCHS):
        while ckpt.global_step < (epoch + 1) * STEPS_PER_EPOCH:
            training.step()
            if ckpt.global_step + 1 in order.get("pause", ()):
                stop(f"in step {ckpt.global_step + 1}")
            ckpt.step()
        if epoch + 1 == order.get("pause_in_epoch"):
            stop(f"in epoch {epoch + 1}")
        ckpt.end_epoch()
    if order.get("pause_at_end"):
        stop("at the end")


def swallowing(ckpt: Checkpointer, training: Training, order: dict[str, Any]) -> None:
    """A loop that goes on whatever happens, or tries to."""
    try:
        plain(ckpt, training, order)
    except Exception as error:  # noqa: BLE001 - such code exists
        print(f"swallowed {error!r}", flush=True)
    finally:
        print("finally", flush=True)


def evaluating(ckpt: Checkpointer, training: Training, order: dict[str, Any]) -> None:
    """A step, and then an evaluation that takes long."""
    training.step()
    ckpt.step()
    for batch in range(3):
        if batch == 1:
            stop("evaluating")
        print(f"batch {batch}", flush=True)
        ckpt.leave_if_preempted()


def loading(ckpt: Checkpointer, training: Training, order: dict[str, Any]) -> None:
    """A loader with forked workers."""
    data = torch.utils.data.TensorDataset(torch.arange(12.0))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    for number, _ in enumerate(loader, 1):
        training.step()
        if number == 2:
            stop("workers are at work")
        ckpt.step()


def hanging(ckpt: Checkpointer, training: Training, order: dict[str, Any]) -> None:
    """A disk that answers no more after the first save; ``busy``: it has stopped in the middle of another."""
    training.step()
    ckpt.step()
    ckpt.save().result()
    stopped = threading.Event()

    def write(pending: LocalPending, images: Any) -> Any:
        stopped.set()
        threading.Event().wait()

    LocalPending.write_files = write  # type: ignore[method-assign]
    if order.get("busy"):
        training.step()
        ckpt.step()
        ckpt.save()
        stopped.wait()
    training.step()
    stop("the disk hangs")
    ckpt.step()


SCENARIOS = {work.__name__: work for work in (plain, swallowing, evaluating, loading, hanging)}


def train(order: dict[str, Any]) -> None:
    """Be one process of a run."""
    os.setsid()
    print(f"pid {os.getpid()}", flush=True)
    os.environ.update(order.get("env", {}))
    training = Training()
    options = {
        "save": Every(steps=order["every"]) if "every" in order else Every(minutes=60),
        "keep": KeepLast(9),
        "drain_s": order.get("drain_s", 600.0),
        "preemption": Preemption(**order.get("preemption", {})),
    }
    with Checkpointer(order["run"], training.state, **options) as ckpt:
        SCENARIOS[order.get("scenario", "plain")](ckpt, training, order)
    print(f"final {training.digest()}", flush=True)


def main() -> None:
    """Follow the orders."""
    os.dup2(1, 2)
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may ignore it
    gc.freeze()  # so that a process does not spend its end on looking through all of PyTorch for garbage
    while line := sys.stdin.readline():
        if not line.strip():
            continue  # it was to let a process go on that a signal had killed
        pid = os.fork()
        if pid == 0:
            train(json.loads(line))
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status}), flush=True)


if __name__ == "__main__":
    main()
