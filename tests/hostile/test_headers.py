"""Headers of data files: intact by their checksums, and telling another story than the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MODEL = "model.safetensors"


def framed(header: object, original: bytes) -> bytes:
    """A data file with ``header`` (JSON, or an object) in the place of its own, of the same length."""
    length = int.from_bytes(original[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return original[:8] + text.ljust(length)[:length] + original[8 + length :]


def own_header(path: Path) -> dict[str, Any]:
    """The header of the model's file."""
    data = (path / MODEL).read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def changed(header: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    """A header in which one tensor is another."""
    return {**header, name: {**header[name], **fields}}


HEADERS: dict[str, Any] = {
    "no JSON": (lambda header: b"{nonsense}", "its safetensors header: not the JSON expected"),
    "depth": (lambda header: b'{"a":' + b"[" * 4000, "its safetensors header: not the JSON expected"),
    "a list": (lambda header: b"[]", "its safetensors header: the header does not start with '{'"),
    "nothing": (lambda header: b"", "its safetensors header: the header does not start with '{'"),
    "another dtype": (lambda header: changed(header, "w", dtype="I32"), "its header and the manifest disagree"),
    "another shape": (lambda header: changed(header, "w", shape=[3, 2]), "its header and the manifest disagree"),
    "negative": (lambda header: changed(header, "w", shape=[-2, -3]), "negative size"),
    "overflow": (lambda header: changed(header, "w", shape=[2**62, 4]), "do not hold shape"),
    "many dimensions": (lambda header: changed(header, "w", shape=[1] * 1000), "do not hold shape"),
    "huge numbers": (lambda header: changed(header, "w", shape=[10**400]), "do not hold shape"),
    "overlap": (lambda header: changed(header, "w", data_offsets=[0, 24]), "a hole or an overlap"),
    "unknown dtype": (lambda header: changed(header, "w", dtype="x" * 1000), "unknown dtype 'xxx"),
    "no tensor": (lambda header: {"__metadata__": header["__metadata__"]}, "the tensors end at byte"),
    "metadata": (lambda header: {**header, "__metadata__": {"a": []}}, "not the JSON expected"),
    "twice": (
        lambda header: json.dumps(header).encode()[:-1] + b',"w":' + json.dumps(header["w"]).encode() + b"}",
        "duplicate key 'w'",
    ),
    "no text": (lambda header: b'{"\xff":1}', "not the JSON expected"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(attack: Any, harmless: Any, name: str) -> None:
    """Verifying finds it. Reading goes by the manifest, and does not care."""
    make, words = HEADERS[name]
    data = framed(make(own_header(attack.path)), (attack.path / MODEL).read_bytes())
    outcomes = harmless(attack.data(MODEL, data))
    assert {name: outcome.error for name, outcome in outcomes.items() if outcome.error} == {
        "verify": "CorruptCheckpointError"
    }
    assert f"{MODEL}: " in outcomes["verify"].message
    assert words in outcomes["verify"].message


@pytest.mark.parametrize("length", [0, 1, 4089, 2**24, 2**31, 2**63 - 1, 2**64 - 1])
def test_lengths_that_lie(attack: Any, harmless: Any, length: int) -> None:
    """A header is no longer than what lies before the first tensor."""
    data = length.to_bytes(8, "little") + (attack.path / MODEL).read_bytes()[8:]
    outcomes = harmless(attack.data(MODEL, data), ("open", "load", "verify", "verify command"))
    assert {name: outcome.error for name, outcome in outcomes.items() if outcome.error} == {
        "verify": "CorruptCheckpointError"
    }
    assert "its safetensors header: " in outcomes["verify"].message


def test_a_file_that_is_nothing_but_header(attack: Any, harmless: Any) -> None:
    """As long as the manifest lets it be, of as many tensors as fit: a limit, not a gigabyte."""
    for text in (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[],"data_offsets":[0,1]}' % n for n in range(270_000)) + b"}",
        b'{"__metadata__":{"a":"' + b"x" * 15_000_000 + b'"}}',
        b"[" * 15_000_000,
        b'{"a":' + b"9" * 15_000_000 + b"}",
        b'{"x":"' + b"x" * 30_000_000 + b'"}',
    ):
        inner = attack.manifest()
        inner["tensors"]["model"] = {}
        inner["state"]["model"] = {}
        attack.seal(inner)
        data = len(text).to_bytes(8, "little") + text
        outcomes = harmless(attack.data(MODEL, data, 2**20), ("open", "verify", "load", "verify command"))
        assert outcomes["load"].error == ""
        if b"__metadata__" not in text:
            assert "its safetensors header: " in outcomes["verify"].message


def test_many_headers_at_a_time(attack: Any, harmless: Any) -> None:
    """Together they take no more than two of the largest."""
    text = b'{"__metadata__":{"a":"' + b"x" * 6_000_000 + b'"}}'
    data = len(text).to_bytes(8, "little") + text
    for number in range(20):
        attack.data(f"model-{number:05d}-of-00020.safetensors", data, 2**20)
    outcomes = harmless(attack.path, ("open", "verify", "verify command"))
    assert {outcome.error for outcome in outcomes.values()} == {""}


def test_an_index_is_not_parsed(attack: Any, harmless: Any) -> None:
    """It is there for others."""
    outcomes = harmless(attack.data("model.safetensors.index.json", b"[" * 10**6, 2**20), ("open", "verify", "load"))
    assert {outcome.error for outcome in outcomes.values()} == {""}
