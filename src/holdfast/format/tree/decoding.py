"""The typed tree to values. Whatever the tree holds, what it cannot mean is a ValueError and nothing else."""

from __future__ import annotations

import base64
import collections
import datetime
import functools
import math
import pathlib
import re
import struct
import zoneinfo
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.errors import HoldfastError, UsageError
from holdfast.format.codecs import Codec, codec_named
from holdfast.format.strict_json import cut, shown
from holdfast.format.tree.nodes import (
    FACTORIES,
    IN_FILES,
    MAX_DEPTH,
    MAX_EQUAL_HASHES,
    MAX_INT_HEX_DIGITS,
    Json,
    LeafDecoder,
    Opaque,
    crowded,
)

_INT = re.compile(rf"-?(0x[0-9a-f]{{1,{MAX_INT_HEX_DIGITS}}}|[0-9]{{1,4001}})", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", re.ASCII)
# What a dtype calls itself: a kind and its size, or a letter of C. numpy knows more names, and reads those that begin
# with a number as if they were Python.
_NUMPY_DTYPE = re.compile(
    r"[<>|=]?(?:[?biufcSUVMm][0-9]{0,9}|[BhHIlLqQpPnNedgFDG])(?:\[(?:[1-9][0-9]{0,8})?[A-Za-z]{1,2}\])?", re.ASCII
)

_LEAF_DEPTH = 2  # a complex number, and within it a float that is not finite


@dataclass(slots=True)
class _Decoder:
    leaves: LeafDecoder
    depth: int = 0
    in_files: int = 0

    def value(self, node: Json) -> Any:
        if not isinstance(node, (list, dict)):
            return node
        if self.depth >= MAX_DEPTH + _LEAF_DEPTH:
            raise ValueError(f"the tree is nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        try:
            if isinstance(node, list):
                return [self.value(item) for item in node]
            if len(node) == 1:
                tag, body = next(iter(node.items()))
                if tag.startswith("$"):
                    return self._tagged(tag, body)
            if any(key.startswith("$") for key in node):
                raise ValueError(f"a tagged object has one key, found {shown(list(node))}")
            return {key: self.value(item) for key, item in node.items()}
        finally:
            self.depth -= 1

    def _tagged(self, tag: str, body: Json) -> Any:
        decode_tag = _TAGS.get(tag)
        try:
            return self._leaf(tag, body) if decode_tag is None else decode_tag(self, body)
        except (HoldfastError, RecursionError):
            raise
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, OSError, struct.error) as error:
            raise ValueError(f"{cut(tag)} cannot hold {shown(body)}: {cut(str(error))}") from error

    def _leaf(self, tag: str, body: Json) -> Any:
        self.in_files += tag in IN_FILES
        try:
            return self.leaves.decode(tag, body)
        except KeyError as error:
            raise ValueError(f"unknown tag {cut(tag)} (a newer Holdfast may know it)") from error

    def items(self, node: Json) -> list[Any]:
        return [self.value(item) for item in _expect(node, list)]

    def pairs(self, node: Json) -> list[tuple[Hashable, Any]]:
        decoded = []
        for pair in _expect(node, list):
            key, item = _expect(pair, list)
            decoded.append((self.hashed(key), self.value(item)))
        _refuse_crowd([key for key, _ in decoded])
        if len({key for key, _ in decoded}) != len(decoded):
            raise ValueError("duplicate key")
        return decoded

    def hashed(self, node: Json) -> Hashable:
        """A member of a set or a key of a dictionary."""
        before = self.in_files
        value: Hashable = self.value(node)
        if self.in_files != before:
            raise ValueError("a tensor cannot be a member of a set or a key")
        return value

    def members(self, node: Json) -> frozenset[Hashable]:
        decoded = [self.hashed(item) for item in _expect(node, list)]
        _refuse_crowd(decoded)
        found = frozenset(decoded)
        if len(found) != len(decoded):
            raise ValueError("duplicate member")
        return found


def decode(node: Json, leaves: LeafDecoder) -> Any:
    """The value that ``node`` stands for; the inverse of :func:`encode`.

    Raises:
        ValueError: ``node`` is not a typed tree.
        UsageError: it needs what is not there: a codec that was not registered, a time zone that is not installed.
    """
    try:
        return _Decoder(leaves).value(node)
    except RecursionError as error:
        raise ValueError("the tree is nested deeper than what is left of Python's stack") from error


def _refuse_crowd(keys: Sequence[Hashable]) -> None:
    if crowded(keys):
        raise ValueError(f"more than {MAX_EQUAL_HASHES} keys or members have one hash")


def _expect(node: Json, kind: type) -> Any:
    if type(node) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {shown(node)}")
    return node


def _decode_int(decoder: _Decoder, body: Json) -> int:
    text = _expect(body, str)
    if not _INT.fullmatch(text):
        raise ValueError(f"not an integer: {shown(text)}")
    return int(text, 16 if "x" in text else 10)


def _decode_float(decoder: _Decoder, body: Json) -> float:
    text = _expect(body, str)
    if text in ("nan", "inf", "-inf"):
        return float(text)  # a new one each time: two nans that are one object would be one key
    prefix, _, bits = text.partition(":")
    value = struct.unpack(">d", bytes.fromhex(bits))[0] if prefix == "nan" else None
    if value is None or not math.isnan(value):
        raise ValueError(f"not a float: {shown(text)}")
    return float(value)


def _decode_complex(decoder: _Decoder, body: Json) -> complex:
    real, imag = (decoder.value(part) for part in _expect(body, list))
    # Built from its parts: arithmetic such as real + imag * 1j would not keep their bits.
    return complex(_expect(real, float), _expect(imag, float))


def _decode_bytes(body: Json) -> bytes:
    return base64.b64decode(_expect(body, str), validate=True)


def _decode_scalar(decoder: _Decoder, body: Json) -> Any:
    name, bits = _expect(body, list)
    dtype = plain_numpy_dtype(name)
    raw = bytes.fromhex(bits)
    if len(raw) != dtype.itemsize:
        raise ValueError(f"{name} takes {dtype.itemsize} bytes, found {len(raw)}")
    if dtype.kind == "U":  # numpy would drop zeros at the end of text and bytes
        return np.str_(raw.decode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le", "surrogatepass"))
    return dtype.type(raw) if dtype.kind in "SV" else np.frombuffer(raw, dtype)[0]


def plain_numpy_dtype(name: Json) -> np.dtype[Any]:
    """The numpy dtype called ``name``; ValueError for objects, records and what is no dtype."""
    if not isinstance(name, str) or not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError(f"not a numpy dtype: {shown(name)}")
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise ValueError(f"not a numpy dtype: {name!r}") from error
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        raise ValueError(f"not a plain numpy dtype: {name!r}")
    return dtype


def _decode_path(decoder: _Decoder, body: Json) -> pathlib.PurePath:
    kind, text = _expect(body, list)
    kinds: dict[str, type[pathlib.PurePath]] = {
        "Path": pathlib.Path,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }
    return kinds[kind](_expect(text, str))


def _decode_zone(zone: Json) -> datetime.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        # A key is looked up below the zone directories: nothing that could climb out of them.
        if not _ZONE.fullmatch(zone):
            raise ValueError(f"not a time zone: {shown(zone)}")
        # And only of those that there are: for others zoneinfo looks for a module of such a name.
        if zone.removeprefix("posix/").removeprefix("right/") not in _known_zones():
            raise UsageError(f"time zone {cut(zone)} is not known on this machine: pip install tzdata.", key=zone)
        try:
            return zoneinfo.ZoneInfo(zone)
        except (zoneinfo.ZoneInfoNotFoundError, OSError, ValueError) as error:
            raise UsageError(f"time zone {zone} is not known on this machine: pip install tzdata.", key=zone) from error
    days, seconds, microseconds, name = _expect(zone, list)
    offset = datetime.timedelta(days, seconds, microseconds)
    return datetime.timezone(offset) if name is None else datetime.timezone(offset, name)


@functools.cache
def _known_zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


def _decode_datetime(decoder: _Decoder, body: Json) -> datetime.datetime:
    text, fold, zone = _expect(body, list)
    return datetime.datetime.fromisoformat(text).replace(fold=fold, tzinfo=_decode_zone(zone))


def _decode_time(decoder: _Decoder, body: Json) -> datetime.time:
    text, fold, zone = _expect(body, list)
    return datetime.time.fromisoformat(text).replace(fold=fold, tzinfo=_decode_zone(zone))


def _decode_defaultdict(decoder: _Decoder, body: Json) -> Any:
    name, pairs = _expect(body, list)
    return collections.defaultdict(None if name is None else FACTORIES[name], decoder.pairs(pairs))


def _decode_deque(decoder: _Decoder, body: Json) -> Any:
    maxlen, items = _expect(body, list)
    return collections.deque(decoder.items(items), maxlen)


def _decode_codec(decoder: _Decoder, body: Json) -> Any:
    name, inner = _expect(body, list)
    codec = codec_named(_expect(name, str))
    leaves = decoder.leaves.for_codec()
    if leaves is None:
        return Opaque("$codec", (name, decoder.value(inner)))
    if codec is None:
        raise UsageError(f"{name} was saved through a codec: call holdfast.register_codec for it first.", key=name)
    outer, decoder.leaves = decoder.leaves, leaves
    try:
        value = decoder.value(inner)
        leaves.fill()
    finally:
        decoder.leaves = outer
    return _through(codec, value)


def _through(codec: Codec, value: Any) -> Any:
    try:
        return codec.decode(value)
    except Exception as error:  # the user's function: what it raises is not ours to know
        raise ValueError(f"the codec of {codec.name} cannot decode {shown(value)}: {error!r}") from error


_TAGS: dict[str, Callable[[_Decoder, Json], Any]] = {
    "$tuple": lambda decoder, body: tuple(decoder.items(body)),
    "$dict": lambda decoder, body: dict(decoder.pairs(body)),
    "$set": lambda decoder, body: set(decoder.members(body)),
    "$frozenset": lambda decoder, body: decoder.members(body),
    "$ordereddict": lambda decoder, body: collections.OrderedDict(decoder.pairs(body)),
    "$counter": lambda decoder, body: collections.Counter(dict(decoder.pairs(body))),
    "$defaultdict": _decode_defaultdict,
    "$deque": _decode_deque,
    "$int": _decode_int,
    "$float": _decode_float,
    "$complex": _decode_complex,
    "$bytes": lambda decoder, body: _decode_bytes(body),
    "$bytearray": lambda decoder, body: bytearray(_decode_bytes(body)),
    "$scalar": _decode_scalar,
    "$path": _decode_path,
    "$datetime": _decode_datetime,
    "$date": lambda decoder, body: datetime.date.fromisoformat(body),
    "$time": _decode_time,
    "$timedelta": lambda decoder, body: datetime.timedelta(*_expect(body, list)),
    "$codec": _decode_codec,
}
