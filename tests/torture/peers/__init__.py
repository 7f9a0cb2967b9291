"""Other ways to save a training, under the same tests: one command, one table (``make peers``)."""
