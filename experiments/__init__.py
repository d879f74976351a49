"""Experiments: binaries that resume, and report beside what is published."""
