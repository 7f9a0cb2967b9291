"""What can be changed in a process under test before it begins; each takes the directory of the workload first."""

from __future__ import annotations

from lab.mutants import mutate, note_places

__all__ = ["mutate", "note_places"]
