"""Every disk that a crash may leave, at every moment of a recording.

For each moment, the plain cases first: nothing more than what was made durable, everything, names without contents,
contents without names, and each single change missing or alone. Then combinations at random. Disks that are equal are
looked at once.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.disk import BLOCK_BYTES, Event, Node, Rename, Resize, Snapshot, Write
from lab.marks import Mark, Promises

SECTOR_BYTES = 512
SECTORS = BLOCK_BYTES // SECTOR_BYTES


@dataclass(slots=True)
class Pending:
    """What happened to a file since it was last made durable: the changes of each block, and of the length."""

    blocks: dict[int, list[Write]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Choice:
    """How far the kernel got: which changes of names, and how many of each block of a file and of its length.

    Attributes:
        names: indexes into the pending changes of names.
        blocks: by file and block, how many of its pending writes; a missing one means none.
        sizes: by file, how many of its pending lengths.
        garbage: lost blocks hold anything, instead of zeros.
        torn: blocks of which only so many sectors are there.
    """

    names: frozenset[int]
    blocks: Mapping[tuple[int, int], int]
    sizes: Mapping[int, int]
    garbage: bool = False
    torn: Mapping[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Crash:
    """One disk after a crash: its files by path (None for a directory), and what it must hold.

    Attributes:
        moment: after how many events of the recording.
        choice: what was there of what was not durable, in words.
        files: contents by relative path; None for a directory, text for a symbolic link.
        promises: by what was said until then.
    """

    moment: int
    choice: str
    files: dict[str, bytes | str | None]
    promises: Promises

    def digest(self) -> bytes:
        """Equal for equal disks of which the same is asked."""
        hasher = hashlib.blake2b(self.promises.key().encode(), digest_size=16)
        for path, content in self.files.items():
            data = _digest_of(content) if isinstance(content, bytes) else repr(content).encode()
            hasher.update(f"\0{path}\0{type(content).__name__}\0".encode())
            hasher.update(data)
        return hasher.digest()

    def build(self, directory: Path) -> None:
        """Make it, in an empty directory."""
        for path, content in self.files.items():  # directories come before what is in them
            target = directory / path
            if content is None:
                target.mkdir()
            elif isinstance(content, str):
                target.symlink_to(content)
            else:
                target.write_bytes(content)


class Durable:
    """What is on the disk for certain, and what may be, after some events."""

    def __init__(self, before: Snapshot) -> None:
        self.root = before.root
        self.promises = Promises()
        self.pending: dict[int, Pending] = {}  # by file
        self.names: list[Rename] = []
        self._data = dict(before.data)
        self._entries = {number: dict(names) for number, names in before.names.items()}

    def hear(self, event: Event) -> None:
        """One more event."""
        if isinstance(event, Mark):
            self.promises.hear(event)
        elif isinstance(event, Write):
            pending = self.pending.setdefault(event.node.number, Pending())
            pending.blocks.setdefault(event.offset // BLOCK_BYTES, []).append(event)
        elif isinstance(event, Resize):
            self.pending.setdefault(event.node.number, Pending()).sizes.append(event.size)
        elif isinstance(event, Rename):
            self.names.append(event)
        else:
            self._sync(event.node)

    def _sync(self, node: Node | None) -> None:
        everything = Choice(
            frozenset(range(len(self.names))),
            {(file, block): len(writes) for file, p in self.pending.items() for block, writes in p.blocks.items()},
            {file: len(p.sizes) for file, p in self.pending.items()},
        )
        for file in list(self.pending) if node is None else [node.number] if node.number in self.pending else []:
            self._data[file] = self.contents(file, everything)
            del self.pending[file]
        left = []
        for change in self.names:
            if node is None or any(directory is node for directory, _, _ in change.changes):
                self._apply(self._entries, change)
            else:
                left.append(change)
        self.names = left

    @staticmethod
    def _apply(entries: dict[int, dict[str, Node]], change: Rename) -> None:
        for directory, name, node in change.changes:
            names = entries.setdefault(directory.number, {})
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node

    def closed(self, wanted: set[int]) -> frozenset[int]:
        """``wanted`` changes of names, without those that need one which is not among them."""
        missing: set[tuple[int, str]] = set()
        chosen = []
        for index, change in enumerate(self.names):
            keys = {(directory.number, name) for directory, name, _ in change.changes}
            if index in wanted and not keys & missing:
                chosen.append(index)
            else:
                missing |= keys
        return frozenset(chosen)

    def with_needed(self, wanted: set[int]) -> frozenset[int]:
        """``wanted`` changes of names, with all that they need."""
        needed: set[tuple[int, str]] = set()
        chosen = []
        for index in reversed(range(len(self.names))):
            keys = {(directory.number, name) for directory, name, _ in self.names[index].changes}
            if index in wanted or keys & needed:
                chosen.append(index)
                needed |= keys
        return frozenset(chosen)

    def contents(self, file: int, choice: Choice) -> bytes:
        """The bytes of a file."""
        base = self._data.get(file, b"")
        pending = self.pending.get(file)
        if pending is None:
            return base
        size = ([len(base), *pending.sizes])[choice.sizes.get(file, 0)]
        smallest = min([size, *pending.sizes[: choice.sizes.get(file, 0)]])
        data = bytearray(base[:smallest].ljust(size, b"\0"))
        for block, writes in pending.blocks.items():
            count = choice.blocks.get((file, block), 0)
            if count == 0 and choice.garbage and len(base) <= block * BLOCK_BYTES:
                data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = b"\xa5" * BLOCK_BYTES
            sectors = choice.torn.get((file, block), SECTORS)
            for write in writes[:count]:
                written = write.data[: sectors * SECTOR_BYTES]
                stop = write.offset + len(written)
                if stop > len(data):
                    data.extend(bytes(stop - len(data)))
                data[write.offset : stop] = written
        return bytes(data[:size])

    def files(self, choice: Choice) -> dict[str, bytes | str | None]:
        """The tree as it would be found."""
        entries = {number: dict(names) for number, names in self._entries.items()}
        for index in sorted(choice.names):
            self._apply(entries, self.names[index])
        found: dict[str, bytes | str | None] = {}
        waiting = [("", self.root)]
        while waiting:
            path, node = waiting.pop()
            for name, child in sorted(entries.get(node.number, {}).items()):
                where = f"{path}{name}"
                if child.link is not None:
                    found[where] = child.link
                elif child.data is None:
                    found[where] = None
                    waiting.append((where + "/", child))
                else:
                    found[where] = self.contents(child.number, choice)
        return found

    def plain_choices(self) -> Iterator[tuple[str, Choice]]:
        """Those that are tried at every moment: extremes, and everything but one thing."""
        every_name = frozenset(range(len(self.names)))
        every_size = {file: len(p.sizes) for file, p in self.pending.items()}
        blocks = {(file, block): len(writes) for file, p in self.pending.items() for block, writes in p.blocks.items()}
        yield "nothing more", Choice(frozenset(), {}, {})
        yield "everything", Choice(every_name, blocks, every_size)
        yield "names and lengths without contents", Choice(every_name, {}, every_size)
        yield "names alone", Choice(every_name, {}, {})
        yield "contents without names", Choice(frozenset(), blocks, every_size)
        for index in range(len(self.names)):
            without = self.closed(set(every_name) - {index})
            yield f"without change {index} of names", Choice(without, blocks, every_size)
            yield f"change {index} of names alone", Choice(self.with_needed({index}), blocks, every_size)
        for file, pending in self.pending.items():
            lost = {key: count for key, count in blocks.items() if key[0] != file}
            yield f"file {file} without contents", Choice(every_name, lost, every_size)
            yield f"file {file} empty", Choice(every_name, lost, {**every_size, file: 0})
            yield f"file {file} with anything in it", Choice(every_name, lost, every_size, garbage=True)
            for block in pending.blocks:
                holed = {**blocks, (file, block): 0}
                yield f"file {file} without block {block}", Choice(every_name, holed, every_size)

    def random_choice(self, chance: random.Random) -> Choice:
        """Any other."""
        named, there = chance.choice((0.2, 0.5, 0.9, 1.0)), chance.choice((0.1, 0.5, 0.9))
        names = {index for index in range(len(self.names)) if chance.random() < named}
        blocks = {
            (file, block): chance.randint(1, len(writes)) if chance.random() < there else 0
            for file, pending in self.pending.items()
            for block, writes in pending.blocks.items()
        }
        torn = {key: chance.randrange(1, SECTORS) for key in blocks if chance.random() < 0.1}
        sizes = {
            file: len(pending.sizes) if chance.random() < there else chance.randint(0, len(pending.sizes))
            for file, pending in self.pending.items()
        }
        chosen = self.with_needed(names) if chance.random() < 0.5 else self.closed(names)
        return Choice(chosen, blocks, sizes, chance.random() < 0.2, torn)


def crashes(
    before: Snapshot, said: Iterable[Mark], events: Sequence[Event], seed: int = 0, rounds: int = 0
) -> Iterator[Crash]:
    """Disks that a crash may leave, in order of the moment, the same at each call; equal ones may come more than once.

    Args:
        before: what was durable before.
        said: what was said before.
        events: what happened since.
        seed: of the combinations at random.
        rounds: how many of these at each moment, beside the plain cases.
    """
    durable = Durable(before)
    for mark in said:
        durable.hear(mark)
    chance = random.Random(seed)
    for moment in range(len(events) + 1):
        if moment:
            durable.hear(events[moment - 1])
        promises = _copy(durable.promises)
        for words, choice in durable.plain_choices():
            yield Crash(moment, words, durable.files(choice), promises)
        for _ in range(rounds if durable.names or durable.pending else 0):
            choice = durable.random_choice(chance)
            yield Crash(moment, repr(choice), durable.files(choice), promises)


@functools.lru_cache(maxsize=2**14)
def _digest_of(data: bytes) -> bytes:
    """Most files are the same, and the same objects, on most disks."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _copy(promises: Promises) -> Promises:
    return Promises(
        {name: set(seeds) for name, seeds in promises.must.items()},
        {name: set(seeds) for name, seeds in promises.may.items()},
        set(promises.pinned),
    )
