"""The system calls that make things durable, and what happens where a file system lacks one."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.storage import durable
from holdfast.storage.durable import Lock


@pytest.fixture
def here(tmp_path: Path) -> durable.Descriptor:
    """The temporary directory, open."""
    return durable.open_directory(str(tmp_path))


def refuse(code: int) -> Callable[..., Any]:
    """A system call that fails."""

    def call(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_directories_that_cannot_be_synced(
    monkeypatch: pytest.MonkeyPatch, here: durable.Descriptor, code: int
) -> None:
    """Some file systems have no fsync of directories; there is nothing more to ask for."""
    monkeypatch.setattr(os, "fsync", refuse(code))
    durable.sync_directory(here)


def test_a_failed_sync_of_a_directory_is_an_error(monkeypatch: pytest.MonkeyPatch, here: durable.Descriptor) -> None:
    """An I/O error is not a missing feature."""
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        durable.sync_directory(here)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_failed_sync_of_a_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, here: durable.Descriptor, code: int
) -> None:
    """Every file system can sync files: whatever a file's fsync says is believed."""
    monkeypatch.setattr(os, "fsync", refuse(code))
    with pytest.raises(OSError, match=r"Input/output|Invalid"):
        durable.write_file(here, "a", b"x")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_space_need_not_be_reserved(
    refuse_in_c: Callable[[str, int], None], tmp_path: Path, here: durable.Descriptor, code: int
) -> None:
    """Without fallocate the file is written all the same."""
    refuse_in_c("fallocate", code)
    with durable.create_file(here, "a") as file:
        durable.preallocate(file, 10)
        durable.write_all(file, memoryview(b"0123456789"))
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5 * 2**20 + 1])
def test_space_is_reserved(tmp_path: Path, here: durable.Descriptor, nbytes: int) -> None:
    """The blocks of the whole file are there before anything is written, and its length is the one planned."""
    with durable.create_file(here, "a") as file:
        durable.preallocate(file, nbytes)
    found = (tmp_path / "a").stat()
    assert (found.st_size, found.st_blocks * 512 >= nbytes) == (nbytes, True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_space_that_cannot_be_reserved(
    refuse_in_c: Callable[[str, int], None], here: durable.Descriptor, code: int
) -> None:
    """A full disk is found out before the first byte."""
    refuse_in_c("fallocate", code)
    with durable.create_file(here, "a") as file, pytest.raises(OSError, match=os.strerror(code)) as caught:
        durable.preallocate(file, 10)
    assert caught.value.errno == code


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100])
def test_short_writes_of_several_views_are_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: durable.Descriptor, most: int
) -> None:
    """Wherever a write stops, the next one begins there; empty views are no end."""
    write = os.pwritev

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        return write(fd, [memoryview(b"".join(views)[:most])], offset)

    monkeypatch.setattr(os, "pwritev", short)
    with durable.create_file(here, "a") as file:
        durable.write_at(file, 2, [memoryview(part) for part in (b"", b"0123", b"", b"456", b"789", b"")])
    assert (tmp_path / "a").read_bytes() == b"\0\0" + b"0123456789"


def test_writing_back_is_only_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: durable.Descriptor) -> None:
    """With or without it, the file holds what was written."""
    with durable.create_file(here, "a") as file:
        durable.write_at(file, 0, [memoryview(b"0123")])
        durable.begin_writeback(file, 0, 4)
        monkeypatch.setattr(durable, "_libc", None)
        durable.begin_writeback(file, 0, 4)
    assert (tmp_path / "a").read_bytes() == b"0123"


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: durable.Descriptor) -> None:
    """A write that took only some bytes is followed by one with the rest."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    durable.write_file(here, "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_nothing_is_written_through_what_is_there(tmp_path: Path, here: durable.Descriptor) -> None:
    """A new file is new: neither an existing one nor a link is opened for writing."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            durable.create_file(here, name)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()


def strange(directory: Path) -> dict[str, Path]:
    """Everything that a name may stand for and that is not a plain file."""
    os.mkfifo(directory / "fifo")
    (directory / "directory").mkdir()
    (directory / "link").symlink_to("/dev/null")
    (directory / "loop").symlink_to("loop")
    (directory / "to_fifo").symlink_to("fifo")
    listening = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(directory)  # a socket's path may have 107 bytes
    try:
        listening.bind("socket")
    finally:
        os.chdir(before)
        listening.close()
    return {path.name: path for path in directory.iterdir()}


