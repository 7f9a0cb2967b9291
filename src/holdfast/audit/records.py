"""What the processes of an audit tell each other, through files: jobs one way, outcomes the other."""

from __future__ import annotations

import os
from typing import Literal, TypeVar

import msgspec

Part = Literal["whole", "first half", "second half"]
Structure = TypeVar("Structure")

LOG = ".log"
"""What the user's code prints goes to a file beside the outcome, whose name ends so."""


class Where(msgspec.Struct, frozen=True):
    """Where a function is found again by another process.

    Attributes:
        function: its qualified name within its module.
        module: the name its module is imported by; empty where only the file is known.
        file: the file of its module; empty where only the name is known.
        search: the directories to look for modules in, before the usual ones.
    """

    function: str
    module: str = ""
    file: str = ""
    search: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file or self.module}:{self.function}"


class Job(msgspec.Struct, frozen=True):
    """One part of a training that a process is to run.

    Attributes:
        part: the whole without interruption, the first half up to a save, or the second half from a restore.
        where: the function that builds the training.
        before: steps before the save.
        after: steps after it.
        checkpoint: the checkpoint that the first half writes and the second half restores.
        outcome: the file for the :class:`Outcome`.
        directory: the working directory.
        watch: record also what only a diagnosis needs; see :class:`Watched`.
        replay: repeat the first steps before restoring.
        save_also: names of things outside the state that the first half saves with it, by entry.
        restore_also: those of them that the second half restores.
        condition: what is changed about the process, see :mod:`holdfast.audit.conditions`; empty for nothing.
    """

    part: Part
    where: Where
    before: int
    after: int
    checkpoint: str
    outcome: str
    directory: str
    watch: bool = False
    replay: bool = False
    save_also: dict[str, str] = {}
    restore_also: dict[str, str] = {}
    condition: str = ""


class Leaf(msgspec.Struct, frozen=True):
    """One value of a state.

    Attributes:
        digest: over its exact bytes, its dtype and its shape.
        form: what it is, in words, such as ``float32 [4, 16]``.
        shown: the value itself where it is short, else empty.
        nbytes: how many bytes were looked at.
    """

    digest: str
    form: str
    shown: str
    nbytes: int

    def __str__(self) -> str:
        return self.shown or f"{self.form}, digest {self.digest[:12]}"


Leaves = dict[str, Leaf]


class Point(msgspec.Struct, frozen=True):
    """Everything that was recorded at one moment: at the beginning, once built, once restored, or after a step."""

    at: Literal["begun", "built", "restored", "step"]
    step: int
    loss: Leaves
    state: Leaves
    generators: Leaves

    @property
    def name(self) -> str:
        """The moment, in words."""
        if self.at == "step":
            return f"step {self.step}"
        return "before the first step" if self.at == "built" else f"after the restore, before step {self.step + 1}"

    def leaves(self) -> Leaves:
        """All of it, in the order in which a step computes it: the loss comes before what follows from it."""
        return {**self.loss, **self.state, **self.generators}


class Thing(msgspec.Struct, frozen=True):
    """Something that ``step`` reaches and that is not saved, as it was between the two halves.

    Attributes:
        name: as the user's code calls it, such as ``hidden`` or ``trainer.count``.
        kind: ``variable``, ``attribute``, ``generator``, ``object``, ``buffer``, ``mode``, ``gradients`` or
            ``iterator``.
        leaf: its value.
        savable: whether it can be put into a state.
    """

    name: str
    kind: str
    leaf: Leaf
    savable: bool


class IteratorMade(msgspec.Struct, frozen=True):
    """An iterator that was made over a DataLoader.

    Attributes:
        step: the step that made it; 0 for the build.
        loader: the loader, in words.
        in_state: whether the loader is in the state, and so resumes where it was.
        drew: the global generators that changed while it was made.
    """

    step: int
    loader: str
    in_state: bool
    drew: tuple[str, ...]


class Watched(msgspec.Struct):
    """What only a diagnosis needs to know of a run.

    Attributes:
        things: what ``step`` reaches outside the state, between the two halves.
        iterators: those made over DataLoaders.
        waiting: parameters whose gradients from before the save were still used after it.
        forgotten: what :func:`holdfast.state.forgotten.forgotten` names.
        kinds: for each entry of the state, the name of its type.
    """

    things: list[Thing] = []
    iterators: list[IteratorMade] = []
    waiting: list[str] = []
    forgotten: list[str] = []
    kinds: dict[str, str] = {}


class Failure(msgspec.Struct, frozen=True):
    """Why a part did not come to its end.

    Attributes:
        usage: whether the function was asked for wrongly, or gave what cannot be audited; else its own code raised.
        doing: what was being done.
        message: the error.
        traceback: where it was raised; empty when that says nothing to the user.
    """

    usage: bool
    doing: str
    message: str
    traceback: str = ""


class Outcome(msgspec.Struct):
    """What one part recorded.

    Attributes:
        points: what was recorded, moment by moment.
        environment: settings that may change bits, such as the number of threads.
        notes: what the restore had to say.
        operators: warnings about operators that do not promise the same bits each time.
        watched: what only a diagnosis needs.
        failure: why it ended early.
    """

    points: list[Point] = []
    environment: dict[str, str] = {}
    notes: list[str] = []
    operators: list[str] = []
    watched: Watched = msgspec.field(default_factory=Watched)
    failure: Failure | None = None

    def point(self, at: str, step: int) -> Point | None:
        """What was recorded at one moment."""
        return next((point for point in self.points if (point.at, point.step) == (at, step)), None)


def write(path: str, record: Job | Outcome) -> None:
    """Write a record to a new file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(record))


def read(path: str, kind: type[Structure]) -> Structure:
    """Read a record.

    Raises:
        FileNotFoundError: nobody wrote it.
        msgspec.DecodeError: only a part of it is there.
    """
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(), type=kind)
