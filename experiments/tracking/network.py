r"""The score of a candidate for a tracklet: an LSTM and a small perceptron.

A candidate's features m become an embedding x = relu(m A + a). The tracklet's
state h is that of an LSTM over the embeddings of its detections. The score of a
step is

    e = MLP([h, x, |h P + p - x|, m]),

and 0 for the null candidate, which is not to have been seen. A tracklet's score
S is the mean of e over its steps.

As in `motion`, arrays are numpy's or jax's, and leading axes are free.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.tracking import motion

Weights = dict[str, Any]
# Of the gates' logistic functions, and of what is new, which is a tanh.
_SLOPES = np.array([[0.5], [0.5], [1.0], [0.5]], np.float32)


def features(looks: int) -> int:
  """Features of a candidate, with so many numbers of a look."""
  return motion.FEATURES + (looks + 1 if looks else 0)


def init(key: chex.PRNGKey, *, hidden: int, looks: int = 0) -> Weights:
  """First weights: normal, scaled by inputs.

  Args:
    key: of the draw.
    hidden: units of every layer.
    looks: numbers of a look.

  Returns:
    Arrays by name.
  """
  count = features(looks)
  shapes = {
    'embed': (count, hidden),
    'expect': (hidden, hidden),
    'from_state': (hidden, hidden),
    'from_embedding': (hidden, hidden),
    'from_difference': (hidden, hidden),
    'from_features': (count, hidden),
    'last': (hidden, 1),
    'input': (hidden, 4 * hidden),
    'state': (hidden, 4 * hidden),
  }
  keys = jax.random.split(key, len(shapes))
  weights = {
    name: jax.random.normal(k, shape) * shape[0] ** -0.5
    for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }
  for name, size in (
    ('embed_bias', hidden),
    ('expect_bias', hidden),
    ('hidden_bias', hidden),
    ('last_bias', 1),
  ):
    weights[name] = jnp.zeros(size)
  # At first, what is known stays known.
  forget = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)
  return weights | {'gate_bias': forget}


def _relu(x):
  return motion.namespace(x).maximum(x, 0)


def embed(weights: Weights, seen: Any) -> Any:
  """Embeddings of features (..., features), as (..., hidden)."""
  return _relu(seen @ weights['embed'] + weights['embed_bias'])


def known(weights: Weights, state: Any) -> tuple[Any, Any]:
  """What a tracklet's state h, (..., hidden), says of any candidate.

  Returns:
    The embedding that it expects, and its part of the perceptron.
  """
  expected = state @ weights['expect'] + weights['expect_bias']
  return expected, state @ weights['from_state'] + weights['hidden_bias']


def score(weights: Weights, state: Any, seen: Any) -> tuple[Any, Any]:
  """Scores of candidates of tracklets.

  Args:
    weights: of `init`.
    state: the h of each, (..., hidden).
    seen: features, (..., candidates, features).

  Returns:
    e (..., candidates), and embeddings (..., candidates, hidden).
  """
  rows = [x[..., None, :] for x in known(weights, state)]
  return of_pairs(weights, rows[0], rows[1], seen)


def of_pairs(
  weights: Weights, expected: Any, part: Any, seen: Any
) -> tuple[Any, Any]:
  """Scores of pairs, and embeddings: of `known` and features."""
  found = embed(weights, seen)
  off = motion.namespace(found).abs(expected - found)
  hidden = _relu(
    part
    + found @ weights['from_embedding']
    + off @ weights['from_difference']
    + seen @ weights['from_features']
  )
  return (hidden @ weights['last'] + weights['last_bias'])[..., 0], found


def remember(
  weights: Weights, state: Any, cell: Any, found: Any
) -> tuple[Any, Any]:
  """A step of the LSTM: h and c, (..., hidden), after embeddings."""
  gates = found @ weights['input'] + state @ weights['state']
  gates = gates + weights['gate_bias']
  gates = gates.reshape(*gates.shape[:-1], 4, state.shape[-1])
  xp = motion.namespace(gates)
  # The logistic function by the same tanh, so that all gates are one call.
  bent = xp.tanh(gates * _SLOPES)
  enter, keep, show = (0.5 * bent[..., i, :] + 0.5 for i in (0, 1, 3))
  cell = keep * cell + enter * bent[..., 2, :]
  return show * xp.tanh(cell), cell


def first(
  weights: Weights, sure: Any, looks: Any, noise: motion.Noise
) -> tuple[Any, Any]:
  """States h and c of tracklets of one detection.

  Args:
    weights: of `init`.
    sure: confidences, (...).
    looks: (..., numbers).
    noise: of the filter.

  Returns:
    h and c, (..., hidden).
  """
  found = embed(weights, motion.at_first(sure, looks, noise))
  none = 0 * found
  return remember(weights, none, none, found)
