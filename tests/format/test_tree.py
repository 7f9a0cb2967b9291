"""The typed tree: exact both ways, and strict when read."""

from __future__ import annotations

import collections
import datetime
import functools
import math
import pathlib
import struct
import sys
import types
import zoneinfo
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UnsupportedValueError, UsageError
from holdfast.format import strict_json, tree

LEAVES = tree.OpaqueLeaves()
UTC = datetime.UTC


def encode(value: object) -> Any:
    """The JSON of a value."""
    return tree.encode(value, "state", LEAVES)


def decode(node: object) -> Any:
    """The value of JSON that went through bytes."""
    return tree.decode(strict_json.decode(msgspec.json.encode(node), object), LEAVES)


def round_trip(value: object) -> Any:
    """Through the bytes of a manifest and back."""
    return decode(encode(value))


def bits(value: Any) -> object:
    """``value`` as something that is equal only where type, order and every bit are."""
    kind = type(value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, struct.pack(">dd", value.real, value.imag)
    if isinstance(value, np.generic):
        return kind, value.dtype, value.tobytes()
    if kind in (datetime.datetime, datetime.time):
        zone = value.tzinfo
        return kind, value.replace(tzinfo=None), value.fold, type(zone), getattr(zone, "key", None) or str(zone)
    if kind in (set, frozenset):
        return kind, sorted(map(repr, map(bits, value)))
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return kind, factory, [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, collections.deque):
        return kind, value.maxlen, list(map(bits, value))
    if isinstance(value, (list, tuple)):
        return kind, list(map(bits, value))
    return kind, value


NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]
NEGATIVE_NAN = struct.unpack(">d", bytes.fromhex("fff8000000000000"))[0]
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")

EXACT: list[Any] = [
    None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, 2**64, 2**128 - 1, -(2**200), 10**4000, 10**4001,
    -(2**400_000 - 1),
    0.0, -0.0, 1.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD, NEGATIVE_NAN,
    "", "a", "ä\0\n\u2028😀", "$x", 1 + 2j, complex(-0.0, math.nan), complex(math.inf, -0.0),
    b"", b"\0\xff", bytearray(b"abc"), bytearray(),
    {10**5000: 1}, [], [[]], (), ((),), (1,), [1, (2, [3])], {}, {"": 1}, {"a": {}}, {"$x": 1},
    {"$tensor": "w"}, {"a": 1, "$b": 2},
    {1: 2}, {1: "int", "1": "text"}, {None: 1, True: 2, 1.5: 3, (1, 2): 4, b"x": 5}, {-0.0: 1}, {math.nan: 1},
    {float("nan"): 1, float("nan"): 2}, {(float("nan"), n): n for n in (1, 1.5)}, {"b": 1, "a": 2},
    set(), {1, 2, 3}, {"a", None, 1.5, (1, 2)}, {float("nan"), float("nan")}, frozenset(),
    frozenset({frozenset({1}), 2}),
    collections.OrderedDict([("b", 1), ("a", 2)]), collections.OrderedDict(), collections.OrderedDict({1: 2}),
    collections.Counter({30: 1, 80: 2}), collections.Counter(), collections.Counter({"a": -1}),
    collections.defaultdict(list, {"a": [1]}), collections.defaultdict(None, {1: 2}), collections.defaultdict(dict),
    collections.defaultdict(int), collections.deque([1, 2], 5), collections.deque(), collections.deque(maxlen=0),
    pathlib.Path("a/b"), pathlib.Path(), pathlib.PurePosixPath("/a"), pathlib.PureWindowsPath("C:\\a\\b"),
    datetime.date(1, 1, 1), datetime.date.max, datetime.timedelta.min, datetime.timedelta(-1, 2, 3),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=BERLIN),  # noqa: DTZ001
    datetime.datetime(2026, 1, 2, tzinfo=UTC), datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")),
    datetime.datetime.min.replace(tzinfo=UTC), datetime.datetime.max.replace(tzinfo=UTC),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, microseconds=1))),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "CEST")),
    datetime.time(1, 2, 3, 4), datetime.time(fold=1), datetime.time(1, tzinfo=UTC), datetime.time(1, tzinfo=BERLIN),
    np.float64(0.1), np.float64("nan"), np.float32(0.1), np.float16("-0.0"), np.longdouble("0.1"),
    np.clongdouble(1 + 2j),
    np.complex64(1j), np.complex128(complex(-0.0, math.nan)), np.bool_(True), np.int8(-1), np.int16(-1), np.int32(-1),
    np.int64(-1), np.uint8(255), np.uint16(65535), np.uint32(2**32 - 1), np.uint64(2**64 - 1), np.longlong(-1),
    np.ulonglong(1), np.intc(3), np.intp(4),
    np.datetime64("2026-01-02T03:04:05.123456789"), np.datetime64("NaT"), np.datetime64("2026", ("s", 25)),
    np.datetime64("2026", "Y"),
    np.timedelta64(5, "ns"), np.timedelta64("NaT"), np.timedelta64(7),
    np.str_(""), np.str_("ä😀"), np.str_("a\0"), np.str_("\udc80"), np.bytes_(b""), np.bytes_(b"a\0"),
    np.void(b"ab"), np.void(b""),
    {np.int64(1): np.str_("x")},
]  # fmt: skip


