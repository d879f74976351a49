"""Benchmarks: what a step of the library costs, against the same by hand."""
