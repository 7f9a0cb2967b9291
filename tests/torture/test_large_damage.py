"""Random damage anywhere in a large checkpoint: each is found, and named with its chunk and its tensors."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import CorruptCheckpointError

FILES = ("model.safetensors", "optimizer.safetensors")
MIB = 2**20
PAGE_BYTES = 4096
SECTOR_BYTES = 512
# Of linux/falloc.h; Python has no names for them.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2

Bytes = np.ndarray[Any, Any]
Count = Callable[[int, int], int]
LayoutOf = Callable[[Path], Any]
RecordProperty = Callable[[str, object], None]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, count: Count) -> Path:
    """Two files of random bytes: 64 MiB, in `make torture` 1 GiB. Their tensors begin and end anywhere in a chunk."""
    chance = np.random.default_rng(0)
    entry_bytes = count(64, 1024) * MIB // len(FILES)
    state: dict[str, dict[str, torch.Tensor]] = {}
    for entry in ("model", "optimizer"):
        data = torch.from_numpy(np.frombuffer(bytearray(chance.bytes(entry_bytes)), np.uint8))
        cuts = sorted(chance.choice(entry_bytes, 11, replace=False).tolist())
        state[entry] = {f"part{index}": part for index, part in enumerate(torch.tensor_split(data, cuts))}
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    holdfast.save(path, state)
    return path


# What happens to files: a place, and the bytes that are there from then on.


def flip_a_bit(data: Bytes, chance: random.Random) -> tuple[int, Bytes]:
    """As memory does that a particle went through."""
    place = chance.randrange(len(data))
    return place, data[place : place + 1] ^ np.uint8(1 << chance.randrange(8))


def change_a_byte(data: Bytes, chance: random.Random) -> tuple[int, Bytes]:
    """To any other value."""
    place = chance.randrange(len(data))
    return place, data[place : place + 1] ^ np.uint8(chance.randrange(1, 256))


def zero_a_sector(data: Bytes, chance: random.Random) -> tuple[int, Bytes]:
    """As a disk does that could not read it."""
    place = chance.randrange(len(data) // SECTOR_BYTES) * SECTOR_BYTES
    return place, np.zeros(SECTOR_BYTES, np.uint8)


def misplace_a_page(data: Bytes, chance: random.Random) -> tuple[int, Bytes]:
    """As a write does that went to another place than it should."""
    source, place = (page * PAGE_BYTES for page in chance.sample(range(len(data) // PAGE_BYTES), 2))
    return place, data[source : source + PAGE_BYTES].copy()


def zero_a_megabyte(data: Bytes, chance: random.Random) -> tuple[int, Bytes]:
    """As data does that was never written; within a chunk or across two."""
    return chance.randrange(len(data) - MIB), np.zeros(MIB, np.uint8)


def punch_a_hole(data: Bytes, chance: random.Random) -> tuple[int, Bytes]:
    """As a file system does that lost an extent."""
    pages = chance.randrange(1, 64)
    place = chance.randrange(len(data) // PAGE_BYTES - pages) * PAGE_BYTES
    return place, np.zeros(pages * PAGE_BYTES, np.uint8)


DAMAGERS = (flip_a_bit, change_a_byte, zero_a_sector, misplace_a_page, zero_a_megabyte, punch_a_hole)


@contextmanager
def damaged(file: Path, chance: random.Random) -> Iterator[list[int]]:
    """A file is damaged within the block; gives where the pages begin that are not what they were."""
    damager = chance.choice(DAMAGERS)
    data = np.memmap(file, np.uint8, "r+")
    place, after = damager(data, chance)
    before = data[place : place + len(after)].copy()
    with file.open("r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), after, place)
        if damager is punch_a_hole:
            punch(opened.fileno(), place, len(after))
        try:
            changed = place + np.flatnonzero(before != after)
            yield (np.unique(changed // PAGE_BYTES) * PAGE_BYTES).tolist()
        finally:
            os.pwrite(opened.fileno(), before, place)


def punch(fd: int, place: int, nbytes: int) -> None:
    """Give the blocks back to the file system, where that can be done; they read as zeros."""
    function = getattr(ctypes.CDLL(None), "fallocate", None)
    if function is not None:
        function(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_long(place), ctypes.c_long(nbytes))


def forget(path: Path) -> None:
    """Have the files read from the disk next time, past the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in FILES:
        with (path / file).open("rb") as opened:
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "from the disk"])
def test_random_damage_is_found_and_named(
    large: Path, cached: bool, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """Several at once: verify lists each damaged chunk and no intact one; no tensor with bytes there is given out."""
    layout, checkpoint = layout_of(large), holdfast.open(large)
    chance = random.Random(int(cached))
    rounds = count(3, 12)
    together = count(6, 24)
    for _ in range(rounds):
        with ExitStack() as stack:
            chunks = set()
            for _ in range(together):
                file = chance.choice(FILES)
                places = stack.enter_context(damaged(large / file, chance))
                chunks |= {(file, layout.chunk_of(file, place)) for place in places}
            if not cached:
                forget(large)
            expected = tuple(layout.damage_of(file, chunk) for file, chunk in sorted(chunks))
            with pytest.raises(CorruptCheckpointError) as caught:
                checkpoint.verify()
            assert caught.value.damage == expected
            one = chance.choice(expected)
            for tensor in one.tensors[:1]:
                with pytest.raises(CorruptCheckpointError, match=one.file):
                    checkpoint.read(tensor)
    checkpoint.verify()
    record_property("count: random damages", rounds * together)


@pytest.mark.slow
def test_random_damage_does_not_reach_a_part(
    large: Path, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """Of one damage at a time: tensors with bytes in the chunk are refused with its name, others are what they were."""
    layout, checkpoint = layout_of(large), holdfast.open(large)
    chance = random.Random(2)
    rounds = count(20, 100)
    for _ in range(rounds):
        file = chance.choice(FILES)
        tensor = chance.choice(layout.tensors(file))
        intact = checkpoint.read(tensor)
        with damaged(large / file, chance) as places:
            damage = [layout.damage_of(file, chunk) for chunk in sorted({layout.chunk_of(file, p) for p in places})]
            mine = [item for item in damage if tensor in item.tensors]
            if mine:
                with pytest.raises(CorruptCheckpointError) as caught:
                    holdfast.load(large, only=tensor)
                assert set(caught.value.damage) <= set(mine)
            else:
                entry, _, part = tensor.partition("/")
                assert np.array_equal(holdfast.load(large, only=tensor)[entry][part].numpy(), intact)
    checkpoint.verify()
    record_property("count: random damages", rounds)
