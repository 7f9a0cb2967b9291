"""The crash laboratory: what can happen to a machine while it saves, made to happen; see docs/torture.md."""

import os

TORTURE = os.environ.get("HOLDFAST_TORTURE", "0") != "0"
"""Whether everything is tried as often as `make torture` does, or a sample of it."""
