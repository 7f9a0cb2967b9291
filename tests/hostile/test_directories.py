"""Directories: links, FIFOs, sockets and folders where files should be, and names that should not be."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[[Path, str], None]


def test_what_is_in_order_is_read(attack: Any, harmless: Any) -> None:
    """Nothing raises, and nothing that the watch forbids happens."""
    outcomes = harmless(attack.path)
    assert {name: outcome.error for name, outcome in outcomes.items() if outcome.error} == {}
    assert {outcome.message for name, outcome in outcomes.items() if name.startswith(("ls", "show", "verify c"))} == {
        "0"
    }


def put_symlink(path: Path, outside: Path) -> None:
    """A link to what has the right contents."""
    path.rename(outside)
    path.symlink_to(outside)


def put_fifo(path: Path, outside: Path) -> None:
    """What blocks whoever opens it to read."""
    path.unlink()
    os.mkfifo(path)


def put_socket(path: Path, outside: Path) -> None:
    """What cannot be opened."""
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def put_directory(path: Path, outside: Path) -> None:
    """What opens, and is no file."""
    path.unlink()
    path.mkdir()


def put_device(path: Path, outside: Path) -> None:
    """What gives zeros without end."""
    path.unlink()
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no device can be made here")


PUTS = [put_symlink, put_fifo, put_socket, put_directory, put_device]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_what_is_no_plain_file(attack: Any, refused: Refused, tmp_path: Path, name: str, put: Any) -> None:
    """In the place of the manifest or of a data file, it is not read, whatever it would give."""
    put(attack.path / name, tmp_path / "outside")
    refused(attack.path, f"{name} is not a plain file")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("put", PUTS)
def test_annotations_that_are_no_plain_file(attack: Any, harmless: Any, tmp_path: Path, put: Any) -> None:
    """They are passed over when a checkpoint is opened, and named when it is verified."""
    attack.annotations({"pinned": True})
    put(attack.path / "annotations.json", tmp_path / "outside")
    outcomes = harmless(attack.path)
    assert {name for name, outcome in outcomes.items() if outcome.error} == {"verify"}
    assert "annotations.json is not a plain file" in outcomes["verify"].message


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("put", PUTS)
def test_events_that_are_no_plain_file(attack: Any, harmless: Any, tmp_path: Path, put: Any) -> None:
    """They are passed over."""
    (attack.run / "events.jsonl").write_bytes(b"{}\n")
    put(attack.run / "events.jsonl", tmp_path / "outside")
    assert harmless(attack.path)["run events"].error == ""


def test_events_that_bring_much(attack: Any, harmless: Any) -> None:
    """Empty lines, short lines, one long line, lists and texts that are no JSON: in so much memory, at most."""
    for data in (
        b"\n" * 2**25,
        b"1\n" * 2**24,
        b"{}\n" * 2**23,
        b'{"a":[' + b"[]," * 2**23 + b"1]}\n",
        b'{"a":"\xff"}\n[1]\n' + b"[" * 10**6 + b"\n",
        b"x" * 2**25,
    ):
        (attack.run / "events.jsonl").write_bytes(data)
        assert harmless(attack.path, ("run events",))["run events"].error == ""
    with (attack.run / "events.jsonl").open("r+b") as file:
        file.truncate(2**30)
    assert harmless(attack.path, ("run events",))["run events"].error == ""


@pytest.mark.parametrize("kind", ["symlink", "fifo", "file"])
def test_what_is_no_directory(attack: Any, harmless: Any, tmp_path: Path, kind: str) -> None:
    """Under the name of a checkpoint in a run, it is no checkpoint; a link is followed only where a user names it."""
    other = attack.run / "step-000000000002"
    if kind == "symlink":
        attack.path.rename(tmp_path / "elsewhere")
        other.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(other)
    else:
        other.write_bytes(b"")
    (attack.run / "step-000000000001").mkdir(exist_ok=True)
    outcomes = harmless(attack.run / "step-000000000003")
    assert {outcome.error for name, outcome in outcomes.items() if name in ("open", "load", "verify")} == {
        "CheckpointNotFoundError"
    }


def test_a_manifest_that_is_a_hole(attack: Any, refused: Refused) -> None:
    """Of a file of any size that takes no room on the disk, the first bytes are looked at, and no more."""
    for nbytes in (2**27, 2**40):
        attack.file.unlink()
        with attack.file.open("wb") as file:
            file.truncate(nbytes)
        refused(attack.path, "does not begin with" if nbytes == 2**27 else "more than the 134217728 that it may have")


def test_a_hole_that_begins_like_a_manifest(attack: Any, refused: Refused) -> None:
    """As large as it may be: its checksum tells."""
    with attack.file.open("r+b") as file:
        file.truncate(2**27)
    refused(attack.path, "not a sealed manifest")


def test_many_strangers(attack: Any, refused: Refused) -> None:
    """A directory full of what is not part of the checkpoint is not looked at to its end."""
    for number in range(3000):
        (attack.path / f"{number}").write_bytes(b"")
    refused(attack.path, "holds more than 1002 files, expected 2")


@pytest.mark.parametrize("name", [b"a\xff\xfe", b"\x1b[2J\x1b]0;x\x07", b"new\nline", b"x" * 255])
def test_names_of_strangers(attack: Any, refused: Refused, name: bytes) -> None:
    """Names that are no text, or that a terminal would obey, are named all the same."""
    with open(os.path.join(os.fsencode(attack.path), name), "wb"):  # noqa: PTH118, PTH123
        pass
    refused(attack.path, "is not part of the checkpoint")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "manifest.json"])
def test_links_to_anywhere(attack: Any, refused: Refused, target: str) -> None:
    """Nothing is read through a link."""
    (attack.path / "array.safetensors").unlink()
    (attack.path / "array.safetensors").symlink_to(target)
    refused(attack.path, "array.safetensors is not a plain file")
