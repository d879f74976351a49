"""Tests of the losses in the records of methods that evaluate some of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness

LOSSES = {'sft': 10.89, 'dpo': 0.67}
# A pattern of objectives in each of three chunks of 8 steps; some have one.
PATTERNS = np.array(
  [
    [0, 0, 1, 0, 0, 0, 0, 0] + [0] * 8 + [1, 0, 1, 1, 1, 1, 1, 1],
    [1] * 8 + [0, 1] * 4 + [0] * 8,
  ]
)
CHUNK = 8


class Params(NamedTuple):
  """One named sequence."""

  z: Any


def constant(value):
  """A loss that is the same everywhere, with a gradient of zero."""
  return lambda params, batch: value + 0 * jnp.sum(params)


def by_pattern(pattern):
  """Selects the objective that a pattern has for each update."""
  parts = {n: bj.gradient(constant(v), name=n) for n, v in LOSSES.items()}
  rule = bj.evaluation.Rule(
    lambda number, dtype: jnp.zeros([], jnp.int32),
    lambda state, count, taken: (pattern[count], state),
    lambda state, *_: state,
    None,
  )
  return bj.evaluation.select(parts, rule, batch_at=lambda batch, t: batch)


def chained(oracle):
  return optax.chain(oracle, optax.sgd(0.1))


def nested(oracle):
  """Within another selection, all of whose updates are of it."""
  other = bj.gradient(constant(5.0), name='other')
  outer = bj.evaluation.select(
    {'inner': oracle, 'other': other},
    bj.evaluation.in_sequence([1_000]),
    batch_at=lambda batch, t: batch,
  )
  return optax.chain(outer, optax.sgd(0.1))


def train(workdir, make, steps=24, *, at_once=None):
  return harness.train(
    lambda context: make(by_pattern(context.own)),
    harness.Task(
      lambda context: jnp.zeros(3),
      lambda context: jnp.float32(0),
      own=jnp.asarray(PATTERNS, jnp.int32),
    ),
    harness.Training(
      steps=steps,
      chunk=CHUNK,
      seeds=len(PATTERNS),
      workdir=workdir,
      at_once=at_once,
      save_seconds=0.0,
    ),
    harness.Measure(record_start=True),
  )


@pytest.mark.parametrize('make', [chained, nested])
@pytest.mark.parametrize('at_once', [None, 1])
def test_means_are_of_the_evaluations_of_a_loss(make, at_once):
  trained = train(None, make, at_once=at_once)
  chunks = PATTERNS.reshape(len(PATTERNS), -1, CHUNK)
  for place, (name, value) in enumerate(LOSSES.items()):
    evaluated = (chunks == place).any(-1).T
    expected = np.where(evaluated, value, np.nan)
    found = trained.history[f'loss/{name}']
    assert np.isnan(found[0]).all()
    # A sum of CHUNK equal numbers, its rounding, and that of the mean.
    rtol = (CHUNK + 1) * np.finfo(np.float32).eps
    np.testing.assert_allclose(found[1:], expected, rtol)
  names = {n for n in trained.history if n.startswith('loss/')}
  others = {'loss/other'} if make is nested else set()
  assert names == {f'loss/{n}' for n in LOSSES} | others
  for name in others:
    assert np.isnan(trained.history[name]).all()
  assert not trained.stopped


def test_within_a_solver_of_sequences():
  """Such a solver holds the losses of its oracles in one array."""
  losses = {
    name: bj.gradient(lambda p, b, v=v: v + 0 * p.z.sum(), name=name, of=['z'])
    for name, v in LOSSES.items()
  }
  oracle = bj.evaluation.select(
    losses,
    bj.evaluation.at_random([0.9, 0.1], key=0, even=True),
    batch_at=lambda batch, t: batch,
  )
  trained = harness.train(
    bj.descend(oracle, z=optax.sgd(0.1)),
    harness.Task(
      lambda context: Params(jnp.zeros(2)), lambda context: jnp.float32(0)
    ),
    harness.Training(30, chunk=5, seeds=1, workdir=None),
  )
  counts = {n: trained.history[f'count/gradients/{n}'][:, 0] for n in LOSSES}
  assert 0 < counts['dpo'][-1] < 6  # Or no chunk is without it.
  for name, value in LOSSES.items():
    evaluated = np.diff(counts[name], prepend=0) > 0
    expected = np.where(evaluated, value, np.nan)
    found = trained.history[f'loss/{name}'][:, 0]
    np.testing.assert_allclose(found, expected, 1e-6)


def test_a_resumed_run_has_the_same_records(tmp_path):
  """Also one that first ended within a chunk."""
  whole = train(None, chained)
  train(tmp_path, chained, steps=8)
  resumed = train(tmp_path, chained)
  assert resumed.steps.tolist() == whole.steps.tolist()
  for name, values in whole.history.items():
    np.testing.assert_array_equal(resumed.history[name], values)
  other = tmp_path / 'other'
  train(other, chained, steps=11)
  found = train(other, chained)
  assert found.steps.tolist() == [0, 8, 11, 16, 24]
  for name in LOSSES:
    of = found.history[f'loss/{name}']
    np.testing.assert_array_equal(
      of[[0, 1, 4]], whole.history[f'loss/{name}'][[0, 1, 3]]
    )
