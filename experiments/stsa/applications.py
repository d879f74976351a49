"""Nested problems with known solutions, for convergence rates.

Step sizes are c / (k + k_0); c and k_0 are computed from the Jacobian of the
joint system at the solution.
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
    solver: schedule of all step sizes -> a solver.
    draw: PRNG key -> a batch.
    everything: a batch of all data.
    solution: all sequences at the solution.
    params: sequences -> the solver's params; the others are in its state.
    main: name of the sequence whose error is measured.
    distance: standard deviation of the start around the solution, comparable to
      the noise of the first steps, so that no transient is fitted.
    room: lower bound of k_0 / (c L), because batches have larger curvature than
      all data.
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
    error = getattr(params, self.main) - getattr(self.solution, self.main)
    return jnp.sum(error**2)


def _bilevel(problem, draw, everything, x, y):
  """A bilevel problem with the three sequences of SOBA at the solution."""
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


def ridge() -> Nested:
  r"""Makes the problem of choosing the penalty of a ridge regression.

  .. math::
    \min_x \tfrac{1}{2} E (a^\top y - b)^2_{\text{val}}, \qquad
    y = \arg\min \tfrac{1}{2} E (a^\top y - b)^2 + \tfrac{1}{2} e^x \|y\|^2

  The noise of the data is as large as the signal. Batches are drawn with
  replacement from each part.

  Returns:
    A `Nested`.
  """
  # A twentieth as many samples for training.
  samples, size, batch, draw = 1_000, 10, 20, np.random.default_rng(0)
  truth = draw.normal(size=size) / size**0.5

  def part(count):
    a = draw.normal(size=(count, size))
    return a, a @ truth + draw.normal(size=count)

  data = (part(samples), part(samples // 20))

  def losses(x, y, rows):
    a, b = rows
    return jnp.mean((a @ y - b) ** 2) / 2

  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: losses(x, y, batch[0]),
    lower=lambda x, y, batch: (
      losses(x, y, batch[1]) + jnp.exp(x[0]) * jnp.vdot(y, y) / 2
    ),
  )
  (above, target), (below, labels) = data
  hessian = below.T @ below / len(labels)

  def minimiser(x):
    ridged = hessian + np.exp(x) * np.eye(size)
    return np.linalg.solve(ridged, below.T @ labels / len(labels))

  # A scalar: minimises the value function itself, in float64.
  value = lambda x: np.mean((above @ minimiser(x) - target) ** 2)
  best = scipy.optimize.minimize_scalar(
    value, bounds=(-10, 5), method='bounded', options={'xatol': 1e-10}
  ).x
  data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data)

  def draw_batch(key):
    def rows(key, part):
      index = jax.random.randint(key, (batch,), 0, part[1].shape[0])
      return part[0][index], part[1][index]

    keys = jax.random.split(key)
    return tuple(rows(k, p) for k, p in zip(keys, data, strict=True))

  return _bilevel(
    problem,
    draw_batch,
    data,
    jnp.full(1, best, jnp.float32),
    jnp.asarray(minimiser(best), jnp.float32),
  )


def bilevel_quadratic(*, size: int = 5, coupling: float = 0.1) -> Nested:
  """Makes a small `quadratic.make_quadratic` with 16 batches of 64."""
  small = quadratic.make_quadratic(coupling=coupling, size=size)

  def full_batch(loss):
    def mean(x, y, numbers):
      one = lambda above, below: loss(x, y, {'upper': above, 'lower': below})
      return jnp.mean(jax.vmap(one)(*numbers))

    return mean

  problem = bj.BilevelProblem(*map(full_batch, small.problem[:2]))
  every = (jnp.arange(small.batches),) * 2
  # One Newton step solves a quadratic.
  zero = jnp.zeros(size)
  slope = jax.grad(problem.lower, 1)(small.solution, zero, every)
  hessian = jax.hessian(problem.lower, 1)(small.solution, zero, every)

  def draw_batch(key):
    return tuple(jax.random.randint(key, (2, 1), 0, small.batches))

  lower = -jnp.linalg.solve(hessian, slope)
  return _bilevel(problem, draw_batch, every, small.solution, lower)


class Steps(NamedTuple):
  """Step sizes c / (k + k_0), with eigenvalue and norm of the Jacobian."""

  scale: float
  offset: float
  rate: float
  largest: float


def steps_for(nested: Nested, *, margin: float = 1.5) -> Steps:
  """Computes c and k_0 from the joint Jacobian at the solution.

  Args:
    nested: the problem.
    margin: c over its lower bound for the rate 1 / k, above 1.

  Returns:
    The step sizes.

  Raises:
    AssumptionError: if the joint system is unstable at the solution.
  """
  oracle = nested.oracle
  flat, unravel = ravel_pytree(nested.solution)

  def directions(z):
    z = unravel(z)
    values, _ = oracle.update(nested.everything, oracle.init(z), z)
    return ravel_pytree(values)[0]

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
  """Makes a solver with the step sizes of `steps_for`."""
  steps = steps_for(nested)
  return nested.solver(
    bj.solvers.power_schedule(steps.scale, 1.0, steps.offset)
  )
