"""Random-number generators: the global ones, captured without being named, and those that are part of a state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from holdfast.format.strict_json import cut
from holdfast.format.tree import plain_numpy_dtype

Generator = torch.Generator | np.random.Generator | np.random.RandomState | np.random.BitGenerator | random.Random
# What comes of setting a state that is none; they are shown to another generator first.
_UNSUITABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_POSITIONS = {"pos": 624, "buffer_pos": 4}  # of MT19937 in its key, of Philox in its buffer
GENERATOR_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)


def capture_global() -> dict[str, Any]:
    """The state of every global generator, in plain values."""
    state: dict[str, Any] = {
        "python": _python_state(random.getstate()),
        "numpy": _pack(np.random.get_state(legacy=False)),
        "torch_cpu": _tensor_bytes(torch.get_rng_state()),
    }
    # Asking a backend that was not used yet would start it: seconds of time and hundreds of megabytes on a GPU.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["torch_cuda"] = [_tensor_bytes(tensor) for tensor in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        state["torch_mps"] = _tensor_bytes(torch.mps.get_rng_state())
    return state


def restore_global(state: Mapping[str, Any]) -> list[str]:
    """Set every global generator; returns what could not be set, in words."""
    notes = []
    random.setstate(_python_tuple(state["python"]))
    np.random.set_state(_unpack(state["numpy"]))
    torch.set_rng_state(_bytes_tensor(state["torch_cpu"]))
    saved = state.get("torch_cuda", [])
    present = torch.cuda.device_count() if saved and torch.cuda.is_available() else 0
    for index, data in enumerate(saved[:present]):
        torch.cuda.set_rng_state(_bytes_tensor(data), index)
    if len(saved) != present:
        notes.append(f"generators of {len(saved)} CUDA devices were saved, {present} devices are here")
    if "torch_mps" in state:
        if torch.backends.mps.is_available():
            torch.mps.set_rng_state(_bytes_tensor(state["torch_mps"]))
        else:
            notes.append("a generator of MPS was saved, there is no MPS here")
    return notes


def global_problem(state: Any) -> str | None:
    """Why ``state`` cannot be what :func:`capture_global` gave, or None when it can; nothing is set."""
    try:
        random.Random().setstate(_python_tuple(state["python"]))
        np.random.RandomState().set_state(_unpack(state["numpy"]))
        for data in (state["torch_cpu"], *state.get("torch_cuda", ()), state.get("torch_mps", b"")):
            _bytes_tensor(data)
        torch.Generator().set_state(_bytes_tensor(state["torch_cpu"]))
    except _UNSUITABLE as error:
        return f"not the state of the generators: {cut(repr(error))}"
    return None


def seed_for(seed: int, path: str) -> int:
    """A seed of 64 bits that depends on another one and on a place in the state."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{path}".encode())


def seed_global(seed: int) -> None:
    """Seed every global generator, each with another seed that follows from ``seed``."""
    random.seed(seed_for(seed, "python"))
    np.random.set_state(np.random.RandomState(_words(seed_for(seed, "numpy"))).get_state())
    torch.manual_seed(seed_for(seed, "torch"))


def seed_generator(generator: Generator, seed: int) -> None:
    """Seed one generator with 64 bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(np.random.RandomState(_words(seed)).get_state())
    else:
        generator.state = type(generator)(seed).state


def _words(seed: int) -> list[int]:
    """The seed as numpy's old generators take it."""
    return [seed & 0xFFFFFFFF, seed >> 32]


def generator_state(generator: Generator) -> dict[str, Any]:
    """The state of one generator, in plain values."""
    if isinstance(generator, torch.Generator):
        return {"kind": "torch", "device": str(generator.device), "state": _tensor_bytes(generator.get_state())}
    if isinstance(generator, random.Random):
        return {"kind": "python", **_python_state(generator.getstate())}
    if isinstance(generator, np.random.Generator):
        return {"kind": "numpy", **_pack(generator.bit_generator.state)}
    if isinstance(generator, np.random.RandomState):
        return {"kind": "numpy", **_pack(generator.get_state(legacy=False))}
    return {"kind": "numpy", **_pack(generator.state)}


def generator_mismatch(generator: Generator, state: Any) -> str | None:
    """Why ``state`` cannot be the state of ``generator``, or None when it can."""
    live = generator_state(generator)
    if not isinstance(state, Mapping) or state.get("kind") != live["kind"]:
        return f"expected the state of a {live['kind']} generator"
    if state.get("bit_generator") != live.get("bit_generator"):
        return f"expected {live.get('bit_generator')}, found {state.get('bit_generator')}"
    if str(state.get("device")).partition(":")[0] != str(live.get("device")).partition(":")[0]:
        return f"expected a generator on {live.get('device')}, found one on {state.get('device')}"
    try:
        restore_generator(_another(generator), state)
    except _UNSUITABLE as error:
        return f"expected the state of a {live['kind']} generator: {cut(repr(error))}"
    return None


def _another(generator: Generator) -> Generator:
    """A generator of the same kind, to try a state on."""
    if isinstance(generator, torch.Generator):
        return torch.Generator(generator.device)
    if isinstance(generator, random.Random):
        return random.Random()
    if isinstance(generator, np.random.Generator):
        return np.random.Generator(type(generator.bit_generator)())
    return type(generator)()


def restore_generator(generator: Generator, state: Mapping[str, Any]) -> None:
    """Set the state of one generator."""
    if isinstance(generator, torch.Generator):
        generator.set_state(_bytes_tensor(state["state"]))
        return
    body = {key: value for key, value in state.items() if key != "kind"}
    if isinstance(generator, random.Random):
        generator.setstate(_python_tuple(body))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _unpack(body)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_unpack(body))
    else:
        generator.state = _unpack(body)


def _python_state(state: tuple[Any, ...]) -> dict[str, Any]:
    version, words, gauss_next = state
    return {"version": version, "words": np.array(words, "<u4").tobytes(), "gauss_next": gauss_next}


def _python_tuple(state: Mapping[str, Any]) -> tuple[Any, ...]:
    words = tuple(int(word) for word in np.frombuffer(state["words"], "<u4"))
    return state["version"], words, state["gauss_next"]


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _bytes_tensor(data: bytes) -> torch.Tensor:
    if not isinstance(data, bytes):
        raise TypeError(f"expected bytes, found {type(data).__name__}")
    # A byte tensor on the CPU, whatever the generator's device: that is what every set_state takes.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _pack(state: Any) -> Any:
    """Arrays as bytes: a few kilobytes that belong into the manifest, not into a file of their own."""
    if isinstance(state, np.ndarray):
        return {"dtype": state.dtype.str, "data": state.tobytes()}
    if isinstance(state, dict):
        return {key: _pack(value) for key, value in state.items()}
    return state.item() if isinstance(state, np.generic) else state


def _unpack(state: Any) -> Any:
    if isinstance(state, Mapping):
        if set(state) == {"dtype", "data"}:
            return np.frombuffer(state["data"], plain_numpy_dtype(state["dtype"])).copy()
        for name, most in _POSITIONS.items():
            # numpy takes any, and then reads from there.
            if name in state and not 0 <= state[name] <= most:
                raise ValueError(f"{name} {state[name]} is not within 0 to {most}")
        return {key: _unpack(value) for key, value in state.items()}
    return state
