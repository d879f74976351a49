"""Reference log-probabilities in a file: served, and never of anything else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lm import decoder, log_probs
from tests.experiments.lm.decoder_test import SMALL

NAMES = ('reference_chosen', 'reference_rejected')


def pairs():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 50, size=(2, 3, 8)).astype(np.int32)
  mask = np.tile((np.arange(8) > 4).astype(np.int32), (3, 1))
  return {
    'chosen': tokens[0],
    'chosen_mask': mask,
    'rejected': tokens[1],
    'rejected_mask': mask,
    'index': np.arange(3),
  }


def test_a_reference_is_computed_once_for_weights_and_data(tmp_path):
  params, given = decoder.init(SMALL, 0), pairs()
  folder = tmp_path / 'cache'
  ask = lambda *args, **how: log_probs.cached_reference(folder, *args, **how)
  first = ask(SMALL, params, given)
  expected = log_probs.reference_of(SMALL, params, given)
  assert tuple(first) == NAMES
  for name in NAMES:
    np.testing.assert_array_equal(first[name], expected[name])
    assert first[name].dtype == np.float32
  (path,) = folder.iterdir()

  # What is read is what the file holds: nothing is computed.
  mine = {name: np.float32([1, 2, 3]) for name in NAMES}
  np.savez(path, **mine)
  again = ask(SMALL, jax.tree.map(jnp.array, params), given, rows=2)
  jax.tree.map(np.testing.assert_array_equal, again, mine)

  # One weight, one token, one mask, the positions or the order: other files.
  weight = params | {'norm': params['norm'].at[3].add(0.5)}
  token = given | {'chosen': given['chosen'].copy()}
  token['chosen'][1, 5] += 1
  mask = given | {'chosen_mask': given['rejected_mask'].copy()}
  mask['chosen_mask'][2, 5] = 0
  turned = dataclasses.replace(SMALL, rope_base=50.0)
  reverse = {name: array[::-1] for name, array in given.items()}
  for args in (
    (SMALL, weight, given),
    (SMALL, params, token),
    (SMALL, params, mask),
    (turned, params, given),
    (SMALL, params, reverse),
  ):
    found = ask(*args)
    fresh = log_probs.reference_of(*args)
    for name in NAMES:
      np.testing.assert_array_equal(found[name], fresh[name])
  assert len(list(folder.iterdir())) == 6
  np.testing.assert_array_equal(
    ask(SMALL, params, given)['reference_chosen'], [1, 2, 3]
  )


@pytest.mark.parametrize('how', ['cut', 'changed', 'empty', 'other'])
def test_a_damaged_file_is_made_anew(tmp_path, how, monkeypatch):
  params, given = decoder.init(SMALL, 0), pairs()
  whole = {name: np.float32([-3, -4, -5]) for name in NAMES}
  monkeypatch.setattr(log_probs, 'reference_of', lambda *a, **k: dict(whole))
  ask = lambda: log_probs.cached_reference(tmp_path, SMALL, params, given)
  ask()
  (path,) = tmp_path.iterdir()
  raw = path.read_bytes()
  at = raw.index(np.float32([-3, -4, -5]).tobytes())
  bad = {
    'cut': raw[: len(raw) // 2],
    'changed': raw[:at] + b'\x01' + raw[at + 1 :],
    'empty': b'',
  }
  if how == 'other':
    np.savez(path, **{name: np.float32([1]) for name in NAMES})
  else:
    path.write_bytes(bad[how])
  with pytest.warns(RuntimeWarning, match=r'is damaged; the .* moved to'):
    found = ask()
  jax.tree.map(np.testing.assert_array_equal, found, whole)
  with np.load(path) as file:
    jax.tree.map(np.testing.assert_array_equal, dict(file), whole)
  assert (tmp_path / 'damaged' / path.name).exists()
  ask()  # Without a warning.
