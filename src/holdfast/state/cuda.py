"""Copies between CUDA devices and the host: through pinned memory, and queued on streams of their own.

Not run on a device yet: its tests are skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from holdfast.storage import memory


class DeviceCopies:
    """Copies of tensors into host memory, under way on each device.

    Args:
        rooms: tensors, each with the memory that takes its bytes in logical order. Pinned memory makes them quick.
        hold: whether later work on the devices waits for them at once; else :meth:`hold_device` says when.
    """

    def __init__(self, rooms: Sequence[tuple[torch.Tensor, memoryview]], *, hold: bool = True) -> None:
        self._rooms = list(rooms)  # the memory must stay until the copies are done
        self._ends: list[tuple[torch.device, torch.cuda.Event]] = []
        for device in {tensor.device for tensor, _ in rooms}:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for tensor, room in rooms:
                    if tensor.device == device:
                        target = torch.frombuffer(room, dtype=tensor.dtype).view(tensor.shape)
                        target.copy_(tensor, non_blocking=True)
                        tensor.record_stream(stream)
            self._ends.append((device, stream.record_event()))
        if hold:
            self.hold_device()

    def hold_device(self) -> None:
        """Have what is queued from now on, on the current stream of each device, wait for the copies."""
        for device, end in self._ends:
            torch.cuda.current_stream(device).wait_event(end)

    def wait(self) -> None:
        """Return when all bytes have arrived."""
        for _, end in self._ends:
            end.synchronize()
        self._rooms = []


def synchronize(values: Iterable[object]) -> bool:
    """Wait for the devices that hold some of ``values``; whether there are any.

    Threads have streams of their own: what they copy is not ordered with what the caller queued before.
    """
    devices = {value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)
    return bool(devices)


def pinned_buffer(nbytes: int) -> memoryview:
    """Memory that devices copy from directly; it goes back with its last view. Ordinary memory where there is none."""
    try:
        buffer: Any = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memoryview(buffer)
    except RuntimeError:
        return memory.allocate(nbytes)


class Pin:
    """Memory registered with the driver, so that devices copy to it directly; as long as it is, it must not go."""

    def __init__(self) -> None:
        self._room = memoryview(b"")

    def hold(self, room: memoryview) -> None:
        """Register ``room``, in the place of what was registered before. Where that cannot be, copies are slower."""
        if room is self._room or not torch.cuda.is_available():
            return
        self.release()
        if len(room) and int(torch.cuda.cudart().cudaHostRegister(memory.address_of(room), len(room), 0)) == 0:
            self._room = room

    def release(self) -> None:
        """Take that back, before the memory goes."""
        if len(self._room):
            torch.cuda.cudart().cudaHostUnregister(memory.address_of(self._room))
            self._room = memoryview(b"")
