"""What all hold whole is read by one rank, each something else, and reaches the others; with threads as ranks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast.distributed import reading_once
from holdfast.distributed.reading_once import ReadOnce
from holdfast.format.records import Piece, TensorRecord
from holdfast.state.leaves import Copy, SavedTensor

SIZES = [1, 3, 70, 2_000_000, 5, 1, 900_000, 40]


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs two ranks over some copies; returns what each has then, and which keys each has read."""
    boxes: dict[int, queue.Queue[torch.Tensor]] = {0: queue.Queue(), 1: queue.Queue()}
    mine = threading.local()
    read: dict[int, list[str]] = {0: [], 1: []}

    def fill(checkpoint: Any, copies: Sequence[Copy], *, whole: bool = False) -> None:
        for saved, target in copies:
            read[mine.rank].append(saved.key)
            target.copy_(torch.arange(target.numel()).reshape(target.shape) + int(saved.key.partition("/")[2]))

    def broadcast(tensor: torch.Tensor, src: int, group: Any) -> None:
        if src == 10 + mine.rank:
            boxes[1 - mine.rank].put(tensor.clone())
        else:
            tensor.copy_(boxes[mine.rank].get(timeout=20))

    monkeypatch.setattr(reading_once, "fill", fill)
    monkeypatch.setattr(reading_once.dist, "broadcast", broadcast)
    group: Any = SimpleNamespace(_device_types=[torch.device("cpu")])

    def run(make: Any) -> tuple[list[list[torch.Tensor]], dict[int, list[str]]]:
        found: list[list[torch.Tensor]] = [[], []]

        def rank(number: int) -> None:
            mine.rank = number
            copies = make()
            once = ReadOnce(group, [10, 11], number, lambda what, alike: nullcontext())
            once(SimpleNamespace(), copies, whole=False)  # type: ignore[arg-type]
            found[number] = [target for _, target in copies]

        threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, read

    return run


def copy_of(key: str, target: torch.Tensor) -> Copy:
    """A saved tensor of the shape of ``target``."""
    shape = tuple(target.shape)
    return SavedTensor(key, TensorRecord("float32", shape, (Piece("f", key, 4096, shape),))), target


def test_each_reads_its_share(resumed: Any) -> None:
    """Nothing is read twice, the bytes are shared about evenly, and both have all of it."""
    found, read = resumed(lambda: [copy_of(f"model/{n}", torch.zeros(size)) for n, size in enumerate(SIZES)])
    assert sorted(read[0] + read[1]) == [f"model/{n}" for n in range(len(SIZES))]
    assert all(read.values())
    for tensors in found:
        for number, (size, tensor) in enumerate(zip(SIZES, tensors, strict=True)):
            assert tensor.tolist() == (torch.arange(size) + number).tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_dtypes_and_orders(resumed: Any, transposed: bool) -> None:
    """Of whatever type, and in whatever order in memory."""
    dtypes = [torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float32]

    def make() -> list[Copy]:
        tensors = [torch.zeros(3, 4, dtype=dtype) for dtype in dtypes]
        return [copy_of(f"model/{n}", each.T if transposed else each) for n, each in enumerate(tensors)]

    found, _ = resumed(make)
    assert [tensor.tolist() for tensor in found[0]] == [tensor.tolist() for tensor in found[1]]
    assert found[0][1].flatten().tolist() == list(range(1, 13))


def test_what_is_a_rank_s_own_is_read_by_it(resumed: Any) -> None:
    """Only what all hold alike is sent."""
    found, read = resumed(lambda: [copy_of("_ranks/7", torch.zeros(2)), copy_of("model/1", torch.zeros(()))])
    assert read[0].count("_ranks/7") == read[1].count("_ranks/7") == 1
    assert [tensor.tolist() for tensor in found[0]] == [tensor.tolist() for tensor in found[1]] == [[7, 8], 1]


def test_one_destination_of_two_names(resumed: Any) -> None:
    """Tied tensors are sent once."""

    def make() -> list[Copy]:
        tied = torch.zeros(4)
        return [copy_of("model/3", tied), copy_of("model/3", tied)]

    found, _ = resumed(make)
    assert found[0][0].tolist() == found[1][1].tolist() == [3, 4, 5, 6]
