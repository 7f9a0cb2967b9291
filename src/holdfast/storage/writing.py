"""From memory to files: gathering, checksums and writes of different parts at the same time.

Past the page cache where the file system takes it: nothing is copied once more, and nothing is left for the fsync to
write. Memory holds a few parts, however large the files are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from holdfast.errors import storage_errors
from holdfast.format.records import CHUNK_BYTES, FileRecord
from holdfast.storage import direct, durable, memory
from holdfast.storage.arena import MemoryImage
from holdfast.storage.chunks import digest
from holdfast.storage.durable import Descriptor
from holdfast.storage.store import FileImage
from holdfast.storage.workers import default_threads, in_parallel

MAX_OPEN_FILES = 64
PART_BYTES = 8 * 2**20
MAX_THREADS = 3
"""More do not make a disk faster: three keep one writing while another gathers (benchmarks/README.md)."""


def gather(
    images: Mapping[str, FileImage],
    slots: Mapping[str, memoryview],
    threads: int,
    begins: Mapping[str, Iterable[int]] | None = None,
) -> None:
    """Copy each image into its slot. Blocks.

    Args:
        images: what to copy, by name.
        slots: where to.
        threads: how many copy, unless there is little to copy.
        begins: where the parts of :data:`PART_BYTES` begin that have something; by default all have.
    """
    tasks = [
        (image, begin, slots[name][begin : begin + PART_BYTES])
        for name, image in images.items()
        for begin in (range(0, len(slots[name]), PART_BYTES) if begins is None else begins[name])
    ]

    def work(task: tuple[FileImage, int, memoryview]) -> None:
        image, begin, room = task
        found = image.read(begin, room)
        if found is not room:
            room[:] = found

    in_parallel(tasks, lambda: work, threads)


def write_files(directory: Descriptor, images: Mapping[str, FileImage], path: str) -> dict[str, FileRecord]:
    """Write new files into ``directory``, which is shown as ``path``, durably. Blocks.

    Space is reserved before the first byte is written. Files are synced together, so that the file system can put what
    it has to say about them into one transaction of its journal. Both hold for :data:`MAX_OPEN_FILES` at a time.
    """
    names = list(images)
    records = {}
    for first in range(0, len(names), MAX_OPEN_FILES):
        some = names[first : first + MAX_OPEN_FILES]
        records.update(_write_together(directory, {name: images[name] for name in some}, path))
    return records


def _write_together(directory: Descriptor, images: Mapping[str, FileImage], path: str) -> dict[str, FileRecord]:
    threads = min(MAX_THREADS, default_threads())
    with ExitStack() as opened:
        targets = {
            name: _Target(_created(opened, directory, name, path), image, os.path.join(path, name))
            for name, image in images.items()
        }
        for target in targets.values():
            target.reserve()
        tasks = [(target, begin) for target in targets.values() for begin in target.parts()]
        largest = max((target.room_bytes for target in targets.values()), default=0)
        in_parallel(tasks, lambda: _worker(largest), threads)
        in_parallel(targets.values(), lambda: _Target.finish, threads)
        return {name: target.record() for name, target in targets.items()}


def _created(opened: ExitStack, directory: Descriptor, name: str, path: str) -> Descriptor:
    with storage_errors("cannot write", os.path.join(path, name)):
        return opened.enter_context(durable.create_file(directory, name))


def _worker(buffer_bytes: int) -> Callable[[tuple[_Target, int]], None]:
    buffer = memory.allocate(buffer_bytes)
    return lambda task: task[0].write_part(task[1], buffer)


class _Target:
    """A file that is being written, by several threads."""

    def __init__(self, file: Descriptor, image: FileImage, path: str) -> None:
        self.file = file
        self.path = path
        self.nbytes = image.nbytes
        self._image = image
        self._digests = [""] * -(-image.nbytes // CHUNK_BYTES)
        self._alignment = direct.enable(file) if image.nbytes >= direct.PAGE_BYTES else 0
        self._tail = b""

    @property
    def room_bytes(self) -> int:
        """What gathering a part of it takes: nothing where the bytes lie in memory as they will in the file."""
        return 0 if isinstance(self._image, MemoryImage) else min(PART_BYTES, self.nbytes)

    def reserve(self) -> None:
        """Have the space that the file will take, or fail."""
        with storage_errors("cannot write", self.path):
            durable.preallocate(self.file, self.nbytes)

    def parts(self) -> Iterator[int]:
        """Where each part begins."""
        return iter(range(0, self.nbytes, PART_BYTES))

    def write_part(self, begin: int, buffer: memoryview) -> None:
        """Gather, hash and write the part that begins at ``begin``."""
        end = min(begin + PART_BYTES, self.nbytes)
        views = []
        for at in range(begin, end, CHUNK_BYTES):
            nbytes = min(at + CHUNK_BYTES, end) - at
            if isinstance(self._image, MemoryImage):
                view = self._image.view(at, nbytes)
            else:
                view = self._image.read(at, buffer[at - begin : at - begin + nbytes])
            if len(view) != nbytes:
                raise ValueError(f"{self.path}: {nbytes} bytes were planned at {at}, {len(view)} came")
            self._digests[at // CHUNK_BYTES] = digest(view)
            views.append(view)
        alignment = self._alignment  # another thread may give it up meanwhile
        if alignment and end % alignment:
            # Only the end of the file. It goes through the page cache when all else is written: a block that is not
            # full cannot go past it.
            rest = end % alignment
            last = views.pop()
            whole, self._tail = last[: len(last) - rest], bytes(last[len(last) - rest :])
            views += [whole] if len(whole) else []
        self._write(begin, views, alignment)

    def finish(self) -> None:
        """Write what is left and make the file durable."""
        with storage_errors("cannot write", self.path):
            if self._tail:
                self._pass_through_cache()
                durable.write_at(self.file, self.nbytes - len(self._tail), [memoryview(self._tail)])
            durable.sync_file(self.file)

    def record(self) -> FileRecord:
        """The record of what was written."""
        return FileRecord(bytes=self.nbytes, chunk_bytes=CHUNK_BYTES, xxh3_128=tuple(self._digests))

    def _write(self, begin: int, views: Sequence[memoryview], alignment: int) -> None:
        with storage_errors("cannot write", self.path):
            try:
                durable.write_at(self.file, begin, views)
            except OSError as error:
                if error.errno != errno.EINVAL or not alignment:
                    raise
                # Some file systems take the flag and refuse the writes. The same bytes again, the ordinary way.
                self._pass_through_cache()
                durable.write_at(self.file, begin, views)
        if not self._alignment:
            durable.begin_writeback(self.file, begin, sum(map(len, views)))

    def _pass_through_cache(self) -> None:
        direct.disable(self.file)
        self._alignment = 0
