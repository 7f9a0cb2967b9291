"""Values to the typed tree."""

from __future__ import annotations

import base64
import collections
import datetime
import math
import pathlib
import struct
import zoneinfo
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from holdfast.format.codecs import Codec, codec_for
from holdfast.format.tree.nodes import (
    FACTORIES,
    HASHED_LEAVES,
    MAX_DEPTH,
    MAX_EQUAL_HASHES,
    MAX_INT_HEX_DIGITS,
    Json,
    LeafEncoder,
    child,
    crowded,
    unsupported,
)

_INT64 = range(-(2**63), 2**63)
_PLAIN_NAN = struct.pack(">d", math.nan)


@dataclass(slots=True)
class _Encoder:
    leaves: LeafEncoder
    open_containers: set[int] = field(default_factory=set)
    hashed: bool = False

    def value(self, value: Any, path: str) -> Json:
        simple = _SIMPLE.get(type(value))
        if simple is not None:
            return simple(value, path)
        container = _CONTAINERS.get(type(value))
        if container is not None:
            return self._container(container, value, path)
        leaf = self.leaves.encode(value, path)
        if leaf is not None:
            if self.hashed and not leaf.keys() <= HASHED_LEAVES:
                raise unsupported(
                    value, path, "It is a member of a set or a key, by identity; use names and a dictionary."
                )
            return leaf
        if isinstance(value, np.generic):
            return _encode_scalar(value, path)
        if isinstance(value, pathlib.PurePath):
            return _encode_path(value, path)
        codec = codec_for(type(value))
        if codec is not None:
            return {"$codec": [codec.name, self._container(_encode_with(codec), value, path)]}
        raise unsupported(
            value, path, "Leave it out of the state, or register how to write it: holdfast.register_codec(...)."
        )

    def _container(self, encode: Callable[[_Encoder, Any, str], Json], value: Any, path: str) -> Json:
        if id(value) in self.open_containers:
            raise unsupported(value, path, "It contains itself.")
        if len(self.open_containers) >= MAX_DEPTH:
            raise unsupported(value, path, f"It is nested deeper than {MAX_DEPTH} levels.")
        self.open_containers.add(id(value))
        try:
            return encode(self, value, path)
        finally:
            self.open_containers.discard(id(value))

    def items(self, values: Any, path: str) -> list[Json]:
        return [self.value(item, f"{path}[{index}]") for index, item in enumerate(values)]

    def pairs(self, mapping: Mapping[Any, Any], path: str) -> list[Json]:
        _refuse_crowd(list(mapping), mapping, path)
        return [[self.key(key, f"{path}.<key>"), self.value(item, child(path, key))] for key, item in mapping.items()]

    def key(self, value: Any, path: str) -> Json:
        """A member of a set or a key of a dictionary."""
        before, self.hashed = self.hashed, True
        try:
            return self.value(value, path)
        finally:
            self.hashed = before

    def dict(self, mapping: dict[Any, Any], path: str) -> Json:
        for key in mapping:
            if type(key) is not str or key[:1] == "$":
                return {"$dict": self.pairs(mapping, path)}
        within = f"{path}." if path else ""  # what child() puts before a text, once instead of for each
        return {
            key if key.isascii() else _text(key, path): self.value(item, within + key) for key, item in mapping.items()
        }


def encode(value: Any, path: str, leaves: LeafEncoder) -> Json:
    """``value`` as JSON.

    Args:
        value: any nesting of the types in the table.
        path: where it stands, for errors.
        leaves: takes the tensors.

    Raises:
        UnsupportedValueError: a type outside the table, a container that holds itself, or nesting past 100 levels.
    """
    try:
        return _Encoder(leaves).value(value, path)
    except RecursionError as error:
        raise unsupported(value, path, "It is nested deeper than what is left of Python's stack.") from error


def _refuse_crowd(keys: Sequence[Hashable], container: object, path: str) -> None:
    if crowded(keys):
        raise unsupported(container, path, f"More than {MAX_EQUAL_HASHES} keys or members have one hash.")


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise unsupported(value, path, f"It is not valid Unicode ({error.reason}); store it as bytes.") from error
    return value


def _encode_int(value: int, path: str) -> Json:
    if value in _INT64:
        return value
    if value.bit_length() > 4 * MAX_INT_HEX_DIGITS:
        raise unsupported(value, path, f"It has {value.bit_length()} bits; store it as bytes.")
    return {"$int": str(value) if abs(value) < 10**4000 else hex(value)}


