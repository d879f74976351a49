"""The LSTM and the score, against references for one tracklet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments.tracking import network

HIDDEN = 3


def drawn(kind):
  """Draws nonzero weights, and inputs."""
  rng = np.random.default_rng(0)
  init = network.init(jax.random.key(0), hidden=HIDDEN)
  weights = {
    name: rng.normal(size=x.shape).astype(kind) for name, x in init.items()
  }
  state, cell, x = rng.normal(size=(3, 5, HIDDEN)).astype(kind)
  features = rng.normal(size=(5, 2, network.feature_count(0))).astype(kind)
  return weights, state, cell, x, features


def one_step(weights, state, cell, x):
  """A step of Hochreiter and Schmidhuber's LSTM, with a forget gate."""
  gate = {
    name: weights['input'][:, columns].T @ x
    + weights['state'][:, columns].T @ state
    + weights['gate_bias'][columns]
    for i, name in enumerate(('enter', 'keep', 'new', 'show'))
    for columns in [np.arange(i * HIDDEN, (i + 1) * HIDDEN)]
  }
  cell = special.expit(gate['keep']) * cell
  cell = cell + special.expit(gate['enter']) * np.tanh(gate['new'])
  return special.expit(gate['show']) * np.tanh(cell), cell


def one_score(weights, state, features):
  """Score and embedding of a candidate, by one matrix for the perceptron."""
  x = np.maximum(weights['embed'].T @ features + weights['embed_bias'], 0)
  off = weights['expect'].T @ state + weights['expect_bias'] - x
  parts = ('state', 'embedding', 'difference', 'features')
  matrix = np.concatenate([weights[f'from_{name}'] for name in parts])
  inputs = np.concatenate([state, x, np.abs(off), features])
  hidden = np.maximum(matrix.T @ inputs + weights['hidden_bias'], 0)
  return weights['last'][:, 0] @ hidden + weights['last_bias'][0], x


@pytest.mark.parametrize(
  'kind, rtol', [(np.float64, 1e-12), (np.float32, 1e-4)]
)
def test_numpy_is_the_reference(kind, rtol):
  weights, state, cell, x, features = drawn(kind)
  after = network.remember(weights, state, cell, x)
  scores, embeddings = network.score(weights, state, features)
  assert {y.dtype for y in (*after, scores, embeddings)} == {np.dtype(kind)}
  for i in range(len(state)):
    wanted = one_step(weights, state[i], cell[i], x[i])
    np.testing.assert_allclose([y[i] for y in after], wanted, rtol)
    for j in range(features.shape[1]):
      score, embedded = one_score(weights, state[i], features[i, j])
      np.testing.assert_allclose(scores[i, j], score, rtol, atol=rtol)
      np.testing.assert_allclose(embeddings[i, j], embedded, rtol, atol=rtol)


def test_jax_is_numpy():
  weights, state, cell, x, features = drawn(np.float32)
  both = [
    (*network.remember(w, *x[:3]), *network.score(w, x[0], x[3]))
    for w, x in (
      (weights, (state, cell, x, features)),
      (
        jax.tree.map(jnp.asarray, weights),
        [jnp.asarray(x) for x in (state, cell, x, features)],
      ),
    )
  ]
  for one, two in zip(*both, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
