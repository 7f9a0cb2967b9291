"""The file systems of the laboratory leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from lab.volumes import Volume

MakeVolume = Callable[[str], Volume]


def test_of_a_killed_process_no_mount_and_no_loop_device_stays(
    volume: MakeVolume, in_a_fork: Callable[[Callable[[], object]], int], tmp_path: Path
) -> None:
    """Whoever is killed while a file system of its own is mounted leaves neither that nor its loop device."""
    made = volume("ext4")
    path = tmp_path / "mounted"
    path.mkdir()

    def be_killed() -> None:
        own = Volume(made.kind, made.image, path)
        own.mount()
        (tmp_path / "device").write_text(f"{own.device} {own.keeper}")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(be_killed) == -signal.SIGKILL
    device, keeper = (tmp_path / "device").read_text().split()
    _wait_for_the_end_of(int(keeper))
    left = subprocess.run(["losetup", "-n", "-O", "NAME", "-j", made.image], capture_output=True, text=True, check=True)
    assert (device in left.stdout.split(), path.is_mount()) == (False, False)


def _wait_for_the_end_of(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 60) == ([fd], [], []), f"process {pid} does not end"
    finally:
        os.close(fd)
