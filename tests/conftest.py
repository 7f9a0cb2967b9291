"""What all tests share."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, settings
from lab import TORTURE
from lab.sharded import Array, Cells, Pieces, write_sharded

from holdfast.errors import Damage
from holdfast.format import manifest as manifests
from holdfast.format.records import FileRecord

# Before anything imports torch, here and in the processes that tests start: the same bits on every machine, and tests
# that run beside each other do not fight for cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

ROOT = Path(__file__).parents[1]

# No test asserts a time. By default the same examples each time, so that a failure is nobody's luck; new ones in
# `make torture`.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.register_profile(
    "torture", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("torture" if TORTURE else "default")


COUNTED = "count: "
"""What a test records under such a name is added up and shown: ``record_property("count: bits flipped", 900)``."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how much was tried, in numbers."""
    counts: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name.startswith(COUNTED) and getattr(report, "when", "") == "call":
                    what = name.removeprefix(COUNTED)
                    counts[what] = counts.get(what, 0) + value
    if counts:
        terminalreporter.section("tried")
        for what, number in sorted(counts.items()):
            terminalreporter.write_line(f"{number:>12,} {what}")


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """How many rounds to run: ``count(default, full)`` is ``full`` in `make torture`."""

    def choose(default: int, full: int) -> int:
        return full if TORTURE else default

    return choose


@dataclass(frozen=True)
class Ended:
    """How one process of a training ended, and what it counted if it came to its end."""

    status: int
    stdout: list[str]
    moments: dict[str, int]
    forwards: int


class Trainer:
    """Trains an example, each time in a new process that runs it from its beginning; see `kill_driver.py`."""

    def __init__(self, example: str, *arguments: object) -> None:
        command = [sys.executable, ROOT / "tests" / "kill_driver.py", ROOT / "examples" / example, *arguments]
        self._driver = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def train(self, **order: int) -> Ended:
        """Let it train up to a moment, or to its end."""
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(order) + "\n")
        self._driver.stdin.flush()
        lines: list[str] = []
        for line in self._driver.stdout:
            if line.startswith("{"):
                return Ended(stdout=lines, **json.loads(line))
            lines.append(line.rstrip())
        raise AssertionError(f"the driver ended with {self._driver.wait()}")

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._driver.communicate()  # no more orders: it ends


@pytest.fixture(scope="session")
def trainer() -> type[Trainer]:
    """Makes a :class:`Trainer` of an example and its arguments, to be used in a block."""
    return Trainer


