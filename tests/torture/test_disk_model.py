"""The model of a disk loses what POSIX lets it lose, and keeps what an fsync made durable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from lab.crashes import Crash, crashes
from lab.disk import Event, Node, Recorder, Rename, Resize, Snapshot, Sync, Write, differences
from lab.explore import record
from lab.marks import Mark, Promises
from lab.subject import Subjects
from lab.trace import Call, Fd, calls

Found = set[tuple[tuple[str, bytes | str | None], ...]]


def found(before: Node, events: Sequence[Event], moment: int | None = None, rounds: int = 50) -> Found:
    """Every disk that may be found after ``moment`` events; by default after all."""
    at = len(events) if moment is None else moment
    return {
        tuple(sorted(crash.files.items(), key=lambda item: item[0]))
        for crash in crashes(Snapshot.of(before), [], events, rounds=rounds)
        if crash.moment == at
    }


def written(name: str, data: bytes) -> tuple[Node, Node, list[Event]]:
    """A directory in which a new file gets some bytes."""
    directory, file = Node(), Node(data=bytearray())
    return directory, file, [Rename(((directory, name, file),)), Resize(file, len(data)), Write(file, 0, data)]


def test_a_new_file_may_be_missing_empty_zeros_or_whole() -> None:
    """Nothing is certain of a file that nobody synced."""
    directory, _, events = written("a", b"data")
    assert found(directory, events) >= {(), (("a", b""),), (("a", bytes(4)),), (("a", b"data"),)}


def test_a_synced_file_may_still_have_no_name() -> None:
    """Fsync of a file does nothing for its name; fsync of its directory does nothing for its contents."""
    directory, file, events = written("a", b"data")
    assert found(directory, [*events, Sync(file)]) == {(), (("a", b"data"),)}
    assert (("a", b""),) in found(directory, [*events, Sync(directory)])
    assert () not in found(directory, [*events, Sync(directory)])
    assert found(directory, [*events, Sync(file), Sync(directory)]) == {(("a", b"data"),)}


def test_a_rename_is_there_or_not() -> None:
    """Never both names, never none, and it replaces what was there in one step."""
    old, new = Node(data=bytearray(b"old")), Node(data=bytearray(b"new"))
    directory = Node(names={"a": old, "b": new})
    events = [Rename(((directory, "b", None), (directory, "a", new)))]
    assert found(directory, events) == {(("a", b"old"), ("b", b"new")), (("a", b"new"),)}


def test_a_change_of_a_name_needs_the_changes_of_that_name_before() -> None:
    """What was made and then renamed is not found renamed without having been made; other names are independent."""
    directory, first, second = Node(), Node(data=bytearray()), Node(data=bytearray())
    events: list[Event] = [
        Rename(((directory, "a", first),)),
        Rename(((directory, "c", second),)),
        Rename(((directory, "a", None), (directory, "b", first))),
    ]
    assert found(directory, events) == {
        (),
        (("a", b""),),
        (("b", b""),),
        (("c", b""),),
        (("a", b""), ("c", b"")),
        (("b", b""), ("c", b"")),
    }


def test_blocks_are_lost_one_by_one() -> None:
    """The second block of a file may be there without the first; its beginning is a multiple of 4096."""
    directory, file = Node(), Node(data=bytearray(8192))
    directory.names["a"] = file
    events: list[Event] = [Write(file, 0, b"x" * 4096), Write(file, 4096, b"y" * 4096)]
    assert (("a", bytes(4096) + b"y" * 4096),) in found(directory, events)
    assert (("a", b"x" * 4096 + bytes(4096)),) in found(directory, events)


def test_what_was_overwritten_may_be_old_or_new() -> None:
    """A synced block that is written again is never lost altogether, unless it is torn within."""
    file = Node(data=bytearray(b"o" * 4096))
    directory = Node(names={"a": file})
    contents = {dict(disk)["a"] for disk in found(directory, [Write(file, 0, b"n" * 4096)])}
    assert {b"o" * 4096, b"n" * 4096} <= contents
    assert all(set(data) <= {ord("o"), ord("n")} for data in contents if isinstance(data, bytes))


def test_promises_are_those_of_the_moment() -> None:
    """What is acknowledged later is not asked for earlier."""
    directory = Node()
    said = [crash.promises.must for crash in crashes(Snapshot.of(directory), [], [Mark("must", "a", 1)])]
    assert said[0] == {}
    assert said[-1] == {"a": {1}}


def test_equal_disks_of_which_the_same_is_asked_have_equal_digests() -> None:
    """So that no disk is judged twice, and none is taken for another."""
    crash = Crash(1, "a", {"x": b"12", "y": None}, Promises())
    assert crash.digest() == Crash(9, "b", {"x": b"12", "y": None}, Promises()).digest()
    others = [{"x": b"12"}, {"x": b"1", "y": None}, {"x": b"12", "y": b""}, {"x": "12", "y": None}]
    digests = {Crash(1, "a", dict(files), Promises()).digest() for files in others}
    promised = Crash(1, "a", {"x": b"12", "y": None}, Promises(must={"x": {1}})).digest()
    assert len({crash.digest(), promised, *digests}) == 6


# ------------------------------------------------------------------------------------------------ from system calls

RECORDING = r"""
7 openat(AT_FDCWD<\x2f>, "\x2f\x72\x2f\x61", O_WRONLY|O_CREAT, 0666) = 3<\x2f\x72\x2f\x61>
7 pwritev(3<\x2f\x72\x2f\x61>, [{iov_base="\x31\x32", iov_len=2}, {iov_base="\x33", iov_len=1}], 2, 0 <unfinished ...>
8 mkdir("\x2f\x72\x2f\x64", 0777) = -1 EEXIST (File exists)
7 <... pwritev resumed>) = 3
7 write(3<\x2f\x72\x2f\x61>, "\x34\x35", 2) = 1
7 fsync(3<\x2f\x72\x2f\x61>) = 0
7 renameat2(5<\x2f\x72>, "\x61", 5<\x2f\x72>, "\x62", RENAME_NOREPLACE) = 0
7 +++ exited with 0 +++
"""


def test_a_recording_is_read_in_the_order_in_which_calls_ended() -> None:
    """Calls that failed are left out, and those that were interrupted in the text are put together."""
    assert list(calls(RECORDING))[1] == Call("pwritev", (Fd(3, "/r/a"), b"12", "2", b"3", "1", "2", "0"), 3)
    assert [call.name for call in calls(RECORDING)] == ["openat", "pwritev", "write", "fsync", "renameat2"]


def test_calls_become_changes_of_the_disk(tmp_path: Path) -> None:
    """Positions, short writes and renames are followed."""
    recorder = Recorder(tmp_path, root_name="/r")
    for call in calls(RECORDING):
        recorder.hear(call)
    assert recorder.tree.names["b"].data == b"423"
    (tmp_path / "b").write_bytes(b"423")
    assert differences(recorder.tree, tmp_path) == []
    (tmp_path / "b").write_bytes(b"421")
    (tmp_path / "c").mkdir()
    assert differences(recorder.tree, tmp_path) == ["/b: other contents", "/c: only in the directory"]


@pytest.mark.usefixtures("strace")
def test_the_model_ends_like_the_real_disk(subjects: Subjects, scratch: Path) -> None:
    """After all that a workload did, for which every kind of call was followed."""
    recording = record(subjects, "frozen data linked", scratch)
    assert recording.unlike == []
    kinds = {type(event).__name__ for event in recording.events}
    assert kinds == {"Rename", "Resize", "Write", "Sync", "Mark"}
