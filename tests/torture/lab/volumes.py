"""Real file systems, each on a loop device of its own, that can be made, mounted, cut off and mounted again.

Whatever happens to the process that uses one, nothing of it stays: a keeper, a process of its own, waits for its end,
and then takes the mount and the loop device away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import HoldfastError
from lab.judge import Judge
from lab.marks import Promises

FS_IOC_SHUTDOWN = 0x8004587D
FLUSH_JOURNAL, DROP_ALL = 1, 2
"""What still reaches the disk when a file system is cut off: its journal without data, or nothing."""

_MIB = 1024 * 1024
_MNT_DETACH = 2
_PATIENCE_S = 30.0
_KEEPER = """
trap '' INT TERM HUP
for attempt in 1 2 3 4 5; do
    said=$(losetup -f --show "$1" 2>&1) && device=$said && break
done
test -n "$device" || echo "$said" >&2
echo "$device"
read -r end
umount -l "$2" 2>/dev/null
test -z "$device" || losetup -d "$device"
"""
_libc = ctypes.CDLL(None, use_errno=True)


class VolumeError(RuntimeError):
    """No such file system can be had here; says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A file system and how it is made.

    Attributes:
        name: as mount knows it.
        size_bytes: of its device; hardly more than the least that it can do with.
        make: the command that makes it, which is given the path.
        options: to mount it with, the usual ones and those that promise less.
        atom_bytes: what it needs to be written whole or not at all, for it to be mounted again.
    """

    name: str
    size_bytes: int
    make: tuple[str, ...]
    options: tuple[str, ...] = ("",)
    atom_bytes: int = 512


KINDS = {
    kind.name: kind
    for kind in (
        # Superblocks with a checksum are written in place, and are larger than a sector where a sector has 512 bytes.
        Kind("ext4", 64 * _MIB, ("mkfs.ext4", "-q", "-F"), ("", "data=writeback,noauto_da_alloc"), atom_bytes=1024),
        Kind("xfs", 300 * _MIB, ("mkfs.xfs", "-q", "-f")),
        Kind("btrfs", 128 * _MIB, ("mkfs.btrfs", "-q", "-f"), atom_bytes=4096),
    )
}


def make_file_system(kind: Kind, image: Path) -> None:
    """Make a new one in a sparse file; :class:`VolumeError` where that cannot be."""
    for command in (kind.make[0], "losetup", "umount"):
        if shutil.which(command) is None:
            raise VolumeError(f"there is no {command} here")
    if os.geteuid() != 0:
        raise VolumeError("only root can mount file systems")
    if shutil.disk_usage(image.parent).free < kind.size_bytes:
        raise VolumeError(f"there is no room for {kind.name} in {image.parent}")
    with image.open("wb") as file:
        file.truncate(kind.size_bytes)
    done = subprocess.run([*kind.make, str(image)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VolumeError(f"{kind.make[0]} failed: {done.stderr.strip()}")


class Volume:
    """A file with a file system, attached to a loop device. A context manager.

    Args:
        kind: of the file system in it.
        image: the file.
        path: where it is mounted, a directory.

    Attributes:
        device: the loop device.
        keeper: the number of the process that takes everything away.
    """

    def __init__(self, kind: Kind, image: Path, path: Path) -> None:
        self.kind = kind
        self.image = image
        self.path = path
        self._mounted = False
        self._keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, "keeper", str(image), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt at the keyboard is not for it
        )
        assert self._keeper.stdout is not None
        self.keeper = self._keeper.pid
        self.device = self._keeper.stdout.readline().strip()
        if not self.device:
            raise VolumeError(f"there is no loop device here: {self._keeper.communicate()[1].strip()}")

    def mount(self, options: str = "") -> None:
        """Mount it; the file system recovers from whatever it was cut off in."""
        name = self.kind.name.encode()
        if _libc.mount(self.device.encode(), os.fsencode(self.path), name, 0, options.encode()) != 0:
            raise VolumeError(f"{self.kind.name} cannot be mounted here: {os.strerror(ctypes.get_errno())}")
        self._mounted = True

    def unmount(self) -> None:
        """Unmount it; nothing in it may be in use."""
        until = time.monotonic() + _PATIENCE_S
        while _libc.umount2(os.fsencode(self.path), 0) != 0:
            code = ctypes.get_errno()
            if code != errno.EBUSY or time.monotonic() > until:
                raise OSError(code, os.strerror(code), str(self.path))
            gc.collect()  # a descriptor may be held by what nobody needs any more, here or in a process just killed
            time.sleep(0.001)
        self._mounted = False

    def close(self) -> None:
        """Take mount and loop device away."""
        if self._mounted:
            _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        complaints = self._keeper.communicate()[1].strip()
        assert not complaints, complaints

    def __enter__(self) -> Volume:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def cut_off(fd: int, flags: int) -> None:
    """Let nothing more reach the disk of an open file or directory: what is open stays so, and fails."""
    fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", flags))


def examine(judge: Judge, directory: Path, promises: Promises) -> list[str]:
    """Every promise that is broken in what was mounted again; that it can be read at all is one."""
    try:
        return judge.problems(directory, promises)
    except (HoldfastError, OSError) as error:
        return [f"it cannot be judged: {error}"]
