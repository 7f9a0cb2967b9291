"""The manifest: what is refused before a file is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from lab.terabyte import terabyte_manifest

from holdfast.errors import FormatVersionError, UsageError
from holdfast.format import envelope, strict_json
from holdfast.format import manifest as manifests
from holdfast.format.manifest import Annotations, Manifest
from holdfast.format.records import FileRecord, Piece, TensorRecord

ID = "0123456789abcdef" * 2
SUM = "f" * 32
PATH = "runs/a/step-000000000001/manifest.json"


def good() -> dict[str, Any]:
    """The inner object of a small manifest with two tensors, one of two pieces, and an alias."""
    return {
        "format": "holdfast/1",
        "checkpoint_id": ID,
        "run_id": ID,
        "parent": None,
        "step": 3,
        "epoch": 1,
        "created_at": "2026-01-02T03:04:05.000006+00:00",
        "reason": "epoch",
        "metrics": {"loss": 0.5, "odd": {"$float": "nan"}},
        "state": {"model": {"w": {"$tensor": "w"}, "t": {"$tensor": "t"}, "s": {"$tensor": "s"}}, "_rng": {}},
        "tensors": {
            "model": {
                "w": {
                    "dtype": "float32",
                    "shape": [2, 3],
                    "pieces": [{"file": "model.safetensors", "name": "w", "begin": 4096, "shape": [2, 3]}],
                },
                "s": {
                    "dtype": "uint8",
                    "shape": [4],
                    "pieces": [
                        {"file": "model.safetensors", "name": "s0", "begin": 4120, "shape": [2]},
                        {"file": "model.safetensors", "name": "s1", "begin": 4122, "shape": [2], "offset": [2]},
                    ],
                    "device": "cuda:1",
                },
            },
            "_rng": {},
        },
        "aliases": {"model": {"t": "w"}},
        "files": {"model.safetensors": {"bytes": 4124, "chunk_bytes": 4096, "xxh3_128": [SUM, SUM]}},
        "environment": {"torch": "2"},
    }


def decode(inner: object) -> Manifest:
    """Decode any inner object in a right envelope."""
    return manifests.decode(envelope.seal("manifest", json.dumps(inner).encode()), PATH)


def test_a_good_one_decodes() -> None:
    """Every field arrives; what was left out has its default."""
    pieces = (Piece("model.safetensors", "s0", 4120, (2,)), Piece("model.safetensors", "s1", 4122, (2,), (2,)))
    whole = TensorRecord("float32", (2, 3), (Piece("model.safetensors", "w", 4096, (2, 3)),))
    fields = good()
    fields["tensors"] = {"model": {"w": whole, "s": TensorRecord("uint8", (4,), pieces, device="cuda:1")}, "_rng": {}}
    fields["files"] = {"model.safetensors": FileRecord(4124, 4096, (SUM, SUM))}
    assert decode(good()) == Manifest(**fields)


def test_round_trip() -> None:
    """What is encoded is what is decoded."""
    manifest = decode(good())
    assert manifests.decode(manifests.encode(manifest), PATH) == manifest


def test_aliases_lead_to_the_tensor() -> None:
    """A tied name gives the record under which it is stored; an unknown one is a KeyError."""
    manifest = decode(good())
    assert manifest.record("model", "t") == manifest.record("model", "w")
    assert manifest.record("model", "w").nbytes == 24
    assert manifest.nbytes == 4124
    with pytest.raises(KeyError):
        manifest.record("model", "x")


def at(*keys: Any) -> Callable[[dict[str, Any], Any], None]:
    """Sets what lies at a path of keys."""

    def put(inner: dict[str, Any], value: Any) -> None:
        target: Any = inner
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return put


W = ("tensors", "model", "w")
PIECE = (*W, "pieces", 0)
FILE = ("files", "model.safetensors")

BAD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("step",), -1, "step -1 is out of range"),
    (("step",), 10**12, "out of range"),
    (("step",), 1.0, "not the JSON expected"),
    (("step",), True, "not the JSON expected"),
    (("step",), "1", "not the JSON expected"),
    (("epoch",), -1, "epoch -1 is out of range"),
    (("checkpoint_id",), "x", "checkpoint_id: expected 32 hex"),
    (("run_id",), ID + "\n", "run_id: expected 32 hex"),
    (("parent",), "", "parent: expected 32 hex"),
    (("created_at",), "yesterday", "created_at"),
    (("created_at",), "2026-01-02T03:04:05", "expected a time in UTC"),
    (("created_at",), "2026-01-02T03:04:05+01:00", "expected a time in UTC"),
    (("metrics",), {"$tuple": []}, "metrics"),
    (("metrics", "loss"), {"$float": "7"}, "not a float"),
    (("metrics", "loss"), {"$set": [1]}, "'loss' is neither a number nor text"),
    (("metrics", "loss"), [1], "'loss' is neither a number nor text"),
    (("unknown",), 1, "unknown field"),
    (("tensors", "model", "w", "x"), 1, "unknown field"),
    ((*PIECE, "x"), 1, "unknown field"),
    ((*FILE, "x"), 1, "unknown field"),
    (("state",), {"model": {}}, "name different entries"),
    (("state", "other"), {}, "name different entries"),
    ((*W, "dtype"), "float33", "unknown dtype"),
    ((*W, "memory_format"), "sideways", "unknown memory format"),
    ((*W, "memory_format"), "channels_last", "channels_last of shape"),
    ((*W, "shape"), [2**62, 4], "impossible shape"),
    ((*W, "shape"), [0, 2**62, 2**62], "impossible shape"),
    ((*W, "shape"), [-2, -3], "impossible shape"),
    ((*W, "shape"), [1] * 65, "impossible shape"),
    ((*W, "shape"), [2, 4], "cover 6 elements"),
    ((*W, "shape"), [2, 2], "is not within"),
    ((*W, "shape"), [6], "is not within"),
    ((*W, "pieces"), [], "has no pieces"),
    ((*PIECE, "file"), "other.safetensors", "which the manifest does not list"),
    ((*PIECE, "begin"), 4101, "lies outside"),
    ((*PIECE, "begin"), -1, "lies outside"),
    ((*PIECE, "begin"), 2**62, "lies outside"),
    ((*PIECE, "offset"), [0, 1], "is not within"),
    ((*PIECE, "offset"), [-1, 0], "is not within"),
    ((*PIECE, "offset"), [0], "is not within"),
    ((*PIECE, "shape"), [2, 2], "cover 4 elements"),
    (("tensors", "model", "s", "pieces", 1, "offset"), [0], "pieces overlap"),
    (("tensors", "model", "s", "pieces", 1, "offset"), [1], "pieces overlap"),
    ((*FILE, "bytes"), -1, "out of range"),
    ((*FILE, "bytes"), 2**63, "out of range|not the JSON expected"),
    ((*FILE, "bytes"), 2**60, "expected 281474976710656 checksums, found 2"),
    ((*FILE, "chunk_bytes"), 0, "chunks of 0 bytes"),
    ((*FILE, "chunk_bytes"), -4096, "chunks of -4096 bytes"),
    ((*FILE, "chunk_bytes"), 2**31, "chunks of"),
    ((*FILE, "xxh3_128"), [SUM], "expected 2 checksums, found 1"),
    ((*FILE, "xxh3_128"), [SUM] * 3, "expected 2 checksums, found 3"),
    ((*FILE, "xxh3_128"), [SUM, "F" * 32], "not 32 hex digits"),
    ((*FILE, "xxh3_128"), [SUM, "f" * 31], "not 32 hex digits"),
    (("aliases", "model", "t"), "x", "an alias of no tensor"),
    (("aliases", "model", "s"), "w", "an alias of no tensor"),
    (("aliases", "other"), {"t": "w"}, "an alias of no tensor"),
    *((("files", name), {"bytes": 0, "chunk_bytes": 4096, "xxh3_128": []}, "is not the name of a data file")
      for name in ("../x.safetensors", "/x.safetensors", "a/b.safetensors", ".x.safetensors", "manifest.json", "")),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused(keys: tuple[Any, ...], value: Any, message: str) -> None:
    """Each field is checked, in a manifest whose checksum is right."""
    inner = good()
    at(*keys)(inner, value)
    with pytest.raises(ValueError, match=message):
        decode(inner)


@pytest.mark.parametrize("name", ["../x", "", ".x", "a/b"])
def test_entry_names_are_checked(name: str) -> None:
    """An entry whose name could not be a file's is refused."""
    inner = good()
    inner["state"][name] = {}
    inner["tensors"][name] = {}
    with pytest.raises(ValueError, match="is not the name of an entry"):
        decode(inner)


