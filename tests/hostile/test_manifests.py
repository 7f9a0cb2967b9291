"""Manifests that lie, and manifests that are meant to cost something. All have a valid checksum."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast.errors import CorruptCheckpointError, UnsupportedValueError, UsageError

Refused = Callable[[Path, str], None]
SUM = "f" * 32
MODEL = "model.safetensors"


def record(nbytes: int, chunk_bytes: int = 4096) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": nbytes, "chunk_bytes": chunk_bytes, "xxh3_128": [SUM] * -(-nbytes // chunk_bytes)}


def tensor(begin: int, nbytes: int, file: str = MODEL, name: str = "w") -> dict[str, Any]:
    """What a manifest says of a tensor of bytes."""
    piece = {"file": file, "name": name, "begin": begin, "shape": [nbytes]}
    return {"dtype": "uint8", "shape": [nbytes], "pieces": [piece]}


LIES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "file above": (("files", "../x.safetensors"), record(0), "'../x.safetensors' is not the name of a data file"),
    "file anywhere": (("files", "/etc/passwd"), record(0), "'/etc/passwd' is not the name of a data file"),
    "file with NUL": (("files", "a\0.safetensors"), record(0), "is not the name of a data file"),
    "long file name": (("files", "x" * 10**6 + ".safetensors"), record(0), "xxx... is not the name of a data file"),
    "file in a folder": (("files", "a/b.safetensors"), record(0), "is not the name of a data file"),
    "its own manifest": (("files", "manifest.json"), record(0), "is not the name of a data file"),
    "case twin": (("files", "Model.safetensors"), record(0), "'Model.safetensors' differ in case alone"),
    "entry above": (("state",), {"../x": 1}, "name different entries"),
    "chunks of a gigabyte": (("files", MODEL), record(2**30, 2**30), "chunks of 1073741824 bytes"),
    "more checksums": (("files", MODEL), {**record(8192), "xxh3_128": [SUM] * 3}, "expected 2 checksums, found 3"),
    "a petabyte": (("files", MODEL), {**record(0), "bytes": 2**50}, "expected 274877906944 checksums, found 0"),
    "negative": (("files", MODEL), {**record(0), "bytes": -1}, "-1 bytes is out of range"),
    "piece elsewhere": (("tensors", "model", "x"), tensor(0, 1, "../x"), "lies in '../x', which the manifest does not"),
    "piece past the end": (("tensors", "model", "x"), tensor(10**9, 1), "model/x: lies outside model.safetensors"),
    "piece before": (("tensors", "model", "x"), tensor(-5, 1), "lies outside"),
    "shape overflow": (
        ("tensors", "model", "x"),
        {**tensor(4096, 1), "shape": [2**40, 2**40]},
        "impossible shape (1099511627776, 1099511627776)",
    ),
    "shape of zeros": (("tensors", "model", "x"), {**tensor(4096, 1), "shape": [0, 2**63]}, "impossible shape"),
    "many dimensions": (("tensors", "model", "x"), {**tensor(4096, 1), "shape": [1] * 10**5}, "impossible shape (1, 1"),
    "dtype of code": (("tensors", "model", "x"), {**tensor(0, 1), "dtype": "__import__('os')"}, "unknown dtype"),
    "same bytes": (("tensors", "model", "x"), tensor(4100, 8), "model.safetensors: two tensors have the bytes 4100"),
    "nested metrics": (("metrics",), {"a": {"$tuple": []}}, "metrics: 'a' is neither a number nor text"),
    "metric of a list": (("metrics",), {"a": [[]]}, "metrics: 'a' is neither a number nor text"),
    "tagged metrics": (("metrics",), {"$set": 1}, "metrics: '$set' is not a name"),
    "long time": (("created_at",), "2" * 10**6, "created_at: expected a time, found '222"),
    "step": (("step",), 10**40, "is out of range"),
    "no text": (("reason",), 1, "not the JSON expected here"),
    "alias of an alias": (("aliases",), {"model": {"x": "y", "y": "w"}}, "model/x is an alias of no tensor"),
    "alias of itself": (("aliases",), {"model": {"x": "x"}}, "model/x is an alias of no tensor"),
    "alias elsewhere": (("aliases",), {"other": {"x": "w"}}, "other/x is an alias of no tensor"),
}
IN_THE_BODY = {"entry above", *(name for name, lie in LIES.items() if lie[0][0] in ("tensors", "aliases"))}


@pytest.mark.parametrize("name", LIES)
def test_lies(attack: Any, refused: Refused, name: str) -> None:
    """Each is refused when the checkpoint is opened, and said in few words."""
    keys, value, words = LIES[name]
    refused(attack.set(*keys, to=value), words)
    with pytest.raises(CorruptCheckpointError) as caught:
        holdfast.open(attack.path)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", sorted(set(LIES) - IN_THE_BODY))
def test_lies_of_the_head(attack: Any, name: str) -> None:
    """What stands in the head is refused where a run is only listed, too."""
    keys, value, _ = LIES[name]
    attack.set(*keys, to=value)
    assert [type(entry).__name__ for entry in holdfast.Run(attack.run).entries()] == ["Broken"]


TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a manifest"),
    "depth": (b"[" * 10**6, "not a manifest"),
    "depth of objects": (b'{"format":' * 10**6, "not a manifest"),
    "depth in a field": (b'{"format":"holdfast/1","state":' + b"[" * 10**6 + b"}", "recursion depth exceeded"),
    "no fields": (b'{"format":"holdfast/1"}', "missing required field"),
    "infinite": (b'{"format":"holdfast/1","step":1e999}', "missing required field"),
    "no text": (b'{"format":"\xff"}', "not a manifest"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_manifest(attack: Any, refused: Refused, name: str) -> None:
    """Whatever else is sealed."""
    text, words = TEXTS[name]
    refused(attack.seal(text), words)


def test_another_format(attack: Any, harmless: Any) -> None:
    """It is a newer one, however it is called."""
    outcomes = harmless(attack.seal({"format": "x" * 10**6}))
    assert outcomes["open"].error == "FormatVersionError"
    assert len(outcomes["open"].message) < 2000


def test_fields_twice(attack: Any, refused: Refused) -> None:
    """The second step, spelled with escapes, in a manifest with spaces."""
    text = msgspec.json.encode(attack.manifest()).replace(b'"step":1,', b'"step": 1, "st\\u0065p":2,')
    refused(attack.seal(text), "duplicate key 'step'")


def test_keys_twice_in_what_is_long(attack: Any, refused: Refused) -> None:
    """It is looked for in bounded memory: text that would take four bytes a character stays bytes."""
    text = msgspec.json.encode(attack.manifest()).replace(
        b'"lr":0.1', b'"wide": "' + "ä".encode() * 5_000_000 + "😀".encode() + b'","lr":0.1,"lr":0.2'
    )
    refused(attack.seal(text), "duplicate key 'lr'")


def test_as_many_files_as_are_allowed(attack: Any, refused: Refused) -> None:
    """None of which is there: all are missing, in no more than a second."""
    inner = attack.manifest()
    inner["files"].update({f"f{number}.safetensors": record(0) for number in range(9_000)})
    refused(attack.seal(inner), "f0.safetensors: is missing")
    inner["files"].update({f"g{number}.safetensors": record(0) for number in range(9_000)})
    refused(attack.seal(inner), "18002 files, more than the 10000 that there may be")


def test_many_damaged_chunks_of_many_tensors(attack: Any, harmless: Any) -> None:
    """It is said of each chunk whose it is, without a look at all tensors for each."""
    (attack.path / MODEL).write_bytes(bytes(20_000 * 4096))
    inner = attack.manifest()
    inner["files"][MODEL] = record(20_000 * 4096)
    names = [f"w{number}" for number in range(19_000)]
    inner["tensors"]["model"] = {
        name: tensor(4096 * (number + 1), 4096, name=name) for number, name in enumerate(names)
    }
    inner["state"]["model"] = {}
    outcomes = harmless(attack.seal(inner), ("verify", "verify command", "verify command json"))
    assert outcomes["verify"].error == "CorruptCheckpointError"


def test_one_megabyte_for_thousands_of_tensors(attack: Any, refused: Refused) -> None:
    """Ten thousand tensors of the same bytes would be ten gigabytes."""
    (attack.path / MODEL).write_bytes(bytes(2**20 + 4096))
    inner = attack.manifest()
    inner["files"][MODEL] = record(2**20 + 4096)
    inner["tensors"]["model"] = {f"w{number}": tensor(4096, 2**20) for number in range(10_000)}
    refused(attack.seal(inner), "two tensors have the bytes")


def test_pieces_without_end(attack: Any, refused: Refused) -> None:
    """Many pieces that begin at one place in the first dimension: comparing each with each would take hours."""
    inner = attack.manifest()
    inner["files"]["x.safetensors"] = record(0)
    count = 20_000
    inner["tensors"]["model"]["x"] = {
        "dtype": "uint8",
        "shape": [1, count],
        "pieces": [
            {"file": MODEL, "name": f"{n}", "begin": 4096, "shape": [1, 1], "offset": [0, n // 2 * 2]}
            for n in range(count)
        ],
    }
    del inner["files"]["x.safetensors"]
    refused(attack.seal(inner), "model/x: its pieces overlap")


def test_pieces_of_many_dimensions(attack: Any, refused: Refused) -> None:
    """Cut in twenty dimensions there are a million corners, twice."""
    inner = attack.manifest()
    halves = [
        {"file": MODEL, "name": "a", "begin": 4096, "shape": [1] * 20},
        {"file": MODEL, "name": "b", "begin": 4097, "shape": [1] * 20, "offset": [1] * 20},
    ]
    inner["tensors"]["model"]["x"] = {"dtype": "uint8", "shape": [2] * 20, "pieces": halves}
    refused(attack.seal(inner), "model/x: is cut in too many dimensions")


def test_tensors_without_elements(attack: Any, harmless: Any) -> None:
    """As many as there may be, of large shapes."""
    inner = attack.manifest()
    empty = {"dtype": "float64", "shape": [0, 2**50], "pieces": [{"file": MODEL, "name": "e", "begin": 4096}]}
    empty["pieces"][0]["shape"] = empty["shape"]
    inner["tensors"]["model"].update({f"e{number}": empty for number in range(20_000)})
    inner["state"]["plain"] = []
    outcomes = harmless(attack.seal(inner), ("open", "tensors", "state_tree", "load", "load mmap", "show"))
    assert {outcome.error for outcome in outcomes.values()} == {""}


def test_texts_that_a_terminal_obeys(attack: Any, harmless: Any, holdfast_show: Callable[[Path], str]) -> None:
    """They are printed as escapes."""
    attack.set("reason", to="\x1b]0;pwned\x07 \x9b2J")
    attack.set("metrics", to={"\x1b[31m": "\x1b[0m"})
    attack.state({"\x1b[1m": "\x1b[2J", "b": {"\x08": [1]}})
    harmless(attack.path)
    assert not set(holdfast_show(attack.path)) & {"\x1b", "\x07", "\x9b", "\x08"}


def test_long_texts_are_not_printed_to_their_end(attack: Any, harmless: Any) -> None:
    """Reasons, metrics, tags, versions, names."""
    long = "x" * 2_000_000
    inner = attack.manifest()
    inner["reason"] = long
    inner["metrics"] = {long: long, "digits": {"$int": "0x" + "f" * 50_000}}
    inner["environment"] = {"torch": long, "deep": [[long]]}
    inner["state"]["plain"] = {long: long}
    attack.annotations({"tags": [long, *map(str, range(50_000))]})
    outcomes = harmless(attack.seal(inner))
    assert {outcome.error for outcome in outcomes.values()} == {""}


@pytest.mark.parametrize("node", [5, "x", [], {"origin": 5}, {"origin": {"step": {"$set": []}}}, {"$set": []}])
def test_loops_that_are_none(attack: Any, harmless: Any, node: Any) -> None:
    """Where in its epoch a training was may be anything; it is shown as far as it means something."""
    inner = attack.manifest()
    inner["state"]["_loop"] = node
    inner["tensors"]["_loop"] = {}
    assert {outcome.error for outcome in harmless(attack.seal(inner)).values()} <= {"", "StateMismatchError"}


@pytest.mark.parametrize(
    "node",
    [
        *(5, {}, {"python": 5}, {"python": {"version": 3, "words": {"$bytes": ""}, "gauss_next": None}}),
        {"$tensor": "w"},
    ],
)
def test_generators_that_are_none(attack: Any, harmless: Any, node: Any) -> None:
    """They are shown to other generators first: nothing is restored of a checkpoint whose own do not fit."""
    outcomes = harmless(attack.set("state", "_rng", to=node), ("open", "load", "restore"))
    assert {name: outcome.error for name, outcome in outcomes.items()} == {
        "open": "",
        "load": "",
        "restore": "CorruptCheckpointError",
    }


def test_a_generator_that_would_read_anywhere(attack: Any, harmless: Any) -> None:
    """Numpy's takes any position, and reads from there."""
    inner = attack.manifest()
    inner["state"]["_rng"]["numpy"]["state"]["pos"] = 2**31 - 1
    outcomes = harmless(attack.seal(inner), ("restore",))
    assert "pos 2147483647 is not within 0 to 624" in outcomes["restore"].message


