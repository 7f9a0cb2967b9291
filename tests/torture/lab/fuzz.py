"""Fuzzes what reads checkpoints: ``python fuzz.py TARGET RUNS [CORPUS...] [-libfuzzer_option=...]``.

Targets:

    manifest   the inner object of a manifest, sealed with a valid checksum; what decodes must encode to an equal one
    tree       a typed tree; what decodes must encode to a tree that decodes to the same
    header     the prefix of a data file
    directory  a checkpoint: one of its files changed, its manifest sealed again or not; opened, verified and read

Only the documented exceptions may come out. libFuzzer watches over time and memory: a unit may take a second, and
allocate no more than 256 MB at once. The answer is on standard error, ``Done N runs``; a finding ends the process with
another code than 0, and its input is written to a file that the output names.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["holdfast.format"]):
    import msgspec
    import xxhash

    from holdfast.checkpoint import open as open_checkpoint
    from holdfast.errors import FormatVersionError, HoldfastError, UnsupportedValueError, UsageError
    from holdfast.format import envelope, safetensors, strict_json, tree
    from holdfast.format import manifest as manifests

LIMIT_S = 1
LIMIT_MB = 256
SUM = "f" * 32
LEAVES = tree.OpaqueLeaves()

# What JSON is made of here: libFuzzer puts these in where it sees fit.
WORDS = [
    *'{ } [ ] , : "" {} [] null true false 0 1 -1 1.5 1e308 18446744073709551616 0.1'.split(),
    *"$tuple $set $frozenset $dict $ordereddict $counter $defaultdict $deque $float $int $complex $bytes".split(),
    *"$bytearray $scalar $path $datetime $date $time $timedelta $dtype $size $device $codec $tensor $ndarray".split(),
    *"nan inf -inf nan:7ff8000000000001 0xff UTC Europe/Berlin 2026-01-02T03:04:05 <f8 U4 list PurePosixPath".split(),
    *"holdfast/1 model.safetensors bytes chunk_bytes xxh3_128 pieces offset begin shape dtype name file".split(),
    *"aliases tensors state files metrics environment memory_format channels_last device parent".split(),
    *"__metadata__ data_offsets F32 U8 F64 BOOL 4096 9223372036854775807".split(),
]


def good_manifest() -> dict[str, Any]:
    """The inner object of a manifest with everything in it."""
    piece = {"file": "model.safetensors", "name": "w", "begin": 4096, "shape": [2, 3]}
    halves = [
        {"file": "model.safetensors", "name": "a", "begin": 4120, "shape": [2]},
        {"file": "model.safetensors", "name": "b", "begin": 4122, "shape": [2], "offset": [2]},
    ]
    return {
        "format": "holdfast/1",
        "checkpoint_id": SUM,
        "run_id": SUM,
        "parent": None,
        "step": 1,
        "epoch": 0,
        "created_at": "2026-01-02T03:04:05+00:00",
        "reason": "save",
        "metrics": {"loss": 0.5, "odd": {"$float": "nan"}},
        "state": {"model": {"w": {"$tensor": "w"}, "t": {"$tensor": "t"}}},
        "tensors": {
            "model": {
                "w": {"dtype": "float32", "shape": [2, 3], "pieces": [piece]},
                "s": {"dtype": "uint8", "shape": [4], "pieces": halves, "device": "cuda:0"},
            }
        },
        "aliases": {"model": {"t": "w"}},
        "files": {"model.safetensors": {"bytes": 4124, "chunk_bytes": 4096, "xxh3_128": [SUM, SUM]}},
        "environment": {"torch": "2"},
    }


GOOD_TREES: list[Any] = [
    {"a": [1, {"$tuple": [True, None]}], "b": {"$float": "nan:7ff8000000000123"}},
    {"$dict": [[1, {"$set": [1, "a", {"$frozenset": []}]}], [{"$tuple": [{"$float": "nan"}]}, {"$int": "0xff"}]]},
    {"$ordereddict": [["a", {"$counter": [["a", 1]]}]]},
    {"$deque": [3, [{"$defaultdict": ["list", [["a", []]]]}]]},
    [{"$complex": [1.0, {"$float": "-inf"}]}, {"$bytes": "AAEC"}, {"$bytearray": ""}, {"$scalar": ["<f8", "0" * 16]}],
    [{"$scalar": ["<U1", "41000000"]}, {"$path": ["PureWindowsPath", "a\\b"]}, {"$date": "2026-01-02"}],
    [{"$datetime": ["2026-01-02T03:04:05", 0, "Europe/Berlin"]}, {"$time": ["03:04", 1, [0, 3600, 0, None]]}],
    [{"$timedelta": [1, 2, 3]}, {"$codec": ["x", {"a": 1}]}, {"$dtype": "float32"}, {"$size": [1]}],
]


def good_header() -> bytes:
    """The prefix of a data file."""
    return safetensors.plan([("w", "F32", (2, 3)), ("s", "U8", (4,))], {"format": "pt"}).prefix


# ------------------------------------------------------------------------------------------------------------- targets


def manifest(data: bytes) -> None:
    """One byte says whether it is sealed, the rest is the manifest."""
    sealed = data[1:] if data[:1] == b"\xff" else envelope.seal("manifest", data[1:])
    try:
        head = manifests.decode_head(sealed, "m")
        decoded = manifests.decode(sealed, "m", head)
    except (ValueError, FormatVersionError):
        return
    assert manifests.decode(manifests.encode(decoded), "m") == decoded


def typed_tree(data: bytes) -> None:
    """JSON, as it stands in a manifest."""
    try:
        value = tree.decode(strict_json.decode(data, object), LEAVES)
    except (ValueError, UsageError):
        return
    with contextlib.suppress(UnsupportedValueError):  # an opaque value is written by nobody, and may stand anywhere
        node = tree.encode(value, "", LEAVES)
        again = tree.encode(tree.decode(node, LEAVES), "", LEAVES)
        assert msgspec.json.encode(again) == msgspec.json.encode(node)


def header(data: bytes) -> None:
    """Two bytes are how long the data behind it is, the rest is length and JSON."""
    file_bytes = len(data) - 2 + int.from_bytes(data[:2], "little")
    with contextlib.suppress(ValueError):
        prefix = data[2:]
        layout = safetensors.parse(prefix[: safetensors.header_length(prefix, file_bytes)], file_bytes)
        tensors = [(tensor.name, tensor.code, tensor.shape) for tensor in layout.tensors]
        with contextlib.suppress(UsageError):
            planned = safetensors.plan(tensors, layout.metadata)
            assert safetensors.parse(planned.prefix, planned.nbytes) == planned


class Directory:
    """A checkpoint, of which one file is changed at a time."""

    def __init__(self, root: Path) -> None:
        self._path = root / "step-000000000001"
        self._path.mkdir()
        prefix = good_header()
        self._data = prefix + bytes(range(28))
        self._inner = good_manifest()
        self._inner["tensors"]["model"]["s"] = {
            "dtype": "uint8",
            "shape": [4],
            "pieces": [{"file": "model.safetensors", "name": "s", "begin": len(prefix) + 24, "shape": [4]}],
        }
        self._inner["tensors"]["model"]["w"]["pieces"][0]["begin"] = len(prefix)
        self._write(self._data, self._sealed(self._data, self._inner))

    def __call__(self, data: bytes) -> None:
        """The first byte says what is changed, the next two where, the rest is put there."""
        kind, place, patch = data[:1], int.from_bytes(data[1:3], "little"), data[3:]
        content, sealed = self._data, self._sealed(self._data, self._inner)
        if kind < b"\x40":
            content = patched(content, place, patch)
        elif kind < b"\x80":  # intact by its checksums, and another than the manifest says
            content = patched(content, place, patch)
            sealed = self._sealed(content, self._inner)
        elif kind < b"\xc0":
            sealed = envelope.seal("manifest", patched(msgspec.json.encode(self._inner), place, patch))
        else:
            sealed = patched(sealed, place, patch)
        self._write(content, sealed)
        if kind[:1] in b"\x01\x41\x81\xc1":
            (self._path / "annotations.json").write_bytes(patch)
        with contextlib.suppress(HoldfastError):
            checkpoint = open_checkpoint(self._path)
            checkpoint.state_tree()
            with contextlib.suppress(HoldfastError):
                checkpoint.verify()
            for name in checkpoint.tensors:
                checkpoint.read(name)
        (self._path / "annotations.json").unlink(missing_ok=True)

    def _sealed(self, content: bytes, inner: dict[str, Any]) -> bytes:
        sums = [xxhash.xxh3_128_hexdigest(content[at : at + 4096]) for at in range(0, len(content), 4096)]
        record = {"bytes": len(content), "chunk_bytes": 4096, "xxh3_128": sums}
        inner["files"]["model.safetensors"] = record
        return envelope.seal("manifest", msgspec.json.encode(inner))

    def _write(self, content: bytes, sealed: bytes) -> None:
        (self._path / "model.safetensors").write_bytes(content)
        (self._path / "manifest.json").write_bytes(sealed)


def patched(data: bytes, place: int, patch: bytes) -> bytes:
    """``data`` with other bytes at a place; where there are none, it ends there."""
    place %= len(data) + 1
    return data[:place] + patch + data[place + len(patch) :] if patch else data[:place]


# ----------------------------------------------------------------------------------------------------------- mutations


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    """JSON with some part put in the place of another, or nested, or repeated: it stays JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    places = list(_places(value))
    if not places:
        return text
    container, key = rng.choice(places)
    part = container[key]
    other, other_key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        container[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 1:
        container[key] = rng.choice([part, [part], {"$tuple": [part]}, {"": part}, [part, part]])
    elif kind == 2:
        container[key] = rng.choice([None, True, 0, -1, 2**63, 2**64, 0.5, "", "a", [], {}, 1e300])
    elif kind == 3:
        container[key] = {rng.choice([word for word in WORDS if word.startswith("$")]): part}
    elif isinstance(container, dict) and kind == 4:
        container[rng.choice(WORDS)] = container.pop(key)
    else:
        del container[key]
    return json.dumps(value, separators=(",", ":")).encode(errors="replace")


def _places(value: Any, depth: int = 0) -> Any:
    if depth > 50:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item, depth + 1)


