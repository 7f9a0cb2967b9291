"""What the tests of the storage share."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from holdfast.storage import durable
from holdfast.storage.local import LocalStore

Trace = list[tuple[str, ...]]
Fault = Callable[[str, int], OSError | None]


class BytesFile:
    """A stored file in memory, which remembers where it was read and how often it was opened and closed.

    Args:
        data: its bytes.
        lost: offsets of which nothing can be read, and what a read that needs them raises.
        at_once: how many bytes it wants to be asked for at a time.
    """

    def __init__(self, data: bytes, lost: Mapping[int, OSError] | None = None, at_once: int = 1) -> None:
        self.data = data
        self.nbytes = len(data)
        self.lost = lost or {}
        self.read: list[int] = []
        self.opened = 0
        self.closed = 0
        self._at_once = at_once

    def open(self) -> BytesFile:
        """The file, counted."""
        self.opened += 1
        return self

    def choose_way(self) -> int:
        """As it was told."""
        return self._at_once

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Bytes, or an error."""
        self.read.append(offset)
        for place, error in self.lost.items():
            if offset == place or (self._at_once > 1 and offset <= place < offset + len(buffer)):
                raise error
        found = self.data[offset : offset + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Counted."""
        self.closed += 1


# The same for all tests, which lets those use it that Hypothesis calls many times.
@pytest.fixture(scope="session")
def stored() -> type[BytesFile]:
    """What makes a stored file of bytes: ``stored(data)``."""
    return BytesFile


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty place for checkpoints, not made yet."""
    return LocalStore(tmp_path / "run")


@pytest.fixture
def commit(image: Any) -> Callable[..., str]:
    """Makes a checkpoint of one data file: ``commit(store, step, data)`` gives its name."""

    def make(store: LocalStore, step: int, data: bytes = b"data", name: str | None = None) -> str:
        final = name or f"step-{step:012d}"
        pending = store.create(step)
        try:
            pending.write_files({"model.safetensors": image(data)})
            pending.commit(final, b"manifest")
        except BaseException:
            pending.abort()
            raise
        return final

    return make


@pytest.fixture
def contents() -> Callable[[LocalStore], dict[str, dict[str, bytes]]]:
    """Everything that lies in a store, by name and file."""

    def look(store: LocalStore) -> dict[str, dict[str, bytes]]:
        root = Path(store.path)
        return {
            directory.name: {file.name: file.read_bytes() for file in directory.iterdir()}
            for directory in root.iterdir()
            if directory.is_dir()
        }

    return look


def opened(fd: int) -> str:
    """What a descriptor was opened as."""
    return str(Path(f"/proc/self/fd/{fd}").readlink())


class SystemCalls:
    """Sees each call of the kinds that change the disk, from any thread, and may let one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.trace: Trace = []
        self.fault: Fault = lambda name, index: None
        self._root = root
        self._lock = threading.Lock()
        for name in ("mkdir", "open", "write", "pwritev", "fsync", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(fcntl, "flock", self._watched("flock", fcntl.flock))
        monkeypatch.setattr(durable, "_libc", CLibrary(self.see))

    def only(self, *names: str) -> Trace:
        """The trace of some kinds of calls."""
        return [call for call in self.trace if call[0] in names]

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OSError | None:
        """Note a call below the test's directory; the error that it is to fail with."""
        described = (name, *self._described(name, args, kwargs))
        if described[1].startswith(".."):
            return None
        with self._lock:
            error = self.fault(name, len(self.trace))
            self.trace.append(described)
        return error

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return function(*args, **kwargs)
            error = self.see(name, args, kwargs)
            if error is not None:
                raise error
            return function(*args, **kwargs)

        return call

    def _described(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        if name == "renameat2":
            return [self._relative(os.fsdecode(args[1])), self._relative(os.fsdecode(args[3]))]
        if name in ("fsync", "write", "pwritev", "fallocate", "flock"):
            return [self._relative(opened(args[0]))]
        directory = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
        base = Path() if directory is None else Path(opened(directory))
        names = args[:2] if name == "rename" else args[:1]
        return [self._relative(str(base / str(item))) for item in names]

    def _relative(self, path: str) -> str:
        shown = re.sub(r"\.tmp-[^/]*", "TMP", path)
        shown = re.sub(r"(\.trash|\.aside)-[0-9a-f]{16}", r"\1", shown)
        return os.path.relpath(shown, self._root) if shown.startswith("/") else shown


class CLibrary:
    """The C library, some of whose calls are seen before they happen, and may fail."""

    def __init__(self, see: Callable[[str, tuple[Any, ...], dict[str, Any]], OSError | None]) -> None:
        self._see = see
        self._library = ctypes.CDLL(None, use_errno=True)

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._library, name)

        def call(*args: Any) -> int:
            error = self._see(name, args, {}) if name in ("renameat2", "fallocate") else None
            if error is None:
                return int(function(*args))
            ctypes.set_errno(error.errno or 0)
            return -1

        return call


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SystemCalls:
    """A watch over the system calls of this test."""
    return SystemCalls(monkeypatch, tmp_path)


@pytest.fixture
def refuse_in_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Lets a function of the C library fail: ``refuse_in_c("fallocate", errno.EINVAL)``."""

    def refuse(function: str, code: int) -> None:
        error = OSError(code, os.strerror(code))
        library = CLibrary(lambda name, args, kwargs: error if name == function else None)
        monkeypatch.setattr(durable, "_libc", library)

    return refuse


@pytest.fixture(params=[errno.EINVAL, errno.ENOSYS], ids=["EINVAL", "ENOSYS"])
def no_renameat2(request: pytest.FixtureRequest, refuse_in_c: Callable[[str, int], None]) -> None:
    """A file system or kernel without renameat2's flags."""
    refuse_in_c("renameat2", request.param)


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