def test_annotations(attack: Any, harmless: Any) -> None:
    """Large ones, and such as are none, are passed over, and named by verify."""
    for inner, words in (
        (b"[" * 10**5, "not the JSON expected here"),
        (b'{"tags":[' + b'"",' * 5_000_000 + b'""]}', "bytes of memory"),
        (b'{"metrics":{"a":{"$set":[[]]}}}', "neither a number nor text"),
        (b'{"metrics":{"a":{"$int":"0x' + b"f" * 10**6 + b'"}}}', "not an integer"),
        (b'{"pinned":"' + b"x" * 2**24 + b'"}', "more than the 16777216 that it may have"),
    ):
        outcomes = harmless(attack.annotations(inner))
        assert {name for name, outcome in outcomes.items() if outcome.error} == {"verify"}
        assert words in outcomes["verify"].message


def test_as_large_as_it_is_allowed(attack: Any, harmless: Any) -> None:
    """A terabyte in twenty thousand tensors, half a million chunks: opened like any other, but for its files."""
    inner = attack.manifest()
    count, chunk_bytes = 500_000, 2**21
    nbytes = count * chunk_bytes // 20_000
    names = [f"transformer.layers.{number}.attention.query.weight" for number in range(20_000)]
    inner["files"]["big.safetensors"] = record(count * chunk_bytes + 4096 * 2000, chunk_bytes)
    inner["files"]["big.safetensors"]["xxh3_128"] = [SUM] * (count + 4)
    inner["state"]["big"] = {name: {"$tensor": name} for name in names}
    inner["tensors"]["big"] = {
        name: tensor(4096 * 2000 + number * nbytes, nbytes, "big.safetensors", name)
        for number, name in enumerate(names)
    }
    attack.seal(inner)
    with (attack.path / "big.safetensors").open("wb") as file:
        file.truncate(count * chunk_bytes + 4096 * 2000)
    outcomes = harmless(attack.path, ("open", "manifest", "tensors", "state_tree", "run latest", "ls"))
    assert {outcome.error for outcome in outcomes.values()} == {""}


