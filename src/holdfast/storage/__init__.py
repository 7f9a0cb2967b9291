"""Bytes in and out: where checkpoints live, and the protocol by which one becomes durable."""
