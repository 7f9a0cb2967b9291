"""What each rank kept for itself in a checkpoint, and which of it a rank takes over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from holdfast.checkpoint import Checkpoint
from holdfast.errors import CorruptCheckpointError, Damage, HoldfastError, StateMismatchError, UsageError
from holdfast.format import strict_json, tree
from holdfast.format.names import GRADIENTS_ENTRY, MANIFEST, RANKS_ENTRY, RNG_ENTRY
from holdfast.state.leaves import SavedLeaves
from holdfast.state.per_rank import per_rank_entries, rank_key, rank_prefix
from holdfast.storage.memory import enough_memory

PER_RANK = ("error", "reassign", "reseed")
"""What to do where a checkpoint was saved by another number of ranks than restore it."""


@dataclass(frozen=True, slots=True)
class PerRankShare:
    """What one rank takes of what each rank kept for itself.

    Attributes:
        values: by entry, what it takes.
        anew: entries of which it takes nothing: generators are seeded anew, the rest stays as it was constructed.
        lost: entries of which nobody takes what ranks had that are gone.
        saved: the entries that the checkpoint holds for each rank.
        seed: what generators are seeded with.
        saved_world_size: how many ranks saved them.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    anew: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    saved: frozenset[str] = frozenset()
    seed: int = 0
    saved_world_size: int = 1


class SavedRanks:
    """The entries that each rank kept for itself, in a checkpoint that several ranks saved.

    Attributes:
        world_size: how many ranks.
        entries: their names.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        node = checkpoint.manifest.state[RANKS_ENTRY]
        size = node.get("world_size") if isinstance(node, dict) else None
        entries = node.get("entries") if isinstance(node, dict) else None
        if type(size) is not int or size < 1 or not isinstance(entries, list) or not all(map(_is_text, entries)):
            raise self._damaged("expected the number of ranks and the entries that each of them has")
        self.world_size = size
        self.entries = frozenset(entries)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SavedRanks | None:
        """Those of a checkpoint; None when one process saved it."""
        return cls(checkpoint) if RANKS_ENTRY in checkpoint.manifest.state else None

    def values(self, rank: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """By entry, what ``rank`` had, its tensors as references. Blocks: its typed trees are read.

        Raises:
            CorruptCheckpointError: they are not what was written.
        """
        trees = self._trees(rank)
        found = {}
        for entry in self.entries:
            if entry not in trees:
                raise self._damaged(f"rank {rank} has no {entry}")
            leaves = SavedLeaves(self._checkpoint, RANKS_ENTRY, device, prefix=rank_prefix(rank, entry))
            found[entry] = decoded(self._checkpoint, entry, trees[entry], leaves)
        return found

    def _trees(self, rank: int) -> dict[str, Any]:
        key = rank_key(rank)
        record = self._checkpoint.manifest.tensors.get(RANKS_ENTRY, {}).get(key)
        if record is None or record.dtype != "uint8" or len(record.shape) != 1:
            raise self._damaged(f"it has no bytes called {key}")
        name = f"{RANKS_ENTRY}/{key}"
        data = self._checkpoint.read(name).tobytes().rstrip(b" ")
        try:
            with enough_memory(name, strict_json.cost_bytes(data)):
                return strict_json.decode(data, dict[str, Any])
        except ValueError as error:
            raise self._damaged(f"{key}: {error}") from error

    def _damaged(self, what: str) -> CorruptCheckpointError:
        damage = [Damage(MANIFEST, f"state of {RANKS_ENTRY}: {what}")]
        return CorruptCheckpointError.at(self._checkpoint.path, damage, self._checkpoint.step)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def decoded(checkpoint: Checkpoint, entry: str, node: Any, leaves: SavedLeaves) -> Any:
    """A typed tree as values, its tensors as references; CorruptCheckpointError where it is none."""
    try:
        return tree.decode(node, leaves)
    except HoldfastError:
        raise
    except (ValueError, KeyError) as error:
        damage = [Damage(MANIFEST, f"state of {entry}: {error}")]
        raise CorruptCheckpointError.at(checkpoint.path, damage, checkpoint.step) from error


def share_of(
    checkpoint: Checkpoint, state: Mapping[str, Any], rank: int, world_size: int, per_rank: str, own: Collection[str]
) -> PerRankShare:
    """What a rank takes of what each rank kept for itself.

    Args:
        checkpoint: where from.
        state: the live entries that are restored.
        rank: of this process.
        world_size: how many ranks restore.
        per_rank: one of ``PER_RANK``.
        own: entries of Holdfast's own that are restored.

    Raises:
        StateMismatchError: another number of ranks saved it, and ``per_rank`` is ``"error"``.
        CorruptCheckpointError: what this rank had is not what was written.
    """
    if per_rank not in PER_RANK:
        raise UsageError(f"per_rank={per_rank!r}: expected one of {', '.join(PER_RANK)}.", key="per_rank")
    ranks = SavedRanks.of(checkpoint)
    if ranks is None and world_size == 1:
        return PerRankShare()
    wanted = {*state, *own}
    if ranks is None:  # one process saved it, all of its entries in the same way
        saved_world_size = 1
        concerned = per_rank_entries(state) & wanted & set(checkpoint.manifest.state)
    else:
        saved_world_size = ranks.world_size
        concerned = ranks.entries & wanted
    if saved_world_size != world_size and concerned and per_rank == "error":
        raise _another_world_size(checkpoint, concerned, saved_world_size, world_size)
    takes = saved_world_size == world_size or (per_rank == "reassign" and rank < saved_world_size)
    values = {} if ranks is None or not takes else ranks.values(rank)
    loses = per_rank == "reassign" and world_size < saved_world_size
    return PerRankShare(
        values={entry: value for entry, value in values.items() if entry in concerned},
        anew=frozenset() if takes else frozenset(concerned),
        lost=frozenset(concerned - {RNG_ENTRY}) if loses else frozenset(),
        saved=frozenset() if ranks is None else ranks.entries,
        seed=xxhash.xxh3_64_intdigest(f"{checkpoint.checkpoint_id}/{checkpoint.step}/{rank}".encode()),
        saved_world_size=saved_world_size,
    )


def _another_world_size(checkpoint: Checkpoint, concerned: Collection[str], saved: int, now: int) -> StateMismatchError:
    words = {RNG_ENTRY: "the global random-number generators", GRADIENTS_ENTRY: "the gradients of an accumulation"}
    names = ", ".join(words.get(entry, repr(entry)) for entry in sorted(concerned))
    return StateMismatchError(
        f"{checkpoint.path} was saved by {_ranks(saved)} and is to be restored by {_ranks(now)}. Each rank kept for "
        f"itself: {names}. Nothing was touched. Choose what becomes of that: per_rank='reassign' gives rank r what "
        "rank r had, and seeds the generators of further ranks anew; per_rank='reseed' seeds all of them anew; "
        "generators=False leaves the global generators alone.",
        path=checkpoint.path,
        step=checkpoint.step,
        key=min(concerned),
    )


def _ranks(count: int) -> str:
    return "one process" if count == 1 else f"{count} ranks"
