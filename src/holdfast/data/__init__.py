"""Data that a training can come back to: a loader that continues in the middle of an epoch. Imports torch."""

from holdfast.data.loader import ResumableDataLoader

__all__ = ["ResumableDataLoader"]
