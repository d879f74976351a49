"""Reads, checks and identifies data sets."""
