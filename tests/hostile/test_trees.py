"""Typed trees: bombs, and values that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.format import manifest as manifests

Check = Callable[[Path, str], None]
Count = Callable[[int, int], int]
PRIME = 2**61 - 1  # ints that differ by a multiple of it have one hash


@pytest.fixture
def refused_as_state(harmless: Any) -> Check:
    """Says that whatever decodes the state refuses it, with these words; the rest of the checkpoint is in order."""

    def check(path: Path, words: str) -> None:
        outcomes = harmless(path)
        failed = {name: outcome for name, outcome in outcomes.items() if outcome.error}
        assert {outcome.error for outcome in failed.values()} == {"CorruptCheckpointError"}, outcomes
        assert set(failed) == {"state_tree", "load", "load mmap", "restore"}
        assert [name for name, outcome in failed.items() if words not in outcome.message] == [], failed
        assert outcomes["show"].message == "2"

    return check


def repeated(node: bytes, count: int) -> bytes:
    """A list of as many of ``node``."""
    return b"[" + b",".join([node] * count) + b"]"


def nested(begin: bytes, end: bytes, levels: int, core: bytes = b"1") -> bytes:
    """``core`` within so many levels."""
    return begin * levels + core + end * levels


BOMBS: dict[str, tuple[bytes, str]] = {
    "equal hashes": (
        b'{"$set":[' + b",".join(b'{"$int":"%d"}' % (PRIME * n) for n in range(1, 50_000)) + b"]}",
        "more than 64 keys or members have one hash",
    ),
    "equal hashes of keys": (
        b'{"$dict":[' + b",".join(b'[{"$int":"%d"},0]' % (PRIME * n) for n in range(1, 50_000)) + b"]}",
        "more than 64 keys or members have one hash",
    ),
    "equal hashes of complex numbers": (
        b'{"$set":[' + b",".join(b'{"$complex":[%d.0,%d.0]}' % (-1000003 * n, n) for n in range(1, 50_000)) + b"]}",
        "more than 64 keys or members have one hash",
    ),
    "equal hashes of long floats": (
        b'{"$frozenset":['
        + b",".join(
            b'{"$scalar":["<f16","%s"]}' % ((n + 2**63).to_bytes(8, "little") + b"\x00\x7f" + bytes(6)).hex().encode()
            for n in range(1, 20_000)
        )
        + b"]}",
        "more than 64 keys or members have one hash",
    ),
    "lists": (nested(b"[", b"]", 500), "nested deeper than 100 levels"),
    "tuples": (nested(b'{"$tuple":[', b"]}", 103), "nested deeper than 100 levels"),
    "keys": (nested(b'{"$dict":[[', b",1]]}", 103), "nested deeper than 100 levels"),
    "integer": (b'{"$int":"' + b"9" * 2**20 + b'"}', "not an integer"),
    "hexadecimal": (b'{"$int":"0x' + b"f" * 2**20 + b'"}', "not an integer"),
    "unhashable": (b'{"$set":[[]]}', "unhashable"),
    "unhashable key": (b'{"$dict":[[{"$set":[]},1]]}', "unhashable"),
    "twice": (b'{"$set":[1,1.0]}', "duplicate member"),
    "key twice": (b'{"$dict":[[1,1],[true,2]]}', "duplicate key"),
    "tensor as key": (b'{"$dict":[[{"$tensor":"w"},1]]}', ""),
    "long tag": (b'{"$' + b"x" * 10**6 + b'":{"$set":1}, "b":1}', "a tagged object has one key"),
    "many keys": (msgspec.json.encode({f"${n}": 1 for n in range(100_000)}), "a tagged object has one key"),
    "scalar of objects": (b'{"$scalar":["O","00"]}', "not a numpy dtype"),
    "scalar of a record": (b'{"$scalar":["i4,i4","00"]}', "not a numpy dtype"),
    "giant scalar": (b'{"$scalar":["U99999999","00"]}', "U99999999 takes 399999996 bytes, found 1"),
    "scalar of text objects": (b'{"$scalar":["T","' + b"00" * 16 + b'"]}', "not a numpy dtype"),
    "dtype that is parsed": (b'{"$scalar":["00f8","00"]}', "not a numpy dtype"),
    "dtype by name": (b'{"$scalar":["float64","0000000000000000"]}', "not a numpy dtype"),
    "deprecated dtype": (b'{"$scalar":["a5","0000000000"]}', "not a numpy dtype"),
    "path kind": (b'{"$path":["PosixPath","/etc"]}', "$path cannot hold"),
    "year": (b'{"$datetime":["99999-01-01",0,null]}', "Invalid isoformat"),
    "fold": (b'{"$datetime":["2020-01-01",%d,null]}' % 2**40, "$datetime cannot hold"),
    "zone that climbs": (b'{"$datetime":["2020-01-01",0,"../../etc/passwd"]}', "not a time zone"),
    "zone from the root": (b'{"$time":["00:00",0,"/etc/localtime"]}', "not a time zone"),
    "time span": (b'{"$timedelta":[1e300]}', "$timedelta cannot hold"),
    "bad base64": (b'{"$bytes":"' + b"A" * (2**20 + 1) + b'"}', "multiple of 4"),
    "deque": (b'{"$deque":[%d,[]]}' % 2**63, "$deque cannot hold"),
    "factory": (b'{"$defaultdict":["eval",[]]}', "$defaultdict cannot hold"),
    "factory that is a list": (b'{"$defaultdict":[[],[]]}', "$defaultdict cannot hold"),
    "complex": (b'{"$complex":[{"$float":"nan:7ff8000000000000"},"1"]}', "expected float"),
}


@pytest.mark.parametrize("name", [name for name in BOMBS if name != "tensor as key"])
def test_bombs(attack: Any, refused_as_state: Check, name: str) -> None:
    """Each is refused with its reason, before it takes time or memory."""
    node, words = BOMBS[name]
    refused_as_state(attack.state(node), words)


TORCH_ONLY: dict[str, tuple[bytes, str]] = {
    "module as dtype": (b'{"$dtype":"_inductor"}', "torch has no dtype '_inductor'"),
    "function as dtype": (b'{"$dtype":"load"}', "torch has no dtype 'load'"),
    "long dtype": (b'{"$dtype":"' + b"x" * 10**6 + b'"}', "torch has no dtype 'xxx"),
    "dtype of a list": (b'{"$dtype":["float32"]}', "$dtype cannot hold"),
    "size": (b'{"$size":[%d]}' % 2**64, "expected a list of integers of 64 bits"),
    "size of floats": (b'{"$size":[1.5]}', "expected a list of integers of 64 bits"),
    "device": (b'{"$device":"nothing:0"}', "$device cannot hold"),
    "device number": (b'{"$device":0}', "expected the name of a device"),
    "unknown tag": (b'{"$what":1}', "unknown tag $what"),
}


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_values_of_torch(attack: Any, harmless: Any, name: str) -> None:
    """Shown as they are, where torch is not needed; refused where they would be made."""
    node, words = TORCH_ONLY[name]
    outcomes = harmless(attack.state(node))
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.error}
    assert {name: outcome.error for name, outcome in failed.items()} == dict.fromkeys(
        ("load", "load mmap", "restore"), "CorruptCheckpointError"
    )
    assert [name for name, outcome in failed.items() if words not in outcome.message] == [], failed


@pytest.mark.parametrize(
    "node",
    [
        b'{"$tensor":"nothing"}',
        b'{"$tensor":["w"]}',
        b'{"$ndarray":[]}',
        b'{"$ndarray":["nothing","<f4",[2]]}',
        b'{"$ndarray":{"a":1}}',
    ],
    ids=bytes.decode,
)
def test_tensors_that_are_not_there(attack: Any, refused_as_state: Check, node: bytes) -> None:
    """A tree refers only to what the manifest lists."""
    refused_as_state(attack.state(node), "")


def test_a_time_zone_that_is_not_known(attack: Any, harmless: Any) -> None:
    """It may be this machine's lack: an error of use, with the way out."""
    outcomes = harmless(attack.state(b'{"$datetime":["2020-01-01",0,"No/Where"]}'))
    assert {name: outcome.error for name, outcome in outcomes.items() if outcome.error} == dict.fromkeys(
        ("state_tree", "load", "load mmap", "restore"), "UsageError"
    )


