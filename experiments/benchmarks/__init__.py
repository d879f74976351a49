"""Benchmarks: costs of the library's steps, compared with other code."""