def json_mutator(skipped: int) -> Callable[[bytes, int, int], bytes]:
    """A mutator that half of the time changes the JSON behind some bytes, and otherwise the bytes."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            changed = data[:skipped] + mutated_json(data[skipped:], rng)
            if len(changed) <= max_size and changed != data:
                return changed
        return bytes(atheris.Mutate(data, max_size))

    return mutate


# ---------------------------------------------------------------------------------------------------------------- main


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with: valid ones."""
    inner = msgspec.json.encode(good_manifest())
    if target == "manifest":
        cut = good_manifest()
        cut["tensors"]["model"]["c"] = {"dtype": "int8", "shape": [3], "cell": [2], "layout": "l"}
        cut["files"]["model-00002-of-00002.safetensors"] = {"bytes": 4096, "chunk_bytes": 4096, "xxh3_128": [SUM]}
        cut["layouts"] = {"l": ["model.safetensors", "model-00002-of-00002.safetensors"]}
        return [b"\0" + inner, b"\xff" + envelope.seal("manifest", inner), b"\0" + msgspec.json.encode(cut)]
    if target == "tree":
        return [msgspec.json.encode(node) for node in GOOD_TREES]
    if target == "header":
        prefix = good_header()
        short = prefix[8:].rstrip()
        return [(28).to_bytes(2, "little") + len(short).to_bytes(8, "little") + short]
    kinds = (b"\0", b"\1", b"\x41", b"\x50", b"\x90", b"\xd0")
    return [kind + place.to_bytes(2, "little") + b"1" for kind in kinds for place in (0, 20, 300, 4100)]


