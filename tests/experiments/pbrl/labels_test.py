"""Files of labels: round trips and errors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.pbrl import labels, preferences

SPEC = {'shape': (2,), 'actions': 3, 'length': 4, 'dtype': 'float32'}
GOOD = {'observations': [[0.5, 1], [2, 3]], 'actions': [0, 2]}


def test_round_trip(tmp_path):
  rng = np.random.default_rng(0)
  mask = np.arange(4) < np.array([[4], [2], [1], [0]])

  def fragments():
    return preferences.Fragments(
      rng.normal(size=(4, 4, 2)).astype(np.float32) * mask[..., None],
      rng.integers(0, 3, (4, 4)) * mask,
      mask,
      np.ones(4, np.float32),
    )

  pairs = preferences.Pairs(
    fragments(), fragments(), np.array([0, 0.5, 1, 1], np.float32)
  )
  path = tmp_path / 'pairs.jsonl'
  labels.write(path, pairs)
  loaded = labels.read(path, **SPEC)
  assert loaded.labels.tolist() == [0, 0.5, 1]  # Without the empty fragment.
  for side in ('first', 'second'):
    one, two = getattr(pairs, side), getattr(loaded, side)
    np.testing.assert_array_equal(one.observations[:3], two.observations)
    np.testing.assert_array_equal(one.actions[:3], two.actions)
    np.testing.assert_array_equal(one.mask[:3], two.mask)
  labels.write(path, pairs, labelled=False)
  with pytest.raises(
    harness.DamagedDataError, match='line 1: it has no label yet'
  ):
    labels.read(path, **SPEC)
  # Cells are written as integers.
  cells = pairs._replace(
    first=pairs.first._replace(observations=jnp.ones((4, 4, 2), bool))
  )
  labels.write(path, cells)
  assert '"observations": [[1, 1], [1, 1]' in path.read_text()


def test_pixels_are_integers_and_a_byte_order_mark_is_skipped(tmp_path):
  path, spec = tmp_path / 'pairs.jsonl', SPEC | {'dtype': 'uint8'}
  for row, valid in (([0, 255], True), ([0, 300], False), ([0.5, 1], False)):
    fragment = {'observations': [row], 'actions': [1]}
    path.write_text(
      _with(first=fragment, second=fragment), encoding='utf-8-sig'
    )
    if valid:
      observations = labels.read(path, **spec).first.observations
      assert observations[0, 0].tolist() == row
    else:
      with pytest.raises(harness.DamagedDataError, match='from 0 to 255'):
        labels.read(path, **spec)


def _with(**changes):
  return json.dumps({'first': GOOD, 'second': GOOD, 'label': 1} | changes)


WRONG = {
  '{"first": ': 'is not JSON',
  '[' * 100_000: 'is not JSON',
  '[1, 2]': 'is not an object',
  _with(label=2): 'has the label 2',
  _with(label=True): 'has the label True',
  _with(label=None): 'has no label yet',
  _with(second=3): 'second: it has no observations and actions',
  _with(second=GOOD | {'actions': []}): 'actions of shape',
  _with(second=GOOD | {'actions': [0] * 5}): '1 to 4 steps',
  _with(second=GOOD | {'actions': [0]}): r'\(2, 2\).* has \(1, 2\)',
  _with(first={'observations': [[1], [2]], 'actions': [0, 1]}): (
    'first: it has observations of shape .* of the same environment'
  ),
  _with(first=GOOD | {'actions': [0, 3]}): 'the action 3; this .* 0 to 2',
  _with(first=GOOD | {'actions': [0, 0.5]}): 'the action 0.5',
  _with(first=GOOD | {'observations': [[0, 'a'], [1, 1]]}): 'not a number',
  _with(first=GOOD | {'observations': [[0, 10**400], [1, 1]]}): 'not a number',
  _with(first=GOOD | {'observations': [[0, float('nan')], [1, 1]]}): (
    'not finite'
  ),
}


def test_errors_name_line_and_cause(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  for line, reason in WRONG.items():
    path.write_text(f'{_with()}\n\n{line}\n')
    with pytest.raises(harness.DamagedDataError, match=f'line 3.*{reason}'):
      labels.read(path, **SPEC)
  path.write_text('\n')
  with pytest.raises(harness.DamagedDataError, match='has no pairs'):
    labels.read(path, **SPEC)
  with pytest.raises(harness.MissingDataError, match='there is no file'):
    labels.read(tmp_path / 'none', **SPEC)
  with pytest.raises(harness.DamagedDataError, match='is a device'):
    labels.read('/dev/zero', **SPEC)
