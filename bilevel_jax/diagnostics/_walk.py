"""A walk along minus the hypergradient, with the lower problem solved.

Curvatures at the start of a run do not predict those along its path. So
`suggest` measures along this walk, and `diagnose` walks from the end of a run
to test whether the upper loss can be lower.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, linear_solvers, projections, types
from bilevel_jax.diagnostics import _bilevel, _spectrum
from bilevel_jax.oracles import _implicit


class WalkSettings(NamedTuple):
  """Settings of the walk of `suggest` and `diagnose`.

  None means that a field is unset; then the default of the function holds.

  Attributes:
    points: the number of points. With one point, `suggest` measures at the
      start without solving the lower problem.
    solve_steps: L-BFGS steps of each lower solve; unset, 50.
    linear_steps: the largest number of conjugate-gradient and Lanczos steps at
      each point; unset, 30 for `suggest` and `solve_steps` for `diagnose`.
    upper_set: the projection on the set of the upper variable.
    safety: the step sizes of `suggest` over those at which descent becomes
      unstable twice as long, above 0 and below 2; unset, 0.5.
    momentum: the largest momentum that `suggest` gives to the two lower
      sequences, in [0, 1); unset, 0.9. It gives less if the slowest motion of
      the lower minimiser needs less.
  """

  points: int | None = None
  solve_steps: int | None = None
  linear_steps: int | None = None
  upper_set: projections.Projection | None = None
  safety: float | None = None
  momentum: float | None = None


def checked_settings(
  settings: WalkSettings | None,
  caller: str,
  defaults: WalkSettings,
  min_points: int = 1,
) -> WalkSettings:
  """Fills in unset fields and checks the numbers.

  Raises:
    ValueError: if a number is too small.
  """
  chosen = (settings or WalkSettings())._asdict()
  unset = {n: v for n, v in defaults._asdict().items() if chosen[n] is None}
  walk = WalkSettings(**(chosen | unset))
  if walk.linear_steps is None:
    walk = walk._replace(linear_steps=walk.solve_steps)
  _checks.whole_number(caller, 'points', walk.points, min_points)
  _checks.whole_number(caller, 'solve_steps', walk.solve_steps)
  _checks.whole_number(caller, 'linear_steps', walk.linear_steps)
  return walk


class Walk(NamedTuple):
  """Measurements along a walk; arrays have an entry for each trial point.

  A trial point that is rejected, because the upper loss is too high, repeats
  the entries of the last accepted point.

  Attributes:
    origin: the solution of the lower problem at the first point.
    params: the last accepted point, with its lower problem solved.
    losses: the upper loss at the lower minimiser.
    steps: the step size to the point, 0 if it is rejected; in units of the
      upper variable squared over the upper loss.
    slopes: the norm of the hypergradient, without the part that the set blocks.
    curvatures: the change of the hypergradient in the step over the length of
      the step, without the part that the set blocks; 0 if it is mostly
      rounding.
    facts: the results of `look`.
  """

  origin: Any
  params: types.BilevelParams
  losses: chex.Array
  steps: chex.Array
  slopes: chex.Array
  curvatures: chex.Array
  facts: Any


def known_curvatures(walked: Walk) -> chex.Array:
  """The curvatures with the last measured one where none was measured."""
  last = jax.lax.associative_scan(
    lambda a, b: jnp.where(b > 0, b, a), walked.curvatures
  )
  return last


class _Point(NamedTuple):
  params: types.BilevelParams
  loss: chex.Array
  slope: Any
  facts: Any


def walk(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any,
  settings: WalkSettings,
  look: Callable[[types.BilevelParams, Any], Any] | None = None,
) -> Walk:
  """Walks along minus the hypergradient by steps that decrease the upper loss.

  Args:
    problem: the upper and the lower loss.
    params: the start.
    batch: the batch of both losses.
    settings: settings of the walk, all set; with zero `solve_steps` the lower
      variable does not move.
    look: from (params, hypergradient) to measurements at a point.
  """
  numbers: Any = settings
  points, solve_steps, linear_steps, upper_set = numbers[:4]
  solve = linear_solvers.conjugate_gradient(linear_steps, tolerance=1e-4)
  norm = _spectrum.norm

  def first_length(x, steepest):
    # To move by a tenth of the size of the variable.
    size = norm(x)
    return _trees.ratio(0.1 * jnp.where(size > 0, size, 1), steepest)

  def free_part(x, slope):
    """The slope without the directions that the set blocks."""
    if upper_set is None:
      return slope
    x = upper_set(x)
    short = 0.01 * first_length(x, norm(slope))
    stepped = _trees.add_scaled(x, -short, slope)
    # Where the set is inactive, the slope avoids the rounding of a difference.
    return jax.tree.map(
      lambda x, z, p, s: jnp.where(
        z == p, s, _trees.ratio(x - p, short).astype(s.dtype)
      ),
      x,
      stepped,
      upper_set(stepped),
      slope,
    )

  def measure(x, y):
    at = types.BilevelParams(x, y)
    if solve_steps:
      y = _bilevel.lower_minimiser(problem, at, batch, steps=solve_steps)
      at = types.BilevelParams(x, y)
    terms = _implicit.implicit_terms(problem, at, batch, solve=solve)
    slope = free_part(x, optax.tree.add(terms.direct, terms.correction))
    facts = () if look is None else look(at, slope)
    return _Point(at, terms.value.astype(_trees.widest_dtype(at)), slope, facts)

  def choose(which, one, other):
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), one, other)

  def body(carry, first):
    last, length, steepest, origin = carry
    length = jnp.where(first, 0, length)
    x = _trees.add_scaled(last.params.upper, -length, last.slope)
    if upper_set is not None:
      x = choose(first, x, upper_set(x))
    new = measure(x, last.params.lower)
    moved = optax.tree.sub(last.params.upper, x)
    # Armijo's condition; the first point is always accepted.
    decreased = new.loss <= last.loss - 0.25 * _trees.dot(last.slope, moved)
    taken = first | (decreased & jnp.isfinite(norm(new.slope)))
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
    accurate = taken & ~first & (change > 1e-3 * steepest)
    curvature = jnp.where(accurate, _trees.ratio(change, norm(moved)), 0)
    # Steps after the first are as long as the curvature allows.
    start = first_length(x, steepest)
    longest = jnp.where(accurate, _trees.ratio(1, curvature), jnp.inf)
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
  blank = optax.tree.zeros_like(jax.eval_shape(measure, *params))
  zero = jnp.zeros_like(blank.loss)
  carry, measured = jax.lax.scan(
    body,
    (blank._replace(params=params), zero, zero, params.lower),
    jnp.arange(points) == 0,
  )
  return Walk(carry[-1], carry[0].params, *measured)
