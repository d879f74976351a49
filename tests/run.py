"""Runs the tests of the named files, for a build system.

Exits with pytest's status, which is nonzero for a file without tests or with a
failed test.
"""

import sys

import pytest

if __name__ == '__main__':
  sys.exit(pytest.main(sys.argv[1:]))
