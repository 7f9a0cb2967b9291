"""A committed checkpoint in a directory of a POSIX file system, open for reading.

Everything goes by the open directory, and never through a link: what was checked is what is read.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os

from holdfast.storage import direct, durable
from holdfast.storage.durable import Descriptor
from holdfast.storage.residency import cached_share

DIRECT_READ_BYTES = 8 * 2**20
"""What is asked for at once past the page cache. Less leaves the disk idle in between."""
MOSTLY = 0.5
"""With more than this share of a file in the page cache, it is read through it."""
_COMPARED_BYTES = 2**20


class LocalFile:
    """A file of a committed checkpoint."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._direct_once = False  # whether reads were sent past the page cache; threads may still be on their way
        try:
            self.nbytes = os.fstat(descriptor.fd).st_size
        except OSError:
            descriptor.close()
            raise

    def choose_way(self) -> int:
        """Past the page cache where the file is not in it; the answer is how many bytes to ask for at a time.

        Decided once for the file: asking for each chunk whether it is there starts the kernel's read-ahead, which then
        competes with the reads (two to four times slower, measured).
        """
        if self.nbytes < DIRECT_READ_BYTES or cached_share(self._descriptor, self.nbytes) > MOSTLY:
            return 1
        alignment = direct.enable(self._descriptor)
        self._direct_once = 0 < alignment <= direct.PAGE_BYTES
        return DIRECT_READ_BYTES if self._direct_once else 1

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; returns how many bytes there were."""
        try:
            return self._fill(offset, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct_once:
                raise
        # Some file systems take the flag and refuse the reads. The same bytes again, the ordinary way.
        direct.disable(self._descriptor)
        return self._fill(offset, buffer)

    def read_all(self, offset: int) -> bytes:
        """Everything from ``offset``, in one piece, copied once."""
        parts = []
        while offset < self.nbytes:
            part = os.pread(self._descriptor.fd, self.nbytes - offset, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self, offset: int, buffer: memoryview) -> int:
        """Past the page cache, what stops in the middle of a block has reached the end: nothing is asked for there."""
        done = 0
        while done < len(buffer) and offset + done < self.nbytes:
            count = os.preadv(self._descriptor.fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def map(self) -> memoryview:
        """All of it as memory, with a private copy of each page that is written to."""
        if self.nbytes == 0:  # of which there is no mapping
            return memoryview(bytearray())
        return memoryview(mmap.mmap(self._descriptor.fd, self.nbytes, access=mmap.ACCESS_COPY))

    def close(self) -> None:
        """Let go of it."""
        self._descriptor.close()

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LocalCheckpoint:
    """A committed checkpoint, open for reading."""

    def __init__(self, path: str, directory: Descriptor) -> None:
        self.path = path
        self._directory = directory

    def is_current(self) -> bool:
        """Whether it still stands under its name."""
        parent, name = os.path.split(self.path)
        try:
            with durable.open_directory(parent) as above:
                return durable.is_same_directory(self._directory, above, name)
        except FileNotFoundError:
            return False

    def names(self, limit: int) -> list[str]:
        """The files it holds, listed or not; no more than ``limit`` of them."""
        with os.scandir(self._directory.fd) as entries:
            return [entry.name for entry in itertools.islice(entries, limit)]

    def read_whole(self, name: str, limit_bytes: int, begin: bytes = b"") -> bytes:
        """A small file in one piece."""
        with self.open_file(name) as file:
            if file.nbytes > limit_bytes:
                raise ValueError(f"{name} has {file.nbytes} bytes, more than the {limit_bytes} that it may have")
            # Before there is memory for all of it: a file that is nothing but a hole has any size.
            first = memoryview(bytearray(len(begin)))
            if bytes(first[: file.read_into(0, first)]) != begin[: file.nbytes]:
                raise ValueError(f"{name} does not begin with {begin.decode()}")
            return file.read_all(0)

    def is_whole(self, name: str, data: bytes) -> bool:
        """Whether a file holds ``data`` and nothing else."""
        with self.open_file(name) as file:
            room = memoryview(bytearray(min(len(data), _COMPARED_BYTES)))
            return file.nbytes == len(data) and all(
                data[at : at + len(room)] == bytes(room[: file.read_into(at, room)])
                for at in range(0, len(data), _COMPARED_BYTES)
            )

    def open_file(self, name: str) -> LocalFile:
        """A file to read from."""
        return LocalFile(durable.open_file(self._directory, name))

    def map_file(self, name: str, nbytes: int) -> memoryview:
        """A whole file as memory, with a private copy of each page that is written to."""
        with self.open_file(name) as file:
            if file.nbytes != nbytes:
                raise ValueError(f"has {file.nbytes} bytes, expected {nbytes}")
            return file.map()

    def lock(self) -> None:
        """Keep others from removing it while it is open."""
        durable.lock_shared(self._directory)

    def close(self) -> None:
        """Let go of it."""
        self._directory.close()
