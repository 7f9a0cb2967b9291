"""Types that the user taught Holdfast to write."""

from __future__ import annotations

import collections
import dataclasses
import decimal
import enum
from typing import Any, NamedTuple

import msgspec
import pytest

from holdfast.errors import UnsupportedValueError, UsageError
from holdfast.format import codecs, tree
from holdfast.format.codecs import register_codec


class Color(enum.Enum):
    """An enum with equal-looking values."""

    RED = 1
    GREEN = "1"


class Size(enum.IntEnum):
    """An enum that is also an int."""

    SMALL = 1


class Name(enum.StrEnum):
    """An enum that is also text."""

    A = "a"


class Mode(enum.Flag):
    """A flag, of which there are more values than members."""

    READ = 1
    WRITE = 2


class Point(NamedTuple):
    """A named tuple."""

    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Config:
    """A dataclass that converts what it is given."""

    name: str
    sizes: tuple[int, ...]
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.sizes))


@dataclasses.dataclass(frozen=True)
class Child(Config):
    """A subclass, which is another type."""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with nothing registered."""
    monkeypatch.setattr(codecs, "_by_type", {})
    monkeypatch.setattr(codecs, "_by_name", {})


class Values(tree.OpaqueLeaves):
    """Leaves that let codecs run, as a load does."""

    def for_codec(self) -> Values:  # type: ignore[override]
        """Themselves."""
        return self


def round_trip(value: object) -> Any:
    """Through the bytes of a manifest and back."""
    node = tree.encode(value, "state", tree.OpaqueLeaves())
    return tree.decode(msgspec.json.decode(msgspec.json.encode(node)), Values())


@pytest.mark.parametrize(
    "value",
    [Color.RED, Color.GREEN, Size.SMALL, Name.A, Mode.READ | Mode.WRITE, Point(1.0, float("inf")), Config("a", (1, 2))],
    ids=repr,
)
def test_plain_kinds_need_no_functions(value: object) -> None:
    """Enums, flags, named tuples and dataclasses come back equal and of the same type."""
    register_codec(type(value))
    back = round_trip({"a": [value]})
    assert back == {"a": [value]}
    assert type(back["a"][0]) is type(value)


@pytest.mark.parametrize(
    "value", [Color.RED, Size.SMALL, Name.A, Mode.READ, Point(1.0, 2.0), Config("a", ())], ids=repr
)
def test_unregistered_types_are_refused(value: object) -> None:
    """Nothing is written as its base type; the error has the path and the way out."""
    with pytest.raises(UnsupportedValueError, match=r"state\.a\[0\].*register_codec") as caught:
        round_trip({"a": [value]})
    assert caught.value.key == "state.a[0]"


def test_unregistered_keys_are_refused() -> None:
    """A StrEnum as a key would come back as text."""
    with pytest.raises(UnsupportedValueError, match=r"state\.<key>"):
        round_trip({Name.A: 1})


def test_registered_keys_and_members() -> None:
    """Hashable values may be keys and members."""
    register_codec(Color)
    register_codec(Point)
    value = {Color.RED: {Color.GREEN, Point(1.0, 2.0)}}
    assert round_trip(value) == value


def test_subclasses_are_not_included() -> None:
    """The codec of a class would lose what its subclass adds."""
    register_codec(Config)
    with pytest.raises(UnsupportedValueError, match="Child"):
        round_trip(Child("a", ()))


def test_own_functions_and_name() -> None:
    """Anything goes through a value that the tree knows; the name is the checkpoint's."""
    register_codec(decimal.Decimal, str, decimal.Decimal, name="decimal")
    assert tree.encode(decimal.Decimal("1.10"), "", tree.OpaqueLeaves()) == {"$codec": ["decimal", "1.10"]}
    assert str(round_trip(decimal.Decimal("1.10"))) == "1.10"


def test_as_a_decorator() -> None:
    """The class itself is returned."""

    @register_codec
    class Pair(NamedTuple):
        a: int

    assert round_trip(Pair(1)) == Pair(1)


def test_functions_are_needed_for_other_types() -> None:
    """A plain class says nothing about how to write it."""
    with pytest.raises(UsageError, match="give encode= and decode="):
        register_codec(decimal.Decimal)


def test_both_functions_or_neither() -> None:
    """Half a codec could not read what it writes."""
    with pytest.raises(UsageError, match="both encode and decode"):
        register_codec(decimal.Decimal, str)


def test_a_name_belongs_to_one_type() -> None:
    """Two types under one name would be read as each other; registering a type again is no harm."""
    register_codec(Color, name="x")
    register_codec(Color, name="x")
    with pytest.raises(UsageError, match="belongs to"):
        register_codec(Size, name="x")


def test_what_the_codec_gives_must_be_known() -> None:
    """An encoder that returns another unknown type fails at the save, with the path."""
    register_codec(decimal.Decimal, lambda value: object(), lambda value: value)
    with pytest.raises(UnsupportedValueError, match=r"state\.a: object"):
        round_trip({"a": decimal.Decimal(1)})


def test_a_codec_that_gives_itself_back() -> None:
    """An encoder that does not get anywhere is found out."""
    register_codec(decimal.Decimal, lambda value: value, lambda value: value)
    with pytest.raises(UnsupportedValueError, match="It contains itself"):
        round_trip(decimal.Decimal(1))


def test_reading_without_the_codec_says_what_to_register() -> None:
    """It is the reader's lack, not damage."""
    register_codec(Color, name="my.Color")
    node = tree.encode(Color.RED, "", tree.OpaqueLeaves())
    codecs._by_name.clear()
    with pytest.raises(UsageError, match=r"register_codec") as caught:
        tree.decode(node, Values())
    assert caught.value.key == "my.Color"


def test_looking_runs_no_codec() -> None:
    """Without tensors a value stays what it is on disk, registered or not."""
    register_codec(Color, name="my.Color")
    node = tree.encode(Color.RED, "", tree.OpaqueLeaves())
    value = tree.decode(node, tree.OpaqueLeaves())
    assert (value, repr(value)) == (tree.Opaque("$codec", ("my.Color", "RED")), "codec(my.Color: 'RED')")


@pytest.mark.parametrize("body", ["BLUE", 1, None, ["RED"], {"a": 1}], ids=str)
def test_what_a_codec_cannot_decode(body: object) -> None:
    """Whatever the user's function raises becomes a ValueError that names the codec."""
    register_codec(Color, name="my.Color")
    with pytest.raises(ValueError, match=r"codec of my\.Color cannot decode"):
        tree.decode({"$codec": ["my.Color", body]}, Values())


def test_ordinary_containers_are_not_codecs() -> None:
    """A subclass of dict is none of the tree's types."""

    class Bag(collections.OrderedDict[str, int]):
        pass

    with pytest.raises(UnsupportedValueError, match="Bag"):
        round_trip(Bag())
