"""Loaders of others: torchdata's, and those that a user writes."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast import Checkpointer, Every, Run, restore, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 still calls it
    # Those of the trainings before, in this same process, are in circles.
    pytest.mark.filterwarnings("ignore:a StatefulDataLoader is alive"),
]

STEPS = 4  # in an epoch


class Numbers(torch.utils.data.Dataset[int]):
    """Ids."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> int:
        return index


def end(loader: Any) -> None:
    """End the workers of torchdata's loader, which is in circles with them."""
    shut_down = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def torchdata(**options: Any) -> Any:
    """Makes torchdata's loader."""
    return lambda: StatefulDataLoader(Numbers(), 4, shuffle=True, **options)


class UsersLoader:
    """Plain Python: shuffles with a seed of its own, and draws from the global generators only for its samples."""

    def __init__(self) -> None:
        self.epoch = 0
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = random.Random(self.epoch).sample(range(4 * STEPS), 4 * STEPS)
        while self.position < STEPS:
            self.position += 1
            noise = int(torch.randint(100, ()))
            yield torch.tensor([index + noise for index in order[4 * self.position - 4 : 4 * self.position]])
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.epoch, self.position = state["epoch"], state["position"]


LOADERS = {
    "torchdata": torchdata(),
    "torchdata, 2 workers": torchdata(num_workers=2),
    "torchdata, 2 persistent workers": torchdata(num_workers=2, persistent_workers=True),
    "a user's": UsersLoader,
}


def train(run: Path, make: Any, seed: int, stop_after: int | None) -> list[Any]:
    """Ids, and a draw as dropout makes one, of two epochs; saved at the border, and where it stops."""
    torch.manual_seed(seed)
    loader = make()
    found: list[Any] = []
    with (
        contextlib.ExitStack() as stack,
        Checkpointer(run, {"loader": loader}, save=Every(epochs=1), background=False) as ckpt,
    ):
        stack.callback(end, loader)
        for _ in range(ckpt.epoch, 2):
            for batch in loader:
                found.append([batch.tolist(), torch.rand(()).item()])
                ckpt.step()
                if len(found) == stop_after:
                    return found  # the end of the block saves
            ckpt.end_epoch()
    return found


@pytest.fixture(scope="module", params=LOADERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A kind of loader, and an uninterrupted training with it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    make = LOADERS[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train(run, make, 3, None)
    return SimpleNamespace(make=make, found=found, run=run)


@pytest.mark.parametrize("stop_after", [1, STEPS, STEPS + 2], ids=["first", "last", "second epoch"])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, whole: SimpleNamespace, stop_after: int
) -> None:
    """Sample ids, and what the training draws itself: after a batch, after an epoch's last one, in the second epoch."""
    found = train(tmp_path / "part", whole.make, 3, stop_after)
    assert found + train(tmp_path / "part", whole.make, 4, None) == whole.found


def test_a_training_interrupted_between_two_epochs(whole: SimpleNamespace) -> None:
    """The new epoch's iterator draws as it would have drawn: once."""
    (border,) = [found for found in Run(whole.run) if found.epoch == 1]
    torch.manual_seed(4)
    loader = whole.make()
    restore(border, {"loader": loader})
    resumed = [[batch.tolist(), torch.rand(()).item()] for batch in loader]
    end(loader)
    assert resumed == whole.found[STEPS:]


def test_planning_a_restore_starts_no_workers(tmp_path: Path) -> None:
    """What is refused touched nothing: no process was started, and no number drawn."""
    loader = torchdata(num_workers=2)()
    save(tmp_path / "x", {"loader": loader, "more": torch.zeros(2)})
    end(loader)
    other = torchdata(num_workers=2, worker_init_fn=lambda worker: 1 / 0)()
    before = torch.get_rng_state().tolist()
    with pytest.raises(ValueError, match="nothing was touched"):
        restore(tmp_path / "x", {"loader": other, "more": torch.zeros(3)})
    assert torch.get_rng_state().tolist() == before
    assert other._iterator is None
