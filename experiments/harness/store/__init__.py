"""Checkpoints, records and other files of a run."""