@pytest.mark.parametrize("value", EXACT, ids=lambda value: type(value).__name__)
def test_round_trip_is_exact(value: object) -> None:
    """Type, order and every bit come back, alone and nested."""
    assert bits(round_trip(value)) == bits(value)
    assert bits(round_trip({"a": [(value,)]})) == bits({"a": [(value,)]})


NUMPY_SCALARS = st.one_of(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda kind: st.binary(min_size=np.dtype(kind).itemsize, max_size=np.dtype(kind).itemsize).map(
            lambda raw: np.frombuffer(raw, kind)[0]
        )
    ),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.text(st.characters(exclude_categories=["Cs"])).map(np.str_),
    st.integers(-(2**63), 2**63 - 1).map(lambda ticks: np.datetime64(ticks, "us")),
)
FLOATS = st.binary(min_size=8, max_size=8).map(lambda raw: float(struct.unpack(">d", raw)[0]))
ZONES = (
    st.none()
    | st.timezones()
    | st.builds(datetime.timezone, st.timedeltas(*(datetime.timedelta(hours=h) for h in (-23, 23))))
)
HASHABLE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        FLOATS,
        st.complex_numbers(),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.binary(),
        NUMPY_SCALARS,
        st.dates(),
        st.timedeltas(),
        st.builds(lambda value, fold: value.replace(fold=fold), st.datetimes(timezones=ZONES), st.integers(0, 1)),
        st.builds(
            lambda value, fold: value.replace(fold=fold),
            st.times(timezones=st.none() | st.just(UTC)),
            st.integers(0, 1),
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=5,
)
VALUES = st.recursive(
    HASHABLE | st.binary().map(bytearray),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(HASHABLE, max_size=4),
        st.dictionaries(st.text("$ab", max_size=3), inner, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4).map(collections.OrderedDict),
        st.dictionaries(HASHABLE, st.integers(), max_size=4).map(collections.Counter),
        st.dictionaries(HASHABLE, inner, max_size=4).map(functools.partial(collections.defaultdict, list)),
        st.builds(collections.deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 4)),
    ),
    max_leaves=20,
)


@given(VALUES)
def test_any_nesting_round_trips(value: object) -> None:
    """Type, order and every bit, of whatever can be built from the table."""
    assert bits(round_trip(value)) == bits(value)


@given(st.sets(st.integers() | st.text(st.characters(exclude_categories=["Cs"]))))
def test_equal_sets_give_equal_bytes(value: set[Any]) -> None:
    """The order of a set's hashes does not reach the file."""
    backwards = sorted(value, key=repr, reverse=True)
    assert encode(value) == encode(set(backwards))


def contains_itself() -> list[Any]:
    """A list within itself."""
    value: list[Any] = [1]
    value.append({"a": value})
    return value


class Text(str):
    """A subclass of text."""

    __slots__ = ()


