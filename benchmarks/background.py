"""Those who save in the background: each opens a session over a live state, as a training would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import holdfast
from benchmarks import measures, peers
from benchmarks.files import size, sync
from benchmarks.workloads import Workload

Wait = Callable[[], int]
"""Blocks until a save is durable, and says how many bytes it wrote."""


class Session(Protocol):
    """Saves one live state again and again.

    Attributes:
        waited_s: seconds that optimizer steps have waited so far, for all saves that were waited for.
    """

    waited_s: float

    def save(self) -> Wait:
        """Begin a save; what the state is now is what will be on the disk."""

    def guard(self) -> AbstractContextManager[object]:
        """Goes around the optimizer's step, for those who must not be disturbed while they copy."""

    def stepped(self) -> None:
        """One optimizer step is done."""

    @property
    def newest(self) -> Path:
        """Where the save lies that was begun last and has been waited for."""

    def load(self, live: Workload) -> None:
        """Fill other live tensors with what was saved last."""


class BackgroundPeer(Protocol):
    """A way to save in the background."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def package(self) -> str:
        """The package whose version matters."""

    def open(self, workload: Workload, directory: Path) -> AbstractContextManager[Session]:
        """Begin to save a workload into a directory of its own; leaving the block waits for what is under way."""


class _Session:
    """What most sessions share: numbered checkpoints, and a thread in which a save ends and becomes durable."""

    def __init__(self, workload: Workload, directory: Path, peer: peers.Peer) -> None:
        self.workload, self.tensors = workload, workload.tensors
        self._directory, self._peer, self._count = directory, peer, 0
        self.waited_s = 0.0
        self._ender = ThreadPoolExecutor(1)
        directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def guard(self) -> Iterator[None]:
        start = time.perf_counter()
        with self._lock():
            self.waited_s += time.perf_counter() - start
            yield

    def _lock(self) -> AbstractContextManager[object]:
        """To be held during the optimizer's step."""
        return nullcontext()

    def stepped(self) -> None:
        return

    def load(self, live: Workload) -> None:
        self._peer.load(live, self.newest)

    def close(self) -> None:
        self._ender.shutdown()

    @property
    def newest(self) -> Path:
        return self._directory / str(self._count)

    def _next(self) -> Path:
        self._count += 1
        return self.newest

    def _durable(self, wait: Callable[[], object]) -> Wait:
        """Peers leave the fsync of files or of folders to others: done here, beside the training."""
        path = self.newest

        def end() -> int:
            wait()
            sync(path)
            return size(path)

        return self._ender.submit(end).result


@dataclass(frozen=True)
class Holdfast:
    """A :class:`holdfast.Checkpointer` that saves when it is asked, and keeps the last checkpoint."""

    overlap: bool = False
    package: str = "holdfast"

    @property
    def name(self) -> str:
        """With the word for copying beside the next step."""
        return measures.OVERLAP if self.overlap else measures.HOLDFAST

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        with holdfast.Checkpointer(
            directory,
            workload.objects,
            save=holdfast.Every(steps=10**9),
            keep=holdfast.KeepLast(1),
            overlap=self.overlap,
        ) as checkpointer:
            yield _HoldfastSession(checkpointer)


class _HoldfastSession:
    def __init__(self, checkpointer: holdfast.Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._handle: holdfast.SaveHandle | None = None
        self.waited_s = 0.0

    def save(self) -> Wait:
        start = time.perf_counter()
        handle = self._handle = self._checkpointer.save()
        called_s = time.perf_counter() - start

        def wait() -> int:
            report = handle.report()
            self.waited_s += max(0.0, report.stall_s - called_s)  # the call and the hook are told in one
            return report.bytes_written

        return wait

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()  # with overlap, a hook of the optimizer's step waits by itself

    def stepped(self) -> None:
        self._checkpointer.step()

    def load(self, live: Workload) -> None:
        holdfast.restore(self.newest, live.objects)

    @property
    def newest(self) -> Path:
        if self._handle is None:
            raise LookupError("nothing was saved")
        return Path(self._handle.result().path)


@dataclass(frozen=True)
class DCP:
    """``async_save``, which writes in a thread, with each of the stagers that work without CUDA.

    Args:
        stager: how the state is copied: ``""`` into new memory, as the file system writer does by itself;
            ``"cached"`` into memory that is kept; ``"overlapped"`` likewise, in a thread that the optimizer waits for.
    """

    stager: str = ""
    package: str = "torch"

    @property
    def name(self) -> str:
        """With the stager."""
        return f"DCP, {self.stager} stager" if self.stager else "DCP"

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        with peers.alone(), closing(_DCPSession(workload, directory, self.stager)) as session:
            yield session


class _DCPSession(_Session):
    def __init__(self, workload: Workload, directory: Path, stager: str) -> None:
        super().__init__(workload, directory, peers.DCP(2))
        self._stager: Any = None
        self._staged: Future[None] | None = None
        if stager:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=False,
                    use_async_staging=stager == "overlapped",
                    use_non_blocking_copy=False,
                )
            )

    def save(self) -> Wait:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

        writer = FileSystemWriter(self._next(), thread_count=2, sync_files=True)
        begun = async_save(self.tensors, storage_writer=writer, async_stager=self._stager, no_dist=True)
        if isinstance(begun, AsyncSaveResponse):
            self._staged = begun.staging_completion
            return self._durable(begun.upload_completion.result)
        return self._durable(begun.result)

    def _lock(self) -> AbstractContextManager[object]:
        if self._staged is not None:
            self._staged.result()
        return nullcontext()

    def close(self) -> None:
        super().close()
        if self._stager is not None:
            self._stager.close()


