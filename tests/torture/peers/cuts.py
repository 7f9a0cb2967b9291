"""Real power cuts: a file system is cut off right after a save was acknowledged, and mounted again.

Everything before that save was made durable: checkpoints lie minutes apart, and file systems write within seconds.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.marks import MUST, Mark, Promises
from lab.subject import Subjects
from lab.volumes import DROP_ALL, FLUSH_JOURNAL, KINDS, Volume, cut_off, make_file_system

from peers.peer import LAST, Peer
from peers.verdict import Harm, Tally, harms

FILE_SYSTEMS = ("ext4", "xfs")


class Cuts:
    """Of one peer.

    Args:
        subjects: starts its processes.
        peer: the peer.
        scratch: where the devices' files lie.
    """

    def __init__(self, subjects: Subjects, peer: Peer, scratch: Path) -> None:
        self._subjects = subjects
        self._peer = peer
        self._scratch = scratch

    def tally(self, kind: str, count: int) -> Tally:
        """What cuts show on one kind of file system: after each save, with nothing flushed and with the journal."""
        tally = Tally()
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        image, mounted = folder / "image", folder / "mounted"
        mounted.mkdir()
        make_file_system(KINDS[kind], image)
        with Volume(KINDS[kind], image, mounted) as volume:
            for index in range(count):
                flags = (DROP_ALL, FLUSH_JOURNAL)[index % 2]
                tally.add(self._cut(volume, 1 + index // 2 % LAST, flags))
        shutil.rmtree(folder)
        return tally

    def _cut(self, volume: Volume, after: int, flags: int) -> set[Harm]:
        said: list[Mark] = []
        acknowledged = 0

        def hear(mark: Mark) -> None:
            nonlocal acknowledged
            if acknowledged == after:  # against a dead disk, and not to be believed
                return
            said.append(mark)
            if mark.kind == MUST:
                acknowledged += 1
                if acknowledged == after:
                    with _opened(volume.path) as fd:
                        cut_off(fd, flags)
                else:
                    with _opened(volume.path) as fd:
                        ctypes.CDLL(None).syncfs(fd)  # and no other file system: beside this, others lose theirs

        volume.mount()
        directory = Path(tempfile.mkdtemp(dir=volume.path))
        self._subjects.run(self._peer.name, directory, hear=hear)
        volume.unmount()
        volume.mount()
        found = harms(self._peer, directory, Promises.of(said))
        shutil.rmtree(directory)
        volume.unmount()
        return found


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
