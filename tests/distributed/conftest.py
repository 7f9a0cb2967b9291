"""What the tests of many processes share: groups of ranks, and what a training comes to that nobody disturbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.ranks import Launch, Outcome, Ranks


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Has a group of ranks do some work: :meth:`lab.ranks.Ranks.run`."""
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks.run


Undisturbed = Callable[..., Outcome]


@pytest.fixture(scope="session")
def undisturbed(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What a training on so many ranks comes to when nothing is saved and nobody disturbs it; made once each."""
    found: dict[tuple[Any, ...], Outcome] = {}

    def train(world_size: int, **settings: Any) -> Outcome:
        key = (world_size, *sorted(settings.items()))
        if key not in found:
            directory = tmp_path_factory.mktemp("undisturbed")
            found[key] = launch("train", directory, world_size, saving="nothing", **settings)
            found[key].results[0]["directory"] = str(directory)
        return found[key]

    return train


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """Makes a directory that nobody has used."""
    made: list[Path] = []

    def make() -> Path:
        made.append(tmp_path / f"round-{len(made)}")
        made[-1].mkdir()
        return made[-1]

    return make