@dataclass(frozen=True)
class TorchCheckpointing:
    """``torch_checkpointing``: copies in a thread into shared memory, writes in a process of its own."""

    name: str = "torch_checkpointing"
    package: str = "torch-checkpointing"

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        with closing(_TorchCheckpointingSession(workload, directory)) as session:
            yield session


class _TorchCheckpointingSession(_Session):
    def __init__(self, workload: Workload, directory: Path) -> None:
        from torch_checkpointing import CheckpointManager

        super().__init__(workload, directory, peers.TorchCheckpointing())
        config = peers.torch_checkpointing_config(CheckpointManager.Config.with_async_save())
        self._manager = CheckpointManager(config)

    def save(self) -> Wait:
        begun = self._manager.save(str(self._next()), {"state": self.tensors})
        if begun is None:
            raise LookupError("torch_checkpointing saved without a future, as if it blocked")
        return self._durable(begun.result)

    def _lock(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self._manager.lock()
        return lock

    def close(self) -> None:
        super().close()
        self._manager.close()


@dataclass(frozen=True)
class Torchsnapshot:
    """``Snapshot.async_take``."""

    name: str = "torchsnapshot"
    package: str = "torchsnapshot"

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        with closing(_TorchsnapshotSession(workload, directory, peers.Torchsnapshot())) as session:
            yield session


class _TorchsnapshotSession(_Session):
    def save(self) -> Wait:
        snapshots = peers.torchsnapshot()
        state = {"state": snapshots.StateDict(**self.tensors)}
        begun = snapshots.Snapshot.async_take(path=str(self._next()), app_state=state)
        return self._durable(begun.wait)


@dataclass(frozen=True)
class Orbax:
    """Orbax's ``AsyncCheckpointer``."""

    name: str = "Orbax"
    package: str = "orbax-checkpoint"

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        with closing(_OrbaxSession(workload, directory)) as session:
            yield session


class _OrbaxSession(_Session):
    def __init__(self, workload: Workload, directory: Path) -> None:
        from orbax import checkpoint as orbax

        super().__init__(workload, directory, peers.Orbax())
        self._checkpointer = orbax.AsyncCheckpointer(orbax.PyTreeCheckpointHandler())

    def save(self) -> Wait:
        from orbax import checkpoint as orbax

        self._checkpointer.save(self._next().resolve(), args=orbax.args.PyTreeSave(peers.arrays(self.tensors)))
        return self._durable(self._checkpointer.wait_until_finished)

    def close(self) -> None:
        super().close()
        self._checkpointer.close()


@dataclass(frozen=True)
class Blocking:
    """A blocking peer in a session: ``save()`` returns when everything is durable."""

    peer: peers.Peer
    name: str

    @property
    def package(self) -> str:
        """See :class:`BackgroundPeer`."""
        return self.peer.package

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        with closing(_BlockingSession(workload, directory, self.peer)) as session:
            yield session


class _BlockingSession(_Session):
    def save(self) -> Wait:
        self._peer.save(self.workload, self._next())
        written = size(self.newest)
        return lambda: written


BACKGROUND_PEERS: tuple[BackgroundPeer, ...] = (
    Holdfast(),
    Holdfast(overlap=True),
    DCP(),
    DCP("cached"),
    DCP("overlapped"),
    TorchCheckpointing(),
    Torchsnapshot(),
    Orbax(),
)
