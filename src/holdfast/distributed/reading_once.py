"""What all processes hold whole, read by one of them and sent to the others, instead of read by each.

It pays where the file system is slower than the network between the processes. The tensors are shared out by their
sizes, so that all read at the same time, each something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash

from holdfast.checkpoint import Checkpoint
from holdfast.format.names import RANKS_ENTRY
from holdfast.state.leaves import Copy, SavedTensor, fill
from holdfast.state.sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES = 4 * 2**20
"""Smaller tensors travel together, up to so many bytes at once."""

_IN_ORDER = torch.contiguous_format


class ReadOnce:
    """Fills tensors from a checkpoint, as all processes of a group together.

    Args:
        group: what carries the bytes.
        members: by rank in the group, the rank in the world.
        rank: of this process, in the group.
        all_succeed: a context that all leave well, or all with an error; all have to say the same when they enter it.
    """

    def __init__(
        self,
        group: ProcessGroup,
        members: Sequence[int],
        rank: int,
        all_succeed: Callable[[str, str], AbstractContextManager[None]],
    ) -> None:
        self._group = group
        self._members = members
        self._rank = rank
        self._all_succeed = all_succeed
        self._devices = {device.type for device in group._device_types}

    def __call__(self, checkpoint: Checkpoint, copies: Sequence[Copy], *, whole: bool) -> None:
        """Read each saved tensor into its destination. Blocks; calls collectives of the group.

        Raises:
            CorruptCheckpointError: a process found damage; all raise it.
        """
        sent = [copy for copy in copies if self._is_sent(*copy)]
        readers = self._shared_out(sent)
        theirs = {id(target) for (_, target), reader in zip(sent, readers, strict=True) if reader != self._rank}
        digest = xxhash.xxh3_128_hexdigest(repr([(saved.key, str(saved.record.shape)) for saved, _ in sent]).encode())
        with self._all_succeed("reading what all have whole", digest):
            fill(checkpoint, [copy for copy in copies if id(copy[1]) not in theirs])
        for reader, targets in self._buckets(sent, readers):
            self._send(reader, targets)

    def _is_sent(self, saved: Any, target: Any) -> bool:
        return (
            isinstance(saved, SavedTensor)
            and isinstance(target, torch.Tensor)
            and target.numel() > 0
            and not is_sharded(target)
            and not saved.key.startswith(f"{RANKS_ENTRY}/")
            and target.device.type in self._devices
        )

    def _shared_out(self, sent: Sequence[Copy]) -> list[int]:
        """The rank that reads each: whoever has least to read so far. Tied tensors are one destination."""
        load = [0] * len(self._members)
        chosen: dict[int, int] = {}
        for _, target in sent:
            if id(target) not in chosen:
                reader = chosen[id(target)] = load.index(min(load))
                load[reader] += target.nbytes
        return [chosen[id(target)] for _, target in sent]

    def _buckets(self, sent: Sequence[Copy], readers: Sequence[int]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Tensors that travel together, in an order that is the same on all processes."""
        open_buckets: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
        seen: set[int] = set()
        for (_, target), reader in zip(sent, readers, strict=True):
            if id(target) in seen:
                continue
            seen.add(id(target))
            bucket = open_buckets.setdefault((reader, target.device), [])
            bucket.append(target)
            if sum(tensor.nbytes for tensor in bucket) >= BUCKET_BYTES:
                yield reader, bucket
                del open_buckets[reader, target.device]
        for (reader, _), bucket in open_buckets.items():
            yield reader, bucket

    def _send(self, reader: int, targets: Sequence[torch.Tensor]) -> None:
        source = self._members[reader]
        if len(targets) == 1 and targets[0].is_contiguous():
            dist.broadcast(_bytes_of(targets[0]), source, group=self._group)
            return
        together = torch.cat([_bytes_of(target.contiguous()) for target in targets])
        dist.broadcast(together, source, group=self._group)
        if reader != self._rank:
            for target, part in zip(targets, together.split([target.nbytes for target in targets]), strict=True):
                room = target if target.is_contiguous() else torch.empty_like(target, memory_format=_IN_ORDER)
                _bytes_of(room).copy_(part)
                if room is not target:
                    target.copy_(room)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
