"""A JSON object sealed with a checksum of its exact bytes: ``{"xxh3_128":"<32 hex>","<key>":<object>}``.

The envelope's own bytes are fixed, spacing included, so that no byte of the file can change unnoticed.
"""

from __future__ import annotations

import xxhash

BEGIN = b'{"xxh3_128":"'
"""The first bytes of everything that is sealed."""
_HEX = 32


def seal(key: str, inner: bytes) -> bytes:
    """``inner`` in an envelope."""
    return BEGIN + xxhash.xxh3_128_hexdigest(inner).encode() + b'","' + key.encode() + b'":' + inner + b"}\n"


def unseal(key: str, data: bytes) -> memoryview:
    """A view of the bytes that :func:`seal` was given; ValueError says what is wrong with the envelope."""
    middle = b'","' + key.encode() + b'":'
    start = len(BEGIN) + _HEX + len(middle)
    if not data.startswith(BEGIN) or data[len(BEGIN) + _HEX : start] != middle or not data.endswith(b"}\n"):
        raise ValueError(
            f"not a sealed {key}: expected {BEGIN.decode()}...{middle.decode()}...}}, cut short or changed"
        )
    inner = memoryview(data)[start:-2]
    expected = data[len(BEGIN) : len(BEGIN) + _HEX].decode("ascii", "replace")
    found = xxhash.xxh3_128_hexdigest(inner)
    if found != expected:
        raise ValueError(f"checksum mismatch: the envelope says {expected}, the bytes give {found}")
    return inner