def test_only_plain_files_are_opened(tmp_path: Path, here: durable.Descriptor) -> None:
    """A FIFO does not block, a link is not followed, a directory is not read: each is named."""
    for name in strange(tmp_path):
        with pytest.raises(ValueError, match=f"^{name} is not a plain file"):
            durable.open_file(here, name)


def test_a_device_is_not_a_plain_file() -> None:
    """A read from a terminal or tape could block, or do something."""
    with pytest.raises(ValueError, match="null is not a plain file"):
        durable.open_file(durable.open_directory("/dev"), "null")


def test_directories_are_not_opened_through_links(tmp_path: Path, here: durable.Descriptor) -> None:
    """A link in a run does not lead out of it."""
    (tmp_path / "link").symlink_to("/tmp")
    with pytest.raises(NotADirectoryError):
        durable.open_directory("link", here)


def test_directories_are_made_and_their_names_synced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each directory above is synced, whoever made what is in it, up to the root of the file system."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    for _ in range(2):
        durable.make_directories(str(tmp_path / "a/b/c"))
        device = tmp_path.stat().st_dev
        above = [path for path in (tmp_path / "a/b/c").parents if path.stat().st_dev == device]
        assert synced == list(map(str, above))
        synced.clear()


def test_directories_above_that_cannot_be_read_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Others made them; the user's own are synced all the same."""
    synced: list[str] = []
    opened = durable.open_directory

    def refuse(path: str) -> durable.Descriptor:
        if path == str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path)

    monkeypatch.setattr(durable, "open_directory", refuse)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    durable.make_directories(str(tmp_path / "a/b"))
    assert synced[:2] == [str(tmp_path / "a"), str(tmp_path.parent)]


def test_publishing_never_replaces(tmp_path: Path, here: durable.Descriptor) -> None:
    """Neither a directory, nor an empty one, nor a file, nor a dangling link."""
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "new").mkdir()
    for name in ("full", "empty", "file", "link"):
        with pytest.raises(FileExistsError):
            durable.publish(here, "new", name)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty", "file", "link", "new"}


@pytest.mark.usefixtures("no_renameat2")
def test_publishing_without_renameat2(tmp_path: Path, here: durable.Descriptor) -> None:
    """A plain rename publishes, and refuses what is taken."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new/x").touch()
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError):
        durable.publish(here, "new", "taken")
    durable.publish(here, "new", "free")
    assert (tmp_path / "free/x").exists()


@pytest.mark.usefixtures("no_renameat2")
def test_a_name_taken_at_the_last_moment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: durable.Descriptor
) -> None:
    """Between the look and the rename somebody else published: the rename itself refuses a full directory."""
    (tmp_path / "new").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").touch()
    monkeypatch.setattr(durable, "exists", lambda parent, name: False)
    with pytest.raises(FileExistsError):
        durable.publish(here, "new", "taken")
    assert (tmp_path / "taken/x").exists()


def test_exchange(tmp_path: Path, here: durable.Descriptor) -> None:
    """Two names are swapped in one step."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/from_a").touch()
    (tmp_path / "b").mkdir()
    assert durable.exchange(here, "a", "b")
    assert (tmp_path / "b/from_a").exists()
    assert (tmp_path / "a").is_dir()


@pytest.mark.usefixtures("no_renameat2")
def test_exchange_is_optional(tmp_path: Path, here: durable.Descriptor) -> None:
    """Where names cannot be swapped, nothing happened."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert not durable.exchange(here, "a", "b")


def test_replacing_a_file(tmp_path: Path, here: durable.Descriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new contents take the name; when that fails the old ones keep it, and nothing else is left."""
    durable.replace_file(here, "a", ".a", b"old")
    durable.replace_file(here, "a", ".a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        durable.replace_file(here, "a", ".a", b"newer")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new"}


def test_a_link_is_the_same_file(tmp_path: Path, here: durable.Descriptor) -> None:
    """Its bytes are not written again."""
    (tmp_path / "other").mkdir()
    (tmp_path / "a").write_bytes(b"data")
    other = durable.open_directory("other", here)
    assert durable.link_file(here, "a", other, "b", 4)
    assert (tmp_path / "other/b").samefile(tmp_path / "a")


