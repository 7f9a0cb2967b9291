"""What the tests of the storage share."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.storage import durable
from holdfast.storage.local import LocalStore

Trace = list[tuple[str, ...]]
Fault = Callable[[str, int], OSError | None]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty place for checkpoints, not made yet."""
    return LocalStore(tmp_path / "run")


@pytest.fixture
def commit() -> Callable[..., str]:
    """Makes a checkpoint of one data file: ``commit(store, step, data)`` gives its name."""

    def make(store: LocalStore, step: int, data: bytes = b"data", name: str | None = None) -> str:
        final = name or f"step-{step:012d}"
        pending = store.create(step)
        try:
            pending.write_file("model.safetensors", [data], len(data))
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
    """Sees each call of the kinds that change the disk, and may let one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.trace: Trace = []
        self.fault: Fault = lambda name, index: None
        self._root = root
        for name in ("mkdir", "open", "write", "fsync", "posix_fallocate", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(durable, "_renameat2", self._watched("renameat2", durable._renameat2))
        monkeypatch.setattr(fcntl, "flock", self._watched("flock", fcntl.flock))

    def only(self, *names: str) -> Trace:
        """The trace of some kinds of calls."""
        return [call for call in self.trace if call[0] in names]

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return function(*args, **kwargs)
            described = (name, *self._described(name, args, kwargs))
            error = self.fault(name, len(self.trace))
            self.trace.append(described)
            if error is not None:
                raise error
            return function(*args, **kwargs)

        return call

    def _described(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        if name == "renameat2":
            return [self._relative(str(args[1])), self._relative(str(args[2]))]
        if name in ("fsync", "write", "posix_fallocate", "flock"):
            return [self._relative(opened(args[0]))]
        directory = kwargs.get("dir_fd", kwargs.get("src_dir_fd"))
        base = Path() if directory is None else Path(opened(directory))
        names = args[:2] if name == "rename" else args[:1]
        return [self._relative(str(base / str(item))) for item in names]

    def _relative(self, path: str) -> str:
        shown = re.sub(r"\.tmp-[^/]*", "TMP", path)
        shown = re.sub(r"(\.trash|\.aside)-[0-9a-f]{16}", r"\1", shown)
        return os.path.relpath(shown, self._root) if shown.startswith("/") else shown


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SystemCalls:
    """A watch over the system calls of this test."""
    return SystemCalls(monkeypatch, tmp_path)


class Refusing:
    """A C library whose renameat2 fails."""

    def __init__(self, code: int) -> None:
        self._code = code

    def renameat2(self, *args: object) -> int:
        """Refuse."""
        ctypes.set_errno(self._code)
        return -1


@pytest.fixture(params=[errno.EINVAL, errno.ENOSYS], ids=["EINVAL", "ENOSYS"])
def no_renameat2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system or kernel without renameat2's flags."""
    monkeypatch.setattr(durable, "_libc", Refusing(request.param))


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
