"""Serves one file, the image of a disk, and records every write and every flush that reaches it, in order.

    python tests/torture/lab/blockserver.py IMAGE DIRECTORY LOG

The file ``DIRECTORY/image`` then is IMAGE, by way of FUSE, for a loop device to stand on. Each line on standard input
is answered with the number of records so far; at its end, everything is taken away.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mfusepy

from lab.records import Record, Write, append


class Image(mfusepy.Operations):  # type: ignore[misc]  # it is published without types
    """The one file; the methods are those of the interface, called one at a time.

    Attributes:
        count: of the records.
    """

    use_ns = True

    def __init__(self, image: str, log: str) -> None:
        self.count = 0
        self._image = os.open(image, os.O_RDWR)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """Of the file, or of its directory."""
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path == "/image":
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": os.fstat(self._image).st_size}
        raise mfusepy.FuseOSError(errno.ENOENT)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """As it is."""
        return os.pread(self._image, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """And record it."""
        self._record(Write(offset, data))
        return os.pwrite(self._image, data, offset)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """A flush: what was written before is durable."""
        self._record(None)
        return 0

    def _record(self, record: Record) -> None:
        append(self._log, record)
        self.count += 1


def main() -> None:
    """Serve until standard input ends."""
    image, directory, log = sys.argv[1:]
    served = Image(image, log)

    def answer() -> None:
        for _ in sys.stdin:
            sys.stdout.write(f"{served.count}\n")
            sys.stdout.flush()
        # A loop device may still hold the file, which then goes when that does.
        subprocess.run(["fusermount3", "-u", "-z", "-q", directory], check=False)

    threading.Thread(target=answer, daemon=True).start()
    mfusepy.FUSE(served, directory, foreground=True, nothreads=True, fsname="holdfast", attr_timeout=3600)


if __name__ == "__main__":
    main()
