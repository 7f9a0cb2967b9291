"""Past the page cache, or not."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.storage import direct, durable, memory
from holdfast.storage.durable import Descriptor


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Descriptor]:
    """A new file for writing."""
    with durable.open_directory(str(tmp_path)) as here, durable.create_file(here, "a") as opened:
        yield opened


def is_direct(file: Descriptor) -> bool:
    """Whether its writes go past the page cache."""
    return bool(fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT)


class Kernel:
    """A C library whose ``statx`` says what it is told to; with ``known`` False it does not know what is asked."""

    def __init__(self, in_memory: int = 0, in_file: int = 0, known: bool = True, result: int = 0) -> None:
        self._fields = {0: 0x2000 if known else 0, 152: in_memory, 156: in_file}
        self._result = result

    def statx(self, fd: int, path: bytes, flags: int, mask: int, buffer: Any) -> int:
        """Fill struct statx: stx_mask, stx_dio_mem_align and stx_dio_offset_align."""
        for at, value in self._fields.items():
            ctypes.memmove(ctypes.addressof(buffer) + at, value.to_bytes(4, sys.byteorder), 4)
        return self._result


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Kernel(in_memory=512, in_file=512), 4096),
        (Kernel(in_memory=4, in_file=4096), 4096),
        (Kernel(in_memory=4096, in_file=65536), 65536),
        (Kernel(in_memory=0, in_file=0), 0),
        (Kernel(in_memory=512, in_file=0), 0),
        (Kernel(in_memory=8192, in_file=4096), 0),
        (Kernel(known=False), 4096),
        (Kernel(in_memory=512, in_file=65536, result=-1), 4096),
        (object(), 4096),
        (None, 4096),
    ],
    ids=[
        *("small sectors", "4096", "large blocks", "not for this file", "no offset", "more than a page"),
        *("older kernel", "failing", "older C library", "no C library"),
    ],
)
def test_what_the_kernel_says_is_done(
    file: Descriptor, monkeypatch: pytest.MonkeyPatch, kernel: object, expected: int
) -> None:
    """Pages at least, the file system's blocks where they are larger; not at all where it does not take it."""
    monkeypatch.setattr(direct, "_libc", kernel)
    monkeypatch.setattr(fcntl, "fcntl", taking_the_flag(fcntl.fcntl))
    assert direct.enable(file) == expected


def taking_the_flag(real: Callable[..., int]) -> Callable[..., int]:
    """A file system that takes O_DIRECT."""
    return lambda fd, command, argument=0: 0 if command == fcntl.F_SETFL else real(fd, command, argument)


def test_it_is_switched_on_and_off(file: Descriptor) -> None:
    """The flag is set where an alignment is returned, and nowhere else; and it goes again, alone."""
    before = fcntl.fcntl(file.fd, fcntl.F_GETFL)
    alignment = direct.enable(file)
    assert is_direct(file) is (alignment > 0)
    direct.disable(file)
    assert fcntl.fcntl(file.fd, fcntl.F_GETFL) == before


def test_what_is_enabled_can_be_written(file: Descriptor, tmp_path: Path) -> None:
    """Memory of ours at a multiple of the alignment is taken, and the bytes are there."""
    alignment = direct.enable(file)
    if not alignment:
        pytest.skip("this file system does not take direct I/O")
    buffer = memory.allocate(2 * alignment)
    buffer[:] = bytes(range(256)) * (2 * alignment // 256)
    durable.write_at(file, 0, [buffer])
    durable.sync_file(file)
    assert (tmp_path / "a").read_bytes() == bytes(buffer)


def test_a_file_system_that_does_not_take_it(file: Descriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is refused: 0, and the file is as it was."""
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert (direct.enable(file), is_direct(file)) == (0, False)


def test_a_file_that_the_kernel_says_no_of(file: Descriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is not even set: some file systems take it, and copy twice."""
    monkeypatch.setattr(direct, "_libc", Kernel(in_memory=0, in_file=0))
    assert (direct.enable(file), is_direct(file)) == (0, False)


def test_a_system_without_it(file: Descriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to set, nor to take back."""
    before = fcntl.fcntl(file.fd, fcntl.F_GETFL)
    monkeypatch.delattr(os, "O_DIRECT")
    enabled = direct.enable(file)
    direct.disable(file)
    assert (enabled, fcntl.fcntl(file.fd, fcntl.F_GETFL)) == (0, before)
