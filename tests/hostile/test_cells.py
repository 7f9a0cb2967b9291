"""Cells and layouts that lie, and such as are meant to cost something. All have valid checksums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

Refused = Callable[[Path, str], None]
SUM = "f" * 32
FILES = [f"cut-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


def data_file(tensors: dict[str, tuple[str, list[int], int]], length: int | None = None) -> bytes:
    """A data file of tensors: type, shape and bytes of each."""
    header, end = {}, 0
    for name, (code, shape, nbytes) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(end)


@pytest.fixture
def cut(attack: Any) -> Any:
    """A checkpoint with a tensor in four cells, each in a file of its own."""
    for file in FILES:
        attack.data(file, data_file({"w": ("U8", [3], 3)}))
    inner = attack.manifest()
    inner["state"]["cut"] = {"w": {"$tensor": "w"}}
    inner["tensors"]["cut"] = {"w": {"dtype": "uint8", "shape": [12], "cell": [3], "layout": "l"}}
    inner["layouts"] = {"l": FILES}
    attack.seal(inner)
    return attack


def test_it_is_in_order(cut: Any, harmless: Any) -> None:
    """As long as nobody changes it."""
    assert {outcome.error for outcome in harmless(cut.path).values()} == {""}


LIES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "cells of no size": (("tensors", "cut", "w", "cell"), [0], "cells of shape (0,) in (12,), expected from 1"),
    "negative cells": (("tensors", "cut", "w", "cell"), [-3], "cells of shape (-3,) in (12,)"),
    "huge cells": (("tensors", "cut", "w", "cell"), [2**63 - 1], "cells of shape (9223372036854775807,) in (12,)"),
    "cells of many dimensions": (("tensors", "cut", "w", "cell"), [1] * 100_000, "cells of shape (1, 1"),
    "as many cells as elements": (("tensors", "cut", "w", "cell"), [1], "has 12 cells, its layout 'l' only 4 files"),
    "a petabyte": (
        ("tensors", "cut", "w"),
        {"dtype": "uint8", "shape": [2**50], "cell": [2**48], "layout": "l"},
        "bytes",
    ),
    "a petabyte in a cell": (
        ("tensors", "cut", "w"),
        {"dtype": "uint8", "shape": [2**50], "cell": [2**50], "layout": "l"},
        "has 1125899906842624 bytes, the files of its cells only",
    ),
    "impossible shape": (
        ("tensors", "cut", "w"),
        {"dtype": "uint8", "shape": [2**40, 2**40], "cell": [2**39, 2**39], "layout": "l"},
        "impossible shape",
    ),
    "no cell": (
        ("tensors", "cut", "w"),
        {"dtype": "uint8", "shape": [12], "layout": "l"},
        "cells of shape () in (12,)",
    ),
    "no layout": (("tensors", "cut", "w"), {"dtype": "uint8", "shape": [12], "cell": [3]}, "its layout '' is not one"),
    "nothing": (("tensors", "cut", "w"), {"dtype": "uint8", "shape": [12]}, "cut/w: has no pieces"),
    "another layout": (("tensors", "cut", "w", "layout"), "x" * 10**6, "its layout 'xxx"),
    "both": (
        ("tensors", "cut", "w", "pieces"),
        [{"file": FILES[0], "name": "w", "begin": 60, "shape": [12]}],
        "has both pieces and cells",
    ),
    "a file above": (
        ("layouts", "l"),
        ["../x.safetensors", *FILES],
        "has '../x.safetensors', which the manifest does not",
    ),
    "a file anywhere": (("layouts", "l"), ["/etc/passwd"], "has '/etc/passwd', which the manifest does not list"),
    "a file twice": (("layouts", "l"), [FILES[0]] * 4, "has a file twice"),
    "nobody's layout": (("layouts", "x"), FILES, "the layout 'x' is that of no tensor"),
    "no list": (("layouts",), {"l": "x"}, "not the JSON expected here"),
    "layouts that are none": (("layouts",), 5, "not the JSON expected here"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies(cut: Any, refused: Refused, name: str) -> None:
    """Each is refused when the checkpoint is opened, and said in few words."""
    keys, value, words = LIES[name]
    refused(cut.set(*keys, to=value), words)


def test_layouts_twice(cut: Any, refused: Refused) -> None:
    """A key of the same name is one too many."""
    text = msgspec.json.encode(cut.manifest())
    refused(cut.seal(text.replace(b'"layouts":{', b'"layouts":{"l":[],')), "duplicate key 'l'")


HEADERS: dict[str, bytes] = {
    "no such tensor": data_file({"v": ("U8", [3], 3)}),
    "another type": data_file({"w": ("I8", [3], 3)}),
    "another shape": data_file({"w": ("U8", [1, 3], 3)}),
    "fewer elements": data_file({"w": ("U8", [2], 2), "v": ("U8", [1], 1)}),
    "the whole tensor": data_file({"w": ("U8", [12], 12)}),
    "no header": b"",
    "half a length": b"\x08\0\0",
    "a length of everything": data_file({"w": ("U8", [3], 3)}, 2**60),
    "a long header that is not there": data_file({"w": ("U8", [3], 3)}, 15 * 2**20),
    "no JSON": (20).to_bytes(8, "little") + b"{" * 20,
    "depth": (10**6).to_bytes(8, "little") + b'{"w":' + b"[" * (10**6 - 5),
    "all lists": (15 * 2**20).to_bytes(8, "little") + (b'{"w":[' + b"[]," * (5 * 2**20 - 3)).ljust(15 * 2**20),
    "many tensors": data_file({str(number): ("U8", [], 1) for number in range(150_000)}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(cut: Any, harmless: Any, name: str) -> None:
    """Reading finds it, names file and tensor, and takes no more for it than the header weighs."""
    outcomes = harmless(cut.data(FILES[2], HEADERS[name], 2**20))
    errors = {reader: outcome.error for reader, outcome in outcomes.items() if outcome.error}
    assert set(errors.values()) == {"CorruptCheckpointError"}
    if "open" in errors:  # an empty file: its cells have no room
        return
    assert {"verify", "load", "load mmap"} <= set(errors) <= {"verify", "load", "load mmap", "read"}
    for reader in ("verify", "load"):
        assert f"{FILES[2]}: its " in outcomes[reader].message
        assert "header" in outcomes[reader].message
    assert "tensors: cut/w" in outcomes["load"].message
    assert outcomes["verify command"].message == "1"


@pytest.mark.parametrize(
    ("file_bytes", "wide", "narrow", "readers"),
    [
        (8192, 100, 50_000, ("open", "manifest", "tensors", "read", "load", "verify", "show", "run latest")),
        (2**21, 40_000, 0, ("open", "manifest", "tensors", "read", "load", "load mmap", "show")),
    ],
)
def test_many_tensors_in_many_files(
    cut: Any, harmless: Any, file_bytes: int, wide: int, narrow: int, readers: tuple[str, ...]
) -> None:
    """A short manifest that speaks of a hundred million cells: they are looked for until one is not there."""
    files = [f"cut-{number:05d}-of-03000.safetensors" for number in range(1, 3001)]
    inner = cut.manifest()
    one = data_file({"w": ("U8", [100], 100)}).ljust(file_bytes, b"\0")
    for file in files:
        with (cut.path / file).open("wb") as opened:
            opened.write(one[:4096])
            opened.truncate(file_bytes)  # they weigh nothing
    for file in FILES:
        (cut.path / file).unlink()
        inner["files"].pop(file)
    sums = [xxhash.xxh3_128_hexdigest(one[at : at + 2**20]) for at in range(0, file_bytes, 2**20)]
    inner["files"] |= {file: {"bytes": file_bytes, "chunk_bytes": 2**20, "xxh3_128": sums} for file in files}
    record = {"dtype": "bool", "shape": [3000], "cell": [1], "layout": "l"}
    inner["tensors"]["cut"] = {f"w{number}": record for number in range(wide)}
    inner["tensors"]["cut"] |= {f"n{number}": {**record, "shape": [1]} for number in range(narrow)}
    inner["state"]["cut"] = {f"w{number}": {"$tensor": f"w{number}"} for number in range(wide)}
    inner["layouts"] = {"l": files}
    outcomes = harmless(cut.seal(inner), readers)
    errors = {reader: outcome.error for reader, outcome in outcomes.items() if outcome.error}
    assert errors == dict.fromkeys(set(errors), "CorruptCheckpointError")
    assert {"load"} <= set(errors) <= {"load", "load mmap", "verify"}


def test_many_missing_files(cut: Any, harmless: Any) -> None:
    """Each has cells of all tensors: not all of them are named for each."""
    files = [f"cut-{number:05d}-of-03000.safetensors" for number in range(1, 3001)]
    inner = cut.manifest()
    for file in FILES:
        (cut.path / file).unlink()
        inner["files"].pop(file)
    inner["files"] |= {file: {"bytes": 20_000, "chunk_bytes": 2**20, "xxh3_128": [SUM]} for file in files}
    wide = {"dtype": "bool", "shape": [3000], "cell": [1], "layout": "l"}
    inner["tensors"]["cut"] = {f"{number}": wide for number in range(18_000)}
    inner["state"]["cut"] = {}
    inner["layouts"] = {"l": files}
    outcomes = harmless(cut.seal(inner), ("open", "run list", "ls", "show", "verify command", "verify command json"))
    assert outcomes["open"].error == "CorruptCheckpointError"
