"""Starts the ranks of a training, kills those that are to be killed, and says how all of them ended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab.ranks_moments import Kill

TORTURE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Ended:
    """How one rank ended.

    Attributes:
        status: its exit status; negative for a signal.
        result: what its work returned; None when it did not come to its end.
        error: the error that ended it, as ``kinds`` (the names of its classes), ``message``, ``ranks``, ``key``,
            ``step``, ``errno`` and ``code``; empty when none did.
        counts: how many moments of each kind it counted; empty when it was killed.
        output: what it printed.
    """

    status: int
    result: Any = None
    error: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    output: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How all ranks of an order ended, by rank; ``late`` are those that had to be ended when the time was over."""

    ranks: tuple[Ended, ...]
    late: tuple[int, ...] = ()

    @property
    def statuses(self) -> list[int]:
        """The exit statuses."""
        return [ended.status for ended in self.ranks]

    @property
    def results(self) -> list[Any]:
        """What their work returned; fails where one did not come to its end."""
        assert set(self.statuses) == {0}, self.story()
        return [ended.result for ended in self.ranks]

    @property
    def errors(self) -> dict[int, dict[str, Any]]:
        """The errors, of the ranks that had one."""
        return {rank: ended.error for rank, ended in enumerate(self.ranks) if ended.error}

    def kinds(self) -> dict[int, str]:
        """The name of the class of each error."""
        return {rank: error["kinds"][0] for rank, error in self.errors.items()}

    def story(self) -> str:
        """What there is to read when something went wrong."""
        lines = [f"statuses {self.statuses}, late {list(self.late)}"]
        lines += [f"--- rank {rank}\n{ended.output[-3000:]}" for rank, ended in enumerate(self.ranks)]
        return "\n".join(lines)


class Ranks:
    """Forks groups of ranks, one group after the other, from a process that is warm. A context manager.

    Args:
        scratch: a directory for what the ranks print and return.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, str(TORTURE / "lab" / "ranks_serve.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def run(
        self,
        work: str,
        directory: Path,
        world_size: int,
        *,
        kills: Mapping[int, Kill] | None = None,
        faults: Mapping[int, Sequence[Sequence[Any]]] | None = None,
        store: Literal["rank", "agent", "file"] = "agent",
        after_death: Literal["kill", "leave"] = "leave",
        bystanders: Sequence[int] = (),
        timeout_s: float = 120.0,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> Outcome:
        """Have a group do some work, and wait until all have ended.

        Args:
            work: its name in :data:`lab.ranks_works.WORKS`.
            directory: where.
            world_size: how many ranks.
            kills: by rank, when it is killed.
            faults: by rank, what is otherwise there: names of functions of :mod:`lab.ranks_faults` and their arguments.
            store: who keeps the store that they talk through: rank 0, with whom it ends; a process beside them, as
                under torchrun; or a file.
            after_death: what happens to the others when one ends with an error: they are killed, or left alone.
            bystanders: ranks that are killed when the others have ended.
            timeout_s: after this all are killed; it is the process group's timeout too.
            environment: more environment variables.
            arguments: of the work.
        """
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        order = {
            "work": work,
            "directory": str(directory),
            "folder": str(folder),
            "world_size": world_size,
            "kills": {str(rank): asdict(kill) for rank, kill in (kills or {}).items()},
            "faults": {str(rank): [list(fault) for fault in all_of] for rank, all_of in (faults or {}).items()},
            "store": store,
            "after_death": after_death,
            "bystanders": list(bystanders),
            "timeout_s": timeout_s,
            "environment": dict(environment or {}),
            "arguments": arguments,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the server of ranks ended with {self._server.wait()}"
        told = json.loads(answer)
        ranks = tuple(_ended(folder, rank, told["statuses"][str(rank)]) for rank in range(world_size))
        return Outcome(ranks, tuple(told["late"]))

    def close(self) -> None:
        """No more."""
        self._server.communicate()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


Launch = Callable[..., Outcome]
"""What :meth:`Ranks.run` is."""


def _ended(folder: Path, rank: int, status: int) -> Ended:
    told_at, log = folder / f"rank-{rank}.json", folder / f"rank-{rank}.log"
    try:
        told = json.loads(told_at.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # killed before, or while it was written
        told = {}
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(status, told.get("result"), told.get("error", {}), told.get("counts", {}), output)
