"""The problems of the contract: small, coupled, noisy, sharded by coordinates.

- nested: an upper variable `{'a': (10,)}` and a lower one `{'b': (10,)}`. The
  losses are means over examples, with noise at both levels and a curvature
  that depends on the example and on the point;
- flat: one variable, `{'z': (10,)}`, with one loss or three.

Coordinates do not mix, so a sharded parameter needs no communication. Whether a
method is right where they mix, a step written by hand has to show.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import descent, types

EXAMPLES = 16  # Rows of a batch.
INNER = 3  # Steps of the solvers with an inner loop.
# Only parameter-shaped arrays may have a last axis of this length: any such
# array counts as coordinates of the parameters.
COORDINATES = 10
OBJECTIVES = 3  # Losses of the problem with several.
PENALTY, RATE = 2.0, 0.1  # The penalty, and the step size of all sequences.
# Hyperparameters of the penalty methods.
PENALISED = {'penalty': PENALTY, 'rate': RATE}

_DRAW = np.random.default_rng(0).uniform
_A, _T, _C = _DRAW(-1, 1, (3, COORDINATES)) * np.array([[0.8], [1.0], [2.0]])
_H = _DRAW(0.5, 1.2, COORDINATES)


def _residual(variable, target):
  return variable - target.reshape(-1, COORDINATES).astype(variable.dtype)


def upper_loss(x: Any, y: Any, batch: Any) -> chex.Array:
  """The upper loss, with noise `c` in the gradient of y and `e` in that of x.

  Example:
    >>> from bilevel_jax import testing
    >>> params, batch = testing.nested_params(0), testing.random_batch(0)
    >>> testing.upper_loss(*params, batch).shape
    ()
  """
  fit = (_residual(y['b'], batch['c']) ** 2).sum(-1).mean() / 2
  own = (_residual(x['a'] - _T.astype(x['a'].dtype), batch['e']) ** 2).sum(-1)
  return fit + own.mean() / 2 + jnp.sin(x['a']) @ y['b'] / 8


def lower_loss(x: Any, y: Any, batch: Any) -> tuple[chex.Array, chex.Array]:
  """The lower loss and an auxiliary output; curvature differs per example.

  Example:
    >>> from bilevel_jax import testing
    >>> params, batch = testing.nested_params(0), testing.random_batch(0)
    >>> loss, errors = testing.lower_loss(*params, batch)
    >>> print(loss.shape, errors.shape)  # 16 examples for each of 3 inner steps
    () (48, 10)
  """
  weight = batch['w'].reshape(-1, 1).astype(y['b'].dtype)
  pull = weight * (_A.astype(weight.dtype) * x['a'])
  error = _residual(y['b'] - pull, batch['d'])
  height = _H.astype(error.dtype) * (error**2 + error**4 / 40)
  return (weight * height).sum(-1).mean() / 2, error


def flat_loss(params: Any, batch: Any) -> chex.Array:
  """The loss of the flat problem.

  Example:
    >>> from bilevel_jax import testing
    >>> params, batch = testing.flat_params(0), testing.random_batch(0)
    >>> testing.flat_loss(params, batch).shape
    ()
  """
  return (_residual(params['z'], batch['c']) ** 2).sum(-1).mean() / 2


_CURVES = _DRAW(0.1, 0.7, (OBJECTIVES, COORDINATES))
_SHIFTS = _DRAW(-1, 2, (OBJECTIVES, COORDINATES))


def three_losses(params: Any, batch: Any) -> chex.Array:
  """Three objectives of the flat problem with different minimisers.

  Example:
    >>> from bilevel_jax import testing
    >>> params, batch = testing.flat_params(0), testing.random_batch(0)
    >>> testing.three_losses(params, batch).shape
    (3,)
  """
  error = _residual(params['z'], batch['c'])[:, None]
  error = error - _SHIFTS.astype(error.dtype)
  return jnp.mean(_CURVES.astype(error.dtype) * error**2, axis=0).sum(-1) / 2


# The bilevel problem of the contract.
PROBLEM = types.BilevelProblem(upper=upper_loss, lower=lower_loss)
# A box for the upper variable.
X_SET = functools.partial(
  optax.projections.projection_box, lower={'a': -1.0}, upper={'a': 0.25}
)
# Bounds that differ between coordinates. NumPy arrays, since importing this
# module must not start a JAX backend.
Y_SET = functools.partial(
  optax.projections.projection_box,
  lower={'b': np.linspace(-2.0, -0.2, COORDINATES, dtype=np.float32)},
  upper={'b': np.linspace(0.2, 2.0, COORDINATES, dtype=np.float32)},
)


def random_batch(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
  """A batch of 16 different examples; its first leaf has integers.

  Example:
    >>> from bilevel_jax import testing
    >>> sorted(testing.random_batch(0))
    ['at', 'c', 'd', 'e', 'w']
  """
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=(EXAMPLES, *shape, COORDINATES))
  values = {
    'c': _C + normal(),
    'd': 0.3 + normal(INNER) / 2,
    'e': normal() / 2,
    'w': rng.uniform(0.5, 1.5, size=(EXAMPLES, INNER)),
  }
  numbers = {'at': jnp.arange(EXAMPLES, dtype=jnp.int32)}
  return numbers | {name: jnp.asarray(x, dtype) for name, x in values.items()}


def inner_batch(batch: Any, t: Any) -> Any:
  """The batch of inner step t: its own examples of the lower loss.

  Example:
    >>> from bilevel_jax import testing
    >>> testing.inner_batch(testing.random_batch(0), 2)['d'].shape
    (16, 10)
  """
  pick = lambda leaf: jnp.take(leaf, t, axis=1)
  return batch | {'d': pick(batch['d']), 'w': pick(batch['w'])}


def nested_params(seed: int, dtype: Any = jnp.float32) -> types.BilevelParams:
  """Initial parameters of the nested problem.

  Example:
    >>> from bilevel_jax import testing
    >>> testing.nested_params(0).upper['a'].shape
    (10,)
  """
  x, y = np.random.default_rng(seed + 100).uniform(size=(2, COORDINATES))
  return types.BilevelParams(
    upper={'a': jnp.asarray(x, dtype)}, lower={'b': jnp.asarray(y / 2, dtype)}
  )


def with_sequence(**values: np.ndarray) -> Callable[..., Any]:
  """Nested parameters with further lower variables, for bare oracles.

  Args:
    **values: an array (10,) for each further sequence.

  Returns:
    A function of a seed and a dtype, for `Row.params`.

  Example:
    >>> import numpy as np
    >>> from bilevel_jax import testing
    >>> testing.with_sequence(value=np.zeros(10))(0)._fields
    ('upper', 'lower', 'value')
  """

  def params(seed: int, dtype: Any = jnp.float32):
    more = {name: {'b': jnp.asarray(z, dtype)} for name, z in values.items()}
    return types.sequences(**nested_params(seed, dtype)._asdict(), **more)

  return params


def flat_params(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
  """Initial parameters of the flat problem.

  Example:
    >>> from bilevel_jax import testing
    >>> testing.flat_params(0)['z'].shape
    (10,)
  """
  z = np.random.default_rng(seed + 100).normal(size=COORDINATES)
  return {'z': jnp.asarray(z, dtype)}


def by_descent(oracle: Any, **rates: Any) -> Any:
  """A solver that moves the sequences of an oracle by gradient descent.

  Args:
    oracle: the oracle to evaluate.
    **rates: the step size of each sequence.

  Example:
    >>> import bilevel_jax as bj
    >>> from bilevel_jax import testing
    >>> oracle = bj.lower_gradient(testing.PROBLEM)
    >>> solver = testing.by_descent(oracle, lower=0.1)
    >>> bj.counts(solver.init(testing.nested_params(0)))
    {'gradients/lower': 0}
  """
  return descent.descend(oracle, **{n: optax.sgd(r) for n, r in rates.items()})
