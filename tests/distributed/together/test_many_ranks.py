"""What many ranks cost beside writing: it grows with tensors and with ranks, not with their product."""

from __future__ import annotations

from lab.many_ranks import main, save_as_coordinator

from holdfast.format.records import CHUNK_BYTES


def test_the_manifest_grows_with_tensors_and_ranks() -> None:
    """Eight times the ranks have eight times the pieces; the manifest has hardly more to say of them."""
    few = len(save_as_coordinator(16, 200).manifest)
    more_ranks = len(save_as_coordinator(128, 200).manifest)
    more_tensors = len(save_as_coordinator(16, 400).manifest)
    assert more_ranks < 2 * few
    assert more_tensors < 2.2 * few


def test_memory_grows_no_faster_than_what_there_is() -> None:
    """Twice the tensors, twice the ranks: four times the pieces, and about twice the memory."""
    once = save_as_coordinator(64, 300, memory=True).peak_bytes
    twice = save_as_coordinator(128, 600, memory=True).peak_bytes
    assert twice < 3 * once


def test_what_a_rank_sends_does_not_grow_with_tensors() -> None:
    """Two saves: a checksum for each 2 MiB that it writes, and nothing for the 2,000 tensors that lie in them."""
    few = save_as_coordinator(32, 50).sent_bytes
    many = save_as_coordinator(32, 500).sent_bytes
    largest_bytes = 3 * 500 * 5504 * 2048 * 4 // 32
    assert many - few < 2 * 40 * (largest_bytes // CHUNK_BYTES)


def test_in_words() -> None:
    """The program behind the figures of docs/distributed.md."""
    assert main(8, 20).startswith("8 ranks, 20 tensors: plan, the first time ")
