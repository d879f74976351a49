"""What the tests of binaries share: options, and the results they wrote."""

import json

import pytest

from experiments import harness


@pytest.fixture
def options(tmp_path):
  """Makes `harness.Options` from settings, in a folder that is new."""

  def make(settings=None, **changes):
    return harness.Options(
      paper='paper',
      binary='binary',
      preset='quick',
      settings=settings,
      workdir=str(tmp_path),
      data_dir=None,
      seeds=(0, 1),
    )._replace(**changes)

  return make


@pytest.fixture
def results(tmp_path):
  """Reads the results.json in that folder."""
  return lambda: json.loads((tmp_path / 'results.json').read_text())
