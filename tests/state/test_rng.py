"""Random-number generators: captured without being named, restored last, and never disturbed by a save."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.errors import StateMismatchError


def draw_global() -> list[Any]:
    """Numbers from every global generator."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(2).tolist(),
        np.random.randn(1).tolist(),
        torch.rand(2).tolist(),
        torch.randn(1).tolist(),
        torch.randperm(5).tolist(),
    ]


def losses(path: Path | None) -> list[float]:
    """A training with shuffled data, dropout and augmentation; with a save at every step where there is a path."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    data = TensorDataset(torch.rand(16, 2))
    seen = []
    for epoch in range(2):
        for index, (batch,) in enumerate(DataLoader(data, batch_size=4, shuffle=True)):
            noise = float(np.random.randn()) + random.gauss(0, 1)
            loss = model(batch + 0.1 * noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
            if path is not None:
                holdfast.save(path / f"{epoch}-{index}", {"model": model, "optimizer": optimizer})
    return seen


def test_saving_never_changes_training(tmp_path: Path) -> None:
    """The loss sequence with a save at every step equals the one without any."""
    assert losses(tmp_path) == losses(None)
    assert len(list(tmp_path.iterdir())) == 8


def test_the_global_generators(tmp_path: Path) -> None:
    """Python's, numpy's and torch's go on where they were; also between the two numbers of a pair."""
    random.gauss(0, 1)
    np.random.randn()
    torch.randn(1)
    holdfast.save(tmp_path / "x", {"n": 1})
    expected = draw_global()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    draw_global()
    holdfast.restore(tmp_path / "x", {"n": 0})
    assert draw_global() == expected


def test_leaving_them_alone(tmp_path: Path) -> None:
    """On request the global generators are not touched."""
    holdfast.save(tmp_path / "x", {"n": 1})
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    holdfast.restore(tmp_path / "x", {"n": 0}, generators=False)
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before
    draw_global()
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    holdfast.restore(tmp_path / "x", {"n": 0}, generators=False)
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


def test_loading_leaves_them_alone(tmp_path: Path) -> None:
    """Looking at a checkpoint is not resuming from it."""
    holdfast.save(tmp_path / "x", {"w": torch.ones(2)})
    draw_global()
    before = torch.get_rng_state().tolist()
    holdfast.load(tmp_path / "x")
    assert torch.get_rng_state().tolist() == before


Draw = Callable[[Any], Any]
GENERATORS: dict[str, tuple[Callable[[], Any], Draw]] = {
    "torch": (lambda: torch.Generator().manual_seed(7), lambda g: torch.rand(3, generator=g).tolist()),
    "PCG64": (lambda: np.random.default_rng(7), lambda g: g.random(3).tolist()),
    "MT19937": (lambda: np.random.Generator(np.random.MT19937(7)), lambda g: g.standard_normal(3).tolist()),
    "Philox": (lambda: np.random.Generator(np.random.Philox(7)), lambda g: g.random(3).tolist()),
    "SFC64": (lambda: np.random.Generator(np.random.SFC64(7)), lambda g: g.random(3).tolist()),
    "PCG64DXSM": (lambda: np.random.Generator(np.random.PCG64DXSM(7)), lambda g: g.integers(0, 99, 3).tolist()),
    "RandomState": (lambda: np.random.RandomState(7), lambda g: g.randn(3).tolist()),
    "BitGenerator": (lambda: np.random.Philox(7), lambda g: g.random_raw(3).tolist()),
    "Random": (lambda: random.Random(7), lambda g: [g.gauss(0, 1), g.random()]),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", ["entry", "nested"])
def test_generators_in_the_state(tmp_path: Path, kind: str, place: str) -> None:
    """Each goes on where it was, in place, wherever in the state it stands."""
    make, draw = GENERATORS[kind]

    def state(generator: Any) -> dict[str, Any]:
        return {"g": generator} if place == "entry" else {"data": {"parts": [1, (generator,)]}}

    saved = make()
    draw(saved)
    holdfast.save(tmp_path / "x", state(saved))
    expected = draw(saved)
    live = make()
    live_state = state(live)
    holdfast.restore(tmp_path / "x", live_state)
    assert draw(live) == expected
    assert (live_state["g"] if place == "entry" else live_state["data"]["parts"][1][0]) is live


@pytest.mark.parametrize(
    ("saved", "live"),
    [("torch", "PCG64"), ("PCG64", "torch"), ("PCG64", "Philox"), ("Random", "PCG64"), ("RandomState", "PCG64")],
)
def test_another_kind_of_generator(tmp_path: Path, saved: str, live: str) -> None:
    """Refused before anything is touched."""
    holdfast.save(tmp_path / "x", {"w": torch.ones(1), "g": GENERATORS[saved][0]()})
    make, draw = GENERATORS[live]
    generator, weight = make(), torch.zeros(1)
    with pytest.raises(StateMismatchError, match="g: live expected"):
        holdfast.restore(tmp_path / "x", {"w": weight, "g": generator})
    assert (weight.item(), draw(generator)) == (0.0, draw(make()))


def test_cuda_is_not_started(tmp_path: Path) -> None:
    """Saving and restoring ask nothing of a device that is not in use."""
    holdfast.save(tmp_path / "x", {"w": torch.ones(1)})
    holdfast.restore(tmp_path / "x", {"w": torch.zeros(1)})
    assert not torch.cuda.is_initialized()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators(tmp_path: Path) -> None:
    """The generators of every device go on where they were, and those in the state too."""
    generator = torch.Generator("cuda").manual_seed(1)
    torch.rand(1, device="cuda")
    holdfast.save(tmp_path / "x", {"g": generator})
    expected = (torch.rand(3, device="cuda").tolist(), torch.rand(3, device="cuda", generator=generator).tolist())
    torch.cuda.manual_seed_all(9)
    holdfast.restore(tmp_path / "x", {"g": generator})
    assert (
        torch.rand(3, device="cuda").tolist(),
        torch.rand(3, device="cuda", generator=generator).tolist(),
    ) == expected
