"""What all tests share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, settings

from holdfast.format import manifest as manifests
from holdfast.format.manifest import FileRecord

# Before anything imports torch, here and in the processes that tests start: the same bits on every machine, and tests
# that run beside each other do not fight for cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

TORTURE = os.environ.get("HOLDFAST_TORTURE", "0") != "0"

# No test asserts a time. By default the same examples each time, so that a failure is nobody's luck; new ones in
# `make torture`.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.register_profile(
    "torture", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("torture" if TORTURE else "default")


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """How many rounds to run: ``count(default, full)`` is ``full`` in `make torture`."""

    def choose(default: int, full: int) -> int:
        return full if TORTURE else default

    return choose


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
