"""Experiments: binaries that compare methods with published numbers."""
