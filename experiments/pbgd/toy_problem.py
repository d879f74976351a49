"""Losses, starts and solutions of the toy problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

X_RANGE, Y_RANGE = (0.0, 3.5), (-5.0, 8.5)  # Range of the starts.
UPPER_SET = functools.partial(
  optax.projections.projection_box, lower=0.0, upper=3.0
)


def upper_loss(x, y, batch=None):
  """cos(4y + 2) / (1 + exp(2 - 4x)) + ln((4x - 2)^2 + 1) / 2."""
  del batch
  wave = jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x))
  return wave + jnp.log((4 * x - 2) ** 2 + 1) / 2


def lower_loss(x, y, batch=None):
  """(x + y)^2 + x sin^2(x + y); minimum 0 at y = -x for x >= 0."""
  del batch
  return (x + y) ** 2 + x * jnp.sin(x + y) ** 2


PROBLEM = bj.BilevelProblem(upper=upper_loss, lower=lower_loss)


def reduced_loss(x):
  """The upper loss at the lower minimiser y = -x."""
  return upper_loss(x, -x)


def local_minima(
  loss=reduced_loss, low: float = 0.0, high: float = 3.0, points: int = 10_001
) -> np.ndarray:
  """Computes all local minima of a smooth function on an interval.

  Args:
    loss: function of a scalar.
    low: lower end of the interval.
    high: upper end of the interval.
    points: size of the grid; Newton steps refine each of its local minima.

  Returns:
    The minimisers, float64, ordered by their loss.
  """
  with jax.enable_x64(True):
    grid = jnp.linspace(low, high, points)
    heights = jnp.pad(jax.vmap(loss)(grid), 1, constant_values=jnp.inf)
    middle = heights[1:-1]
    x = grid[(middle <= heights[:-2]) & (middle < heights[2:])]
    slope = jax.grad(loss)
    move = jax.jit(jax.vmap(lambda x: x - slope(x) / jax.grad(slope)(x)))
    for _ in range(10):
      newton = move(x)
      # At an end of the interval, a Newton step would leave it.
      x = jnp.where((newton >= low) & (newton <= high), newton, x)
    return np.asarray(x[jnp.argsort(jax.vmap(loss)(x))])


def draw_starts(seeds: tuple[int, ...], starts: int) -> bj.BilevelParams:
  """Draws uniform starts in the rectangle `X_RANGE` x `Y_RANGE`."""

  def draw(seed):
    key_x, key_y = jax.random.split(jax.random.key(seed))
    uniform = lambda key, low, high: jax.random.uniform(
      key, (starts,), minval=low, maxval=high
    )
    return bj.BilevelParams(uniform(key_x, *X_RANGE), uniform(key_y, *Y_RANGE))

  drawn = [draw(seed) for seed in seeds]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)


def distances_to(minima: np.ndarray, params: bj.BilevelParams) -> np.ndarray:
  """Maximum-norm distances to the minima (x, -x), (params, minima)."""
  x, y = (np.asarray(z)[:, None] for z in params)
  return np.maximum(np.abs(x - minima), np.abs(y + minima))
