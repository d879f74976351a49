"""Runs the tests of the files that are named, for a build system.

It ends with pytest's status: not 0 for a file without a test, or with a failed
one.
"""

import sys

import pytest

if __name__ == '__main__':
  sys.exit(pytest.main(sys.argv[1:]))
