"""The typed tree: Python values as JSON, exact in type and bits.

JSON stands for itself where it can say a value exactly. Everything else is an object with one key, the tag:

    $tensor $ndarray                      the name of a tensor in the entry's file
    $tuple $dict $set $frozenset          containers; ``$dict`` for keys that are not plain strings
    $ordereddict $counter $defaultdict $deque
    $float $int $complex $bytes $bytearray $scalar
    $path $datetime $date $time $timedelta
    $dtype $size $device                  torch's, where torch is loaded
    $codec                                a type the user registered

A type outside this table is an error with the path to it. Nothing is guessed, coerced or imported.
"""

from __future__ import annotations

import base64
import collections
import datetime
import math
import pathlib
import re
import struct
import zoneinfo
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from holdfast.errors import UnsupportedValueError
from holdfast.format.codecs import Codec, codec_for, codec_named

Json = Any  # None | bool | int | float | str | list[Json] | dict[str, Json]

MAX_DEPTH = 200
_INT64 = range(-(2**63), 2**63)
_PLAIN_NAN = struct.pack(">d", math.nan)


class Leaves(Protocol):
    """What the tree leaves to its user: the values that live in data files, and those that only torch knows."""

    def encode(self, value: Any, path: str) -> dict[str, Json] | None:
        """``value`` as a tagged object, or None when it is not one of these leaves."""

    def decode(self, tag: str, body: Json) -> Any:
        """The value of a tagged object; KeyError when the tag is not one of these leaves."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that cannot be made here: its tag and body, for showing (torch is not loaded, or no codec registered)."""

    tag: str
    body: Any

    def __repr__(self) -> str:
        return f"{self.tag.removeprefix('$')}({self.body})"


class OpaqueLeaves:
    """Leaves for looking at a tree without torch: each stays what it is on disk."""

    def encode(self, value: Any, path: str) -> dict[str, Json] | None:
        """Nothing is a leaf when encoding without tensors."""
        return None

    def decode(self, tag: str, body: Json) -> Any:
        """Every unknown tag becomes an :class:`Opaque`."""
        return Opaque(tag, body)


