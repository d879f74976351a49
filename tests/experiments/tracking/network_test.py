"""The LSTM and the score against both written out for one tracklet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments.tracking import network

HIDDEN = 3


def drawn(kind):
  """Weights none of which is zero, and numbers to try them on."""
  rng = np.random.default_rng(0)
  init = network.init(jax.random.key(0), hidden=HIDDEN)
  weights = {
    name: rng.normal(size=x.shape).astype(kind) for name, x in init.items()
  }
  state, cell, found = rng.normal(size=(3, 5, HIDDEN)).astype(kind)
  seen = rng.normal(size=(5, 2, network.features(0))).astype(kind)
  return weights, state, cell, found, seen


def one_step(weights, state, cell, found):
  """A step of Hochreiter and Schmidhuber's LSTM, with a forget gate."""
  gate = {
    name: weights['input'][:, columns].T @ found
    + weights['state'][:, columns].T @ state
    + weights['gate_bias'][columns]
    for i, name in enumerate(('enter', 'keep', 'new', 'show'))
    for columns in [np.arange(i * HIDDEN, (i + 1) * HIDDEN)]
  }
  kept = special.expit(gate['keep']) * cell
  cell = kept + special.expit(gate['enter']) * np.tanh(gate['new'])
  return special.expit(gate['show']) * np.tanh(cell), cell


def one_score(weights, state, seen):
  """Score and embedding of a candidate, by one matrix for the perceptron."""
  found = np.maximum(weights['embed'].T @ seen + weights['embed_bias'], 0)
  off = weights['expect'].T @ state + weights['expect_bias'] - found
  parts = ('state', 'embedding', 'difference', 'features')
  matrix = np.concatenate([weights[f'from_{name}'] for name in parts])
  given = np.concatenate([state, found, np.abs(off), seen])
  hidden = np.maximum(matrix.T @ given + weights['hidden_bias'], 0)
  return weights['last'][:, 0] @ hidden + weights['last_bias'][0], found


@pytest.mark.parametrize(
  'kind, rtol', [(np.float64, 1e-12), (np.float32, 1e-4)]
)
def test_numpy_is_the_reference(kind, rtol):
  weights, state, cell, found, seen = drawn(kind)
  after = network.remember(weights, state, cell, found)
  scores, embedded = network.score(weights, state, seen)
  assert {x.dtype for x in (*after, scores, embedded)} == {np.dtype(kind)}
  for i in range(len(state)):
    wanted = one_step(weights, state[i], cell[i], found[i])
    np.testing.assert_allclose([x[i] for x in after], wanted, rtol)
    for j in range(seen.shape[1]):
      score, x = one_score(weights, state[i], seen[i, j])
      np.testing.assert_allclose(scores[i, j], score, rtol, atol=rtol)
      np.testing.assert_allclose(embedded[i, j], x, rtol, atol=rtol)


def test_jax_is_numpy():
  weights, state, cell, found, seen = drawn(np.float32)
  both = [
    (*network.remember(w, *x[:3]), *network.score(w, x[0], x[3]))
    for w, x in (
      (weights, (state, cell, found, seen)),
      (
        jax.tree.map(jnp.asarray, weights),
        [jnp.asarray(x) for x in (state, cell, found, seen)],
      ),
    )
  ]
  for one, two in zip(*both, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