class Zone(datetime.tzinfo):
    """A time zone of the user's own."""

    def utcoffset(self, dt: datetime.datetime | None, /) -> datetime.timedelta:
        """None to speak of."""
        return datetime.timedelta()

    dst = utcoffset

    def tzname(self, dt: datetime.datetime | None, /) -> str:
        """Its name."""
        return "zone"


REFUSED: list[tuple[Any, str, str]] = [
    ({"a": [lambda: 1]}, "state.a[0]", "function"),
    ({"a": (1, len)}, "state.a[1]", "builtin_function_or_method"),
    ({"a": {1: object()}}, "state.a[1]", "object"),
    ({"a": {"b.c": math}}, "state.a.b.c", "module"),
    ({"a": int}, "state.a", "type"),
    ({"a": {object}}, "state.a{...}", "type"),
    ({"a": Text("x")}, "state.a", "Text"),
    ({Text("x"): 1}, "state.<key>", "Text"),
    ({"a": iter([])}, "state.a", "list_iterator"),
    ({"a": range(3)}, "state.a", "range"),
    ({"a": types.MappingProxyType({})}, "state.a", "mappingproxy"),
    ({"a": "\ud800"}, "state.a", "not valid Unicode"),
    ({"a": {"\ud800": 1}}, "state.a", "not valid Unicode"),
    ({"a": pathlib.Path("\udc80")}, "state.a", "not valid Unicode"),
    ({"a": contains_itself()}, "state.a[1].a", "It contains itself"),
    ({"a": collections.defaultdict(lambda: 1)}, "state.a.default_factory", "function"),
    ({"a": datetime.datetime(2026, 1, 1, tzinfo=Zone())}, "state.a", "time zone"),
    ({"a": np.array((1, 2.0), "i4,f8")[()]}, "state.a", "plain type"),
    ({"a": 2**400_001}, "state.a", "400002 bits"),
    ({"a": functools.partial(int)}, "state.a", "partial"),
]


@pytest.mark.parametrize(("value", "path", "what"), REFUSED, ids=[what for _, _, what in REFUSED])
def test_what_cannot_be_written_is_refused(value: object, path: str, what: str) -> None:
    """The error says where and what, at the save."""
    with pytest.raises(UnsupportedValueError) as caught:
        encode(value)
    assert caught.value.key == path
    assert str(caught.value).startswith(path)
    assert what in str(caught.value)


def test_one_list_twice_is_not_a_list_within_itself() -> None:
    """Shared values are written as often as they stand there."""
    shared = [1]
    assert round_trip([shared, shared]) == [[1], [1]]


WRAPS: dict[str, Any] = {
    "list": lambda value: [value],
    "tuple": lambda value: (value,),
    "dict": lambda value: {"a": value},
    "pairs": lambda value: {1: value},
    "frozenset": lambda value: frozenset([value]),
    "deque": lambda value: collections.deque([value]),
    "ordereddict": lambda value: collections.OrderedDict(a=value),
}


def nested(kind: str, levels: int) -> Any:
    """``levels`` containers in each other."""
    value: Any = () if kind == "frozenset" else 1
    for _ in range(levels - (kind == "frozenset")):
        value = WRAPS[kind](value)
    return value


def under(frames: int, function: Any) -> Any:
    """Call ``function`` that many frames further down the stack."""
    return function() if frames == 0 else under(frames - 1, function)


@pytest.mark.parametrize("kind", WRAPS)
def test_the_deepest_nesting_can_be_read_wherever_it_could_be_written(kind: str) -> None:
    """A hundred levels, and the reader may stand 300 calls deeper than the writer."""
    value = nested(kind, tree.MAX_DEPTH)
    node = encode(value)
    assert encode(under(300, lambda: decode(node))) == node


@pytest.mark.parametrize("kind", WRAPS)
def test_deeper_nesting_is_refused(kind: str) -> None:
    """One more level is an error with a path, not a crash of the reader."""
    with pytest.raises(UnsupportedValueError, match="nested deeper than 100 levels"):
        encode(nested(kind, tree.MAX_DEPTH + 1))


