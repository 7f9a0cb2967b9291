"""What the tests of hostile checkpoints share: how one is made, and how everything that reads is let loose on it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zoneinfo
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import typer.main
from click.testing import CliRunner

import holdfast
from holdfast.cli import app
from holdfast.errors import HoldfastError
from holdfast.format import envelope, tree
from holdfast.format import manifest as manifests

CPU_S = 1.0
"""What a reader may take, on a machine on which `_unit_s` is `UNIT_S`: elsewhere, or while it is busy, as much more."""
UNIT_S = 0.003
ATTEMPTS = 3  # a machine may become busy in the middle of one
WALL_S = 60
GROWTH_BYTES = 256 * 2**20

_runner = CliRunner()
_command_line = typer.main.get_command(app)  # made once: making it compiles the annotations of its functions


# ---------------------------------------------------------------------------------------------------- how one is made


class Attack:
    """A small checkpoint in a run of its own, whose parts are changed by somebody who knows how to seal them."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "step-000000000001"
        self.file = self.path / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """The inner object of its manifest."""
        inner: dict[str, Any] = msgspec.json.decode(envelope.unseal("manifest", self.file.read_bytes()))
        return inner

    def seal(self, inner: object) -> Path:
        """Make ``inner`` (an object, or JSON) its manifest, with a valid checksum."""
        text = inner if isinstance(inner, bytes) else msgspec.json.encode(inner)
        self.file.write_bytes(envelope.seal("manifest", text))
        return self.path

    def set(self, *keys: Any, to: object) -> Path:
        """Change what lies at a path of keys of its manifest."""
        inner = self.manifest()
        target: Any = inner
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = to
        return self.seal(inner)

    def state(self, node: object) -> Path:
        """Make ``node`` (an object, or JSON) the tree of the entry ``plain``."""
        text = node if isinstance(node, bytes) else msgspec.json.encode(node)
        return self.set("state", "plain", to=msgspec.Raw(text))

    def annotations(self, inner: object) -> Path:
        """Give it annotations, with a valid checksum."""
        text = inner if isinstance(inner, bytes) else msgspec.json.encode(inner)
        (self.path / "annotations.json").write_bytes(envelope.seal("annotations", text))
        return self.path

    def data(self, name: str, data: bytes, chunk_bytes: int = 4096) -> Path:
        """Give it a data file, with valid checksums."""
        import xxhash

        (self.path / name).write_bytes(data)
        sums = [xxhash.xxh3_128_hexdigest(data[at : at + chunk_bytes]) for at in range(0, len(data), chunk_bytes)]
        return self.set("files", name, to={"bytes": len(data), "chunk_bytes": chunk_bytes, "xxh3_128": sums})


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one checkpoint of everything that is small."""
    path = tmp_path_factory.mktemp("pristine") / "run"
    state = {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)},
        "array": np.arange(5, dtype=np.int16),
        "plain": {"lr": 0.1, "names": ["a", "b"]},
    }
    holdfast.Run(path).save(state, step=1, metrics={"loss": 0.5})
    # Whatever is imported or compiled when it is first used, is now.
    everything(path / "step-000000000001")
    manifests.decode_annotations(manifests.encode_annotations(manifests.Annotations()))
    broken = Attack(shutil.copytree(path, path.with_name("broken")))
    broken.seal({"format": "x" * 10_000})
    for reader in NEVER_RAISE:
        READERS[reader](broken.path)
    tree.decode({"$time": ["00:00", 0, "Europe/Berlin"]}, tree.OpaqueLeaves())
    for inner in (b"{}", b"[]"):
        with contextlib.suppress(ValueError):
            manifests.decode(envelope.seal("manifest", inner), "")
    gc.collect()
    gc.freeze()  # what is there by now stays: the collections before each fork need not look at it
    return path


@pytest.fixture
def attack(pristine: Path, tmp_path: Path) -> Attack:
    """A copy of it to change."""
    return Attack(shutil.copytree(pristine, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ everything that reads


def _command(*arguments: object) -> int:
    result = _runner.invoke(_command_line, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


def _read_all(path: Path) -> list[Any]:
    checkpoint = holdfast.open(path)
    return [checkpoint.read(name) for name, info in list(checkpoint.tensors.items())[:3] if info.dtype != "bfloat16"]


def _look_at(value: Any) -> None:
    """Touch the bytes of mapped tensors."""
    if isinstance(value, dict):
        for item in value.values():
            _look_at(item)
    elif isinstance(value, torch.Tensor) and value.numel():
        value.reshape(-1)[[0, -1]].tolist()


def _facts(path: Path) -> None:
    checkpoint = holdfast.open(path)
    for name in ("metrics", "created_at", "reason", "environment", "pinned", "tags", "files", "nbytes", "annotations"):
        getattr(checkpoint, name)


READERS: dict[str, Callable[[Path], object]] = {
    "open": holdfast.open,
    "facts": _facts,
    "manifest": lambda path: holdfast.open(path).manifest,
    "tensors": lambda path: holdfast.open(path).tensors,
    "state_tree": lambda path: holdfast.open(path).state_tree(),
    "loop": lambda path: holdfast.open(path).loop,
    "config": lambda path: holdfast.open(path).config,
    "read": _read_all,
    "verify": lambda path: holdfast.open(path).verify(),
    "load": holdfast.load,
    "load mmap": lambda path: _look_at(holdfast.load(path, mmap=True)),
    "restore": lambda path: holdfast.restore(path, {"plain": None, "array": np.zeros(5, np.int16)}),
    "run list": lambda path: list(holdfast.Run(path.parent)),
    "run latest": lambda path: holdfast.Run(path.parent).latest(),
    "run entries": lambda path: holdfast.Run(path.parent).entries(),
    "run broken": lambda path: holdfast.Run(path.parent).broken(),
    "run events": lambda path: holdfast.Run(path.parent).events(),
    "ls": lambda path: _command("ls", path.parent),
    "ls json": lambda path: _command("ls", path.parent, "--json"),
    "show": lambda path: _command("show", path),
    "show json": lambda path: _command("show", path, "--json"),
    "verify command": lambda path: _command("verify", path),
    "verify command json": lambda path: _command("verify", path.parent, "--json"),
}
NEVER_RAISE = {name for name in READERS if name.startswith(("run ", "ls", "show", "verify command"))}


def everything(path: Path) -> None:
    """All of it, on a checkpoint that is in order."""
    for reader in READERS.values():
        reader(path)
    traceback.format_exc()


@dataclass(frozen=True)
class Outcome:
    """What became of one reader.

    Attributes:
        error: the class of what it raised; empty when it returned.
        message: what that said; of what returned a number, the number.
    """

    error: str
    message: str


class _Watch:
    """What a process does beside reading below a directory, as Python's audit events tell it."""

    _NEVER = ("exec", "compile", "import", "marshal.loads", "pickle.find_class", "socket.", "subprocess.", "os.system")
    _NEVER += ("os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link")
    _NEVER += ("os.symlink", "os.truncate", "os.chmod", "shutil.", "ctypes.dlopen", "urllib.", "webbrowser.")

    def __init__(self, run: Path) -> None:
        self.seen: list[str] = []
        self._parent = str(run.parent)
        self._inside = (str(run), "/proc/", "/sys/fs/cgroup/", *zoneinfo.TZPATH)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event in ("open", "os.listdir", "os.scandir")
        if event.startswith(self._NEVER) or (opens and not self._may(arguments[0])):
            self.seen.append(f"{event} {arguments!r:.200}")

    def _may(self, path: Any) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, (str, os.PathLike)):
            return True  # a descriptor
        text = os.fspath(path)
        # A plain name is one in a directory that is open.
        # Whether the run itself is a checkpoint is asked in the directory that it stands in.
        known = "/" not in text or text.startswith(self._inside) or text == self._parent
        return known and ".." not in text.split("/")


