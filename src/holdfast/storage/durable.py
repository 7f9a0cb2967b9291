"""Durability, and all of it: no other module syncs, renames, locks or removes anything.

What each step relies on, and what it does where a file system cannot do it:

=====================  =========================================================================================
file contents          fsync of the file. A failure is final for that descriptor: Linux reports an error once and
                       then forgets the dirty pages (https://wiki.postgresql.org/wiki/Fsync_Errors), so the save
                       fails and new inodes are written by the next attempt.
names                  fsync of the directory. Some file systems (FUSE, SMB) answer EINVAL or ENOTSUP: they keep
                       names by other means or not at all, and there is nothing more to ask for.
space                  fallocate, so that a full disk fails before anything else is tried. Optional.
publishing             renameat2(RENAME_NOREPLACE). Without it, rename: a directory never replaces one that holds
                       something, so the only thing that could be replaced is an empty directory.
replacing              renameat2(RENAME_EXCHANGE). Without it, the old one steps aside first (see ``local``).
sharing                link. Where a file system has no links, or no more of them, the bytes are written again.
exclusion              flock. Released by the kernel when its holder dies, however it dies. Where it is missing,
                       nothing is taken for abandoned unless its writer is known to be dead.
=====================  =========================================================================================
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import os
import stat
import sys
import weakref
from collections.abc import Iterable, Sequence

_NO_SUPPORT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOLCK})
_NO_LINK = _NO_SUPPORT | {errno.ENOENT, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK}
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2


class Lock(enum.Enum):
    """What came of asking for a lock."""

    HELD = "held"
    BUSY = "busy"
    UNSUPPORTED = "unsupported"


class Descriptor:
    """An open file descriptor that is closed once: by ``close``, by garbage collection, or in a forked child.

    A lock belongs to the open file, which a fork shares. A data loader's worker that outlived a killed trainer would
    keep the trainer's locks; so children close their copies at once.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _open_descriptors.add(self)

    def fileno(self) -> int:
        """The descriptor's number."""
        return self.fd

    def close(self) -> None:
        """Close it; with it goes its lock. Never fails: what has to be durable was synced, and close adds nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # Linux has let go of it even so
                os.close(fd)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


_open_descriptors: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _close_in_child() -> None:
    for descriptor in list(_open_descriptors):
        descriptor.close()


os.register_at_fork(after_in_child=_close_in_child)


# ------------------------------------------------------------------------------------------------------- directories


def open_directory(path: str, parent: Descriptor | None = None) -> Descriptor:
    """Open a directory; below ``parent``, never through a symbolic link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if parent is None:
        return Descriptor(os.open(path, flags))
    return Descriptor(os.open(path, flags | os.O_NOFOLLOW, dir_fd=parent.fd))


def make_directories(path: str) -> None:
    """Make ``path`` and what is missing above it; all its names, up to the root of its file system, are then durable.

    Also those that were there already: whoever made them, the user's script or a process that began at the same moment,
    need not have synced them.
    """
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)  # another process may be making the same run
    device = os.stat(path).st_dev
    below = os.path.realpath(path)
    while (above := os.path.dirname(below)) != below and os.stat(above).st_dev == device:
        # One that this user may pass through but not read cannot be synced, and was not made by this user either.
        with contextlib.suppress(PermissionError), open_directory(above) as directory:
            sync_directory(directory)
        below = above


def make_directory(parent: Descriptor, name: str) -> Descriptor | None:
    """Make a new directory in ``parent`` and open it; None when somebody removed it in between."""
    os.mkdir(name, dir_fd=parent.fd)
    try:
        return open_directory(name, parent)
    except FileNotFoundError:
        return None
    except OSError:  # no descriptor left, say
        remove_directory(parent, name)
        raise


def sync_directory(directory: Descriptor) -> None:
    """Make the names in ``directory`` durable, as far as its file system knows how to."""
    try:
        os.fsync(directory.fd)
    except OSError as error:
        if error.errno not in _NO_SUPPORT:
            raise


def is_same_directory(directory: Descriptor, parent: Descriptor, name: str) -> bool:
    """Whether ``name`` in ``parent`` still is the directory that is open as ``directory``."""
    try:
        named = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(directory.fd))


# ------------------------------------------------------------------------------------------------------------- files