@pytest.fixture(scope="session")
def in_a_fork() -> Callable[[Callable[[], object]], int]:
    """How a forked process ends that does some work: 0 when it returned, 42 after Ctrl-C, negative by a signal."""

    def fork(work: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Python 3.12 warns of threads; so does JAX, where a benchmark has loaded it
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work()
                status = 0
            except KeyboardInterrupt:
                status = 42
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return fork


class BytesImage:
    """A data file that is to be written.

    Args:
        data: its bytes.
        own: give views of them, as an image does whose bytes lie in memory already; otherwise copies.
    """

    def __init__(self, data: bytes | memoryview, own: bool = False) -> None:
        self._data = memoryview(data)
        self._own = own
        self.nbytes = len(data)

    def read(self, begin: int, room: memoryview) -> memoryview:
        """The bytes from ``begin``."""
        found = self._data[begin : begin + len(room)]
        if self._own:
            return found
        room[:] = found
        return room


# These are the same for all tests, which lets those use them that Hypothesis calls many times.


@pytest.fixture(scope="session")
def image() -> type[BytesImage]:
    """What makes an image of bytes: ``image(data)``."""
    return BytesImage


@pytest.fixture(scope="session")
def record_of() -> Callable[[bytes, int], FileRecord]:
    """What makes the record of bytes by definition, one checksum for each chunk: ``record_of(data, chunk_bytes)``."""

    def make(data: bytes, chunk_bytes: int) -> FileRecord:
        chunks = (data[cut : cut + chunk_bytes] for cut in range(0, len(data), chunk_bytes))
        return FileRecord(len(data), chunk_bytes, tuple(map(xxhash.xxh3_128_hexdigest, chunks)))

    return make


@pytest.fixture(scope="session")
def rechunk(record_of: Callable[[bytes, int], FileRecord]) -> Callable[[Path, int], None]:
    """Gives the files of a checkpoint small chunks, so that small files have several: ``rechunk(path, 4096)``."""

    def change(path: Path, chunk_bytes: int) -> None:
        manifest = manifests.decode((path / "manifest.json").read_bytes(), str(path))
        files = {name: record_of((path / name).read_bytes(), chunk_bytes) for name in manifest.files}
        changed = msgspec.structs.replace(manifest, files=files)
        (path / "manifest.json").write_bytes(manifests.encode(changed))

    return change


class Layout:
    """Where the tensors of an intact checkpoint lie, read from its files by nothing but the format's definition."""

    def __init__(self, path: Path) -> None:
        self.manifest = json.loads((path / "manifest.json").read_bytes())["manifest"]
        self._extents = {name: self._read(path / name) for name in self.manifest["files"]}

    @staticmethod
    def _read(file: Path) -> dict[str, tuple[int, int]]:
        """By tensor, where its bytes begin and end in a file."""
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if file.suffix == ".safetensors" else {}
        header.pop("__metadata__", None)
        first = 8 + length
        return {
            name: (first + begin, first + end)
            for name, (begin, end) in ((n, h["data_offsets"]) for n, h in header.items())
        }

    def tensors(self, file: str, begin: int | None = None, end: int = 0) -> tuple[str, ...]:
        """The tensors of a file, or those with bytes from ``begin`` to ``end``, as ``entry/name``."""
        own = re.sub(r"(-[0-9]{5}-of-[0-9]{5})?\.safetensors\Z", "", file)
        found = [
            name
            for name in self.manifest["tensors"].get(own, {})
            if name in self._extents[file]
            and (begin is None or max(begin, self._extents[file][name][0]) < min(end, self._extents[file][name][1]))
        ]
        return tuple(f"{own}/{name}" for name in found)

    def chunk_of(self, file: str, place: int) -> int:
        """The chunk in which a byte of a file lies."""
        return int(place // self.manifest["files"][file]["chunk_bytes"])

    def damage_of(self, file: str, chunk: int) -> Damage:
        """What is to be said of a chunk whose bytes changed."""
        record = self.manifest["files"][file]
        begin = chunk * record["chunk_bytes"]
        end = min(begin + record["chunk_bytes"], record["bytes"])
        what = f"bytes {begin} to {end} differ from what was written"
        return Damage(file, what, chunk=chunk, tensors=self.tensors(file, begin, end))

    def damage_at(self, file: str, place: int) -> Damage:
        """What is to be said of one changed byte."""
        return self.damage_of(file, self.chunk_of(file, place))


@pytest.fixture(scope="session")
def layout_of() -> type[Layout]:
    """What tells what is to be said of damage: ``layout_of(path)``, of the checkpoint while it is intact."""
    return Layout


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A checkpoint that several processes saved, made by hand; ``arrays`` by ``entry/name`` are what it holds."""

    path: Path
    arrays: dict[str, Array]


@pytest.fixture
def sharded_checkpoint(tmp_path: Path) -> ShardedCheckpoint:
    """A small one in a run of its own: tensors in cells, in pieces and whole, a tied one, and what is each rank's own.

    Others are made with ``lab.sharded.write_sharded``, of arrays and of how each is cut.
    """
    random = np.random.default_rng(0)
    model: dict[str, Array] = {
        "rows": random.normal(size=(1100, 4)).astype(np.float32),
        "columns": random.normal(size=(6, 7)),
        "grid": random.integers(-5, 5, (7, 5)).astype(np.int16),
        "few": random.normal(size=(2, 3)).astype(np.float32),
        "anyhow": random.normal(size=(4, 6)).astype(np.float32),
        "whole": random.normal(size=(300,)).astype(np.float32),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    moments: dict[str, Array] = {name: random.normal(size=model[name].shape) for name in ("rows", "columns")}
    cuts = {
        "model/rows": Cells((275, 4)),
        "model/columns": Cells((6, 2)),
        "model/grid": Cells((4, 3), (2, 0, 3, 1)),
        "model/few": Cells((1, 3)),
        "model/anyhow": Pieces((((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4)))),
        "moments/rows": Cells((275, 4)),
        "moments/columns": Cells((6, 2)),
    }
    ranks = [{"_rng": {"python": rank}, "loader": {"position": 10 * rank}} for rank in range(4)]
    path = write_sharded(
        tmp_path / "run" / "step-000000000001",
        {"model": model, "moments": moments},
        cuts,
        ranks=ranks,
        aliases={"model": {"tied": "rows"}},
    )
    arrays = {f"model/{name}": array for name, array in model.items()}
    arrays |= {f"moments/{name}": array for name, array in moments.items()}
    return ShardedCheckpoint(path, {**arrays, "model/tied": model["rows"]})


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system in memory: ``mount("size=64k")``."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        path = tmp_path / f"mounted{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)
