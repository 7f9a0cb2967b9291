"""Removing what no reader shall find any more: the rest of removed checkpoints, and what dead writers left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Sequence

from holdfast.format.names import (
    MANIFEST,
    CheckpointName,
    TemporaryName,
    host_label,
    is_auxiliary,
    is_data_file_name,
    is_probe,
    is_staged_annotations,
    is_trash,
    parse_aside,
    probe_name,
)
from holdfast.storage import durable
from holdfast.storage.durable import Descriptor, Lock

# A writer on another host is given up for dead only after this long without a sign of life, by the file system's own
# clock, and only when its lock is free as well: some network file systems keep locks to one host.
FOREIGN_IDLE_S = 3600.0


def clean(parent: Descriptor, names: Sequence[str]) -> list[str]:
    """Remove what dead writers left of ``names`` in ``parent``, as far as it is certain that they are dead.

    Returns:
        What was removed.
    """
    removed = []
    durable.unlink_files(parent, filter(is_probe, names))
    for name in names:
        unfinished = is_trash(name) or parse_aside(name) or TemporaryName.parse(name)
        if not unfinished and CheckpointName.parse(name) is None:
            continue
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            durable.open_directory(name, parent) as directory,
        ):
            if not unfinished:
                _remove_staged(directory)
            elif _is_abandoned(name, directory, parent) and remove_rest(parent, name, directory):
                removed.append(name)
    return removed


def discard(parent: Descriptor, name: str) -> None:
    """Remove a checkpoint that has been renamed out of sight, unless it is being read; then ``clean`` will."""
    with contextlib.suppress(FileNotFoundError), durable.open_directory(name, parent) as directory:
        if durable.lock_exclusive(directory) is not Lock.BUSY:
            remove_rest(parent, name, directory)


def remove_rest(parent: Descriptor, name: str, directory: Descriptor) -> bool:
    """Unlink the files of a removed or abandoned checkpoint; the manifest first, so that no half of it looks whole.

    What is not a checkpoint's is left, and with it the directory.
    """
    found = os.listdir(directory.fd)
    ours = [file for file in found if file != MANIFEST and (is_auxiliary(file) or is_data_file_name(file))]
    durable.unlink_files(directory, [MANIFEST, *ours])
    return durable.remove_directory(parent, name)


def _is_abandoned(name: str, directory: Descriptor, parent: Descriptor) -> bool:
    lock = durable.lock_exclusive(directory)
    if lock is Lock.BUSY or not durable.is_same_directory(directory, parent, name):
        return False
    if is_trash(name):
        return True  # its removal was decided, and no reader holds it
    successor = parse_aside(name)
    if successor is not None:
        return durable.exists(parent, successor)
    temporary = TemporaryName.parse(name)
    assert temporary is not None
    if temporary.host == host_label(socket.gethostname()):
        return lock is Lock.HELD or not _is_alive(temporary.pid)
    return lock is Lock.HELD and _idle_s(directory, parent) > FOREIGN_IDLE_S


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _idle_s(directory: Descriptor, parent: Descriptor) -> float:
    """Seconds since anything changed in ``directory``, by the clock of its file system, not by this host's."""
    newest = os.fstat(directory.fd).st_mtime
    for name in os.listdir(directory.fd):
        newest = max(newest, os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_mtime)
    probe = probe_name(secrets.token_hex(8))
    try:
        with durable.create_file(parent, probe) as file:
            return os.fstat(file.fd).st_mtime - newest
    finally:
        durable.unlink_files(parent, [probe])


def _remove_staged(directory: Descriptor) -> None:
    """Unlink annotations that were about to replace others when their writer died."""
    for name in filter(is_staged_annotations, os.listdir(directory.fd)):
        with contextlib.suppress(FileNotFoundError, ValueError), durable.open_file(directory, name) as file:
            if durable.lock_exclusive(file) is Lock.HELD:
                durable.unlink_files(directory, [name])
