"""Live objects to a state tree and back. Imports torch."""
