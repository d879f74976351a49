"""Dense test problems without symmetry between coordinates, rows or levels.

The upper variable has two leaves of two and one numbers, the lower variable
two numbers or, with equations, four. Each loss couples all of them, is not
quadratic, and is a mean over rows, so that batches add noise at both levels.
"""

import jax.numpy as jnp
import numpy as np

from tests import perturbed

UPPER = {'a': np.array([0.5, -0.4]), 'b': np.array([0.3])}
LOWER = np.array([-0.2, 0.6])
UPDATES, INNER = 4, 3


def flat(x):
  """The upper variable as one vector."""
  return jnp.concatenate([x['a'], x['b']])


def tree(vector):
  """The upper variable from one vector."""
  return {'a': vector[:2], 'b': vector[2:]}


def pick(batch, t):
  """The rows of inner step t; their losses average to those of the batch."""
  return {**batch, 'rows': batch['rows'][t % INNER]}


def full_batch(batch, t):
  """The whole batch at each step."""
  return batch


def _parts(x, y, batch):
  rows = batch['rows'].reshape(-1, batch['rows'].shape[-1])
  return rows[:, : x.size], rows[:, x.size : -1], rows[:, -1]


def upper(x, y, batch):
  """The upper loss of the vectors x and y."""
  p, q, s = _parts(x, y, batch)
  fit = jnp.sqrt(1 + (p @ x + q @ y - s) ** 2) + 0.1 * (q @ y + s) ** 2
  return jnp.mean(fit) + 0.2 * jnp.sum(x**2) + 0.1 * x[0] * jnp.sum(jnp.sin(y))


def second_upper(x, y, batch):
  """Another upper loss, in conflict with the first one."""
  p, q, s = _parts(x, y, batch)
  fit = (p @ x - q @ y + 0.5 * s) ** 2 * (1 + 0.2 * jnp.cos(q @ y))
  return jnp.mean(fit) + 0.3 * jnp.sum((x - 0.5) ** 2) + 0.2 * jnp.sum(y**4)


def lower(x, y, batch):
  """The lower loss: strongly convex in y if the batch's matrix is definite."""
  p, q, s = _parts(x, y, batch)
  z = q @ y - 0.7 * p @ x + s
  fit = jnp.sqrt(1 + z**2) * (1 + 0.3 * jnp.sin(p @ x))
  quadratic = 0.5 * y @ batch['matrix'] @ y + y @ batch['slope'] @ x
  return jnp.mean(fit) + quadratic + 0.1 * jnp.sum(x**2)


def batches(*, lower_size=2, singular=False, count=UPDATES, seed=0):
  """Batches of three by six rows, a new one for each update.

  Args:
    lower_size: numbers in the lower variable.
    singular: whether the lower Hessian has rank one, everywhere.
    count: how many batches.
    seed: the seed of the rows.

  Returns:
    A list of dicts of NumPy arrays.
  """
  random = np.random.default_rng(seed)
  root = random.normal(size=(lower_size, lower_size))
  matrix = 0.3 * root @ root.T + 0.4 * np.eye(lower_size)
  slope = 0.5 * random.normal(size=(lower_size, 3))
  rows = random.normal(size=(count, INNER, 6, 4 + lower_size))
  if singular:
    line = np.array([0.8, -0.6])
    matrix = 0.9 * np.outer(line, line)
    slope = np.outer(line, slope[0])
    rows[..., 3:-1] = rows[..., 3:4] * line
  # Losses are means over rows, so the order of rows changes only rounding.
  rows = perturbed.reordered(rows, -2)
  return [{'rows': r, 'matrix': matrix, 'slope': slope} for r in rows]


def row_losses(x, batch):
  """The losses of a batch's rows, (rows,), positive, of three numbers."""
  p, q, s = _parts(x, LOWER, batch)
  z = p @ x + q @ jnp.asarray(LOWER, x.dtype) - s
  return jnp.sqrt(1 + z**2) + 0.2 * jnp.sum(x**2) * q[:, 0] ** 2


# A y + h(x) = c of rank two with three rows, and an equation above.
_random = np.random.default_rng(7)
LOWER_MATRIX = _random.normal(size=(3, 2)) @ _random.normal(size=(2, 4))
LOWER_RIGHT = LOWER_MATRIX @ _random.normal(size=4)
_COUPLING = _random.normal(size=(4, 3))
UPPER_MATRIX = np.array([[0.6, -1.1, 0.4]])
UPPER_RIGHT = np.array([0.2])
LONG_LOWER = _random.normal(size=4)
START = np.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3]])


def coupling(x):
  """The coupling h of the equations; some y satisfies them at each x."""
  inner = jnp.sin(jnp.asarray(_COUPLING, x.dtype) @ x)
  return jnp.asarray(LOWER_MATRIX, x.dtype) @ inner


# Levels of a composition of expectations, R^3 to R^2 to R^2 to R.
_W0, _W1 = _random.normal(size=(2, 3)), _random.normal(size=(2, 2))


def level_0(x, batch):
  """The inner level, of the vector x."""
  p, q, s = _parts(x, LOWER, batch)
  return jnp.tanh(jnp.asarray(_W0, x.dtype) @ x) + 0.3 * jnp.mean(
    q * (p @ x + s)[:, None], 0
  )


def level_1(y, batch):
  """The middle level."""
  _, q, s = _parts(np.zeros(3), y, batch)
  return jnp.asarray(_W1, y.dtype) @ jnp.sin(y) + 0.3 * jnp.mean(
    q * jnp.tanh(q @ y + s)[:, None], 0
  )


def level_2(y, batch):
  """The outer level, a scalar."""
  _, q, s = _parts(np.zeros(3), y, batch)
  return jnp.mean(jnp.sqrt(1 + (q @ y - s) ** 2)) + 0.3 * jnp.sum(
    (y - 0.4) ** 2
  )


def objectives(x, batch):
  """Three positive losses of a vector of three numbers."""
  p, q, s = _parts(x, LOWER, batch)
  return jnp.stack(
    [
      upper(x, jnp.asarray(LOWER, x.dtype), batch),
      3 + lower(x, jnp.asarray(LOWER, x.dtype), batch),
      1 + jnp.mean((p @ x - s) ** 2 * (1 + q[:, 0] ** 2)),
    ]
  )


_MIX = {
  k: _random.normal(size=(n, 7)) for k, n in (('x', 3), ('y', 2), ('z', 2))
}


def increments(name):
  """The increment of one of three coupled sequences, from (vectors, batch)."""

  def increment(x, y, z, batch):
    noise = jnp.mean(batch['rows'].reshape(-1, batch['rows'].shape[-1]), 0)
    own = {'x': x, 'y': y, 'z': z}[name]
    mixed = jnp.tanh(_MIX[name] @ jnp.concatenate([x, y, z]))
    return mixed - 1.5 * own + noise[: own.size]

  return increment