class _TooLongError(BaseException):
    pass


_expired: list[int] = []
"""Signals that came: what they raise may be swallowed, where it is raised in a callback."""


def _too_long(number: int, frame: object) -> None:
    _expired.append(number)
    raise _TooLongError


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _peak_is_known() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return bool(_status_bytes("VmHWM"))


def _unit_s() -> float:
    """How long this machine takes, now, for a little of what readers do: the CPU time of it."""
    begin_s = time.process_time()
    repr(json.loads(_UNIT))
    return time.process_time() - begin_s


_UNIT = json.dumps([[[n], str(n)] for n in range(10_000)])


def _attempt(name: str, path: Path, watch: _Watch, may_s: float) -> tuple[str, str, list[str]]:
    """Run one reader: the class of its error and what that said, and what it did that a reader does not do."""
    error, message = "", ""
    seen: list[str] = []
    _expired.clear()
    watch.seen.clear()
    # Where it is in C all the time, no handler of ours is called: the kernel ends it.
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + may_s) + 5, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, may_s)
    signal.alarm(WALL_S)
    with contextlib.suppress(_TooLongError):  # it may come at any moment, also while an error is looked at
        try:
            result = READERS[name](path)
            seen = list(watch.seen)
            message = str(result) if isinstance(result, int) else ""
            del result
        except _TooLongError:
            pass
        except BaseException as caught:  # noqa: BLE001 - what it may be is what is tested
            seen = list(watch.seen)  # without what is opened to show it
            error, message = type(caught).__name__, str(caught)[:2000]
            if not isinstance(caught, HoldfastError):
                error, message = f"foreign {error}", traceback.format_exc()[-1500:]
            del caught
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    if _expired:
        error, message = "too long", f"more than {may_s:.1f} s of CPU time, or {WALL_S} s"
    return error, message, seen