def test_what_a_reader_refuses_is_not_written(tmp_path: Path) -> None:
    """It says which entry it is, and what to do; nothing is left."""
    for value, words in (
        ([0] * 500_000, "more than the 400000 that it may have; put large lists"),
        ([10**3999] * 1200, "long integers have"),
        ("x" * 140_000_000, "more than the 134217728 that it may have"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            holdfast.save(tmp_path / "checkpoint", {"small": 1, "large": value})
        assert caught.value.key == "large"
        assert list(tmp_path.iterdir()) == []


def test_keys_of_one_hash_are_not_written(tmp_path: Path) -> None:
    """No reader would take them."""
    value = {n * (2**61 - 1) for n in range(1, 100)}
    with pytest.raises(UnsupportedValueError, match="More than 64 keys or members have one hash"):
        holdfast.save(tmp_path / "checkpoint", {"a": value})
    with pytest.raises(UnsupportedValueError, match="More than 64 keys or members have one hash"):
        holdfast.save(tmp_path / "checkpoint", {"a": dict.fromkeys(value)})


def test_a_file_that_changes_after_the_first_look(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is read: another size is found in the very file that is open."""
    checkpoint = holdfast.open(attack.path)
    name = next(name for name in checkpoint.tensors if name.startswith("array"))
    file = attack.path / "array.safetensors"
    whole = file.read_bytes()
    looked: list[Any] = []
    monkeypatch.setattr("holdfast.checkpoint.unreadable", lambda *given: looked.append(given) or [])
    monkeypatch.setattr("holdfast.checkpoint.structure_damage", lambda *given: looked.append(given) or [])
    for put, words in (
        (lambda: file.write_bytes(whole + b"x"), f"has {len(whole) + 1} bytes, expected {len(whole)}"),
        (lambda: (file.unlink(), file.symlink_to("/etc/passwd")), "is not a plain file"),
    ):
        put()
        for use in (
            lambda: checkpoint.read(name),
            lambda: checkpoint.map_files(["array.safetensors"]),
            checkpoint.verify,
        ):
            with pytest.raises(CorruptCheckpointError, match=words):
                use()
    assert len(looked) == 6


def test_the_header_that_is_verified_is_the_one_that_is_parsed(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each data file is opened once to look at its size, and once to be read."""
    from holdfast.storage.local_reading import LocalCheckpoint

    opened: list[str] = []
    original = LocalCheckpoint.open_file
    monkeypatch.setattr(LocalCheckpoint, "open_file", lambda self, name: opened.append(name) or original(self, name))
    holdfast.open(attack.path).verify()
    data = [name for name in opened if name.endswith(".safetensors")]
    assert sorted(data) == sorted(["array.safetensors", MODEL] * 3)  # opening looks too


def test_mapped_tensors_in_between(attack: Any) -> None:
    """One that is not aligned to its elements is copied, and right."""
    values = np.arange(3, dtype="<f4")
    header = b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    data = (len(header)).to_bytes(8, "little") + header + values.tobytes()
    begin = 8 + len(header)
    assert begin % 4
    inner = attack.manifest()
    inner["tensors"]["model"] = {
        "w": {
            "dtype": "float32",
            "shape": [3],
            "pieces": [{"file": MODEL, "name": "w", "begin": begin, "shape": [3]}],
        }
    }
    inner["state"]["model"] = {"w": {"$tensor": "w"}}
    attack.seal(inner)
    attack.data(MODEL, data)
    holdfast.open(attack.path).verify()
    loaded = holdfast.load(attack.path, mmap=True)["model"]["w"]
    assert (loaded.tolist(), loaded.data_ptr() % 4) == ([0.0, 1.0, 2.0], 0)


def test_all_terms_of_a_grid() -> None:
    """Tiles of a grid cover it; the same with one tile moved, twice, missing or of no size do not, or do."""
    from holdfast.format.records import Piece, TensorRecord, pieces_problem

    def problem(boxes: list[tuple[tuple[int, int], tuple[int, int]]]) -> str | None:
        pieces = tuple(Piece("f", "n", 0, shape, offset) for offset, shape in boxes)
        return pieces_problem(TensorRecord("uint8", (4, 6), pieces))

    tiles = [((row, column), (2, 3)) for row, column in itertools.product((0, 2), (0, 3))]
    assert problem(tiles) is None
    assert problem([*tiles, ((1, 1), (0, 3))]) is None
    assert problem([*tiles[:3], ((1, 3), (2, 3))]) == "its pieces overlap"
    assert problem([*tiles[:3], tiles[0]]) == "its pieces overlap"
    assert problem(tiles[:3]) == "its pieces cover 18 elements of (4, 6)"