def child(path: str, key: object) -> str:
    """The path of the value under ``key`` in the container at ``path``: ``optimizer.param_groups[0].lr``."""
    if isinstance(key, str):
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def unsupported(value: object, path: str, way_out: str) -> UnsupportedValueError:
    """The error for a value that cannot be written."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return UnsupportedValueError(f"{path}: {name} cannot be saved exactly. {way_out}", key=path)


# ---------------------------------------------------------------------------------------------------------- encoding


@dataclass(slots=True)
class _Encoder:
    leaves: Leaves
    open_containers: set[int] = field(default_factory=set)

    def value(self, value: Any, path: str) -> Json:
        simple = _SIMPLE.get(type(value))
        if simple is not None:
            return simple(value, path)
        container = _CONTAINERS.get(type(value))
        if container is not None:
            return self._container(container, value, path)
        leaf = self.leaves.encode(value, path)
        if leaf is not None:
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
        return [[self.value(key, f"{path}.<key>"), self.value(item, child(path, key))] for key, item in mapping.items()]

    def dict(self, mapping: dict[Any, Any], path: str) -> Json:
        if all(type(key) is str and not key.startswith("$") for key in mapping):
            return {_text(key, path): self.value(item, child(path, key)) for key, item in mapping.items()}
        return {"$dict": self.pairs(mapping, path)}


def encode(value: Any, path: str, leaves: Leaves) -> Json:
    """``value`` as JSON.

    Args:
        value: any nesting of the types in the table.
        path: where it stands, for errors.
        leaves: takes the tensors.

    Raises:
        UnsupportedValueError: a type outside the table, a container that holds itself, or nesting past 200 levels.
    """
    return _Encoder(leaves).value(value, path)


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise unsupported(value, path, f"It is not valid Unicode ({error.reason}); store it as bytes.") from error
    return value


def _encode_int(value: int, path: str) -> Json:
    return value if value in _INT64 else {"$int": str(value) if abs(value) < 10**4000 else hex(value)}


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
    return {"$scalar": [_dtype_text(value.dtype), np.asarray(value).tobytes().hex()]}


def _dtype_text(dtype: np.dtype[Any]) -> str:
    text = dtype.str
    return text if np.dtype(text) == dtype else dtype.name


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
    if zone is datetime.timezone.utc:
        return "UTC"
    if type(zone) is datetime.timezone:
        name = zone.tzname(None)
        offset = zone.utcoffset(None)
        plain = datetime.timezone(offset) == zone and datetime.timezone(offset).tzname(None) == name
        return [offset.days, offset.seconds, offset.microseconds, None if plain else name]
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key is not None:
        return zone.key
    raise unsupported(value, path, "Its time zone is neither a fixed offset nor a zoneinfo key.")


def _encode_datetime(value: datetime.datetime, path: str) -> Json:
    return {"$datetime": [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone(value, path)]}


def _encode_time(value: datetime.time, path: str) -> Json:
    return {"$time": [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone(value, path)]}


def _encode_set(tag: str) -> Callable[[_Encoder, Any, str], Json]:
    def encode_set(encoder: _Encoder, value: Any, path: str) -> Json:
        # Sorted by their text, so that equal sets give equal bytes whatever the hash seed.
        return {tag: sorted((encoder.value(item, f"{path}{{...}}") for item in value), key=repr)}

    return encode_set


def _encode_defaultdict(encoder: _Encoder, value: Any, path: str) -> Json:
    name = next((name for name, factory in _FACTORIES.items() if factory is value.default_factory), "")
    if value.default_factory is not None and not name:
        raise unsupported(value.default_factory, f"{path}.default_factory", "Use one of " + ", ".join(_FACTORIES) + ".")
    return {"$defaultdict": [name or None, encoder.pairs(value, path)]}


def _encode_with(codec: Codec) -> Callable[[_Encoder, Any, str], Json]:
    return lambda encoder, value, path: encoder.value(codec.encode(value), path)


_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, list, dict, set, tuple)
}

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


# ---------------------------------------------------------------------------------------------------------- decoding


@dataclass(slots=True)
class _Decoder:
    leaves: Leaves
    depth: int = 0

    def value(self, node: Json) -> Any:
        if not isinstance(node, (list, dict)):
            return node
        if self.depth >= 3 * MAX_DEPTH:  # a level of a container takes up to three levels of JSON
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
                raise ValueError(f"a tagged object has one key, found {sorted(node)}")
            return {key: self.value(item) for key, item in node.items()}
        finally:
            self.depth -= 1

    def _tagged(self, tag: str, body: Json) -> Any:
        decode_tag = _TAGS.get(tag)
        try:
            if decode_tag is not None:
                return decode_tag(self, body)
            return self.leaves.decode(tag, body)
        except KeyError as error:
            raise ValueError(f"unknown tag {tag} (a newer Holdfast may know it)") from error
        except (TypeError, AttributeError, OverflowError, RuntimeError, struct.error) as error:
            raise ValueError(f"{tag} cannot hold {str(body)[:80]!r}: {error}") from error

    def items(self, node: Json) -> list[Any]:
        return [self.value(item) for item in _expect(node, list)]

    def pairs(self, node: Json) -> list[tuple[Hashable, Any]]:
        decoded = []
        for pair in _expect(node, list):
            key, item = _expect(pair, list)
            decoded.append((self.value(key), self.value(item)))
        if len({key for key, _ in decoded}) != len(decoded):
            raise ValueError("duplicate key")
        return decoded


def decode(node: Json, leaves: Leaves) -> Any:
    """The value that ``node`` stands for; the inverse of :func:`encode`.

    Raises:
        ValueError: ``node`` is not a typed tree.
    """
    return _Decoder(leaves).value(node)


def _expect(node: Json, kind: type) -> Any:
    if type(node) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {str(node)[:80]!r}")
    return node


def _decode_int(decoder: _Decoder, body: Json) -> int:
    text = _expect(body, str)
    if not re.fullmatch(r"-?(0x[0-9a-f]{1,100000}|[0-9]{1,4001})", text):
        raise ValueError(f"not an integer: {text[:80]!r}")
    return int(text, 16 if "x" in text else 10)


def _decode_float(decoder: _Decoder, body: Json) -> float:
    named = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    text = _expect(body, str)
    if text in named:
        return named[text]
    prefix, _, bits = text.partition(":")
    value = struct.unpack(">d", bytes.fromhex(bits))[0] if prefix == "nan" else None
    if value is None or not math.isnan(value):
        raise ValueError(f"not a float: {text[:80]!r}")
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
    return np.frombuffer(raw, dtype)[0] if raw else dtype.type()


def plain_numpy_dtype(name: Json) -> np.dtype[Any]:
    """The numpy dtype called ``name``; ValueError for objects, records and what is no dtype."""
    if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[A-Za-z0-9_]{1,16}(\[[0-9A-Za-z]{1,8}\])?", name):
        raise ValueError(f"not a numpy dtype: {str(name)[:80]!r}")
    dtype = np.dtype(name)
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"not a plain numpy dtype: {name!r}")
    return dtype


def _decode_path(decoder: _Decoder, body: Json) -> pathlib.PurePath:
    kind, text = _expect(body, list)
    kinds = {"Path": pathlib.Path, "PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath}
    return kinds[kind](_expect(text, str))


def _decode_zone(zone: Json) -> datetime.tzinfo | None:
    if zone is None:
        return None
    if zone == "UTC":
        return datetime.timezone.utc
    if isinstance(zone, str):
        # A key is looked up below the zone directories: nothing that could climb out of them.
        if not re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", zone):
            raise ValueError(f"not a time zone: {zone[:80]!r}")
        try:
            return zoneinfo.ZoneInfo(zone)
        except zoneinfo.ZoneInfoNotFoundError as error:
            raise ValueError(f"time zone {zone} is not known on this machine") from error
    days, seconds, microseconds, name = _expect(zone, list)
    offset = datetime.timedelta(days, seconds, microseconds)
    return datetime.timezone(offset) if name is None else datetime.timezone(offset, name)


def _decode_datetime(decoder: _Decoder, body: Json) -> datetime.datetime:
    text, fold, zone = _expect(body, list)
    return datetime.datetime.fromisoformat(text).replace(fold=fold, tzinfo=_decode_zone(zone))


def _decode_time(decoder: _Decoder, body: Json) -> datetime.time:
    text, fold, zone = _expect(body, list)
    return datetime.time.fromisoformat(text).replace(fold=fold, tzinfo=_decode_zone(zone))


def _decode_defaultdict(decoder: _Decoder, body: Json) -> Any:
    name, pairs = _expect(body, list)
    return collections.defaultdict(None if name is None else _FACTORIES[name], decoder.pairs(pairs))


def _decode_deque(decoder: _Decoder, body: Json) -> Any:
    maxlen, items = _expect(body, list)
    return collections.deque(decoder.items(items), maxlen)


def _decode_codec(decoder: _Decoder, body: Json) -> Any:
    name, inner = _expect(body, list)
    value = decoder.value(inner)
    codec = codec_named(_expect(name, str))
    if codec is not None:
        return codec.decode(value)
    if isinstance(decoder.leaves, OpaqueLeaves):
        return Opaque("$codec", f"{name}: {value!r}")
    raise ValueError(f"{name} was saved through a codec; call holdfast.register_codec for it before loading")


_TAGS: dict[str, Callable[[_Decoder, Json], Any]] = {
    "$tuple": lambda decoder, body: tuple(decoder.items(body)),
    "$dict": lambda decoder, body: dict(decoder.pairs(body)),
    "$set": lambda decoder, body: set(decoder.items(body)),
    "$frozenset": lambda decoder, body: frozenset(decoder.items(body)),
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
