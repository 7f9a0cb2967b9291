"""A disk as it may be after a crash: what was made durable is there, and of the rest whatever the kernel got to.

The model is that of POSIX, which promises less than any file system keeps (Pillai et al., "All File Systems Are Not
Created Equal", OSDI 2014):

- what was written to a file is durable after an fsync of the file. Before, each block of 4 KiB may be there or not,
  independently, and so may the new length; a lost block reads as zeros, or as anything;
- a name (made, linked, renamed, removed) is durable after an fsync of its directory; fsync of the file itself does
  nothing for it. Before, each change may be there or not, but one that concerns a name needs all earlier ones that
  concern it. A rename is one change, whatever it replaces;
- no order between different files or different names, unless an fsync made it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.marks import Mark
from lab.trace import Argument, Call, Fd, StraceError, is_mark

BLOCK_BYTES = 4096
_numbers = itertools.count()


@dataclass(eq=False, slots=True)
class Node:
    """A file or a directory as the running system sees it.

    Attributes:
        data: the contents of a file; None for a directory.
        names: the entries of a directory.
        link: where a symbolic link points to.
    """

    data: bytearray | None = None
    names: dict[str, Node] = field(default_factory=dict)
    link: str | None = None
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes written to a file, within one block."""

    node: Node
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A new length of a file."""

    node: Node
    size: int


@dataclass(frozen=True, slots=True)
class Rename:
    """A change of names that happens at once: for each directory and name, what it now stands for."""

    changes: tuple[tuple[Node, str, Node | None], ...]


@dataclass(frozen=True, slots=True)
class Sync:
    """A file or directory made durable; None for everything."""

    node: Node | None


Event = Write | Resize | Rename | Sync | Mark


def scan(directory: Path) -> Node:
    """What lies in ``directory``."""
    seen: dict[int, Node] = {}

    def look(path: Path) -> Node:
        status = path.lstat()
        if path.is_symlink():
            return Node(link=str(path.readlink()))
        if path.is_dir():
            return Node(names={child.name: look(child) for child in path.iterdir()})
        if status.st_ino not in seen:
            seen[status.st_ino] = Node(data=bytearray(path.read_bytes()))
        return seen[status.st_ino]

    return look(directory)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A tree as it was at one moment, whatever happens to its nodes later.

    Attributes:
        root: its top.
        data: of each file, by number.
        names: of each directory, by number.
    """

    root: Node
    data: dict[int, bytes]
    names: dict[int, dict[str, Node]]

    @classmethod
    def of(cls, root: Node) -> Snapshot:
        """As it is now."""
        snapshot = cls(root, {}, {})
        waiting = [root]
        while waiting:
            node = waiting.pop()
            if node.data is not None:
                snapshot.data[node.number] = bytes(node.data)
            snapshot.names[node.number] = dict(node.names)
            waiting += node.names.values()
        return snapshot


