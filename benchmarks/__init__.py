"""Holdfast beside its peers: the same state, the same disk, the same minutes. Run as ``python -m benchmarks``."""