def main(arguments: list[str]) -> int:
    """Fuzz a target, in a process of its own: libFuzzer ends it without a chance to tidy up."""
    target, runs, *more = arguments
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="holdfast-fuzz-", dir=shared if shared.is_dir() else None) as root:
        pid = os.fork()
        if pid == 0:
            fuzz(target, runs, Path(root), more)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fuzz(target: str, runs: str, root: Path, more: list[str]) -> None:
    """Fuzz a target; does not return."""
    warnings.simplefilter("ignore")
    corpus = root / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(target)):
        (corpus / str(number)).write_bytes(seed)
    words = root / "words"
    words.write_text("".join(f'"{word}"\n'.replace('"""', '"\\"\\""') for word in WORDS))
    run: Callable[[bytes], None]
    keywords = {}
    if target == "directory":
        run = Directory(root)
    else:
        run = {"manifest": manifest, "tree": typed_tree, "header": header}[target]
        keywords["custom_mutator"] = json_mutator({"manifest": 1, "tree": 0, "header": 10}[target])
    options = [
        f"-runs={runs}",
        f"-timeout={LIMIT_S}",
        f"-malloc_limit_mb={LIMIT_MB}",
        f"-dict={words}",
        "-max_len=4096",
    ]
    options += ["-rss_limit_mb=1024", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus), *more], run, **keywords)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