def test_a_codec_that_is_not_known(attack: Any, harmless: Any) -> None:
    """It is shown; nothing is imported for it."""
    outcomes = harmless(attack.state(b'{"$codec":["os:system",{"$bytes":"AAAA"}]}'))
    assert {name: outcome.error for name, outcome in outcomes.items() if outcome.error} == dict.fromkeys(
        ("load", "load mmap", "restore"), "UsageError"
    )


# What is allowed, as much of it as the limit lets pass: marks (, : [ {) for the whole budget.
MARKS = manifests.MAX_STATE_MARKS - 1000  # the rest of the state has some too


def filled(node: bytes) -> bytes:
    """A list with as many nodes as are allowed."""
    return repeated(node, MARKS // (1 + sum(node.count(mark) for mark in b",:[{")))


LARGE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: filled(b"[]"),
    "dictionaries": lambda: filled(b"{}"),
    "floats": lambda: filled(b"1.5"),
    "sets": lambda: filled(b'{"$set":[]}'),
    "deques": lambda: filled(b'{"$deque":[null,[]]}'),
    "counters": lambda: filled(b'{"$counter":[]}'),
    "ordered": lambda: filled(b'{"$ordereddict":[]}'),
    "defaults": lambda: filled(b'{"$defaultdict":["set",[]]}'),
    "keyed": lambda: filled(b'{"":0}'),
    "opaque": lambda: filled(b'{"$size":[1]}'),
    "arrays of keys": lambda: b'{"$dict":[' + b",".join(b"[%d,0]" % n for n in range(MARKS // 3)) + b"]}",
    "times": lambda: filled(b'{"$datetime":["2020-01-01T00:00:00",0,[0,3600,0,"x"]]}'),
    "zones": lambda: filled(b'{"$datetime":["2020-01-01T00:00:00",0,"Europe/Berlin"]}'),
    "paths": lambda: filled(b'{"$path":["Path","a/b/c"]}'),
    "scalars": lambda: filled(b'{"$scalar":["<f4","00000000"]}'),
    "deep": lambda: b"[" + b",".join([nested(b"[", b"]", 90)] * (MARKS // 91)) + b"]",
    "deep texts": lambda: b"[" + b",".join([nested(b'{"a":', b"}", 90)] * (MARKS // 181)) + b"]",
    "long text": lambda: b'"' + b"x" * 49_000_000 + b'"',
    "long text in escapes": lambda: b'"' + b"\\n" * 14_000_000 + b'"',
    "wide text": lambda: '"{}😀"'.format("x" * 28_000_000).encode(),
    "bytes": lambda: b'{"$bytes":"' + b"AAAA" * 12_000_000 + b'"}',
    "bytearrays": lambda: filled(b'{"$bytearray":""}'),
    "long key": lambda: b'{"' + b"k" * 45_000_000 + b'":1}',
    "codec within codec": lambda: nested(b'{"$codec":["x",', b"]}", 90, b'"' + b"x" * 40_000_000 + b'"'),
    "codec within set": lambda: nested(b'{"$set":[{"$codec":["x",', b"]}]}", 45, repeated(b"1", MARKS - 500)),
    "texts within codec": lambda: nested(b'{"$codec":["x",', b"]}", 90, b'"' + b"'\\\\" * 10_000_000 + b'"'),
    "integers": lambda: repeated(b'{"$int":"' + b"9" * 4000 + b'"}', 1_000),
    "plain integers": lambda: repeated(b"9" * 4300, 1_000),
    "hexadecimal": lambda: repeated(b'{"$int":"0x' + b"f" * 100_000 + b'"}', 400),
    "control characters": lambda: repeated(b'"\\u001b[2J\\u009b"', 22_000),
}
QUICK = ("counters", "deep", "wide text")
"""Those that take the most of something; the others take their turn in `make torture`."""


SOME = ("open", "state_tree", "load", "show", "show json", "verify command")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_as_much_as_is_allowed(attack: Any, harmless: Any, name: str, count: Count) -> None:
    """Takes no longer and no more than the rest: a second, and 256 MiB."""
    if name not in QUICK and not count(0, 1):
        pytest.skip("in make torture")
    outcomes = harmless(attack.state(LARGE[name]()), *((SOME,) if count(1, 0) else ()))
    assert {outcome.error for outcome in outcomes.values()} <= {"", "UsageError", "StateMismatchError"}, outcomes
    assert outcomes["open"].error == ""


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (repeated(b"[]", 310_000), "of ',:[{' in its state, more than the 400000"),
        (repeated(b"9" * 4300, 1100), "long integers have"),
        (repeated(b'{"$int":"' + b"9" * 4000 + b'"}', 1200), "long integers have"),
        (b'"' + b"x" * 2**27 + b'"', "more than the 134217728 that it may have"),
    ],
    ids=["values", "integers", "integers in text", "bytes"],
)
def test_more_than_is_allowed(attack: Any, refused: Check, node: bytes, words: str) -> None:
    """It is refused by its size alone."""
    refused(attack.state(node), words)