@pytest.mark.parametrize("name", ["short", "missing", "fifo", "link"])
def test_what_is_not_linked(tmp_path: Path, here: durable.Descriptor, name: str) -> None:
    """A file of another size, none, and what is not a plain file: nothing is left of the attempt."""
    (tmp_path / "short").write_bytes(b"dat")
    (tmp_path / "data").write_bytes(b"data")
    (tmp_path / "link").symlink_to("data")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert not durable.link_file(here, name, here, "b", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_links_are_optional(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: durable.Descriptor, code: int
) -> None:
    """Without them the caller writes the bytes again."""
    (tmp_path / "a").write_bytes(b"data")
    monkeypatch.setattr(os, "link", refuse(code))
    assert not durable.link_file(here, "a", here, "b", 4)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_link_that_fails_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: durable.Descriptor, code: int
) -> None:
    """A full disk is not a missing feature."""
    (tmp_path / "a").write_bytes(b"data")
    monkeypatch.setattr(os, "link", refuse(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        durable.link_file(here, "a", here, "b", 4)


def test_lines_are_appended(tmp_path: Path, here: durable.Descriptor) -> None:
    """After what is there."""
    for line in (b"one\n", b"two\n"):
        durable.append_line(here, "a", line)
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\n"


def test_no_line_is_appended_through_a_link(tmp_path: Path, here: durable.Descriptor) -> None:
    """What a link leads to is somebody else's."""
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        durable.append_line(here, "link", b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_locks(tmp_path: Path, here: durable.Descriptor) -> None:
    """One writer, or several readers."""
    other = durable.open_directory(str(tmp_path))
    third = durable.open_directory(str(tmp_path))
    assert durable.lock_shared(here) is Lock.HELD
    assert durable.lock_shared(other) is Lock.HELD
    assert durable.lock_exclusive(third) is Lock.BUSY
    here.close()
    other.close()
    assert durable.lock_exclusive(third) is Lock.HELD
    assert durable.lock_holder(third) == os.getpid()


@pytest.mark.usefixtures("no_flock")
def test_locks_are_optional(here: durable.Descriptor) -> None:
    """A file system without them says so, and nothing fails."""
    assert (durable.lock_exclusive(here), durable.lock_shared(here)) == (Lock.UNSUPPORTED, Lock.UNSUPPORTED)


FORKING = """
import os, sys
from holdfast.storage import durable
held = durable.open_directory(sys.argv[1])
assert durable.lock_exclusive(held) is durable.Lock.HELD
child = os.fork()
if child == 0:
    sys.stdout.write("child\\n"); sys.stdout.flush()
    sys.stdin.readline()
    os._exit(0)
os.kill(os.getpid(), 9)
"""


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path, here: durable.Descriptor) -> None:
    """A loader's worker that outlives a killed trainer must not keep its run locked."""
    arguments = [sys.executable, "-c", FORKING, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "child\n"
        assert process.wait() == -9
        assert durable.lock_exclusive(here) is Lock.HELD
        process.stdin.close()


def test_descriptors_close_once(tmp_path: Path) -> None:
    """A second close does not close somebody else's descriptor of the same number."""
    first = durable.open_directory(str(tmp_path))
    number = first.fileno()
    first.close()
    second = durable.open_directory(str(tmp_path))
    assert second.fileno() == number
    first.close()
    os.fstat(second.fileno())


def test_unlinking_leaves_directories(tmp_path: Path, here: durable.Descriptor) -> None:
    """Files go, what is gone is no error, a directory of a file's name stays."""
    (tmp_path / "a").touch()
    (tmp_path / "d").mkdir()
    durable.unlink_files(here, ["a", "gone", "d"])
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_only_empty_directories_are_removed(tmp_path: Path, here: durable.Descriptor) -> None:
    """What holds anything stays, and so does a file."""
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").touch()
    removed = {name: durable.remove_directory(here, name) for name in ("empty", "full", "file", "gone")}
    assert removed == {"empty": True, "full": False, "file": False, "gone": False}
    assert (tmp_path / "full/x").exists()