def create_file(directory: Descriptor, name: str) -> Descriptor:
    """A new file for writing, with the permissions that the process's umask leaves."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return Descriptor(os.open(name, flags, 0o666, dir_fd=directory.fd))


def open_file(directory: Descriptor, name: str) -> Descriptor:
    """A plain file for reading; ValueError when it is anything else.

    What is checked is what will be read: the descriptor, not the name. O_NONBLOCK keeps a FIFO from blocking the open.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory.fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ValueError(f"{name} is not a plain file") from error
        raise
    descriptor = Descriptor(fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{name} is not a plain file")
    except BaseException:
        descriptor.close()
        raise
    return descriptor


def preallocate(file: Descriptor, nbytes: int) -> None:
    """Reserve the space of a file, so that a full disk is found out before the first byte."""
    if nbytes == 0:
        return
    try:
        _fallocate(file.fd, nbytes)
    except OSError as error:
        # A signal came meanwhile, which some file systems give up for (tmpfs). The writes will find out.
        if error.errno not in _NO_SUPPORT | {errno.EINTR}:
            raise


def _fallocate(fd: int, nbytes: int) -> None:
    """fallocate(2). Not posix_fallocate: where a file system cannot, the C library writes into every block instead."""
    function = getattr(_libc, "fallocate", None)
    if function is None:
        return
    if function(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_all(file: Descriptor, data: memoryview) -> None:
    """Write all of ``data`` at the file's position."""
    while len(data):
        data = data[os.write(file.fd, data) :]


def write_at(file: Descriptor, offset: int, views: Sequence[memoryview]) -> None:
    """Write all of ``views``, one after the other, at ``offset``. Several threads may write different places."""
    left = [view for view in views if len(view)]
    while left:
        count = os.pwritev(file.fd, left, offset)
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def begin_writeback(file: Descriptor, offset: int, nbytes: int) -> None:
    """Have the kernel begin to write what was just written, instead of at the fsync. A hint: nothing relies on it."""
    function = getattr(_libc, "sync_file_range", None)
    if function is not None:
        function(file.fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def sync_file(file: Descriptor) -> None:
    """Make a file's contents durable. Never try again on the same descriptor after a failure."""
    os.fsync(file.fd)


def write_file(directory: Descriptor, name: str, data: bytes) -> None:
    """A new file with ``data``, its contents durable."""
    with create_file(directory, name) as file:
        write_all(file, memoryview(data))
        sync_file(file)


def link_file(source: Descriptor, file: str, directory: Descriptor, name: str, nbytes: int) -> bool:
    """Make ``file`` in ``source`` known as ``name`` in ``directory`` too; False where that cannot be.

    Durable with the next sync of ``directory``: the contents are, since the file belongs to a committed checkpoint.
    """
    try:
        os.link(file, name, src_dir_fd=source.fd, dst_dir_fd=directory.fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    linked = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
    if stat.S_ISREG(linked.st_mode) and linked.st_size == nbytes:
        return True
    unlink_files(directory, [name])
    return False


def append_line(directory: Descriptor, name: str, line: bytes) -> None:
    """Append to a file that nothing depends on; one write, so that lines of several writers do not mix."""
    # O_NONBLOCK: where a FIFO stands in its place, there is an error instead of a wait for its reader.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with Descriptor(os.open(name, flags, 0o666, dir_fd=directory.fd)) as file:
        write_all(file, memoryview(line))


def replace_file(directory: Descriptor, name: str, staged: str, data: bytes) -> None:
    """Replace ``name`` by a file with ``data``, atomically and durably.

    ``staged`` is the name it waits under; it is locked as long as its writer lives.
    """
    try:
        with create_file(directory, staged) as file:
            lock_exclusive(file)
            write_all(file, memoryview(data))
            sync_file(file)
            _rename(directory, staged, name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(staged, dir_fd=directory.fd)
        raise
    sync_directory(directory)


# ----------------------------------------------------------------------------------------------------------- renaming


def publish(parent: Descriptor, name: str, final: str) -> None:
    """Rename ``name`` to ``final`` within ``parent``; FileExistsError when ``final`` is taken. Not yet durable."""
    if _renameat2(parent, name, final, _RENAME_NOREPLACE):
        return
    if exists(parent, final):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final)
    try:
        _rename(parent, name, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final) from error
        raise


def exchange(parent: Descriptor, one: str, other: str) -> bool:
    """Swap two names atomically; False where the file system cannot."""
    return _renameat2(parent, one, other, _RENAME_EXCHANGE)


def move_aside(parent: Descriptor, name: str, aside: str) -> None:
    """Rename ``name`` to ``aside``. Not yet durable."""
    _rename(parent, name, aside)


def exists(parent: Descriptor, name: str) -> bool:
    """Whether ``name`` is there, whatever it is."""
    try:
        os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _rename(directory: Descriptor, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)


def _renameat2(parent: Descriptor, old: str, new: str, flags: int) -> bool:
    """renameat2(2); False where kernel, C library or file system do not have it."""
    function = getattr(_libc, "renameat2", None)
    if function is None:
        return False
    if function(parent.fd, os.fsencode(old), parent.fd, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUPPORT:
        return False
    raise OSError(code, os.strerror(code), new)


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


# ------------------------------------------------------------------------------------------------------------ locking


def lock_exclusive(descriptor: Descriptor, *, wait: bool = False) -> Lock:
    """Ask for the only lock; without waiting, unless told to."""
    return _flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def lock_shared(descriptor: Descriptor) -> Lock:
    """Ask for a reader's lock. Waits for an exclusive one to go: its holders are between two renames, no longer."""
    return _flock(descriptor, fcntl.LOCK_SH)


def _flock(descriptor: Descriptor, operation: int) -> Lock:
    try:
        fcntl.flock(descriptor.fd, operation)
    except BlockingIOError:
        return Lock.BUSY
    except OSError as error:
        if error.errno in _NO_SUPPORT:
            return Lock.UNSUPPORTED
        raise
    return Lock.HELD


def lock_holder(descriptor: Descriptor) -> int | None:
    """The process that holds the lock on the open file, where the kernel tells (Linux); for messages only."""
    inode = str(os.fstat(descriptor.fd).st_ino)
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/locks", encoding="ascii") as table:
        for line in table:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return int(fields[4])
    return None


# ------------------------------------------------------------------------------------------------------------ removal


def unlink_files(directory: Descriptor, names: Iterable[str]) -> None:
    """Unlink plain files by name; one that is gone already is no error, and a directory is not a file."""
    for name in names:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=directory.fd)


def remove_directory(parent: Descriptor, name: str) -> bool:
    """Remove an empty directory; False when it is not empty (or gone)."""
    try:
        os.rmdir(name, dir_fd=parent.fd)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    return True
