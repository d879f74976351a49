"""Smooth problems that no step is exact on, and finite differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj


def rough_upper(x, y, batch):
  """Neither quadratic nor convex; couples all leaves of x and y."""
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
