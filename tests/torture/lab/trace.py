"""System calls of a process under test, recorded by strace: what it did to its disk, in order, with every byte.

strace prints strings and paths as hex (``-xx``) and descriptors with the path that they have at that moment (``-y``),
so that a call says by itself which file it meant, whatever was renamed since.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.marks import PREFIX

RECORDED = (
    *("open", "openat", "creat", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat"),
    *("rmdir", "rename", "renameat", "renameat2", "truncate", "ftruncate", "fallocate", "lseek", "dup3"),
    *("write", "pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile"),
    *("fsync", "fdatasync", "sync_file_range", "sync", "syncfs", "msync", "sendto"),
)
"""Everything that changes names or contents, makes them durable, or moves a file's position; sendto has the marks."""

_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?)", re.DOTALL)
_BEGUN = re.compile(r"(\d+) +(\w+)\((.*?),? ?<unfinished \.\.\.>$", re.DOTALL)
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)$", re.DOTALL)
_TOKEN = re.compile(
    r"""(?P<fd>(?:AT_FDCWD|\d+)<(?P<path>(?:\\x[0-9a-f]{2})*)>(?P<gone>\(deleted\))?)"""
    r"""|"(?P<text>(?:\\x[0-9a-f]{2})*)"(?P<cut>\.\.\.)?"""
    r"""|(?P<word>[-A-Za-z0-9_|]+)"""
)


@dataclass(frozen=True, slots=True)
class Fd:
    """A descriptor, by the path that it had; None when its name was gone."""

    number: int
    path: str | None


Argument = Fd | bytes | str


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that succeeded: its name, its arguments in order, and what it returned."""

    name: str
    arguments: tuple[Argument, ...]
    result: int


class StraceError(RuntimeError):
    """strace did not do what it should."""


class Strace:
    """strace beside a process that runs already.

    Args:
        pid: the process, with all that it starts.
        options: more for strace, such as ``-e inject=...``.
        output: where it writes what it saw.
        follow: also watch the threads and processes that it starts.
    """

    def __init__(self, pid: int, options: Iterable[str], output: Path, *, follow: bool = True) -> None:
        command = ["strace", *(["-f"] if follow else []), "-p", str(pid), "-o", str(output), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        # Not before it says so does it see every call: the kernel names it the tracer earlier.
        said = self._process.stderr.readline()
        if " attached" not in said:
            raise StraceError(f"strace cannot attach: {said}{self.end()}")

    def end(self) -> str:
        """Wait for it, which ends with what it watches; returns what it complained of."""
        return self._process.communicate(timeout=60)[1]


def record_options() -> list[str]:
    """For strace, to record what :func:`calls` reads."""
    names = ",".join(f"?{name}" for name in RECORDED)  # some systems have not all of them
    return ["-y", "-xx", "-s", "67108864", "-e", f"trace={names}", "-e", "signal=none"]


def calls(recording: str) -> Iterator[Call]:
    """The calls that succeeded, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in recording.splitlines():
        unfinished = _BEGUN.match(line)
        if unfinished is not None:
            begun[unfinished[1]] = f"{unfinished[1]} {unfinished[2]}({unfinished[3]}"
            continue
        resumed = _RESUMED.match(line)
        whole = line if resumed is None else begun.pop(resumed[1]) + resumed[3]
        match = _CALL.match(whole)
        if match is None or match[4] == "?" or int(match[4]) < 0:
            continue  # it failed, or is no call: a process that ended, say
        yield Call(match[2], tuple(_arguments(match[3])), int(match[4]))


def is_mark(call: Call) -> bool:
    """Whether the process said something with it."""
    said = call.arguments[1] if call.name == "sendto" else None
    return isinstance(said, bytes) and said.startswith(PREFIX.encode())


def _arguments(text: str) -> Iterator[Argument]:
    for token in _TOKEN.finditer(text):
        if token["cut"]:
            raise StraceError("strace did not print a string to its end")
        if token["fd"] is not None:
            number = token["fd"].partition("<")[0]
            path = None if token["gone"] else _text(token["path"]).decode()
            yield Fd(-100 if number == "AT_FDCWD" else int(number), path)
        elif token["text"] is not None:
            yield _text(token["text"])
        elif token["word"] not in ("iov_base", "iov_len"):
            yield token["word"]


def _text(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))