def _encode_float(value: float, path: str) -> Json:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        bits = struct.pack(">d", value)
        return {"$float": "nan" if bits == _PLAIN_NAN else f"nan:{bits.hex()}"}
    return {"$float": "inf" if value > 0 else "-inf"}


def _encode_bytes(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _encode_scalar(value: np.generic, path: str) -> Json:
    if value.dtype.hasobject or value.dtype.names is not None:
        raise unsupported(value, path, "Only numpy scalars of a plain type can be saved.")
    return {"$scalar": [_dtype_text(value.dtype), value.tobytes()[: value.dtype.itemsize].hex()]}


def _dtype_text(dtype: np.dtype[Any]) -> str:
    # C's long and long long have one size and two scalar types; only the letter tells them apart.
    return dtype.str if np.dtype(dtype.str).type is dtype.type else dtype.char


def _encode_path(value: pathlib.PurePath, path: str) -> Json:
    if type(value) in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
        return {"$path": [type(value).__name__, _text(str(value), path)]}
    if isinstance(value, pathlib.Path) and type(value) is type(pathlib.Path()):
        return {"$path": ["Path", _text(str(value), path)]}
    raise unsupported(value, path, "Only pathlib's own paths of this system can be saved.")


def _zone(value: datetime.datetime | datetime.time, path: str) -> Json:
    zone = value.tzinfo
    if zone is None:
        return None
    if type(zone) is datetime.timezone:
        name = zone.tzname(None)
        offset = zone.utcoffset(None)
        plain = datetime.timezone(offset) == zone and datetime.timezone(offset).tzname(None) == name
        return [offset.days, offset.seconds, offset.microseconds, None if plain else name]
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        return zone.key
    raise unsupported(value, path, "Its time zone is neither a fixed offset nor a zoneinfo key.")


def _encode_datetime(value: datetime.datetime, path: str) -> Json:
    return {"$datetime": [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone(value, path)]}


def _encode_time(value: datetime.time, path: str) -> Json:
    return {"$time": [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone(value, path)]}


def _encode_set(tag: str) -> Callable[[_Encoder, Any, str], Json]:
    def encode_set(encoder: _Encoder, value: Any, path: str) -> Json:
        _refuse_crowd(list(value), value, path)
        # Sorted by their text, so that equal sets give equal bytes whatever the hash seed.
        return {tag: sorted((encoder.key(item, f"{path}{{...}}") for item in value), key=repr)}

    return encode_set


def _encode_defaultdict(encoder: _Encoder, value: Any, path: str) -> Json:
    name = next((name for name, factory in FACTORIES.items() if factory is value.default_factory), "")
    if value.default_factory is not None and not name:
        raise unsupported(value.default_factory, f"{path}.default_factory", "Use one of " + ", ".join(FACTORIES) + ".")
    return {"$defaultdict": [name or None, encoder.pairs(value, path)]}


def _encode_with(codec: Codec) -> Callable[[_Encoder, Any, str], Json]:
    return lambda encoder, value, path: encoder.value(codec.encode(value), path)


_SIMPLE: dict[type, Callable[[Any, str], Json]] = {
    type(None): lambda value, path: None,
    bool: lambda value, path: value,
    int: _encode_int,
    float: _encode_float,
    str: _text,
    complex: lambda value, path: {"$complex": [_encode_float(value.real, path), _encode_float(value.imag, path)]},
    bytes: lambda value, path: {"$bytes": _encode_bytes(value)},
    bytearray: lambda value, path: {"$bytearray": _encode_bytes(value)},
    datetime.datetime: _encode_datetime,
    datetime.date: lambda value, path: {"$date": value.isoformat()},
    datetime.time: _encode_time,
    datetime.timedelta: lambda value, path: {"$timedelta": [value.days, value.seconds, value.microseconds]},
}

_CONTAINERS: dict[type, Callable[[_Encoder, Any, str], Json]] = {
    list: _Encoder.items,
    dict: _Encoder.dict,
    tuple: lambda encoder, value, path: {"$tuple": encoder.items(value, path)},
    set: _encode_set("$set"),
    frozenset: _encode_set("$frozenset"),
    collections.OrderedDict: lambda encoder, value, path: {"$ordereddict": encoder.pairs(value, path)},
    collections.Counter: lambda encoder, value, path: {"$counter": encoder.pairs(value, path)},
    collections.defaultdict: _encode_defaultdict,
    collections.deque: lambda encoder, value, path: {"$deque": [value.maxlen, encoder.items(value, path)]},
}
