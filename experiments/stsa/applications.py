"""Nested problems with known solutions, for rates.

With steps c / (k + k_0); what the rate asks of the joint system is computed at
the solution and asserted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from experiments.stsa import chains, quadratic


class Nested(NamedTuple):
  """A nested problem on finite data, its joint system and its solution.

  Attributes:
    oracle: directions of all sequences, from (batch, state, sequences).
    solver: schedule of all steps -> a solver.
    draw: PRNG key -> a batch.
    everything: a batch of all data.
    solution: all sequences at the solution.
    params: sequences -> those that a user holds; the others are in the
      solver's state.
    main: the name of the sequence whose error is measured.
    distance: of each number at the start from the solution: as far as the
      noise of the first steps, else a transient is fitted.
    room: k_0 is at least so many times c L: the curvature of a batch is above
      that of all data.
  """

  oracle: Any
  solver: Callable[[Callable[[Any], Any]], Any]
  draw: Callable[[chex.PRNGKey], Any]
  everything: Any
  solution: Any
  params: Callable[[Any], Any]
  main: str
  distance: float = 0.1
  room: float = 2.0

  def error(self, params: Any) -> chex.Array:
    """The squared distance of the main sequence to its solution."""
    far = getattr(params, self.main) - getattr(self.solution, self.main)
    return jnp.sum(far**2)


def _bilevel(problem, draw, everything, x, y):
  """By SOBA, whose three sequences are solved for at the solution."""
  hessian = jax.hessian(problem.lower, 1)(x, y, everything)
  f_y = jax.grad(problem.upper, 1)(x, y, everything)

  def solver(schedule):
    step = optax.sgd(schedule)
    return bj.soba(problem, upper=step, lower=step)

  return Nested(
    oracle=bj.implicit_directions(problem),
    solver=solver,
    draw=draw,
    everything=everything,
    solution=bj.sequences(
      upper=x, lower=y, linear=jnp.linalg.solve(hessian, f_y)
    ),
    params=lambda z: bj.BilevelParams(z.upper, z.lower),
    main='upper',
  )


def ridge(
  *, samples: int = 1_000, size: int = 10, batch: int = 20, seed: int = 0
) -> Nested:
  r"""The penalty of a ridge regression, by its loss on other data.

  .. math::
    \min_x \tfrac{1}{2} E (a^\top y - b)^2_{\text{val}}, \qquad
    y = \arg\min \tfrac{1}{2} E (a^\top y - b)^2 + \tfrac{1}{2} e^x \|y\|^2

  Args:
    samples: in each of the two parts.
    size: regressors.
    batch: samples in a batch, drawn with replacement from each part.
    seed: of the data; noise is as large as the signal.

  Returns:
    A `Nested`.
  """
  draw = np.random.default_rng(seed)
  truth = draw.normal(size=size) / size**0.5

  def part(count):
    a = draw.normal(size=(count, size))
    return a, a @ truth + draw.normal(size=count)

  data = (part(samples), part(samples // 20))  # Little to train on.

  def losses(x, y, rows):
    a, b = rows
    return jnp.mean((a @ y - b) ** 2) / 2

  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: losses(x, y, batch[0]),
    lower=lambda x, y, batch: (
      losses(x, y, batch[1]) + jnp.exp(x[0]) * jnp.vdot(y, y) / 2
    ),
  )
  (above, target), (below, seen) = data
  hessian = below.T @ below / len(seen)

  def minimiser(x):
    ridged = hessian + np.exp(x) * np.eye(size)
    return np.linalg.solve(ridged, below.T @ seen / len(seen))

  # One number: by the value function itself, to more than float32 can tell.
  value = lambda x: np.mean((above @ minimiser(x) - target) ** 2)
  least = scipy.optimize.minimize_scalar(
    value, bounds=(-10, 5), method='bounded', options={'xatol': 1e-10}
  ).x
  data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data)

  def drawn(key):
    def rows(key, part):
      index = jax.random.randint(key, (batch,), 0, part[1].shape[0])
      return part[0][index], part[1][index]

    keys = jax.random.split(key)
    return tuple(rows(k, p) for k, p in zip(keys, data, strict=True))

  return _bilevel(
    problem,
    drawn,
    data,
    jnp.full(1, least, jnp.float32),
    jnp.asarray(minimiser(least), jnp.float32),
  )


def bilevel_quadratic(*, size: int = 5, coupling: float = 0.1) -> Nested:
  """A small problem of `quadratic.make_quadratic`, 16 batches of 64."""
  made = quadratic.make_quadratic(coupling=coupling, size=size)

  def whole(loss):
    def mean(x, y, numbers):
      one = lambda above, below: loss(x, y, {'upper': above, 'lower': below})
      return jnp.mean(jax.vmap(one)(*numbers))

    return mean

  problem = bj.BilevelProblem(*map(whole, made.problem[:2]))
  every = (jnp.arange(made.batches),) * 2
  # A quadratic: one Newton step from anywhere.
  zero = jnp.zeros(size)
  slope = jax.grad(problem.lower, 1)(made.solution, zero, every)
  hessian = jax.hessian(problem.lower, 1)(made.solution, zero, every)

  def drawn(key):
    numbers = jax.random.randint(key, (2, 1), 0, made.batches)
    return tuple(numbers)

  lower = -jnp.linalg.solve(hessian, slope)
  return _bilevel(problem, drawn, every, made.solution, lower)


class Steps(NamedTuple):
  """Steps c / (k + k_0), and what they come from."""

  scale: float
  offset: float
  rate: float
  largest: float


def steps_for(nested: Nested, *, margin: float = 1.5) -> Steps:
  """The constants of the steps, from the joint Jacobian at the solution.

  Args:
    nested: the problem.
    margin: c over the least that the rate 1 / k asks, above 1.

  Returns:
    The steps.

  Raises:
    AssumptionError: if the joint system is unstable there.
  """
  oracle = nested.oracle
  flat, unravel = ravel_pytree(nested.solution)

  def directions(z):
    z = unravel(z)
    found, _ = oracle.update(nested.everything, oracle.init(z), z)
    return ravel_pytree(found)[0]

  jacobian = np.asarray(jax.jacobian(directions)(flat), np.float64)
  rate = float(np.linalg.eigvals(jacobian).real.min())
  largest = float(np.linalg.norm(jacobian, 2))
  if rate <= 0:
    raise chains.AssumptionError(
      f'the joint system is unstable: an eigenvalue has the real part {-rate}.'
    )
  scale = margin / (2 * rate)
  offset = max(20.0, nested.room * scale * largest)
  return Steps(scale, offset, rate, largest)


def nested_solver(nested: Nested) -> Any:
  """A solver with the steps that the rate asks."""
  found = steps_for(nested)
  return nested.solver(
    bj.solvers.power_schedule(found.scale, 1.0, found.offset)
  )
