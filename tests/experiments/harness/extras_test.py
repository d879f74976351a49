"""Packages of extras."""

import json

import pytest

from experiments import harness


def test_a_missing_package_is_said_with_its_extra():
  said = (
    r"reading needs the extra `llm`: pip install -e '\.\[experiments,llm\]'"
  )
  with pytest.raises(harness.SettingsError, match=said):
    harness.load_extra('nowhere.at_all', 'llm', 'reading')
  assert harness.load_extra('json', 'llm', 'reading') is json
