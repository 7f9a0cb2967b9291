"""One line that stands for every bit of a training run's state: what the examples compare.

It is made here from the live objects alone, so that it vouches for a restored run without trusting who restored it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def run_digests(state: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each entry of ``state``, of the global generators, and of them all together."""
    digests = {name: digest(value) for name, value in state.items()}
    digests["generators"] = digest([random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()])
    digests["all"] = digest(digests)
    return digests


def digest(value: object) -> str:
    """SHA-256 over everything in ``value``: tensors by their bytes, mappings in the order of their names."""
    hasher = hashlib.sha256()
    _update(hasher, value)
    return hasher.hexdigest()


def _update(hasher: hashlib._Hash, value: object) -> None:
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    elif isinstance(value, torch.Generator):
        value = value.get_state()

    if isinstance(value, torch.Tensor):
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        hasher.update(f"array {value.dtype} {value.shape};".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, Mapping):
        hasher.update(f"mapping of {len(value)};".encode())
        for key in sorted(value, key=repr):
            hasher.update(f"{key!r}:".encode())
            _update(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"{type(value).__name__} of {len(value)};".encode())
        for item in value:
            _update(hasher, item)
    else:
        # repr tells 1 from 1.0 and True, and gives every bit of a float.
        hasher.update(f"{value!r};".encode())
