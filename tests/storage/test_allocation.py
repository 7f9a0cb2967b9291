"""Memory for direct I/O."""

from __future__ import annotations

import gc
import io
import itertools
import mmap
import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.storage import memory
from holdfast.storage.memory import HUGE_PAGE_BYTES

SIZES = [0, 1, 4095, 4096, 4097, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1, 3 * HUGE_PAGE_BYTES + 5]


class WithoutAdvice(mmap.mmap):
    """A mapping on an older kernel."""

    def madvise(self, *args: int) -> None:
        """Not known."""
        raise OSError(22, "Invalid argument")


@pytest.fixture(params=["advice", "no advice"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes all advice, and one that takes none."""
    if request.param == "no advice":
        monkeypatch.setattr(mmap, "mmap", WithoutAdvice)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("nbytes", SIZES)
def test_as_many_zeros_as_asked_for(nbytes: int) -> None:
    """The size is exact, and nothing of anybody else's is in it."""
    assert bytes(memory.allocate(nbytes)) == bytes(nbytes)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("nbytes", SIZES[1:])
def test_it_is_aligned(nbytes: int) -> None:
    """To pages, and to huge pages where there is room for one."""
    alignment = HUGE_PAGE_BYTES if nbytes >= HUGE_PAGE_BYTES else 4096
    assert memory.address_of(memory.allocate(nbytes)) % alignment == 0


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("nbytes", SIZES[1:])
def test_it_can_be_written_to_its_end(nbytes: int) -> None:
    """First and last byte are its own."""
    view = memory.allocate(nbytes)
    view[0] = view[-1] = 7
    assert (view[0], view[-1], view.readonly) == (7, 7, False)


@pytest.mark.usefixtures("kernel")
def test_its_pages_are_there() -> None:
    """Touching them makes no fault: that would happen in the middle of a transfer."""
    pages = 256
    view = memory.allocate(pages * mmap.PAGESIZE)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for page in range(pages):
        view[page * mmap.PAGESIZE] = 1
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < pages // 4


def test_two_do_not_meet() -> None:
    """Each has memory of its own."""
    views = [memory.allocate(5000) for _ in range(3)]
    for value, view in enumerate(views):
        view[:] = bytes([value]) * 5000
    assert [bytes(view) for view in views] == [bytes([value]) * 5000 for value in range(3)]


def test_it_lives_as_long_as_a_view_of_it() -> None:
    """A part of it is enough, and with the last one it is gone."""
    view = memory.allocate(10_000)
    mapping = weakref.ref(view.obj)
    part = view[100:200]
    del view
    gc.collect()
    assert (mapping() is not None, bytes(part)) == (True, bytes(100))
    del part
    gc.collect()
    assert mapping() is None


@pytest.mark.parametrize("nbytes", [2**62, 2**63, 2**70])
def test_more_than_there_can_be(nbytes: int) -> None:
    """A MemoryError that says how much it was, whatever the system calls it."""
    with pytest.raises(MemoryError, match=str(nbytes)):
        memory.allocate(nbytes)


# ----------------------------------------------------------------------------------------------------------- addresses


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_view_at_an_address(data: bytes, draw: st.DataObject) -> None:
    """It shows what lies there, and writes there."""
    buffer = memoryview(bytearray(data))
    begin = draw.draw(st.integers(0, len(data)))
    view = memory.view_at(memory.address_of(buffer) + begin, len(data) - begin)
    assert bytes(view) == data[begin:]
    view[:] = bytes(len(view))
    assert bytes(buffer) == data[:begin] + bytes(len(data) - begin)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 1000, 32 * 2**10 - 1, 32 * 2**10, 32 * 2**10 + 1, 10**6])
@pytest.mark.parametrize(("to", "at"), [(0, 0), (1, 0), (0, 3), (5, 2)])
def test_copies(nbytes: int, to: int, at: int) -> None:
    """Short and long, from anywhere to anywhere: so many bytes and no more."""
    source = memoryview(bytearray(itertools.islice(itertools.cycle(range(1, 252)), nbytes + 8)))
    target = memoryview(bytearray(nbytes + 8))
    memory.copy(memory.address_of(target) + to, memory.address_of(source) + at, nbytes)
    assert bytes(target) == bytes(to) + bytes(source[at : at + nbytes]) + bytes(8 - to)


# -------------------------------------------------------------------------------------------------- what there is left


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], int]:
    """What is available on a system whose files say this: ``system({path: text})``."""

    def available(files: dict[str, str]) -> int:
        def fake(path: str, **kwargs: Any) -> io.StringIO:
            if path not in files:
                raise FileNotFoundError(path)
            return io.StringIO(files[path])

        monkeypatch.setattr(memory, "open", fake, raising=False)
        return memory.available_bytes()

    return available


MEMINFO = {"/proc/meminfo": "MemTotal:       9000 kB\nMemFree:        100 kB\nMemAvailable:   1000 kB\n"}
GROUP = {"/proc/self/cgroup": "0::/jobs/a\n", "/sys/fs/cgroup/jobs/a/memory.current": "300000\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2**63),
        (MEMINFO, 1_024_000),
        ({"/proc/meminfo": "nothing\n"}, 2**63),
        ({**MEMINFO, **GROUP, "/sys/fs/cgroup/jobs/a/memory.max": "400000\n"}, 100_000),
        ({**MEMINFO, **GROUP, "/sys/fs/cgroup/jobs/a/memory.max": "9000000\n"}, 1_024_000),
        ({**MEMINFO, **GROUP, "/sys/fs/cgroup/jobs/a/memory.max": "max\n"}, 1_024_000),
        ({**MEMINFO, "/proc/self/cgroup": "4:memory:/jobs/a\n"}, 1_024_000),
        ({**GROUP, "/sys/fs/cgroup/jobs/a/memory.max": "400000\n"}, 100_000),
    ],
    ids=["unknown", "system", "strange", "group", "large group", "unlimited group", "old groups", "group alone"],
)
def test_the_smallest_limit_counts(
    system: Callable[[dict[str, str]], int], files: dict[str, str], expected: int
) -> None:
    """The system's memory and the container's; none where neither is told."""
    assert system(files) == expected


def test_this_system_has_some() -> None:
    """The real files are read."""
    assert 0 < memory.available_bytes() < 2**63


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's account of the memory")
def test_memory_is_private() -> None:
    """Shared memory would have no huge pages, and a forked child could write to it."""
    view = memory.allocate(2**23)
    address = memory.address_of(view)
    spans = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    (mode,) = [
        mode for span, mode in spans if int(span.partition("-")[0], 16) <= address < int(span.partition("-")[2], 16)
    ]
    assert mode == "rw-p"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's advice for forks")
def test_its_place_stays_taken_in_a_forked_child(in_a_fork: Callable[..., int]) -> None:
    """What the child maps goes elsewhere: its own copy of the view, let go of, would unmap whatever had come there."""
    view = memory.allocate(2**23)
    begin = memory.address_of(view)

    def child() -> None:
        others = [mmap.mmap(-1, 2**20) for _ in range(64)]
        assert not [other for other in others if begin <= memory.address_of(other) < begin + 2**23]
        assert bytes(view[: mmap.PAGESIZE]) == bytes(mmap.PAGESIZE)  # there, and nothing of the parent's

    view[:] = b"x" * 2**23
    assert in_a_fork(child) == 0
    assert view[-1] == ord("x")
