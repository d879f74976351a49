r"""The score of a candidate for a tracklet: an LSTM and a small perceptron.

A candidate's features m are embedded as x = relu(m A + a). The tracklet's state
h is that of an LSTM over the embedded features of its detections. The score of
a step is

    e = MLP([h, x, |h P + p - x|, m]),

and 0 for the null candidate, a miss. A tracklet's score S is the mean of e over
its steps.

As in `motion`, arrays are numpy's or jax's, with any leading axes.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.tracking import motion

Weights = dict[str, Any]
# Input slopes: three gates are logistic, and the third, the new cell, is tanh.
_SLOPES = np.array([[0.5], [0.5], [1.0], [0.5]], np.float32)


def feature_count(embedding_size: int) -> int:
  """Number of features of a candidate."""
  return motion.FEATURES + (embedding_size + 1 if embedding_size else 0)


def shapes(hidden: int, embedding_size: int = 0) -> dict[str, tuple[int, ...]]:
  """Shapes of the weights by name; see `init`."""
  count = feature_count(embedding_size)
  return {
    'embed': (count, hidden),
    'expect': (hidden, hidden),
    'from_state': (hidden, hidden),
    'from_embedding': (hidden, hidden),
    'from_difference': (hidden, hidden),
    'from_features': (count, hidden),
    'last': (hidden, 1),
    'input': (hidden, 4 * hidden),
    'state': (hidden, 4 * hidden),
    'embed_bias': (hidden,),
    'expect_bias': (hidden,),
    'hidden_bias': (hidden,),
    'last_bias': (1,),
    'gate_bias': (4 * hidden,),
  }


def init(key: chex.PRNGKey, *, hidden: int, embedding_size: int = 0) -> Weights:
  """Draws weights: normal, scaled by the number of inputs.

  Args:
    key: of the draw.
    hidden: units of every layer.
    embedding_size: numbers in the embedding of a detection.

  Returns:
    Arrays by name.
  """
  every = shapes(hidden, embedding_size)
  drawn = {name: shape for name, shape in every.items() if len(shape) > 1}
  keys = jax.random.split(key, len(drawn))
  weights = {
    name: jax.random.normal(k, shape) * shape[0] ** -0.5
    for k, (name, shape) in zip(keys, drawn.items(), strict=True)
  }
  weights |= {
    name: jnp.zeros(shape) for name, shape in every.items() if name not in drawn
  }
  # The forget gate starts open.
  forget = weights['gate_bias'].at[hidden : 2 * hidden].set(1.0)
  return weights | {'gate_bias': forget}


def _relu(x):
  return motion.namespace(x).maximum(x, 0)


def embed(weights: Weights, features: Any) -> Any:
  """Embeds features (..., features), as x (..., hidden)."""
  return _relu(features @ weights['embed'] + weights['embed_bias'])


def tracklet_terms(weights: Weights, state: Any) -> tuple[Any, Any]:
  """Terms of the score that depend on the tracklet's state h only.

  Returns:
    The expected x, and the perceptron's part, both (..., hidden).
  """
  expected = state @ weights['expect'] + weights['expect_bias']
  return expected, state @ weights['from_state'] + weights['hidden_bias']


def score(weights: Weights, state: Any, features: Any) -> tuple[Any, Any]:
  """Scores the candidates of tracklets.

  Args:
    weights: output of `init`.
    state: h, (..., hidden).
    features: (..., candidates, features).

  Returns:
    e, (..., candidates), and x, (..., candidates, hidden).
  """
  expected, part = (x[..., None, :] for x in tracklet_terms(weights, state))
  return score_pairs(weights, expected, part, features)


def score_pairs(
  weights: Weights, expected: Any, part: Any, features: Any
) -> tuple[Any, Any]:
  """Scores e and x of pairs, from `tracklet_terms` and features."""
  x = embed(weights, features)
  difference = motion.namespace(x).abs(expected - x)
  hidden = _relu(
    part
    + x @ weights['from_embedding']
    + difference @ weights['from_difference']
    + features @ weights['from_features']
  )
  return (hidden @ weights['last'] + weights['last_bias'])[..., 0], x


def remember(
  weights: Weights, state: Any, cell: Any, x: Any
) -> tuple[Any, Any]:
  """Advances the LSTM by x; returns h and c, (..., hidden)."""
  gates = x @ weights['input'] + state @ weights['state']
  gates = gates + weights['gate_bias']
  gates = gates.reshape(*gates.shape[:-1], 4, state.shape[-1])
  xp = motion.namespace(gates)
  # logistic(z) = (tanh(z / 2) + 1) / 2: one call for all gates.
  bent = xp.tanh(gates * _SLOPES)
  enter, forget, show = (0.5 * bent[..., i, :] + 0.5 for i in (0, 1, 3))
  cell = forget * cell + enter * bent[..., 2, :]
  return show * xp.tanh(cell), cell


def first_state(
  weights: Weights, confidence: Any, embedding: Any, noise: motion.Noise
) -> tuple[Any, Any]:
  """States h and c of tracklets of one detection.

  Args:
    weights: output of `init`.
    confidence: (...).
    embedding: (..., embedding_size).
    noise: of the filter.

  Returns:
    h and c, (..., hidden).
  """
  x = embed(weights, motion.first_features(confidence, embedding, noise))
  zero = 0 * x
  return remember(weights, zero, zero, x)
