"""Nested problems with known solutions, and a loop that runs a solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _sequences, types


class Solved(NamedTuple):
  """A nested problem with its solution.

  Attributes:
    problem: the upper and the lower loss, which ignore the batch.
    params: the initial point.
    solution: the optimal point, `BilevelParams` of NumPy arrays.
    minimiser: maps an upper variable to the minimiser of the lower loss.
    hypergradient: maps an upper variable x to the gradient of the upper loss at
      (x, minimiser(x)), through the minimiser.
  """

  problem: types.BilevelProblem
  params: types.BilevelParams
  solution: types.BilevelParams
  minimiser: Callable[[Any], Any]
  hypergradient: Callable[[Any], Any]


def _quadratic(curvature, slope, shift, y_target, x_target, start):
  """The lower minimiser is S x + d; the upper loss pulls y and x to targets."""

  def upper(x, y, batch):
    y_error = y - jnp.asarray(y_target, y.dtype)
    x_error = x - jnp.asarray(x_target, x.dtype)
    return jnp.sum(y_error**2) / 2 + jnp.sum(x_error**2) / 2

  def lower(x, y, batch):
    error = y - jnp.asarray(slope, x.dtype) @ x - jnp.asarray(shift, y.dtype)
    return error @ jnp.asarray(curvature, y.dtype) @ error / 2

  minimiser = lambda x: slope @ np.asarray(x) + shift
  hypergradient = lambda x: (
    slope.T @ (minimiser(x) - y_target) + np.asarray(x) - x_target
  )
  x = np.linalg.solve(
    slope.T @ slope + np.eye(len(x_target)),
    slope.T @ (y_target - shift) + x_target,
  )
  return Solved(
    types.BilevelProblem(upper, lower),
    types.BilevelParams(*map(jnp.asarray, start)),
    types.BilevelParams(x, minimiser(x)),
    minimiser,
    hypergradient,
  )


def toy_problem() -> Solved:
  r"""The smallest nested problem: the lower minimiser is the upper variable.

  .. math::
    \min_x \| y - 1 \|^2 \quad \text{where} \quad
    y = \arg\min_{y'} \| y' - x \|^2

  Returns:
    The problem with two coordinates per variable. It starts at zero, and all
    entries of its solution are one.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.soba(
    ...   toy.problem, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    ... )
    >>> params, state = bj.testing.run(solver, toy.params, 200)
    >>> print(params.upper.round(2), toy.solution.upper)
    [1. 1.] [1. 1.]
  """
  ones = np.ones(2)
  return Solved(
    types.BilevelProblem(
      upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
      lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ),
    types.BilevelParams(jnp.zeros(2), jnp.zeros(2)),
    types.BilevelParams(ones, ones),
    minimiser=lambda x: x,
    hypergradient=lambda x: 2 * (x - 1),
  )


def coupled_problem() -> Solved:
  """A quadratic problem whose coordinates mix: x has two entries, y three.

  A method that transposes a matrix or drops a coupling misses its solution.

  Returns:
    The problem; its initial point is away from its solution.

  Example:
    >>> import bilevel_jax as bj
    >>> coupled = bj.testing.coupled_problem()
    >>> x = coupled.solution.upper
    >>> print(abs(coupled.hypergradient(x)).max() < 1e-12)
    True
  """
  return _quadratic(
    curvature=np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]]),
    slope=np.array([[0.5, 1.0], [-0.4, 0.3], [0.2, 0.1]]),
    shift=np.array([0.3, 0.4, -0.2]),
    y_target=np.array([2.0, 2.5, -1.0]),
    x_target=np.array([1.0, 0.5]),
    start=(np.array([0.2, 0.9]), np.array([0.4, -0.3, 0.1])),
  )


def run(
  solver: optax.GradientTransformation,
  params: Any,
  updates: int,
  batch: Any = None,
) -> tuple[Any, Any]:
  """Runs a solver on one batch, in one compiled loop.

  Args:
    solver: any solver.
    params: the initial parameters.
    updates: the number of updates.
    batch: the batch of every update.

  Returns:
    The parameters and the state after the last update.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> loss = lambda x, batch: (x - batch) ** 2
    >>> solver = optax.chain(bj.gradient(loss), optax.sgd(0.5))
    >>> params, state = bj.testing.run(solver, jnp.float32(0.0), 3, 2.0)
    >>> print(params, bj.counts(state))
    2.0 {'gradients/loss': 3}
  """
  evaluated = optax.with_extra_args_support(solver)

  def body(_, carry):
    params, state = carry
    moves, state = evaluated.update(batch, state, params)
    return _sequences.apply_updates(params, moves), state

  loop = jax.jit(lambda carry: jax.lax.fori_loop(0, updates, body, carry))
  return loop((params, evaluated.init(params)))
