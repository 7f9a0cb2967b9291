"""Live tensors copied to where the training cannot reach them: at once, or partly beside what it does next."""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from holdfast.errors import StrayWriteError
from holdfast.format.safetensors import Layout
from holdfast.state.capture import CapturedTensor
from holdfast.state.cuda import DeviceCopies, Pin
from holdfast.state.image import StateImage
from holdfast.state.tensors import tensor_version
from holdfast.storage.arena import Arena, MemoryImage
from holdfast.storage.workers import cores
from holdfast.storage.writing import PART_BYTES, gather

_FEW_BYTES = 4 * 2**20  # copied sooner than another thread has begun


@dataclass(frozen=True, slots=True)
class LiveFile:
    """A file that is to be written: where everything lies in it, and the live tensors that fill it."""

    layout: Layout
    tensors: Mapping[str, CapturedTensor]

    def image(self) -> StateImage:
        """Its image, which holds what the tensors hold when it is read."""
        return StateImage(self.layout, self.tensors)


class Staging:
    """The files of a save, copied into an arena.

    When this is made, everything is copied that may change with the next thing that the training does. What an
    optimizer alone changes may be left for :meth:`finish`; then :meth:`before_step` must be called before it does.

    Copies from a CUDA device are queued on a stream of their own. Later work on the device waits for them there; the
    caller does not.

    Args:
        files: by name, what to copy.
        arena: where to. It belongs to this save until that has been written.
        late: addresses of the tensors that only an optimizer changes.

    Raises:
        MemoryError: the arena cannot be made that large.
    """

    def __init__(self, files: Mapping[str, LiveFile], arena: Arena, late: Container[int] = ()) -> None:
        slots = arena.slots({name: file.layout.nbytes for name, file in files.items()})
        self.images = {name: MemoryImage(slot) for name, slot in slots.items()}
        self._slots = slots
        parts = {name: _Parts.of(file, late) for name, file in files.items()}
        self._rest = {
            name: StateImage(files[name].layout, part.late, header=False) for name, part in parts.items() if part.late
        }
        self._watch = _Watch([tensor for part in parts.values() for tensor in part.late.values()])
        self._device_watch = _Watch([tensor for part in parts.values() for tensor in part.device_late.values()])
        self._done = threading.Event()
        if any(part.device or part.device_late for part in parts.values()):
            pin = arena.pinning if isinstance(arena.pinning, Pin) else Pin()
            pin.hold(arena.memory)
            arena.pinning = pin
        self._device_now = DeviceCopies(_rooms(files, slots, {name: part.device for name, part in parts.items()}))
        self._device_late = DeviceCopies(
            _rooms(files, slots, {name: part.device_late for name, part in parts.items()}), hold=False
        )
        self._gather({name: StateImage(files[name].layout, part.now) for name, part in parts.items()}, cores())
        if not self._rest:
            self._done.set()

    def before_step(self) -> None:
        """Return when an optimizer may change what was left for later. Does nothing where that is done already."""
        self._done.wait()
        # From here on the caller may count writes that the device does only after the copies: so look now.
        self._device_watch.look()
        self._device_late.hold_device()

    def finish(self) -> None:
        """Copy what was left, and wait for the devices. For the thread that writes.

        Raises:
            StrayWriteError: something else than an optimizer wrote a tensor meanwhile.
        """
        try:
            if self._rest:
                self._gather(self._rest, 1)
            self._device_watch.look()
            self._device_now.wait()
            self._device_late.wait()
            strays = self._watch.look() + self._device_watch.look()
            if strays:
                raise StrayWriteError.to(strays)
        finally:
            self._done.set()  # whatever happened, nobody may wait for ever
            self._rest = {}

    def _gather(self, images: Mapping[str, StateImage], threads: int) -> None:
        few = sum(image.held_bytes for image in images.values()) < _FEW_BYTES
        begins = {name: image.begins(PART_BYTES) for name, image in images.items()}
        gather(images, self._slots, 1 if few else threads, begins)


class _Watch:
    """Sees which of some tensors were written between its making and the first look."""

    def __init__(self, tensors: Sequence[CapturedTensor]) -> None:
        self._tensors = tensors
        self._versions = self._now()
        self._found: list[str] | None = None
        self._lock = threading.Lock()

    def look(self) -> list[str]:
        """The names of those that were, as far as torch counts writes."""
        with self._lock:
            if self._found is None:
                self._found = [
                    tensor.name
                    for tensor, before, now in zip(self._tensors, self._versions, self._now(), strict=True)
                    if before != now
                ]
                self._tensors = ()
            return self._found

    def _now(self) -> list[int]:
        return [tensor_version(tensor.value) for tensor in self._tensors]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of a file by how they are copied."""

    now: dict[str, CapturedTensor]
    late: dict[str, CapturedTensor]
    device: dict[str, CapturedTensor]
    device_late: dict[str, CapturedTensor]

    @classmethod
    def of(cls, file: LiveFile, late: Container[int]) -> _Parts:
        parts = cls({}, {}, {}, {})
        for name, tensor in file.tensors.items():
            value = tensor.value
            is_late = tensor.address in late
            if isinstance(value, torch.Tensor) and value.is_cuda:
                (parts.device_late if is_late else parts.device)[name] = tensor
            else:
                (parts.late if is_late else parts.now)[name] = tensor
        return parts


def _rooms(
    files: Mapping[str, LiveFile], slots: Mapping[str, memoryview], chosen: Mapping[str, Mapping[str, CapturedTensor]]
) -> list[tuple[torch.Tensor, memoryview]]:
    """Each of the chosen tensors, and the part of the slot that it has to fill."""
    return [
        (chosen[name][place.name].value, slots[name][place.begin : place.begin + place.nbytes])  # type: ignore[misc]
        for name, file in files.items()
        if chosen[name]
        for place in file.layout.tensors
        if place.name in chosen[name] and place.nbytes
    ]
