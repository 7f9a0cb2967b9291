"""The names of files and directories, in both directions: one grammar, strict.

Anything that does not match is a stranger's, and is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.errors import UsageError

MANIFEST = "manifest.json"
ANNOTATIONS = "annotations.json"
EVENTS = "events.jsonl"
DATA_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_STEP = 10**12 - 1
# Entries that Holdfast adds to a state. No entry of a user begins with an underscore.
RNG_ENTRY = "_rng"
LOOP_ENTRY = "_loop"
GRADIENTS_ENTRY = "_gradients"
CONFIG_ENTRY = "_config"
RANKS_ENTRY = "_ranks"  # what each rank keeps for itself: generators, places in the data
MAX_ENTRY_NAME = 100

_STEP = re.compile(r"step-([0-9]{12})(?:\.g([2-9]|[1-9][0-9]{1,8}))?", re.ASCII)
_TEMPORARY = re.compile(r"\.tmp-([0-9]{12})-([A-Za-z0-9_.]{1,64})-([0-9]{1,10})-([0-9a-f]{16})", re.ASCII)
_TRASH = re.compile(r"\.trash-([0-9a-f]{16})-(.{1,200})", re.ASCII)
_ASIDE = re.compile(r"\.aside-([0-9a-f]{16})-(.{1,200})", re.ASCII)
_STAGED_ANNOTATIONS = re.compile(r"\.annotations\.json\.[0-9a-f]{16}", re.ASCII)
_PROBE = re.compile(r"\.probe-[0-9a-f]{16}", re.ASCII)
_ENTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}\Z", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class CheckpointName:
    """The name of a checkpoint within its run; ordered as checkpoints are: by step, then by generation."""

    step: int
    generation: int = 1

    def __str__(self) -> str:
        suffix = "" if self.generation == 1 else f".g{self.generation}"
        return f"step-{self.step:012d}{suffix}"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """The name that ``name`` spells, or None when it is not a checkpoint's."""
        match = _STEP.fullmatch(name)
        return None if match is None else cls(int(match[1]), int(match[2] or 1))


@dataclass(frozen=True, slots=True)
class TemporaryName:
    """The name of a save under way: who writes it, so that a dead writer's rest can be told from a live one's."""

    step: int
    host: str
    pid: int
    nonce: str

    def __str__(self) -> str:
        return f".tmp-{self.step:012d}-{self.host}-{self.pid}-{self.nonce}"

    @classmethod
    def parse(cls, name: str) -> TemporaryName | None:
        """The temporary name that ``name`` spells, or None."""
        match = _TEMPORARY.fullmatch(name)
        return None if match is None else cls(int(match[1]), match[2], int(match[3]), match[4])


def host_label(hostname: str) -> str:
    """``hostname`` in the characters that a temporary name may hold."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", hostname)[:64] or "unknown"


def trash_name(name: str, nonce: str) -> str:
    """The name under which a removed checkpoint waits for its files to be unlinked."""
    return f".trash-{nonce}-{name}"


def is_trash(name: str) -> bool:
    """Whether ``name`` is that of a removed checkpoint."""
    return _TRASH.fullmatch(name) is not None


def aside_name(name: str, nonce: str) -> str:
    """The name under which a checkpoint waits while another takes its place."""
    return f".aside-{nonce}-{name}"


def parse_aside(name: str) -> str | None:
    """The name that the checkpoint waiting as ``name`` had, or None when ``name`` is no such name."""
    match = _ASIDE.fullmatch(name)
    return None if match is None else match[2]


def staged_annotations_name(nonce: str) -> str:
    """The name of annotations that are about to replace ``annotations.json``."""
    return f".{ANNOTATIONS}.{nonce}"


def is_staged_annotations(name: str) -> bool:
    """Whether ``name`` is one of these."""
    return _STAGED_ANNOTATIONS.fullmatch(name) is not None


def export_name(nonce: str) -> str:
    """The name of a file that is being exported, until it is whole."""
    return f".holdfast-export-{nonce}"


def probe_name(nonce: str) -> str:
    """The name of a file that is made to read the clock of a file system, and removed at once."""
    return f".probe-{nonce}"


def is_probe(name: str) -> bool:
    """Whether ``name`` is one of these."""
    return _PROBE.fullmatch(name) is not None


def is_auxiliary(name: str) -> bool:
    """Whether a file in a checkpoint may be there without being listed in its manifest."""
    return name in (MANIFEST, ANNOTATIONS) or is_staged_annotations(name)


def data_file_name(entry: str) -> str:
    """The name of the file that holds the tensors of ``entry``, where one holds them all."""
    return entry + DATA_SUFFIX


def shard_name(entry: str, number: int, count: int) -> str:
    """The name of one of several files that hold the tensors of ``entry``; numbers count from 1."""
    return f"{entry}-{number:05d}-of-{count:05d}{DATA_SUFFIX}"


def index_name(entry: str) -> str:
    """The name of the file that says which tensor of ``entry`` lies in which of its files."""
    return entry + INDEX_SUFFIX


def is_entry_name(name: str) -> bool:
    """Whether ``name`` may be the name of an entry, and with that of a file."""
    return len(name) <= MAX_ENTRY_NAME and _ENTRY.fullmatch(name) is not None and ".." not in name


def is_data_file_name(name: str) -> bool:
    """Whether ``name`` may be that of a file with data or an index: nothing that could leave the directory or hide.

    The files of Holdfast's own entries begin with an underscore.
    """
    for suffix in (INDEX_SUFFIX, DATA_SUFFIX):
        if name.endswith(suffix):
            return is_entry_name(_SHARD.sub("", name.removesuffix(suffix)).removeprefix("_"))
    return False


def is_tensor_file_name(name: str) -> bool:
    """Whether a data file holds tensors; otherwise it is an index of those that do."""
    return name.endswith(DATA_SUFFIX)


def check_entry_names(names: Iterable[object]) -> None:
    """Refuse names of entries that could not be names of files everywhere."""
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not is_entry_name(name):
            raise UsageError(
                f"state[{name!r}]: the name of an entry becomes the name of a file; expected up to {MAX_ENTRY_NAME} "
                "ASCII letters, digits, '_', '-' and single '.', starting with a letter or digit.",
                key=str(name),
            )
        if _SHARD.search(name):
            raise UsageError(
                f"state[{name!r}]: a name that ends like this is that of one of several files of an entry; choose "
                "another.",
                key=name,
            )
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            raise UsageError(
                f"state[{twin!r}] and state[{name!r}] would be one file where the file system ignores case; "
                "rename one.",
                key=name,
            )


def check_step(step: object) -> int:
    """``step`` as an int that a name can hold, or an error."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
        raise UsageError(f"step: expected an int from 0 to {MAX_STEP}, found {step!r}.", key="step")
    return step
