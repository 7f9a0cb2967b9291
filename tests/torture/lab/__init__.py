"""The crash laboratory: what can happen to a machine while it saves, made to happen; see docs/torture.md."""
