"""A walk down the hypergradient with the lower problem solved at each point.

What a run will meet cannot be seen at its start: `suggest` measures along this
walk, and `diagnose` asks by it whether a run could have gone further.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _trees, linear_solvers, projections, types
from bilevel_jax.diagnostics import _bilevel, _spectrum
from bilevel_jax.oracles import _implicit


class Walk(NamedTuple):
  """What `walk` has seen; arrays have one entry for each point looked at.

  A point that is not taken, as the upper loss is not low enough there, repeats
  the entries of the last one that was.

  Attributes:
    origin: the lower variable solved at the first point.
    params: the last point taken, its lower problem solved.
    losses: the upper loss with the lower problem solved.
    steps: the step size that led to the point, 0 if it is not taken; in units
      of the upper variable squared over the upper loss.
    slopes: the norm of the hypergradient, in a set of what of it leads on.
    curvatures: the change of the hypergradient in that step over the length of
      the step; 0 where it is too small to be told from rounding. What the set
      blocks before or after the step does not count.
    facts: what `look` returned.
  """

  origin: Any
  params: types.BilevelParams
  losses: chex.Array
  steps: chex.Array
  slopes: chex.Array
  curvatures: chex.Array
  facts: Any


class _Point(NamedTuple):
  params: types.BilevelParams
  loss: chex.Array
  slope: Any
  facts: Any


def walk(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any,
  *,
  points: int,
  solve_steps: int,
  linear_steps: int,
  upper_set: projections.Projection | None = None,
  look: Callable[[types.BilevelParams, Any], Any] | None = None,
) -> Walk:
  """Walks along minus the hypergradient, by steps that lower the upper loss.

  Args:
    problem: the upper and the lower loss.
    params: where to begin.
    batch: the batch of both losses.
    points: how many points to look at; the first is the upper variable's start.
    solve_steps: L-BFGS steps of each lower solve, from the last solution; 0
      leaves the lower variable as it is.
    linear_steps: conjugate gradients at most for each hypergradient.
    upper_set: projects the upper variable.
    look: measures at a point, from (params, hypergradient).
  """
  solve = linear_solvers.conjugate_gradient(linear_steps, tolerance=1e-4)
  norm = _spectrum.norm

  def length_of(x, steepest):
    # A tenth of the variable.
    size = norm(x)
    return _trees.ratio(0.1 * jnp.where(size > 0, size, 1), steepest)

  def leading_on(x, slope):
    """What of a slope is left in the set: blocked directions are 0."""
    if upper_set is None:
      return slope
    x = upper_set(x)
    short = 0.01 * length_of(x, norm(slope))
    stepped = _trees.add_scaled(x, -short, slope)
    # Where the set did nothing the slope is exact; a difference would round it.
    return jax.tree.map(
      lambda x, z, p, s: jnp.where(
        z == p, s, _trees.ratio(x - p, short).astype(s.dtype)
      ),
      x,
      stepped,
      upper_set(stepped),
      slope,
    )

  def see(x, y):
    at = types.BilevelParams(x, y)
    if solve_steps:
      y = _bilevel.lower_minimiser(problem, at, batch, steps=solve_steps)
      at = types.BilevelParams(x, y)
    terms = _implicit.implicit_terms(problem, at, batch, solve=solve)
    slope = leading_on(x, optax.tree.add(terms.direct, terms.correction))
    facts = () if look is None else look(at, slope)
    return _Point(at, terms.value.astype(_trees.dtype_of(at)), slope, facts)

  def choose(which, one, other):
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)

  def body(carry, first):
    last, length, steepest, origin = carry
    length = jnp.where(first, 0, length)
    x = _trees.add_scaled(last.params.upper, -length, last.slope)
    if upper_set is not None:
      x = choose(first, x, upper_set(x))
    new = see(x, last.params.lower)
    moved = optax.tree.sub(last.params.upper, x)
    # The usual condition of enough decrease; the first point counts anyhow.
    fallen = new.loss <= last.loss - 0.25 * _trees.dot(last.slope, moved)
    taken = first | (fallen & jnp.isfinite(norm(new.slope)))
    change = norm(
      jax.tree.map(
        lambda a, b: jnp.where((a != 0) & (b != 0), a - b, 0),
        new.slope,
        last.slope,
      )
      if upper_set is not None
      else optax.tree.sub(new.slope, last.slope)
    )
    steepest = jnp.where(first, norm(new.slope), steepest)
    told = taken & ~first & (change > 1e-3 * steepest)
    curvature = jnp.where(told, _trees.ratio(change, norm(moved)), 0)
    # The first step is a tenth of the variable; then as long as will do.
    start = length_of(x, steepest)
    longest = jnp.where(told, _trees.ratio(1, curvature), jnp.inf)
    longer = jnp.minimum(4 * length, longest)
    after = jnp.where(first, start, jnp.where(taken, longer, length / 4))
    point = choose(taken, new, last)
    origin = choose(first, new.params.lower, origin)
    step = jnp.where(taken, length, 0)
    return (point, after, steepest, origin), (
      point.loss,
      step,
      norm(point.slope),
      curvature,
      point.facts,
    )

  params = types.BilevelParams(*jax.tree.map(jnp.asarray, tuple(params)))
  blank = optax.tree.zeros_like(jax.eval_shape(see, *params))
  zero = jnp.zeros_like(blank.loss)
  carry, seen = jax.lax.scan(
    body,
    (blank._replace(params=params), zero, zero, params.lower),
    jnp.arange(points) == 0,
  )
  return Walk(carry[-1], carry[0].params, *seen)
