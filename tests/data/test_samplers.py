"""Orders that are the user's: made again as they were, or refused."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from holdfast.data import ResumableDataLoader
from holdfast.errors import StateMismatchError

COUNT = 17


class PythonRandom:
    """Draws from Python's global generator, as it goes."""

    def __iter__(self) -> Any:
        for _ in range(COUNT):
            yield random.randrange(COUNT)

    def __len__(self) -> int:
        return COUNT


class OwnGenerators(PythonRandom):
    """Draws from three generators of its own."""

    def __init__(self) -> None:
        self.python = random.Random(1)
        self.numpy = np.random.default_rng(2)
        self.torch = torch.Generator().manual_seed(3)

    def __iter__(self) -> Any:
        for _ in range(COUNT):
            drawn = self.python.random() + self.numpy.random() + torch.rand((), generator=self.torch).item()
            yield int(drawn * 1000) % COUNT


class Counting(PythonRandom):
    """Has a state: the passes that it began."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        yield from random.Random(self.passes).sample(range(COUNT), COUNT)

    def state_dict(self) -> dict[str, int]:
        """The passes."""
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.passes = state["passes"]


class Buckets:
    """Gives lists, of several lengths, in the form of tuples of numpy integers."""

    def __iter__(self) -> Any:
        order = np.random.permutation(COUNT)
        for begin, size in ((0, 3), (3, 5), (8, 1), (9, 4), (13, 4)):
            yield tuple(order[begin : begin + size])

    def __len__(self) -> int:
        return 5


def own() -> torch.Generator:
    """A generator for a sampler."""
    return torch.Generator().manual_seed(9)


WEIGHTS = [1.0 + index % 3 for index in range(COUNT)]
SAMPLERS = {
    "RandomSampler": lambda: RandomSampler(range(COUNT)),
    "RandomSampler, own generator": lambda: RandomSampler(range(COUNT), generator=own()),
    "RandomSampler, replacement": lambda: RandomSampler(range(COUNT), True, 70, own()),
    "WeightedRandomSampler": lambda: WeightedRandomSampler(WEIGHTS, 40, True),
    "WeightedRandomSampler, own generator": lambda: WeightedRandomSampler(WEIGHTS, 40, True, own()),
    "SequentialSampler": lambda: SequentialSampler(range(COUNT)),
    "DistributedSampler": lambda: DistributedSampler(range(COUNT), 2, 1, seed=4),
    "StatefulDistributedSampler": lambda: StatefulDistributedSampler(range(COUNT), 2, 1, seed=4),
    "Python's random": PythonRandom,
    "three own generators": OwnGenerators,
    "a state": Counting,
}
BATCH_SAMPLERS = {
    "BatchSampler": lambda: BatchSampler(RandomSampler(range(COUNT)), 3, False),
    "BatchSampler, drop_last, own generator": lambda: BatchSampler(
        RandomSampler(range(COUNT), generator=own()), 3, True
    ),
    "BatchSampler of a DistributedSampler": lambda: BatchSampler(DistributedSampler(range(COUNT), 2, 0), 3, False),
    "BatchSampler of a stateful one": lambda: BatchSampler(StatefulDistributedSampler(range(COUNT), 2, 0), 3, False),
    "numpy's random, uneven": Buckets,
}
ARGUMENTS: dict[str, Any] = {
    **{name: lambda make=make: {"sampler": make(), "batch_size": 3} for name, make in SAMPLERS.items()},
    **{f"{name}, batches": lambda make=make: {"batch_sampler": make()} for name, make in BATCH_SAMPLERS.items()},
    "samples one by one": lambda: {"sampler": RandomSampler(range(COUNT)), "batch_size": None},
    "drop_last": lambda: {"sampler": RandomSampler(range(COUNT)), "batch_size": 3, "drop_last": True},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_resumed_order_is_the_uninterrupted_one(kit: SimpleNamespace, tmp_path: Path, arguments: Any) -> None:
    """Killed at the border, in the second epoch, at its last batch; ids, augmentation, and nothing decoded twice."""
    log = tmp_path / "decoded"

    def make() -> ResumableDataLoader:
        torch.rand(7), random.random(), np.random.rand()  # what another process had drawn
        return ResumableDataLoader(kit.Pictures(COUNT, log), seed=5, **arguments())

    loader = make()
    whole = [kit.batches(loader) for _ in range(3)]
    assert whole[0] != whole[1]
    assert len(loader) == len(whole[0])
    for stop in (0, 2, len(whole[1])):
        loader = make()
        kit.batches(loader)
        log.unlink()
        iterator = iter(loader) if stop else iter(())
        found = kit.batches(iterator, stop)
        again = kit.resumed(make(), loader.state_dict())
        found += kit.batches(again)
        decoded = log.read_text().split()
        assert found == whole[1]
        assert [int(float(row)) for row in decoded] == [int(row[0]) for batch in whole[1] for row in rows(batch)]
        assert kit.batches(again) == whole[2]


def rows(batch: Any) -> list[Any]:
    """The samples of a batch, or of a sample that is none."""
    return batch if isinstance(batch[0], list) else [batch]


@pytest.mark.parametrize("name", ["DistributedSampler", "BatchSampler of a DistributedSampler, batches"])
def test_samplers_are_told_the_epoch(kit: SimpleNamespace, name: str) -> None:
    """The outermost, and those inside it."""
    loader = ResumableDataLoader(kit.Pictures(COUNT), seed=5, **ARGUMENTS[name]())
    assert kit.ids(kit.batches(loader)) != kit.ids(kit.batches(loader))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["RandomSampler, replacement", "Python's random", "numpy's random, uneven, batches"])
def test_prefetching_does_not_change_the_order(kit: SimpleNamespace, name: str, workers: int) -> None:
    """Samplers that draw as they go are ahead of what was consumed; the place is not."""
    whole = kit.batches(ResumableDataLoader(kit.Pictures(COUNT), seed=5, **ARGUMENTS[name]()))
    loader = ResumableDataLoader(kit.Pictures(COUNT), seed=5, num_workers=workers, **ARGUMENTS[name]())
    found = kit.batches(iter(loader), 2)
    again = ResumableDataLoader(kit.Pictures(COUNT), seed=5, num_workers=workers, **ARGUMENTS[name]())
    assert found + kit.batches(kit.resumed(again, loader.state_dict())) == whole


def test_the_training_s_generators_are_untouched(kit: SimpleNamespace) -> None:
    """A sampler that draws from the global generators draws from others."""
    loader = ResumableDataLoader(kit.Pictures(COUNT), 3, seed=5, sampler=PythonRandom())
    kit.seed_everything(3)
    expected = [kit.globals_drawn() for _ in range(6)]
    kit.seed_everything(3)
    assert [kit.globals_drawn() for _ in loader] == expected


def test_one_index_drawn_twice_is_augmented_twice(kit: SimpleNamespace) -> None:
    """The position is part of the seed."""
    (batch,) = kit.batches(ResumableDataLoader(kit.Pictures(3), 3, seed=5, sampler=[1, 1, 1]))
    assert len({tuple(row) for row in batch}) == 3


def test_an_order_that_nobody_can_make_again_is_found(kit: SimpleNamespace) -> None:
    """A sampler that depends on something else is refused, before a sample is loaded."""

    class Unknown(PythonRandom):
        hidden = iter(range(1000))

        def __iter__(self) -> Any:
            yield from ((next(self.hidden) * 7) % COUNT for _ in range(COUNT))

    loader = ResumableDataLoader(kit.Pictures(COUNT), 3, seed=5, sampler=Unknown())
    kit.batches(loader, 2)
    again = kit.resumed(ResumableDataLoader(kit.Pictures(COUNT), 3, seed=5, sampler=Unknown()), loader.state_dict())
    with pytest.raises(StateMismatchError, match=r"first 6 samples of epoch 0 are not those.*set_epoch\(1\)"):
        iter(again)
    again.set_epoch(1)
    assert len(kit.batches(again)) == 6


def test_a_sampler_that_has_become_shorter_is_found(kit: SimpleNamespace) -> None:
    """It ends before what was consumed."""
    loader = ResumableDataLoader(kit.Pictures(COUNT), 3, seed=5, sampler=range(12))
    kit.batches(loader, 3)
    again = ResumableDataLoader(kit.Pictures(COUNT), 3, seed=5, sampler=range(6))
    with pytest.raises(StateMismatchError, match="order differs"):
        iter(kit.resumed(again, loader.state_dict()))


def test_indices_may_be_anything(kit: SimpleNamespace) -> None:
    """Texts and tuples, as the keys of a dictionary."""
    data = {("a", 1): 1, "b": 2, "c": 3, ("d", np.int64(4)): 4}
    loader = ResumableDataLoader(data, 1, seed=5, sampler=list(data))
    kit.batches(loader, 2)
    again = kit.resumed(ResumableDataLoader(data, 1, seed=5, sampler=list(data)), loader.state_dict())
    assert kit.batches(again) == [[3], [4]]


def test_a_sampler_continues_with_another_batch_size(kit: SimpleNamespace) -> None:
    """It gives single indices, which are counted."""
    loader = ResumableDataLoader(kit.Pictures(COUNT), 3, seed=5, sampler=range(12))
    kit.batches(loader, 2)
    again = kit.resumed(ResumableDataLoader(kit.Pictures(COUNT), 2, seed=5, sampler=range(12)), loader.state_dict())
    assert again.position == 3
    assert kit.ids(kit.batches(again)) == [[6, 7], [8, 9], [10, 11]]
