"""Tests of the records, their file and TensorBoard's, and of the progress."""

import io
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import harness
from experiments.harness.app import progress


def write(folder, steps, resume=-1):
  writer = harness.MetricsWriter(folder, step=resume)
  for step in steps:
    writer.write(step, {'b': np.float32([step, 0.1]), 'a': [np.nan, np.inf]})
  writer.close()
  return writer


def events(folder):
  found = []
  for path in sorted(folder.glob('tensorboard/events*')):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
      content = content[16 + length :]
  return found


class TestFile:
  def test_one_line_a_record_and_null_for_not_finite(self, tmp_path):
    write(tmp_path, [10])
    assert (tmp_path / 'metrics.jsonl').read_text() == (
      '{"step": 10, "a": [null, null], "b": [10.0, 0.10000000149011612], '
      '"_digest": "9665577ac7303c87"}\n'
    )

  def test_history_survives_the_file_exactly(self, tmp_path):
    steps, history = write(tmp_path, [10, 20]).history()
    assert steps.tolist() == [10, 20]
    assert np.isnan(history['a']).all()
    again = harness.MetricsWriter(tmp_path, step=20)
    np.testing.assert_array_equal(again.history()[1]['b'], history['b'])
    assert history['b'][0, 1] == np.float32(0.1)
    again.close()

  @pytest.mark.parametrize('rest', ['', '{"step": 40, "a', 'null\n', '[1]\n'])
  def test_resuming_drops_later_and_broken_lines(self, tmp_path, rest):
    path = tmp_path / 'metrics.jsonl'
    write(tmp_path, [10, 20, 30])
    with path.open('a') as file:
      file.write(rest)
    write(tmp_path, [30, 40], resume=20)
    write(tmp_path / 'whole', [10, 20, 30, 40])
    whole = tmp_path / 'whole' / 'metrics.jsonl'
    assert path.read_bytes() == whole.read_bytes()

  @pytest.mark.parametrize('old, new', [(b'20.0', b'30.0'), (b'20, ', b'20 ')])
  def test_a_damaged_line_costs_itself_alone(self, tmp_path, old, new):
    path = tmp_path / 'metrics.jsonl'
    write(tmp_path, [10, 20, 30])
    damaged = path.read_bytes().replace(old, new)
    path.write_bytes(damaged)
    with pytest.warns(RuntimeWarning, match=r'is damaged in line 2: .*moved'):
      write(tmp_path, [40], resume=30)
    assert [r['step'] for r in harness.read_records(path)] == [10, 30, 40]
    assert (tmp_path / 'damaged' / 'metrics.jsonl').read_bytes() == damaged
    path.write_bytes(damaged)
    with pytest.warns(RuntimeWarning, match='in line 2: a gap stays there'):
      assert len(harness.read_records(path)) == 2

  @pytest.mark.parametrize(
    ('order', 'line'), [((1, 0, 2), 2), ((2, 0, 1), 2), ((0, 1, 1, 2), 3)]
  )
  def test_lines_out_of_order_are_sorted_and_put_aside(
    self, tmp_path, order, line
  ):
    """Read in order, the first large step would end the file."""
    path = tmp_path / 'metrics.jsonl'
    write(tmp_path, [10, 20, 30])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    moved = b''.join(lines[i] for i in order)
    path.write_bytes(moved)
    with pytest.warns(RuntimeWarning, match=f'out of order in line {line}'):
      assert len(harness.read_records(path)) == 3
    with pytest.warns(RuntimeWarning, match=rf'in line {line}: .*moved to'):
      write(tmp_path, [], resume=30)
    assert path.read_bytes() == whole
    assert (tmp_path / 'damaged' / 'metrics.jsonl').read_bytes() == moved
    path.write_bytes(moved)
    with pytest.warns(RuntimeWarning, match='out of order'):
      write(tmp_path, [], resume=20)
    assert path.read_bytes() == b''.join(lines[:2])

  def test_two_kinds_of_damage_are_both_named(self, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(tmp_path, [10, 20, 30, 40])
    a, b, c, d = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([c, b.replace(b'20.0', b'21.0'), a, d]))
    words = 'damaged in line 2: a gap .*, and has steps out of order in line 3'
    with pytest.warns(RuntimeWarning, match=words):
      assert len(harness.read_records(path)) == 3

  def test_a_folder_in_its_place_is_put_aside(self, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.mkdir()
    with pytest.warns(RuntimeWarning, match='is a folder: its records are mis'):
      write(tmp_path, [20], resume=10)
    assert [r['step'] for r in harness.read_records(path)] == [20]

  def test_a_new_run_drops_all(self, tmp_path):
    write(tmp_path, [10, 20])
    assert len(write(tmp_path, [10]).records) == 1

  def test_a_gap_is_told(self, tmp_path):
    write(tmp_path, [10])
    with pytest.warns(RuntimeWarning, match='lacks records before step 20'):
      write(tmp_path, [], resume=20)

  def test_no_records_no_history(self):
    steps, history = harness.MetricsWriter.__mro__[1]().history()
    assert (steps.size, history) == (0, {})


def test_tensorboard_gets_means_and_is_told_of_a_resumption(tmp_path):
  write(tmp_path, [10, 20, 30])
  write(tmp_path, [30], resume=20)
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in events(tmp_path)
    for value in event.summary.value
  ]
  # Metrics that are not finite for any seed are left out.
  assert [(step, tag) for step, tag, _ in scalars] == [
    (10, 'b'),
    (20, 'b'),
    (30, 'b'),
    (30, 'b'),
  ]
  np.testing.assert_allclose(
    [v for *_, v in scalars], [5.05, 10.05, 15.05, 15.05]
  )
  starts = [e.step for e in events(tmp_path) if e.HasField('session_log')]
  assert starts[-1] == 21  # TensorBoard hides what an earlier part wrote after.


class TestProgress:
  def test_lines_where_stderr_is_no_terminal(self, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', stream)
    shown = progress.Progress('fit', 100, 20, every=0.0)
    shown.update(60, 'error 0.5')
    shown.close()
    line = 'fit: step 60/100, 00:00 left; error 0.5\n'
    assert stream.getvalue() == line

  def test_metrics_of_the_study_come_first(self):
    record = {
      'step': 3,
      'count/gradients': [9.0, 9.0],
      'loss/upper': [1.0, None],
      'return': [100.0, 150.0],
      'unmeasured': [None, None],
    }
    assert progress.describe(record) == 'return 125, loss/upper 1'

  def test_silence_for_short_runs(self, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', stream)
    shown = progress.Progress('fit', 100, 0)
    shown.update(100)
    shown.close()
    assert not stream.getvalue()

  def test_a_bar_on_a_terminal(self, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', stream)
    shown = progress.Progress('fit', 100, 20)
    shown.update(60, 'error 0.5')
    shown.close()
    assert '60/100' in stream.getvalue() and 'error 0.5' in stream.getvalue()
