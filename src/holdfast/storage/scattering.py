"""A new file whose bytes come in any order, from several threads; it has its name when it is whole and durable."""

from __future__ import annotations

import contextlib
import math
import os
import secrets

from holdfast.errors import CheckpointExistsError, storage_errors
from holdfast.format.names import export_name
from holdfast.storage import durable, memory


class ScatteredFile:
    """Such a file. Until it is published it has a hidden name beside its own, which a dead process leaves behind.

    Args:
        path: what it is to be called; nothing may be there.
        nbytes: its size; the space is reserved at once.

    Raises:
        CheckpointExistsError: something is there.
        DiskFullError: there is no space for it.
    """

    def __init__(self, path: str, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        parent, self._name = os.path.split(path)
        self._hidden = export_name(secrets.token_hex(8))
        self._published = False
        with contextlib.ExitStack() as opened:
            with storage_errors("cannot write", path):
                self._parent = opened.enter_context(durable.open_directory(parent))
                if durable.exists(self._parent, self._name):
                    raise self._taken()
                self._file = opened.enter_context(durable.create_file(self._parent, self._hidden))
                opened.callback(self._remove)
                durable.preallocate(self._file, nbytes)
            self._opened = opened.pop_all()

    def write(self, at: int, data: memoryview) -> None:
        """Write some of it."""
        with storage_errors("cannot write", self.path):
            durable.write_at(self._file, at, [data])

    def publish(self) -> None:
        """Make it durable, and give it its name.

        Raises:
            CheckpointExistsError: something has come to be there meanwhile.
        """
        with storage_errors("cannot write", self.path):
            durable.sync_file(self._file)
            try:
                durable.publish(self._parent, self._hidden, self._name)
            except FileExistsError as error:
                raise self._taken() from error
            self._published = True
            durable.sync_directory(self._parent)

    def close(self) -> None:
        """Let go of it; where it was not published, nothing is left."""
        self._opened.close()

    def __enter__(self) -> ScatteredFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _remove(self) -> None:
        if not self._published:
            with contextlib.suppress(OSError):
                durable.unlink_files(self._parent, [self._hidden])

    def _taken(self) -> CheckpointExistsError:
        return CheckpointExistsError(f"{self.path} exists already; it was left as it is.", path=self.path)


class BoxWriter:
    """Takes the bytes of a box of a tensor, in logical order, to where they belong in the file that holds all of it.

    Args:
        file: the file.
        begin: where the tensor begins in it.
        itemsize: bytes of an element.
        shape: of the tensor.
        offset: of the box in it; empty for its origin.
        size: the shape of the box.
    """

    def __init__(
        self,
        file: ScatteredFile,
        begin: int,
        itemsize: int,
        shape: tuple[int, ...],
        offset: tuple[int, ...],
        size: tuple[int, ...],
    ) -> None:
        self._file = file
        strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
        self._begin = begin + sum(at * stride for at, stride in zip(offset, strides, strict=bool(offset)))
        # What lies one behind the other in the box and in the tensor, beginning with the last dimension that is cut.
        cut = max(
            (axis for axis, (part, whole) in enumerate(zip(size, shape, strict=True)) if part != whole), default=0
        )
        self._run_bytes = math.prod(size[cut:]) * itemsize
        self._outer = list(zip(reversed(size[:cut]), reversed(strides[:cut]), strict=True))

    def __call__(self, offset: int, address: int, nbytes: int) -> None:
        """See ``Sink``."""
        end = offset + nbytes
        while offset < end:
            run, within = divmod(offset, self._run_bytes)
            count = min(self._run_bytes - within, end - offset)
            self._file.write(self._place(run) + within, memory.view_at(address, count))
            offset += count
            address += count

    def _place(self, run: int) -> int:
        place = self._begin
        for size, stride in self._outer:
            run, at = divmod(run, size)
            place += at * stride
        return place
