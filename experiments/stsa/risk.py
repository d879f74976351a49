"""Risk-averse mean-deviation problem: three nested expectations."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments.stsa import applications, chains


def levels() -> tuple[Any, Any, Any]:
  r"""Makes the three functions of the composition, of (inner value, rows).

  .. math::
    \min_x E U + \lambda \sqrt{E \max(0, U - E U)^2 + \delta},
    \qquad U = (b - (a^\top x)^2)^2, \qquad \lambda = \delta = 0.1

  Returns:
    The functions; the first two also pass on inputs of the next ones.
  """

  def losses(x, rows):
    a, b = rows
    return (b - (a @ x) ** 2) ** 2

  def mean(x, rows):
    return x, jnp.mean(losses(x, rows))

  def deviation(below, rows):
    x, average = below
    above = jnp.maximum(0, losses(x, rows) - average)
    return average, jnp.mean(above**2)

  def total(below, rows):
    del rows
    average, square = below
    # The corrected estimate of the mean square can be negative.
    return average + 0.1 * jnp.sqrt(jnp.maximum(square, 0) + 0.1)

  return mean, deviation, total


def risk_averse(*, method: str = 'scsc') -> applications.Nested:
  """Makes the problem near its solution, where it is strongly convex.

  The targets b are the squared true responses plus noise. Batches are drawn
  with replacement.

  Args:
    method: `scsc`, or `scgd` without the correction.

  Returns:
    A `Nested`.
  """
  samples, size, batch, draw = 1_000, 10, 100, np.random.default_rng(0)
  truth = draw.normal(size=size) / size**0.5
  a = draw.normal(size=(samples, size))
  b = (a @ truth) ** 2 + draw.normal(size=samples) / 2
  functions = levels()
  inner = lambda x, rows: (
    functions[0](x, rows),
    functions[1](functions[0](x, rows), rows),
  )
  with jax.enable_x64(True):
    exact = jnp.asarray(a), jnp.asarray(b)
    total = lambda x: functions[2](inner(x, exact)[1], exact)
    solved = chains.minimise(total, truth)
  solved = jnp.asarray(solved, jnp.float32)
  rows = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  level_1, level_2 = inner(solved, rows)

  def solver(schedule):
    return getattr(bj.solvers, method)(
      functions,
      main=optax.sgd(schedule),
      tracking=schedule,
      levels=lambda params: inner(params.main, rows),
    )

  def draw_batch(key: chex.PRNGKey):
    index = jax.random.randint(key, (batch,), 0, samples)
    return rows[0][index], rows[1][index]

  return applications.Nested(
    oracle=bj.compositional(functions),
    solver=solver,
    draw=draw_batch,
    everything=rows,
    solution=bj.sequences(main=solved, level_1=level_1, level_2=level_2),
    params=lambda z: bj.sequences(main=z.main),
    main='main',
    distance=0.03,
    room=4.0,
  )
