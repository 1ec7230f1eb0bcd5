"""Checkpoint files, and the state of a run in them."""
