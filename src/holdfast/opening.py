"""The first things read of a checkpoint: its manifest and its annotations; and what to say where there is none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, Damage, FormatVersionError, storage_errors
from holdfast.format import envelope
from holdfast.format import manifest as manifests
from holdfast.format.manifest import Annotations, Head
from holdfast.format.names import ANNOTATIONS, MANIFEST, CheckpointName
from holdfast.inspection import read_annotations
from holdfast.storage.store import StoredCheckpoint


@contextmanager
def reading(path: str, step: int | None = None) -> Iterator[None]:
    """The file system's errors while reading the checkpoint at ``path``, in the words of checkpoints."""
    with storage_errors("cannot read", path):
        try:
            yield
        except CheckpointNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointNotFoundError(_why_not_found(path), path=path, step=step) from error


def read_head(stored: StoredCheckpoint) -> tuple[Head, bytes]:
    """What the manifest says first, validated, and the bytes of all of it.

    Raises:
        FileNotFoundError: there is no manifest.
        CorruptCheckpointError: it is damaged, or that of another step than the directory's name says.
        FormatVersionError: a newer Holdfast wrote it.
    """
    try:
        data = stored.read_whole(MANIFEST, manifests.MAX_MANIFEST_BYTES, envelope.BEGIN)
        head = manifests.decode_head(data, os.path.join(stored.path, MANIFEST))
    except FormatVersionError:
        raise
    except ValueError as error:
        raise CorruptCheckpointError.at(stored.path, [Damage(MANIFEST, str(error))]) from error
    _check_step(stored.path, head)
    return head, data


def holds_manifest(stored: StoredCheckpoint, data: bytes) -> bool:
    """Whether the manifest that is there is ``data``."""
    try:
        return stored.is_whole(MANIFEST, data)
    except ValueError:  # reading it says what is wrong
        return False


def annotations_of(stored: StoredCheckpoint, head: Head) -> Annotations:
    """The annotations; none where there are none, and none, with a warning, where they are broken: no state is lost."""
    try:
        return read_annotations(stored, head)
    except ValueError as error:
        damage = Damage(ANNOTATIONS, str(error))
        warnings.warn(f"{stored.path}: {damage}; its later metrics, pin and tags are not known.", stacklevel=2)
        return Annotations()


def _check_step(path: str, head: Head) -> None:
    """Refuse the checkpoint of one step under the name of another: a run orders its checkpoints by their names.

    Generations are not compared: a manifest does not know its own, and a checkpoint under another is still of its step.
    """
    named = CheckpointName.parse(os.path.basename(path))
    if named is not None and named.step != head.step:
        what = f"is that of step {head.step}, in a directory named for step {named.step}"
        raise CorruptCheckpointError(
            f"{path} is damaged: {MANIFEST} {what}. If the directory was copied or renamed, name it "
            f"{CheckpointName(head.step)} (or with .g2, .g3 where that is taken); if the manifest is from another "
            "checkpoint, restore it from a copy.",
            damage=[Damage(MANIFEST, what)],
            path=path,
            step=head.step,
        )


def _why_not_found(path: str) -> str:
    if os.path.isfile(path):
        return f"{path} is a file; a checkpoint is a directory with a {MANIFEST}."
    if os.path.islink(path):
        return f"{path} is a symbolic link; within a run, a checkpoint is a directory."
    if not os.path.isdir(path):
        return f"{path} does not exist; expected the directory of a checkpoint."
    inside = sorted(filter(None, map(CheckpointName.parse, os.listdir(path))))
    if inside:
        return f"{path} is a run of {len(inside)} checkpoints, not one; open one of them, such as {inside[-1]}."
    return f"{path} has no {MANIFEST}: it is not a checkpoint."