@pytest.mark.parametrize("field", good())
def test_no_field_may_be_missing(field: str) -> None:
    """A manifest without one of its fields is none."""
    inner = good()
    del inner[field]
    with pytest.raises(ValueError, match=r"not a manifest|missing required field"):
        decode(inner)


def test_boxes_that_cover_the_volume_and_overlap() -> None:
    """Two dimensions: the right number of elements is not enough, each must be covered once."""
    inner = good()
    record = inner["tensors"]["model"]["w"]
    record["shape"] = [2, 4]
    record["dtype"] = "uint8"
    corners = ([0, 0], [0, 2], [1, 0], [1, 2])
    record["pieces"] = [
        {"file": "model.safetensors", "name": f"w{index}", "begin": 4096 + 2 * index, "shape": [1, 2], "offset": corner}
        for index, corner in enumerate(corners)
    ]
    assert len(decode(inner).tensors["model"]["w"].pieces) == 4
    record["pieces"][3]["offset"] = [1, 1]
    with pytest.raises(ValueError, match="its pieces overlap"):
        decode(inner)


@pytest.mark.parametrize("version", ["holdfast/2", "holdfast/10", "other"])
def test_another_version_says_what_to_do(version: str) -> None:
    """A newer format is not corruption, whatever else the manifest holds."""
    inner = {"format": version, "anything": [1, 2, {"else": 1.5}]}
    with pytest.raises(FormatVersionError, match="pip install --upgrade holdfast") as caught:
        decode(inner)
    assert (caught.value.path, caught.value.key) == (PATH, "format")


