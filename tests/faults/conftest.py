"""A worker whose system calls fail, one for the tests of a module."""

import pytest

from tests.faults import lab as lab_lib


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  with lab_lib.lab(tmp_path_factory.mktemp('lab')) as lab:
    yield lab
