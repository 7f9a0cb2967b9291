"""The proof that a training loop resumes exactly, run on the user's own code.

    def training():
        torch.manual_seed(0)
        ...
        return {"model": model, "optimizer": optimizer}, step

    report = audit(training, before=3, after=3)

The training runs once without interruption; and once up to a save, and on from there in a new process. Every value of
the state, every global generator and every loss is compared, bit by bit. Where something differs, the first difference
is named, and experiments look for its cause.
"""

from __future__ import annotations

from holdfast.audit.auditing import Auditor, assert_resumes_exactly, audit
from holdfast.audit.comparison import Difference, Divergence
from holdfast.audit.report import AuditReport, Cause, Counts

__all__ = ["AuditReport", "Auditor", "Cause", "Counts", "Difference", "Divergence", "assert_resumes_exactly", "audit"]
