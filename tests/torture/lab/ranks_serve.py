"""Ranks of a training: forks of this process, which imports what they need and makes nothing that has threads.

    python tests/torture/lab/ranks_serve.py

Each line on standard input is an order, a JSON object; see :class:`lab.ranks.Order`. For each, as many processes as it
says join one gloo group and do one piece of work of :mod:`lab.ranks_works`. When all have ended, a line on standard
output gives their exit statuses. What a rank prints, and what came of its work, lies in files of the order's folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # the first optimizer imports it
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

import holdfast.checkpointer
from lab import ranks_faults
from lab.ranks_moments import Kill, Moments
from lab.ranks_works import WORKS

PR_SET_PDEATHSIG = 1
GRACE_S = 5.0
"""How long a rank may need to end by itself, once the others have."""


def main() -> None:
    """Take orders until there are no more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    torch.set_num_threads(1)
    assert holdfast.checkpointer is not None
    gc.freeze()
    moments = Moments()
    moments.install()
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.write(json.dumps(_serve(order, moments)) + "\n")
        sys.stdout.flush()


def _serve(order: dict[str, Any], moments: Moments) -> dict[str, Any]:
    """Do one order; by rank, the exit statuses, and who had to be ended because the time was over."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        keeper = _fork(partial(_keep_store, listener)) if order["store"] == "agent" else None
        pids = {rank: _fork(partial(_rank, order, rank, listener, moments)) for rank in range(order["world_size"])}
    try:
        return _Group(order, pids).wait()
    finally:
        if keeper is not None:
            _end(keeper)
            os.waitpid(keeper, 0)


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 4
        try:
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            status = work()
        finally:
            os._exit(status)
    with contextlib.suppress(OSError):  # whoever comes first, it or this
        os.setpgid(pid, pid)
    return pid


def _end(pid: int) -> None:
    """Kill a rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class _Group:
    """The processes of one order, until none is left."""

    def __init__(self, order: dict[str, Any], pids: dict[int, int]) -> None:
        self._order = order
        self._pids = dict(pids)
        self._running = {os.pidfd_open(pid): rank for rank, pid in pids.items()}
        self._deadline_s = time.monotonic() + order["timeout_s"]
        self._statuses: dict[int, int] = {}
        self._late: list[int] = []

    def wait(self) -> dict[str, Any]:
        """Until all have ended; see :func:`_serve`."""
        while self._running:
            poll = select.poll()
            for fd in self._running:
                poll.register(fd, select.POLLIN)
            ended = poll.poll(max(0.0, self._deadline_s - time.monotonic()) * 1000)
            if not ended:
                self._late += sorted(self._running.values())
                self._end_all()
                self._deadline_s = time.monotonic() + GRACE_S
            for fd, _ in ended:
                self._reap(fd)
            idle = set(self._order["bystanders"])
            if set(self._running.values()) <= idle:
                self._end_all()
        return {"statuses": self._statuses, "late": self._late}

    def _reap(self, fd: int) -> None:
        rank = self._running.pop(fd)
        os.close(fd)
        _end(self._pids[rank])  # such as workers of a loader that were left behind
        self._statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(self._pids[rank], 0)[1])
        if self._statuses[rank] != 0 and self._order["after_death"] == "kill":
            self._end_all()

    def _end_all(self) -> None:
        for rank in self._running.values():
            _end(self._pids[rank])


def _keep_store(listener: socket.socket) -> int:
    """Keep the store that the ranks talk through, as torchrun's agent does, until it is killed."""
    address, port = listener.getsockname()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    signal.pause()
    return 0 if store.port else 1


def _rank(order: dict[str, Any], rank: int, listener: socket.socket, moments: Moments) -> int:
    """One rank; returns its exit status."""
    folder = Path(order["folder"])
    output = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    told: dict[str, Any] = {}
    status = 0
    try:
        with _group(order, rank, listener):
            for name, *arguments in order["faults"].get(str(rank), []):
                getattr(ranks_faults, name)(*arguments)
            kill = order["kills"].get(str(rank))
            moments.begin(None if kill is None else Kill(**kill))
            told["result"] = WORKS[order["work"]](Path(order["directory"]), **order["arguments"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        told["error"] = _told(error)
    except BaseException as error:  # noqa: BLE001 - whoever gave the order is told
        traceback.print_exc()
        status, told["error"] = 3, _told(error)
    told["counts"] = moments.counts
    (folder / f"rank-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return status


@contextlib.contextmanager
def _group(order: dict[str, Any], rank: int, listener: socket.socket) -> Iterator[None]:
    """The process group of all ranks of the order."""
    address, port = listener.getsockname()
    world_size = order["world_size"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=address)
    os.environ.update(MASTER_PORT=str(port), **order["environment"])
    timeout = datetime.timedelta(seconds=order["timeout_s"])
    store: Store
    if order["store"] == "file":
        store = FileStore(str(Path(order["folder"]) / "store"), world_size)
    else:
        keeps = rank == 0 and order["store"] == "rank"
        own = listener.detach() if keeps else None
        store = TCPStore(address, port, world_size, keeps, timeout, wait_for_workers=False, master_listen_fd=own)
    listener.close()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield
    dist.destroy_process_group()


def _told(error: BaseException) -> dict[str, Any]:
    """An error in plain values."""
    where = {name: getattr(error, name, None) for name in ("ranks", "key", "step", "errno", "code")}
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in where.items()},
    }


if __name__ == "__main__":
    main()
