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