class Recorder:
    """Turns system calls into what happened to a disk.

    Args:
        root: the directory that is watched; what happens elsewhere is left out.
        root_name: what it is called in the calls, where that differs.

    Attributes:
        before: what was in it when this was made.
        tree: what is in it now.
        events: what happened since.
    """

    def __init__(self, root: Path, root_name: str | None = None) -> None:
        self.events: list[Event] = []
        self.tree = scan(root)
        self.before = Snapshot.of(self.tree)
        self._root = str(root) if root_name is None else root_name
        self._positions: dict[tuple[int, int], int] = {}  # by node and descriptor
        self._appending: set[tuple[int, int]] = set()

    def hear(self, call: Call) -> None:
        """One more call."""
        if is_mark(call):
            assert isinstance(call.arguments[1], bytes)
            self.events.append(Mark.parse(call.arguments[1]))
            return
        handler = getattr(self, f"_{call.name}", None)
        if handler is not None:
            handler(call)

    # ------------------------------------------------------------------------------------------------------- places

    def _place(self, base: Argument | None, name: Argument) -> tuple[Node, str] | None:
        """The directory and the name of a path; None where it is not watched."""
        assert isinstance(name, bytes)
        path = name.decode()
        if not path.startswith("/"):
            if not isinstance(base, Fd) or base.path is None:
                return None
            path = f"{base.path}/{path}"
        parts = self._parts(path)
        if not parts:
            return None
        node = self.tree
        for part in parts[:-1]:
            node = node.names[part]
        return node, parts[-1]

    def _parts(self, path: str) -> list[str] | None:
        """Below the root; None for what is not."""
        if path == self._root:
            return []
        if not path.startswith(self._root + "/"):
            return None
        return [part for part in path[len(self._root) + 1 :].split("/") if part not in ("", ".")]

    def _node(self, descriptor: Argument) -> Node | None:
        if not isinstance(descriptor, Fd) or descriptor.path is None:
            return None
        return self._at(descriptor.path)

    def _at(self, path: str) -> Node | None:
        parts = self._parts(path)
        if parts is None:
            return None
        node = self.tree
        for part in parts:
            if part not in node.names:
                return None
            node = node.names[part]
        return node

    def _change(self, *changes: tuple[Node, str, Node | None]) -> None:
        for directory, name, node in changes:
            if node is None:
                directory.names.pop(name, None)
            else:
                directory.names[name] = node
        self.events.append(Rename(changes))

    # -------------------------------------------------------------------------------------------------------- names

    def _openat(self, call: Call) -> None:
        base, name, flags = call.arguments[:3]
        self._opened(call, self._place(base, name), str(flags))

    def _open(self, call: Call) -> None:
        name, flags = call.arguments[:2]
        self._opened(call, self._place(None, name), str(flags))

    def _creat(self, call: Call) -> None:
        self._opened(call, self._place(None, call.arguments[0]), "O_CREAT|O_TRUNC")

    def _opened(self, call: Call, place: tuple[Node, str] | None, flags: str) -> None:
        if place is None:
            return
        directory, name = place
        words = flags.split("|")
        if "O_TMPFILE" in words:
            raise StraceError("files without a name are not modelled")
        node = directory.names.get(name)
        if node is None:
            if "O_CREAT" not in words:
                return
            node = Node(data=bytearray())
            self._change((directory, name, node))
        elif "O_TRUNC" in words and node.data:
            self._resize(node, 0)
        key = (node.number, call.result)
        self._positions[key] = 0
        self._appending.discard(key)
        if "O_APPEND" in words:
            self._appending.add(key)

    def _mkdirat(self, call: Call) -> None:
        self._new(self._place(call.arguments[0], call.arguments[1]), Node())

    def _mkdir(self, call: Call) -> None:
        self._new(self._place(None, call.arguments[0]), Node())

    def _symlinkat(self, call: Call) -> None:
        self._new(self._place(call.arguments[1], call.arguments[2]), Node(link=_path(call.arguments[0])))

    def _symlink(self, call: Call) -> None:
        self._new(self._place(None, call.arguments[1]), Node(link=_path(call.arguments[0])))

    def _new(self, place: tuple[Node, str] | None, node: Node) -> None:
        if place is not None:
            self._change((*place, node))

    def _linkat(self, call: Call) -> None:
        self._linked(self._place(*call.arguments[:2]), self._place(*call.arguments[2:4]))

    def _link(self, call: Call) -> None:
        self._linked(self._place(None, call.arguments[0]), self._place(None, call.arguments[1]))

    def _linked(self, old: tuple[Node, str] | None, new: tuple[Node, str] | None) -> None:
        if old is not None and new is not None:
            self._change((*new, old[0].names[old[1]]))

    def _unlinkat(self, call: Call) -> None:
        self._gone(self._place(call.arguments[0], call.arguments[1]))

    def _unlink(self, call: Call) -> None:
        self._gone(self._place(None, call.arguments[0]))

    _rmdir = _unlink

    def _gone(self, place: tuple[Node, str] | None) -> None:
        if place is not None:
            self._change((*place, None))

    def _renameat2(self, call: Call) -> None:
        old, new = self._place(*call.arguments[:2]), self._place(*call.arguments[2:4])
        if len(call.arguments) > 4 and call.arguments[4] == "RENAME_EXCHANGE":
            assert old is not None
            assert new is not None
            self._change((*old, new[0].names[new[1]]), (*new, old[0].names[old[1]]))
        else:
            self._renamed(old, new)

    _renameat = _renameat2

    def _rename(self, call: Call) -> None:
        self._renamed(self._place(None, call.arguments[0]), self._place(None, call.arguments[1]))

    def _renamed(self, old: tuple[Node, str] | None, new: tuple[Node, str] | None) -> None:
        if old is None and new is None:
            return
        if old is None or new is None:
            raise StraceError("a rename into or out of what is watched is not modelled")
        self._change((*old, None), (*new, old[0].names[old[1]]))

    # ----------------------------------------------------------------------------------------------------- contents

    def _write(self, call: Call) -> None:
        self._write_on(call, [call.arguments[1]])

    def _writev(self, call: Call) -> None:
        self._write_on(call, call.arguments[1:])

    def _write_on(self, call: Call, parts: Iterable[Argument]) -> None:
        """At the descriptor's position."""
        node = self._node(call.arguments[0])
        if node is None or node.data is None:
            return
        assert isinstance(call.arguments[0], Fd)
        key = (node.number, call.arguments[0].number)
        offset = len(node.data) if key in self._appending else self._positions.get(key, 0)
        self._written(node, offset, _joined(parts)[: call.result])
        self._positions[key] = offset + call.result

    def _lseek(self, call: Call) -> None:
        node = self._node(call.arguments[0])
        if node is not None:
            assert isinstance(call.arguments[0], Fd)
            self._positions[node.number, call.arguments[0].number] = call.result

    def _pwrite64(self, call: Call) -> None:
        self._write_at(call, [call.arguments[1]], call.arguments[3])

    def _pwritev(self, call: Call) -> None:
        self._write_at(call, call.arguments[1:-2], call.arguments[-1])

    def _pwritev2(self, call: Call) -> None:
        self._write_at(call, call.arguments[1:-3], call.arguments[-2])

    def _write_at(self, call: Call, parts: Iterable[Argument], offset: Argument) -> None:
        node = self._node(call.arguments[0])
        if node is not None:
            self._written(node, int(str(offset)), _joined(parts)[: call.result])

    def _sendfile(self, call: Call) -> None:
        self._copied(call, source=call.arguments[1], target=call.arguments[0])

    def _copy_file_range(self, call: Call) -> None:
        self._copied(call, source=call.arguments[0], target=call.arguments[2])

    def _copied(self, call: Call, source: Argument, target: Argument) -> None:
        """By the kernel, at the positions of both."""
        to, came_from = self._node(target), self._node(source)
        if to is None or call.result == 0:
            return
        if came_from is None or came_from.data is None:
            raise StraceError("a copy from outside of what is watched is not modelled")
        assert isinstance(target, Fd)
        key = (to.number, target.number)
        offset = self._positions.get(key, 0)
        self._written(to, offset, bytes(came_from.data[offset : offset + call.result]))
        self._positions[key] = offset + call.result

    def _written(self, node: Node, offset: int, data: bytes) -> None:
        assert node.data is not None
        end = offset + len(data)
        if end > len(node.data):
            self._resize(node, end)
        node.data[offset:end] = data
        begin = offset
        while begin < end:
            stop = min(end, (begin // BLOCK_BYTES + 1) * BLOCK_BYTES)
            self.events.append(Write(node, begin, data[begin - offset : stop - offset]))
            begin = stop

    def _ftruncate(self, call: Call) -> None:
        node = self._node(call.arguments[0])
        if node is not None:
            self._resize(node, int(str(call.arguments[1])))

    def _truncate(self, call: Call) -> None:
        place = self._place(None, call.arguments[0])
        if place is not None:
            self._resize(place[0].names[place[1]], int(str(call.arguments[1])))

    def _fallocate(self, call: Call) -> None:
        node = self._node(call.arguments[0])
        if node is None:
            return
        assert node.data is not None
        mode, offset, nbytes = map(str, call.arguments[1:4])
        if mode != "0":
            raise StraceError(f"fallocate with {mode} is not modelled")
        if int(offset) + int(nbytes) > len(node.data):
            self._resize(node, int(offset) + int(nbytes))

    def _resize(self, node: Node, size: int) -> None:
        assert node.data is not None
        if size < len(node.data):
            del node.data[size:]
        else:
            node.data.extend(bytes(size - len(node.data)))
        self.events.append(Resize(node, size))

    def _fsync(self, call: Call) -> None:
        node = self._node(call.arguments[0])
        if node is not None:
            self.events.append(Sync(node))

    _fdatasync = _fsync

    def _sync(self, call: Call) -> None:
        self.events.append(Sync(None))

    _syncfs = _sync

    def _msync(self, call: Call) -> None:
        raise StraceError("writing through a mapping is not modelled")


def _joined(parts: Iterable[Argument]) -> bytes:
    return b"".join(part for part in parts if isinstance(part, bytes))


def _path(argument: Argument) -> str:
    assert isinstance(argument, bytes)
    return argument.decode()


def differences(model: Node, path: Path) -> list[str]:
    """Where the model of a disk differs from the real one."""
    real = scan(path)

    def compare(a: Node, b: Node, where: str) -> Iterator[str]:
        if (a.data, a.link) != (b.data, b.link):
            yield f"{where}: other contents"
        for name in sorted(a.names.keys() | b.names.keys()):
            if name not in a.names or name not in b.names:
                yield f"{where}/{name}: only in the {'model' if name in a.names else 'directory'}"
            else:
                yield from compare(a.names[name], b.names[name], f"{where}/{name}")

    return list(compare(model, real, ""))
