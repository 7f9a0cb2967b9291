"""The sealed envelope."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format import envelope

INNER = b'{"format":"holdfast/1","step": 3}'
SEALED = envelope.seal("manifest", INNER)


@given(st.binary())
def test_round_trip(inner: bytes) -> None:
    """Whatever is sealed comes out."""
    assert envelope.unseal("manifest", envelope.seal("manifest", inner)) == inner


def test_its_bytes() -> None:
    """The envelope is a JSON object with the checksum in front, and a newline behind."""
    checksum = SEALED[13:45]
    assert b'{"xxh3_128":"%b","manifest":%b}\n' % (checksum, INNER) == SEALED


@pytest.mark.parametrize("place", range(len(SEALED)))
def test_any_byte_changed_is_refused(place: int) -> None:
    """No byte may become any other, blanks and digits in the other case included."""
    for value in range(256):
        if value != SEALED[place]:
            with pytest.raises(ValueError, match=r"not a sealed manifest|checksum mismatch"):
                envelope.unseal("manifest", SEALED[:place] + bytes([value]) + SEALED[place + 1 :])


def test_any_other_length_is_refused() -> None:
    """Cut at any length, or with anything added at either end or within."""
    others = [SEALED[:length] for length in range(len(SEALED))]
    others += [SEALED[:place] + b" " + SEALED[place:] for place in range(len(SEALED) + 1)]
    others += [SEALED + b"\n", SEALED * 2, SEALED.replace(b"\n", b"\r\n")]
    for other in others:
        with pytest.raises(ValueError, match=r"not a sealed manifest|checksum mismatch"):
            envelope.unseal("manifest", other)


def test_another_key_is_refused() -> None:
    """Annotations are no manifest."""
    with pytest.raises(ValueError, match="not a sealed annotations"):
        envelope.unseal("annotations", SEALED)
