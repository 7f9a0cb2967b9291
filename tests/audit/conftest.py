"""What the tests of the audit share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.audit import Auditor


@pytest.fixture(scope="session")
def auditor() -> Iterator[Auditor]:
    """Audits for all tests, so that its interpreters import torch once."""
    with Auditor() as made:
        yield made