def test_the_end_of_the_stack_is_an_error_of_the_same_kind() -> None:
    """However little of the stack the caller has left: no RecursionError, in either direction."""
    node = encode(nested("tuple", tree.MAX_DEPTH))
    depth = len(__import__("inspect").stack())
    left = sys.getrecursionlimit() - depth - 120
    with pytest.raises(UnsupportedValueError, match="Python's stack"):
        under(left, lambda: encode(nested("tuple", tree.MAX_DEPTH)))
    with pytest.raises(ValueError, match="Python's stack"):
        under(left, lambda: tree.decode(node, LEAVES))


HOSTILE: list[Any] = [
    {"$int": 1}, {"$int": "1.0"}, {"$int": "\uff11"}, {"$int": " 1"}, {"$int": "9" * 5000},
    {"$int": "0x" + "f" * 100_001}, {"$int": "1_0"},
    {"$float": 1.0}, {"$float": "1"}, {"$float": "NaN"}, {"$float": "nan:"}, {"$float": "nan:7ff0000000000000"},
    {"$float": "nan:zz"},
    {"$float": "nan:" + "7f" * 9}, {"$complex": []}, {"$complex": [1, 2]}, {"$complex": [1.0]},
    {"$complex": [1.0, 2.0, 3.0]},
    {"$complex": [{"$tuple": []}, 1.0]}, {"$bytes": "a"}, {"$bytes": "a b="}, {"$bytes": 1}, {"$bytes": "ä"},
    {"$bytearray": None},
    {"$tuple": 1}, {"$tuple": {"a": 1}}, {"$tuple": "ab"}, {"$set": [[1]]}, {"$set": [{}]}, {"$set": [1, 1]},
    {"$set": [1, 1.0]},
    {"$set": "ab"}, {"$frozenset": [{"$set": []}]}, {"$set": [{"$tensor": "w"}]}, {"$set": [{"$bytearray": ""}]},
    {"$dict": {}}, {"$dict": [1]}, {"$dict": [[1]]}, {"$dict": [[1, 2, 3]]}, {"$dict": [[[], 1]]},
    {"$dict": [[1, 1], [1, 2]]},
    {"$dict": [[{"$tensor": "w"}, 1]]}, {"$dict": [["a", 1], ["a", 1]]}, {"$dict": ["ab"]},
    {"$ordereddict": 1}, {"$counter": [[1]]}, {"$counter": None}, {"$defaultdict": []},
    {"$defaultdict": ["exec", []]},
    {"$defaultdict": ["int"]}, {"$defaultdict": [1, []]}, {"$defaultdict": [["int"], []]}, {"$deque": []},
    {"$deque": [-1, []]},
    {"$deque": ["a", []]}, {"$deque": [2**70, []]}, {"$deque": [1.5, []]}, {"$deque": [None, 1]},
    {"$path": "a"}, {"$path": ["os.system", "a"]}, {"$path": ["Path", 1]}, {"$path": [["Path"], "a"]},
    {"$date": 1}, {"$date": "2026-13-01"}, {"$date": None}, {"$date": "never"},
    {"$timedelta": [10**10, 0, 0]}, {"$timedelta": ["a", 0, 0]}, {"$timedelta": 1},
    {"$timedelta": [1, 2, 3, 4, 5, 6, 7, 8]},
    {"$timedelta": [10**400, 0, 0]}, {"$timedelta": [{"a": 1}]},
    {"$datetime": []}, {"$datetime": "2026"}, {"$datetime": [1, 0, None]}, {"$datetime": ["2026-01-01", 2, None]},
    {"$datetime": ["2026-01-01", "0", None]}, {"$datetime": ["2026-01-01", 0, 5]},
    {"$datetime": ["2026-01-01", 0, "../../etc/passwd"]},
    {"$datetime": ["2026-01-01", 0, "/etc/passwd"]}, {"$datetime": ["2026-01-01", 0, "No/Where"]},
    {"$datetime": ["2026-01-01", 0, "Europe"]},
    {"$datetime": ["2026-01-01", 0, ""]}, {"$datetime": ["2026-01-01", 0, "a" * 5000]},
    {"$datetime": ["2026-01-01", 0, [0, 0, 0]]},
    {"$datetime": ["2026-01-01", 0, [1, 0, 0, None]]}, {"$datetime": ["2026-01-01", 0, [0, 0, 0, 7]]},
    {"$datetime": ["2026-01-01", 0, [10**10, 0, 0, None]]},
    {"$time": ["25:00", 0, None]}, {"$time": ["01:00", 10**30, None]}, {"$time": 1},
    {"$scalar": []}, {"$scalar": ["<f4"]}, {"$scalar": ["<f4", "00"]}, {"$scalar": ["<f4", "zz000000"]},
    {"$scalar": ["<f4", 1]}, {"$scalar": [1, "00"]},
    {"$scalar": ["O", "00" * 8]}, {"$scalar": ["object", "00" * 8]}, {"$scalar": ["i4,f8", "00" * 12]},
    {"$scalar": ["V99999999999", ""]},
    {"$scalar": ["S999999999999", ""]}, {"$scalar": ["nope", ""]}, {"$scalar": ["M8[zz]", "00" * 8]},
    {"$scalar": ["<M8[0s]", "00" * 8]},
    {"$scalar": ["(2,)i4", "00" * 8]}, {"$scalar": ["T", "00" * 16]}, {"$scalar": ["U1", "ffffffff"]},
    {"$scalar": ["2i4", "00" * 8]},
    {"$scalar": ["f" * 300, ""]}, {"$scalar": ["<f4\n", "00000000"]},
    {"$codec": []}, {"$codec": [1, 2]}, {"$codec": ["a"]}, {"$codec": "a"},
    {"$int": "1", "a": 1}, {"a": 1, "$b": 1}, {"$a": 1, "$b": 1},
]  # fmt: skip


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: str(node)[:60])
def test_hostile_trees_raise_value_errors(node: object) -> None:
    """What a writer of Holdfast would never write is refused, and by nothing but a ValueError."""
    with pytest.raises(ValueError, match=r".+"):
        decode(node)
    with pytest.raises(ValueError, match=r".+"):
        decode({"a": [node]})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(
            lambda tag, body: {tag: body}, st.sampled_from(sorted({next(iter(node)) for node in HOSTILE})), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_value_or_a_value_error(node: object) -> None:
    """No other exception comes out of the decoder, whatever goes in; and what comes out can be written again."""
    try:
        value = decode(node)
        again = encode(value)
    except (ValueError, UnsupportedValueError):  # opaque values can only be shown
        return
    assert bits(decode(again)) == bits(value)


@pytest.mark.parametrize(
    "wrap", [lambda n: [n], lambda n: {"a": n}, lambda n: {"$tuple": [n]}, lambda n: {"$dict": [[1, n]]}]
)
def test_a_depth_bomb_is_a_value_error(wrap: Any) -> None:
    """Nesting without end is refused before it reaches the end of the stack."""
    node: Any = 1
    for _ in range(400):
        node = wrap(node)
    with pytest.raises(ValueError, match="nested deeper"):
        tree.decode(node, LEAVES)


def test_a_zone_that_is_not_installed() -> None:
    """It is this machine's lack, with the way out; not damage."""
    with pytest.raises(UsageError, match="pip install tzdata") as caught:
        decode({"$datetime": ["2026-01-01", 0, "No/Where"]})
    assert caught.value.key == "No/Where"


def test_unknown_tags_stay_opaque_without_torch() -> None:
    """Looking needs no torch: its values are shown as they are on disk, also as keys."""
    node = {"$dict": [[{"$size": [1, 2]}, {"$device": "cuda:0"}]]}
    assert decode(node) == {tree.Opaque("$size", [1, 2]): tree.Opaque("$device", "cuda:0")}
    assert str(decode({"$device": "cuda:0"})) == "device(cuda:0)"


@pytest.mark.parametrize(
    ("parent", "key", "path"), [("a", "b", "a.b"), ("", "b", "b"), ("a", 1, "a[1]"), ("a", (1, "x"), "a[(1, 'x')]")]
)
def test_paths(parent: str, key: object, path: str) -> None:
    """Paths read like Python."""
    assert tree.child(parent, key) == path