def _watched(path: Path, names: Collection[str], answers: io.TextIOBase) -> None:
    """Run every reader, and write of each what became of it, as soon as it is known."""
    warnings.simplefilter("ignore")
    logging.disable()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _too_long)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = _Watch(path.parent)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    measured = _peak_is_known()
    before_bytes = _status_bytes("VmRSS")
    sys.addaudithook(watch)

    def fresh() -> bool:
        """Give back what the attempt before left, and count the peak from here; whether that can be."""
        gc.collect()
        if trim is not None:
            trim(0)
        return measured and _peak_is_known()

    for name in names:
        watch.seen.clear()
        answers.write(json.dumps({"begun": name}) + "\n")
        answers.flush()
        peak = fresh()
        error, message, seen = _attempt(name, path, watch, CPU_S)
        for _ in range(ATTEMPTS):
            if error != "too long":
                break
            peak = fresh()
            slower = max(1.0, min(_unit_s() for _ in range(3)) / UNIT_S)
            error, message, seen = _attempt(name, path, watch, CPU_S * slower)
        growth_bytes = _status_bytes("VmHWM") - before_bytes if peak else 0
        answer = {
            "name": name,
            "error": error,
            "message": message,
            "seen": seen,
            "growth_bytes": growth_bytes,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _in_a_child(path: Path, names: Collection[str]) -> Iterator[Mapping[str, Any]]:
    reading, writing = os.pipe()
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        # What other tests left is not this process's to collect: a process group without its threads never ends.
        gc.freeze()
        status = 1
        try:
            os.close(reading)
            with open(writing, "w", encoding="utf-8") as answers, contextlib.redirect_stdout(io.StringIO()):  # noqa: PTH123
                _watched(path, names, answers)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as answers:  # noqa: PTH123
        yield from map(json.loads, answers)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    yield {"code": code}


Harmless = Callable[..., dict[str, Outcome]]


@pytest.fixture(scope="session")
def harmless() -> Harmless:
    """Lets everything that reads loose on a checkpoint, in a process of its own, and says what became of each.

    ``harmless(path, names)`` for some of the readers. It fails where one crashes, takes too long or too much, or does
    anything else than reading in the run.
    """

    def let_loose(path: Path, names: Collection[str] = tuple(READERS)) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        problems: list[str] = []
        begun = ""
        for answer in _in_a_child(path, names):
            begun = answer.get("begun", begun)
            if "code" in answer and answer["code"] != 0:
                problems.append(f"{begun}: the process ended with {answer['code']}")
            if "name" not in answer:
                continue
            name, error = answer["name"], answer["error"]
            outcomes[name] = Outcome(error, answer["message"])
            if error.startswith(("foreign", "too long")) or (error and name in NEVER_RAISE):
                problems.append(f"{name}: {error}: {answer['message']}")
            if answer["growth_bytes"] > GROWTH_BYTES:
                problems.append(f"{name}: took {answer['growth_bytes']} bytes")
            problems += [f"{name}: {seen}" for seen in answer["seen"]]
        assert not problems, "\n".join(problems)
        return outcomes

    return let_loose


@pytest.fixture(scope="session")
def holdfast_show() -> Callable[[Path], str]:
    """What ``holdfast show`` prints of a checkpoint, and ``holdfast ls`` of its run."""

    def output(path: Path) -> str:
        answers = (
            _runner.invoke(_command_line, [command, str(where)])
            for command, where in (("show", path), ("ls", path.parent))
        )
        return "".join(answer.output for answer in answers)

    return output


@pytest.fixture(scope="session")
def refused(harmless: Harmless) -> Callable[[Path, str], None]:
    """Says that a checkpoint is refused when it is opened, by everything, and with which words."""

    def check(path: Path, words: str) -> None:
        outcomes = harmless(path)
        opened = {name: outcome for name, outcome in outcomes.items() if name not in NEVER_RAISE}
        assert {outcome.error for outcome in opened.values()} == {"CorruptCheckpointError"}, outcomes
        assert [name for name, outcome in opened.items() if words not in outcome.message] == [], outcomes["open"]
        codes = {name: outcomes[name].message for name in ("show", "show json", "verify command")}
        assert codes == {"show": "2", "show json": "2", "verify command": "1"}

    return check
