"""JSON from a hostile writer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format import strict_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class Point(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A struct with a default."""

    x: int
    y: int = 0


@given(VALUES)
def test_what_msgspec_writes_is_read(value: object) -> None:
    """Everything that is written comes back equal and of the same types."""
    assert repr(strict_json.decode(msgspec.json.encode(value), Any)) == repr(value)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}',
        b'{"a":1,"a":1}',
        b'[{"b":{"a":1, "a":1}}]',
        b'{"\\u0061":1,"a":1}',
    ],
)
def test_duplicate_keys(text: bytes) -> None:
    """A key twice in one object is refused at any depth and however it is spelled."""
    with pytest.raises(ValueError, match="duplicate key"):
        strict_json.decode(text, Any)


def test_duplicate_fields_of_a_struct() -> None:
    """Also where the second would only repeat a default."""
    with pytest.raises(ValueError, match="duplicate key"):
        strict_json.decode(b'{"x":1,"y":0,"y":0}', Point)


@pytest.mark.parametrize(
    "text",
    [
        *(b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"01", b"+1", b".5", b"1.", b"0x1"),
        *(b"", b" ", b"{", b"[1,", b'{"a"}', b"'a'", b"{}{}", b"[1,]", b"// a\n1", b"True", b"undefined"),
        *(b'"\xff"', b'"\\ud800"', b'"\x01"', b'"\\x41"', b"\xef\xbb\xbf1"),
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=lambda text: text[:12],
)
def test_what_is_not_json(text: bytes) -> None:
    """Numbers that are not finite, bad text, and nesting without end are ValueErrors."""
    with pytest.raises(ValueError, match=r"not the JSON expected|nested too deeply"):
        strict_json.decode(text, Any)


@pytest.mark.parametrize(
    "text", [b'{"x":1,"z":1}', b'{"x":"1"}', b'{"x":1.5}', b"{}", b"[]", b'{"x":true}', b'{"x":null}']
)
def test_other_types_than_expected(text: bytes) -> None:
    """Unknown fields and values of another type are refused, never converted."""
    with pytest.raises(ValueError, match="not the JSON expected"):
        strict_json.decode(text, Point)


def test_foreign_spacing_is_read() -> None:
    """JSON by another writer is JSON too."""
    assert strict_json.decode(b' { "x" : 1 , "y" : 2 } ', Point) == Point(1, 2)
