"""Preemption: somebody asks the training to leave, and it saves at the next step and leaves. See docs/preemption.md."""

from holdfast.preemption.settings import Preempted, Preemption

__all__ = ["Preempted", "Preemption"]
