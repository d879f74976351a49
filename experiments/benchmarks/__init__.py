"""Benchmarks: what a step of the library costs, beside the same by hand."""
