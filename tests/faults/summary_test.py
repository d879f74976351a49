"""The page of faults has the stored counts."""

import json

import pytest

from tests.faults import summary


def test_the_page_has_the_stored_counts():
  stored = json.loads(summary.STORED.read_text(encoding='utf-8'))
  text = summary.PAGE.read_text(encoding='utf-8')
  assert summary.page(text, stored) == text
  for row in stored['faults']:
    assert row['survived'] == row['tried'] > 0


def test_counts_and_failures(tmp_path, monkeypatch):
  monkeypatch.setenv(summary.VARIABLE, str(tmp_path))
  summary.record('a kill', 'a run', [[], []])
  with pytest.raises(AssertionError, match='lost'):
    summary.record('a pause', 'a run', [[], ['lost']])
  rows = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
  assert rows == [
    {'kind': 'a kill', 'where': 'a run', 'tried': 2, 'survived': 2},
    {'kind': 'a pause', 'where': 'a run', 'tried': 2, 'survived': 1},
  ]
