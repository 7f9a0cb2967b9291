"""The manifest: what a checkpoint holds, where each byte of it lies, and what those bytes must be.

What it says of each tensor and file is in :mod:`holdfast.format.records`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from holdfast.errors import FormatVersionError, UsageError
from holdfast.format import envelope, strict_json, tree
from holdfast.format.cells import check_cells
from holdfast.format.names import MAX_STEP, is_data_file_name, is_entry_name
from holdfast.format.records import HEX, FileRecord, TensorRecord, check_file, check_tensors
from holdfast.format.strict_json import cut, shown

FORMAT = "holdfast/1"
MAX_MANIFEST_BYTES = 128 * 2**20
MAX_ANNOTATIONS_BYTES = 16 * 2**20
MAX_MANIFEST_COST_BYTES = 192 * 2**20
"""What a manifest may take in memory, by the estimate of :func:`holdfast.format.strict_json.cost_bytes`."""
MAX_COST_A_BYTE = 16
"""A manifest that is large itself may take so many times its size: those of real checkpoints take seven to fourteen."""
MAX_STATE_MARKS = 400_000
"""How many ``, : [ {`` the trees of a state may have together: AdamW on 20,000 parameters, decoded in half a second."""
MIN_BYTES_A_STATE_MARK = 50
"""A manifest that is large itself may have more, one for so many of its bytes: those of real checkpoints have 75."""
MAX_ANNOTATIONS_COST_BYTES = 48 * 2**20
MAX_FILES = 10_000
# A value of the typed tree beside the JSON that it is decoded from: a mark of a tag may begin a deque, a byte of text
# may be one of base64.
_VALUE_BYTES_A_BYTE = 1
_VALUE_BYTES_A_MARK = 70
_SUPPORTED_BY = {FORMAT: "0.1"}
_NUMBER_TAGS = frozenset({"$float", "$int"})
_NOTHING = msgspec.Raw(b"{}")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything about a checkpoint but its tensors' bytes. Times are UTC, ISO 8601."""

    format: str
    checkpoint_id: str
    run_id: str
    parent: str | None
    step: int
    epoch: int
    created_at: str
    reason: str
    metrics: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, dict[str, TensorRecord]]
    aliases: dict[str, dict[str, str]]
    files: dict[str, FileRecord]
    environment: dict[str, Any]
    layouts: dict[str, tuple[str, ...]] = {}

    def record(self, entry: str, name: str) -> TensorRecord:
        """The record of tensor ``name`` of ``entry``, through its alias if it has one; KeyError when there is none."""
        canonical = self.aliases.get(entry, {}).get(name, name)
        return self.tensors[entry][canonical]

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return sum(record.bytes for record in self.files.values())


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A manifest whose long parts are not looked into: enough to list a run and to decide what stays.

    The fields, their order and what is left out are those of :class:`Manifest`: what it wrote is encoded to the same
    bytes again, which rules out duplicate keys without a look at each.
    """

    format: str
    checkpoint_id: str
    run_id: str
    parent: str | None
    step: int
    epoch: int
    created_at: str
    reason: str
    metrics: dict[str, Any]
    state: msgspec.Raw
    tensors: msgspec.Raw
    aliases: msgspec.Raw
    files: dict[str, FileRecord]
    environment: dict[str, Any]
    layouts: msgspec.Raw = _NOTHING


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The other half: the long parts of a manifest, without those that are in its head already."""

    format: str
    checkpoint_id: msgspec.Raw
    run_id: msgspec.Raw
    parent: msgspec.Raw
    step: msgspec.Raw
    epoch: msgspec.Raw
    created_at: msgspec.Raw
    reason: msgspec.Raw
    metrics: msgspec.Raw
    state: dict[str, Any]
    tensors: dict[str, dict[str, TensorRecord]]
    aliases: dict[str, dict[str, str]]
    files: msgspec.Raw
    environment: msgspec.Raw
    layouts: dict[str, tuple[str, ...]] = {}


class _Parts(msgspec.Struct, frozen=True):
    """A manifest that is not looked into: where each of its parts is."""

    format: msgspec.Raw
    checkpoint_id: msgspec.Raw
    run_id: msgspec.Raw
    parent: msgspec.Raw
    step: msgspec.Raw
    epoch: msgspec.Raw
    created_at: msgspec.Raw
    reason: msgspec.Raw
    metrics: msgspec.Raw
    state: msgspec.Raw
    tensors: msgspec.Raw
    aliases: msgspec.Raw
    files: msgspec.Raw
    environment: msgspec.Raw
    layouts: msgspec.Raw = _NOTHING


_Kind = TypeVar("_Kind", _Body, Head)


class Annotations(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What was learned of a checkpoint after it was made. Losing it loses no state.

    ``checkpoint_id`` is whose they are, so that a copy beside another checkpoint is noticed.
    """

    metrics: dict[str, Any] = {}
    pinned: bool = False
    tags: tuple[str, ...] = ()
    checkpoint_id: str | None = None


def encode(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``.

    Raises:
        UsageError: they, or what they would be decoded to, would be more than a reader takes.
    """
    inner = msgspec.json.encode(manifest)
    data = envelope.seal("manifest", inner)
    try:
        _require(
            len(data) <= MAX_MANIFEST_BYTES, f"has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} that it may"
        )
        strict_json.check_digits(inner)
        _check_size(inner)
        _check_files(manifest)
    except ValueError as error:
        largest = max(manifest.state, key=lambda entry: len(msgspec.json.encode(manifest.state[entry])), default="")
        raise UsageError(
            f"the manifest, with all values beside the tensors, {error} have; put large lists, texts and bytes into "
            f"arrays. Most of them are in the entry {largest!r}.",
            key=largest,
        ) from error
    return data


def _check_size(inner: bytes | memoryview) -> None:
    """Refuse a manifest that takes much memory or time to decode, by an estimate of what there is at most.

    Part by part, for text in one needs no more because of a character in another.
    """
    try:
        parts = msgspec.json.decode(inner, type=_Parts)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not the JSON expected here: {error}") from error
    texts = [memoryview(getattr(parts, name)) for name in _Parts.__struct_fields__]
    state = memoryview(parts.state)
    marks = strict_json.marks(state)
    most = max(MAX_STATE_MARKS, len(inner) // MIN_BYTES_A_STATE_MARK)
    _require(marks <= most, f"has {marks} of ',:[{{' in its state, more than the {most} that it may")
    values_bytes = _VALUE_BYTES_A_BYTE * len(state) + _VALUE_BYTES_A_MARK * marks
    limit_bytes = max(MAX_MANIFEST_COST_BYTES, MAX_COST_A_BYTE * len(inner))
    _check_cost(sum(map(strict_json.cost_bytes, texts)) + values_bytes, limit_bytes)


def decode(data: bytes, path: str, head: Head | None = None) -> Manifest:
    """The manifest in ``data``, checked as far as that goes without its files.

    Args:
        data: the bytes of ``manifest.json``.
        path: where they were found, for errors.
        head: its head, where that is decoded already; what it holds is not made again.

    Raises:
        ValueError: what is wrong with it.
        FormatVersionError: it was written in another version of the format.
    """
    head = decode_head(data, path) if head is None else head
    body = _decoded(data, path, _Body)
    manifest = Manifest(
        format=head.format,
        checkpoint_id=head.checkpoint_id,
        run_id=head.run_id,
        parent=head.parent,
        step=head.step,
        epoch=head.epoch,
        created_at=head.created_at,
        reason=head.reason,
        metrics=head.metrics,
        state=body.state,
        tensors=body.tensors,
        aliases=body.aliases,
        files=head.files,
        environment=head.environment,
        layouts=body.layouts,
    )
    _check_body(manifest)
    return manifest


def decode_head(data: bytes, path: str) -> Head:
    """The head of the manifest in ``data``, checked as :func:`decode` does but for what it leaves out."""
    head = _decoded(data, path, Head)
    _check_head(head)
    return head


def encode_annotations(annotations: Annotations) -> bytes:
    """The bytes of ``annotations.json``.

    Raises:
        UsageError: they would be more than a reader takes.
    """
    inner = msgspec.json.encode(annotations)
    data = envelope.seal("annotations", inner)
    if len(data) > MAX_ANNOTATIONS_BYTES or strict_json.cost_bytes(inner) > MAX_ANNOTATIONS_COST_BYTES:
        raise UsageError(
            f"metrics and tags take {len(data)} bytes, more than annotations may have; put large ones into the state."
        )
    return data


def decode_annotations(data: bytes) -> Annotations:
    """The annotations in ``data``; ValueError says what is wrong."""
    inner = envelope.unseal("annotations", data)
    _check_cost(strict_json.cost_bytes(inner), MAX_ANNOTATIONS_COST_BYTES)
    annotations = strict_json.decode(inner, Annotations)
    _check_metrics(annotations.metrics)
    return annotations


def _decoded(data: bytes, path: str, kind: type[_Kind]) -> _Kind:
    inner = envelope.unseal("manifest", data)
    try:
        if kind is Head:
            strict_json.check_digits(inner)
            _check_size(inner)
        decoded = strict_json.decode(inner, kind, digits_checked=True)  # the body is that of a head
    except ValueError:
        _check_version(inner, path)  # another version may have other fields, and says so better
        raise
    if decoded.format != FORMAT:
        _check_version(inner, path)
    return decoded


def _check_cost(cost_bytes: int, limit_bytes: int) -> None:
    _require(
        cost_bytes <= limit_bytes, f"takes up to {cost_bytes} bytes of memory, more than the {limit_bytes} that it may"
    )


class _Version(msgspec.Struct):
    format: str


def _check_version(inner: memoryview, path: str) -> None:
    found = _version(inner)
    if found != FORMAT:
        raise FormatVersionError(
            f"{path} is in format {shown(found)}; this Holdfast reads {', '.join(_SUPPORTED_BY)}. "
            "A newer Holdfast wrote it: upgrade to read it (pip install --upgrade holdfast). It was left as it is.",
            path=path,
            key="format",
        )


def _version(inner: memoryview) -> str:
    """The ``format`` field alone, whatever else the object holds."""
    try:
        return msgspec.json.decode(inner, type=_Version).format
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a manifest: {error}") from error


def _check_body(manifest: Manifest) -> None:
    """Refuse whatever the types alone do not, of what is not in the head."""
    _require(set(manifest.state) == set(manifest.tensors), "state and tensors name different entries")
    _check_twins(manifest.state)
    for entry in manifest.tensors:
        _require(is_entry_name(entry.removeprefix("_")), f"{shown(entry)} is not the name of an entry")
    check_tensors(manifest.tensors, manifest.files)
    check_cells(manifest.tensors, manifest.layouts, manifest.files)
    for entry, aliases in manifest.aliases.items():
        known = manifest.tensors.get(entry, {})
        for alias, name in aliases.items():
            if name not in known or alias in known:
                raise ValueError(f"{cut(entry)}/{cut(alias)} is an alias of no tensor")


def _check_head(manifest: Head) -> None:
    _require(0 <= manifest.step <= MAX_STEP, f"step {manifest.step} is out of range")
    _require(0 <= manifest.epoch <= MAX_STEP, f"epoch {manifest.epoch} is out of range")
    for name, value in (
        ("checkpoint_id", manifest.checkpoint_id),
        ("run_id", manifest.run_id),
        ("parent", manifest.parent),
    ):
        if value is not None and HEX.fullmatch(value) is None:
            raise ValueError(f"{name}: expected 32 hex digits, found {shown(value)}")
    _check_time(manifest.created_at)
    _check_metrics(manifest.metrics)
    _check_files(manifest)
    _check_twins(manifest.files)
    for name, file in manifest.files.items():
        _require(is_data_file_name(name), f"{shown(name)} is not the name of a data file")
        check_file(name, file)


def _check_files(manifest: Manifest | Head) -> None:
    found = len(manifest.files)
    _require(found <= MAX_FILES, f"{found} files, more than the {MAX_FILES} that there may be")


def _check_twins(names: Iterable[str]) -> None:
    """One name where the file system ignores case."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(name.casefold(), name)
        if twin is not name:
            raise ValueError(f"{shown(twin)} and {shown(name)} differ in case alone")


def _check_metrics(metrics: Mapping[str, Any]) -> None:
    """Numbers and text: each is a single value, for they are decoded wherever checkpoints are listed."""
    for name, node in metrics.items():
        if name.startswith("$"):
            raise ValueError(f"metrics: {shown(name)} is not a name")
        if isinstance(node, dict) and len(node) == 1 and not node.keys().isdisjoint(_NUMBER_TAGS):
            tree.decode(node, tree.OpaqueLeaves())
        elif not isinstance(node, (bool, int, float, str)):
            raise ValueError(f"metrics: {shown(name)} is neither a number nor text")


def _check_time(text: str) -> None:
    try:
        zone = datetime.datetime.fromisoformat(text).utcoffset()
    except ValueError as error:
        raise ValueError(f"created_at: expected a time, found {shown(text)}") from error
    _require(zone == datetime.timedelta(), f"created_at: expected a time in UTC, found {shown(text)}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
