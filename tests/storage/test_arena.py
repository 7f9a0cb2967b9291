"""Memory that is kept from save to save."""

from __future__ import annotations

import pytest

from holdfast.storage import memory
from holdfast.storage.arena import Arena, BytesImage, MemoryImage

SIZES = {"a": 5000, "b": 0, "c": 4096, "d": 1}


def test_slots_are_apart_and_aligned() -> None:
    """Each has its size, begins where direct I/O takes it, and what is written into one is in no other."""
    slots = Arena().slots(SIZES)
    for value, slot in enumerate(slots.values()):
        slot[:] = bytes([value]) * len(slot)
    assert {name: bytes(slot) for name, slot in slots.items()} == {
        name: bytes([value]) * SIZES[name] for value, name in enumerate(SIZES)
    }
    assert [memory.address_of(slot) % 4096 for slot in slots.values() if len(slot)] == [0, 0, 0]


def test_the_next_save_finds_it_there() -> None:
    """The same memory for the same sizes, and for somewhat smaller ones."""
    arena = Arena()
    first = memory.address_of(arena.slots({"a": 10_000})["a"])
    assert [memory.address_of(arena.slots({"a": size})["a"]) for size in (10_000, 5000)] == [first, first]


def test_it_grows_and_shrinks() -> None:
    """With what a save needs; not for every byte less."""
    arena = Arena()
    held = []
    for size in (8192, 100_000, 60_000, 8192):
        arena.slots({"a": size})
        held.append(arena.nbytes)
    assert held == [8192, 102_400, 102_400, 8192]


def test_a_slot_outlives_its_arena() -> None:
    """Whoever still writes it to a disk may do so."""
    arena = Arena()
    slot = arena.slots({"a": 4})["a"]
    slot[:] = b"data"
    arena.release()
    assert (bytes(slot), arena.nbytes) == (b"data", 0)


def test_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the system swaps or kills somebody, and the arena can be used all the same."""
    arena = Arena()
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**28 + 8192)
    with pytest.raises(MemoryError, match="12288 bytes are needed"):
        arena.slots({"a": 8193})
    assert len(arena.slots({"a": 8192})["a"]) == 8192


@pytest.mark.parametrize("image", [BytesImage(b"0123456789"), MemoryImage(memoryview(bytearray(b"0123456789")))])
def test_images_of_memory(image: BytesImage | MemoryImage) -> None:
    """All of it, and any part."""
    whole = image.read(0, memoryview(bytearray(10)))
    part = image.read(3, memoryview(bytearray(4)))
    assert (image.nbytes, bytes(whole), bytes(part)) == (10, b"0123456789", b"3456")
