"""JSON as a hostile writer may send it: decoded by msgspec, with the one hole it leaves closed.

msgspec refuses numbers that are not finite, text that is not UTF-8, values of the wrong type, unknown fields where a
struct forbids them, and nesting that would reach the end of the stack. It lets duplicate keys pass; they are refused
here.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def decode(data: bytes, type_: type[T]) -> T:
    """``data`` as ``type_``; ValueError says what is wrong."""
    try:
        value = msgspec.json.decode(data, type=type_)
        canonical = msgspec.json.encode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not the JSON expected here: {error}") from error
    # Equal bytes cannot have held a duplicate. Only foreign spacing, number forms or left-out defaults pay for the
    # slow look, which sees each key.
    if canonical != data:
        _check_duplicates(data)
    return value


def _check_duplicates(data: bytes) -> None:
    try:
        json.loads(data, object_pairs_hook=_refuse_duplicates)
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {error}") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"duplicate key {key!r}")
        seen.add(key)
