"""What can be changed in a process under test before it begins, or done there afterwards; see :mod:`lab.serve`."""

from __future__ import annotations

from lab.cutting import count_moments, cut_power, cut_power_of_mutant
from lab.handling import in_one_thread, in_several_threads, save_again, with_short_writes
from lab.mutants import mutate, note_places

__all__ = [
    "count_moments",
    "cut_power",
    "cut_power_of_mutant",
    "in_one_thread",
    "in_several_threads",
    "mutate",
    "note_places",
    "save_again",
    "with_short_writes",
]
