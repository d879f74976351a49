"""Data sets from files: found in one place, read within bounds, and named.

A loader returns its arrays and a `Source`, which says from the content which
data set it is. What is missing or damaged ends in one line that names the file.
"""
