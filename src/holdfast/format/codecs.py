"""Types that the user taught Holdfast to write."""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from holdfast.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Codec:
    """How one type is written and read: through a value that the typed tree knows."""

    name: str
    type: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_lock = threading.Lock()
_by_type: dict[type, Codec] = {}
_by_name: dict[str, Codec] = {}


def register_codec(
    type_: type[T],
    encode: Callable[[T], Any] | None = None,
    decode: Callable[[Any], T] | None = None,
    *,
    name: str | None = None,
) -> type[T]:
    """Teach Holdfast to save and load values of ``type_``.

    Enums, named tuples and dataclasses need no functions: ``register_codec(Point)``. It also works as a decorator on
    such a class. Register before saving and before loading; a checkpoint never imports the type by itself.

    Args:
        type_: the type; its subclasses are not included.
        encode: turns a value into plain containers, numbers, text, tensors or arrays.
        decode: the inverse of ``encode``.
        name: what the checkpoint calls the type; by default its module and qualified name. Give one to stay readable
            when the class moves.

    Returns:
        ``type_`` itself.

    Raises:
        UsageError: no functions were given for a type that needs them, or the name belongs to another type.
    """
    if (encode is None) != (decode is None):
        raise UsageError(f"register_codec({type_.__qualname__}): give both encode and decode, or neither.")
    if encode is None or decode is None:
        encode, decode = _functions_for(type_)
    codec = Codec(name or f"{type_.__module__}:{type_.__qualname__}", type_, encode, decode)
    with _lock:
        holder = _by_name.get(codec.name)
        if holder is not None and (holder.type.__module__, holder.type.__qualname__) != (
            type_.__module__,
            type_.__qualname__,
        ):
            raise UsageError(f"register_codec: the name {codec.name!r} belongs to {holder.type!r}; give another name=.")
        _by_type[type_] = codec
        _by_name[codec.name] = codec
    return type_


def codec_for(type_: type) -> Codec | None:
    """The codec registered for exactly ``type_``."""
    return _by_type.get(type_)


def codec_named(name: str) -> Codec | None:
    """The codec that a checkpoint calls ``name``."""
    return _by_name.get(name)


def _functions_for(type_: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if issubclass(type_, enum.Flag):
        return (lambda member: member.value), type_
    if issubclass(type_, enum.Enum):
        # By name: two members may not share one, and a value may be anything.
        return (lambda member: member.name), lambda name: type_[name]
    if issubclass(type_, tuple) and hasattr(type_, "_fields"):
        return (lambda value: value._asdict()), (lambda fields: type_(**fields))
    if dataclasses.is_dataclass(type_):
        return _dataclass_functions(type_)
    raise UsageError(
        f"register_codec({type_.__qualname__}): only enums, named tuples and dataclasses need no functions; "
        "give encode= and decode=."
    )


def _dataclass_functions(type_: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    names = [field.name for field in dataclasses.fields(type_)]

    def decode(fields: dict[str, Any]) -> Any:
        # Set one by one, past __init__: fields with init=False and conversions in __post_init__ stay as they were.
        value = object.__new__(type_)
        for name in names:
            object.__setattr__(value, name, fields[name])
        return value

    return (lambda value: {name: getattr(value, name) for name in names}), decode