@pytest.mark.parametrize("inner", [b"[]", b"{}", b'{"format":1}', b"1", b"[" * 50_000, b'{"format":"holdfast/1"', b""])
def test_what_is_no_manifest(inner: bytes) -> None:
    """Any other content in a right envelope is a ValueError."""
    with pytest.raises(ValueError, match="not a manifest"):
        manifests.decode(envelope.seal("manifest", inner), PATH)


def test_duplicate_keys_are_refused() -> None:
    """Two values for one tensor leave open which is meant."""
    text = json.dumps(good()).replace('"step": 3', '"step": 3, "step": 4').encode()
    with pytest.raises(ValueError, match="duplicate key 'step'"):
        manifests.decode(envelope.seal("manifest", text), PATH)


def test_a_manifest_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of readers holds for writers."""
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 500)
    with pytest.raises(UsageError, match="more than the 500 that it may have; put large lists"):
        manifests.encode(decode(good()))


def test_annotations_round_trip() -> None:
    """Metrics, pin and tags; none at all are the default."""
    annotations = Annotations({"val_loss": {"$float": "inf"}}, pinned=True, tags=("a", "b"))
    assert manifests.decode_annotations(manifests.encode_annotations(annotations)) == annotations
    assert manifests.decode_annotations(manifests.encode_annotations(Annotations())) == Annotations()


@pytest.mark.parametrize(
    "inner",
    [{"pinned": 1}, {"tags": "a"}, {"x": 1}, {"metrics": {"a": {"$float": ""}}}, {"metrics": {"$int": "1"}}, []],
    ids=str,
)
def test_bad_annotations(inner: object) -> None:
    """They are as strict as the manifest."""
    with pytest.raises(ValueError, match=r".+"):
        manifests.decode_annotations(envelope.seal("annotations", msgspec.json.encode(inner)))


def test_a_head_has_the_fields_of_a_manifest() -> None:
    """In the same order."""
    assert manifests.Head.__struct_fields__ == manifests.Manifest.__struct_fields__


@pytest.mark.parametrize("many", [False, True], ids=["of one process", "of many"])
def test_what_holdfast_wrote_is_not_searched_for_duplicate_keys(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It encodes to the same bytes, head and body, so that no key can stand there twice; another's is searched."""
    searched: list[bytes] = []
    monkeypatch.setattr(strict_json, "_check_duplicates", lambda data: searched.append(bytes(data)))
    manifest = terabyte_manifest(4, 3) if many else decode(good())
    assert (searched == []) == many
    searched.clear()

    assert manifests.decode(manifests.encode(manifest), PATH) == manifest

    assert searched == []
