"""Data sets: read, checked, named."""
