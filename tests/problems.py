"""Test problems with and without known solutions, and finite differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj


def rough_upper(x, y, batch):
  """An upper loss, neither quadratic nor convex, that couples all leaves."""
  mixed = jnp.tanh(batch @ y['matrix'] @ jnp.cos(y['vector']))
  return jnp.mean(mixed * jnp.sin(x['a'].sum() + batch.sum(-1))) + x['k'] ** 4


def rough_lower(x, y, batch):
  error = jnp.sin(batch @ y['matrix']) - x['a'] * jnp.exp(x['k'] / 3)
  penalty = jnp.sum(y['vector'] ** 4) + jnp.sum(jnp.sin(y['matrix']) * x['k'])
  loss = jnp.mean(error**2) + penalty / 4 + jnp.vdot(x['a'], y['vector']) / 5
  return loss, {'error': error}


ROUGH = bj.BilevelProblem(rough_upper, rough_lower)


def rough_params(seed: int = 0, dtype: Any = None) -> bj.BilevelParams:
  draws = jax.random.normal(jax.random.key(seed), (12,), dtype) / 2
  return bj.BilevelParams(
    upper={'a': draws[:2], 'k': draws[2]},
    lower={'matrix': draws[3:9].reshape(3, 2), 'vector': draws[9:11]},
  )


def rough_batch(seed: int = 0, dtype: Any = None) -> jax.Array:
  return jax.random.normal(jax.random.key(seed + 50), (4, 3), dtype)


def by_differences(
  fn: Callable[[Any], Any], point: Any, step: float = 1e-5
) -> Any:
  """The gradient of a scalar function by central differences."""
  flat, back = ravel_pytree(point)
  assert flat.dtype == np.float64
  call = jax.jit(lambda z: fn(back(z)))
  slope = []
  for i in range(flat.size):
    away = jnp.zeros_like(flat).at[i].set(step)
    slope.append((call(flat + away) - call(flat - away)) / (2 * step))
  return back(jnp.stack(slope))


# min (y - C)^2 / 2 + (x - T)^2 / 2 at the minimiser y = A x + D of the lower
# loss, separately in each coordinate, with the curvatures below.
_A, _C, _D, _T = (
  np.array(row) for row in ([0.5, 0.8], [2.0, 2.5], [0.3, 0.4], [1.0, 0.5])
)
CURVATURE = np.array([1.0, 0.5])
SOLUTION = (_T + _A * (_C - _D)) / (1 + _A**2)
QUADRATIC = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - _C) ** 2 + (x - _T) ** 2).sum() / 2,
  lower=lambda x, y, batch: (CURVATURE * (y - _A * x - _D) ** 2).sum() / 2,
)


def lower_minimiser(x: Any) -> np.ndarray:
  """The lower minimiser of `QUADRATIC`."""
  return _A * np.asarray(x) + _D


def lower_slope(x: Any, y: Any) -> np.ndarray:
  """The gradient of the lower loss of `QUADRATIC` in y."""
  return CURVATURE * (y - lower_minimiser(x))


def start(dtype: Any = None) -> bj.BilevelParams:
  """The initial parameters of `QUADRATIC`."""
  x, y = np.array([[0.2, 0.9], [0.4, -0.3]])
  return bj.BilevelParams(jnp.asarray(x, dtype), jnp.asarray(y, dtype))


def solve(
  solver: Any, updates: int, params: Any = None, batch: Any = None
) -> tuple[Any, Any]:
  """Parameters and state after many updates on one batch, as NumPy arrays."""
  params = start() if params is None else params
  return bj.testing.run(solver, params, updates, batch)


# A lower variable of three numbers whose coordinates mix.
MATRIX = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]])
MIX = np.array([[0.5, 1.0, 0.0], [0.0, -0.4, 0.3], [1.0, 0.2, 0.1]])
MIXED = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - 1) ** 2).sum() + jnp.sin(x).sum(),
  lower=lambda x, y, batch: y @ MATRIX @ y / 2 - y @ (MIX @ x),
)


def mixed_minimiser(x: Any) -> Any:
  """The lower minimiser of `MIXED`."""
  return np.linalg.inv(MATRIX).astype(x.dtype) @ (MIX.astype(x.dtype) @ x)


def mixed_hypergradient(x: Any) -> Any:
  """The hypergradient of `MIXED` in closed form."""
  slope = (np.linalg.inv(MATRIX) @ MIX).T.astype(x.dtype)
  return jnp.cos(x) + slope @ (2 * (mixed_minimiser(x) - 1))


def mixed_params() -> bj.BilevelParams:
  """A point of `MIXED` with the lower variable at the minimiser."""
  x = jnp.array([0.3, -0.7, 1.1])
  return bj.BilevelParams(x, jnp.asarray(mixed_minimiser(x)))
