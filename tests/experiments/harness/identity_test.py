"""Digests of a run's arrays."""

import jax
import numpy as np

from experiments.harness import identity


def test_tells_arrays_apart_and_names_them():
  rows = np.arange(12.0).reshape(3, 4)
  found = identity.digests('data', {'a': rows, 'b': (rows.T, rows + 0)})
  assert list(found) == ["data['a']", "data['b'][0]", "data['b'][1]"]
  a, transposed, again = found.values()
  assert a == again != transposed
  same = identity.digests('', [rows, rows.reshape(-1), np.float32(rows)])
  assert len(set(same.values())) == 3
  keys = [jax.random.key(0), jax.random.key(1)]
  assert len(set(identity.digests('', keys).values())) == 2
  on_device = identity.digests('', np.float32(rows))
  many = [rows] * 20
  assert list(identity.digests('data', many)) == ['data']
  assert identity.digest(many) != identity.digest([*many[:-1], rows + 1])
  assert on_device == identity.digests('', jax.numpy.float32(rows))


def test_large_arrays_are_sampled(monkeypatch):
  monkeypatch.setattr(identity, '_WHOLE', 400)
  large = np.random.default_rng(0).normal(size=10_000)
  of = lambda x: identity.digests('', x)['']
  assert of(large) == of(large.copy())
  assert of(large) != of(large + 1e-9)
  assert of(large) != of(large[::-1])
