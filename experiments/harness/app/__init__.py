"""Flags, errors, signals and processes of a program."""
