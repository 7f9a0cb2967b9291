"""JSON as a hostile writer may send it: decoded by msgspec, with the holes it leaves closed.

msgspec refuses numbers that are not finite, text that is not UTF-8, values of the wrong type, unknown fields where a
struct forbids them, and nesting that would reach the end of the stack. It lets duplicate keys pass; they are refused
here. And it makes what it is asked to make: three bytes (``[],``) are a list of seventy, so what a text can become is
estimated before it is decoded.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# What decoding can take, at most (CPython 3.11 to 3.14, measured). Of a byte: itself, once more to find duplicates, and
# the text that it is decoded to, which has four bytes a character where only one of them needs four. Of a mark: what it
# begins, an item of a list, a key, a container.
MARKS = b",:[{"
_BYTES_A_BYTE = 3
_BYTES_A_WIDE_BYTE = 6
_BYTES_A_MARK = 100
MAX_LONG_DIGITS = 4 * 2**20
"""Of all integers of more than five hundred digits together, whether they stand as numbers or in text."""
_DIGITS = 256
_BLOCK_BYTES = 2**20
_SHOWN = 200

# Of text that msgspec took, the strings, with a colon behind those that are keys, and where objects begin and end.
# Possessive: nothing is remembered for going back, however long a string is.
_KEYS = re.compile(rb'"((?:[^"\\]++|\\.)*+)"[ \t\n\r]*+(:)?+|[{}]', re.DOTALL)


def decode(data: bytes | memoryview, type_: type[T], *, digits_checked: bool = False) -> T:
    """``data`` as ``type_``; ValueError says what is wrong.

    Args:
        data: JSON.
        type_: what it is to be.
        digits_checked: whether :func:`check_digits` has seen it.
    """
    if not digits_checked:
        check_digits(data)
    try:
        value = msgspec.json.decode(data, type=type_)
        canonical = msgspec.json.encode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not the JSON expected here: {error}") from error
    # Equal bytes cannot have held a duplicate. Only foreign spacing, number forms or left-out defaults pay for the
    # slow look, which sees each key.
    if not _equal(canonical, data):
        del canonical
        _check_duplicates(data)
    return value


def check_digits(data: bytes | memoryview) -> None:
    """Refuse so many digits of long integers that reading them takes long: it takes the square of their length."""
    view = memoryview(data)
    found = sum(_DIGITS for at in range(0, len(view), _DIGITS) if bytes(view[at : at + _DIGITS]).isdigit())
    if found > MAX_LONG_DIGITS:
        raise ValueError(f"long integers have {found} digits in all, more than the {MAX_LONG_DIGITS} that they may")


def marks(data: bytes | memoryview) -> int:
    """How many ``, : [ {`` there are, those within text included: no more values than that can come of it."""
    view = memoryview(data)
    blocks = (bytes(view[at : at + _BLOCK_BYTES]) for at in range(0, len(view), _BLOCK_BYTES))
    return sum(len(block) - len(block.translate(None, MARKS)) for block in blocks)


def cost_bytes(data: bytes | memoryview) -> int:
    """The memory that ``data`` and what it is decoded to can take, at most."""
    return len(data) * (_BYTES_A_WIDE_BYTE if _is_wide(data) else _BYTES_A_BYTE) + marks(data) * _BYTES_A_MARK


def _is_wide(data: bytes | memoryview) -> bool:
    """Whether text in it may hold other characters than ASCII."""
    view = memoryview(data)
    for at in range(0, len(view), _BLOCK_BYTES):
        block = bytes(view[at : at + _BLOCK_BYTES + 1])  # one more, for an escape across the border
        if not block.isascii() or b"\\u" in block:
            return True
    return False


def _equal(one: bytes, other: bytes | memoryview) -> bool:
    """Equality without a copy of either: a view is compared item by item, fifty times slower than bytes."""
    if len(one) != len(other):
        return False
    blocks = range(0, len(one), _BLOCK_BYTES)
    return all(one[at : at + _BLOCK_BYTES] == bytes(other[at : at + _BLOCK_BYTES]) for at in blocks)


def _check_duplicates(data: bytes | memoryview) -> None:
    """Look at each key of valid JSON. Not by decoding once more: a text may become four times its bytes."""
    seen: list[set[bytes]] = []
    for found in _KEYS.finditer(data):
        token = found[0][:1]
        if token == b"{":
            seen.append(set())
        elif token == b"}":
            seen.pop()
        elif found[2]:
            key = found[1]
            if b"\\" in key:
                key = msgspec.json.encode(msgspec.json.decode(b'"' + key + b'"'))[1:-1]
            if key in seen[-1]:
                raise ValueError(f"duplicate key {shown(key.decode())}")
            seen[-1].add(key)


def shown(value: Any) -> str:
    """``value`` for a message, short: what is wrong may be megabytes."""
    return cut(repr(value[:_SHOWN] if isinstance(value, (str, bytes, list, tuple)) else value))


def cut(text: str) -> str:
    """The beginning of ``text``."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
