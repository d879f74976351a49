"""How far a run is from what it approximates: gap, hypergradient, sets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, linear_solvers, types
from bilevel_jax.oracles import _implicit, _value_gap, base
from bilevel_jax.projections import AffineSet, Projection, _affine


def _checked(found: Any, fine: chex.Array, error: Callable[[], str]) -> Any:
  """What was found; if it is not fine, an error, or nan where traced."""
  if _affine.is_concrete(fine) and not fine:
    raise ValueError(error())
  return jax.tree.map(lambda a: jnp.where(fine, a, jnp.nan), found)


def lower_minimiser(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  optimiser: optax.GradientTransformation | None = None,
  steps: int = 1000,
) -> Any:
  """Minimises the lower loss from the lower variable, the upper one fixed.

  Args:
    problem: the upper and the lower loss; only the lower is used.
    params: where to start, and the upper variable.
    batch: the batch of the lower loss, the same in each step.
    optimiser: any optax optimiser; by default L-BFGS with a line search, which
      needs no step size, and at the end a hundred steps without one.
    steps: how many steps.

  Returns:
    The best lower variable seen in `steps` steps: of least loss, and where
    losses differ by rounding alone, of least slope. Compilable.

  Raises:
    ValueError: if the slope is still more than half of the loss's fall over the
      distance from the start, or the loss is not finite: it is unbounded below,
      or far from minimised. Where values are traced, by `jax.jit` for instance,
      the result is nan instead.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> square = lambda x, y, batch: jnp.sum((y - 2 * x) ** 2)
    >>> params = bj.BilevelParams(jnp.float32(1.5), jnp.zeros(2))
    >>> problem = bj.BilevelProblem(square, square)
    >>> y = bj.diagnostics.lower_minimiser(problem, params, steps=9)
    >>> print(y)
    [3. 3.]
  """
  steps = _checks.whole('lower_minimiser', 'steps', steps)
  lower = base.Loss(problem.lower, 'lower')
  loss = lambda y: lower(params.upper, y, batch)

  def run(solver, y, best, length):
    solver = optax.with_extra_args_support(solver)

    def body(carry, _):
      y, state, best = carry
      value, slope = jax.value_and_grad(loss)(y)
      now = (y, value, optax.tree.norm(slope))
      # Where losses differ by rounding alone, the smaller slope is the better.
      room = 100 * jnp.finfo(value.dtype).eps * jnp.abs(best[1])
      better = (value < best[1] - room) | (
        (value <= best[1] + room) & (now[2] < best[2])
      )
      best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now, best)
      updates, state = solver.update(
        slope, state, y, value=value, grad=slope, value_fn=loss
      )
      return (optax.apply_updates(y, updates), state, best), value

    carry: Any = (y, solver.init(y), best)
    # One more: the last step is measured too.
    (*_, best), values = jax.lax.scan(body, carry, length=length + 1)
    return best, values[0]

  infinite = jnp.asarray(jnp.inf, jax.eval_shape(loss, params.lower).dtype)
  best = (params.lower, infinite, infinite)
  solver = optimiser or optax.lbfgs()
  best, first = run(solver, params.lower, best, steps)
  if optimiser is None:
    # A line search sees no further than the rounding of the loss.
    best, _ = run(optax.lbfgs(1.0, linesearch=None), best[0], best, 100)
  y, value, slope = best
  # On the way to a minimum, the slope falls below that of the way.
  fell, moved = first - value, optax.tree.norm(optax.tree.sub(y, params.lower))
  room = jnp.finfo(value.dtype).eps ** 0.5
  noise = (fell < room * jnp.abs(value)) | (moved < room * optax.tree.norm(y))
  fine = jnp.isfinite(value) & (noise | (slope * moved <= fell / 2))
  return _checked(
    y,
    fine,
    lambda: (
      f'lower_minimiser: after {steps} steps the lower loss is {value:.3g} and '
      f'its slope still {slope:.3g}: it is unbounded below, or far from its '
      'minimum. Add a strongly convex term to it, or take more steps or '
      'another optimiser.'
    ),
  )


def penalty_gap(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  optimiser: optax.GradientTransformation | None = None,
  steps: int = 1000,
) -> chex.Array:
  r"""How far the lower loss is above its minimum, to the accuracy of a solve.

  .. math::
    g(x, y) - \min_{y'} g(x, y')

  Unlike `bj.values(state)['gap']`, it does not trust the value sequence. Where
  the difference of the two losses is rounding, it is the integral of the slope
  between the two points, as with `quadrature` in `bj.value_gap`.

  Args:
    problem: the upper and the lower loss.
    params: the two variables.
    batch: the batch of the lower loss.
    optimiser: as in `lower_minimiser`.
    steps: as in `lower_minimiser`.

  Returns:
    A scalar, in units of the lower loss.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(3.0))
    >>> problem = bj.BilevelProblem(square, square)
    >>> print(bj.diagnostics.penalty_gap(problem, params, steps=9))
    4.0
  """
  lower = base.Loss(problem.lower, 'lower')
  y = lower_minimiser(problem, params, batch, optimiser=optimiser, steps=steps)
  return _value_gap.accurate_gap(lower, *params, y, batch)


def hypergradient(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  steps: int = 1000,
  tolerance: float = 0.0,
  lower_set: AffineSet | None = None,
) -> Any:
  r"""The implicit gradient of the upper loss at a lower minimiser.

  .. math::
    \nabla_x f - \nabla_{xy} g \, [\nabla_{yy} g]^{-1} \, \nabla_y f

  Args:
    problem: the upper and the lower loss.
    params: the upper variable, and the lower one at a minimiser with a positive
      definite Hessian: see `lower_minimiser`.
    batch: the batch of both losses.
    steps: at most so many conjugate-gradient steps.
    tolerance: at which relative residual they end; by default at rounding.
    lower_set: the lower variable's equations, as in `implicit`.

  Returns:
    A pytree of the structure of the upper variable.

  Raises:
    ValueError: if the linear system is not solved, to a relative residual of
      the cube root of rounding (5e-3 in float32, 6e-6 in float64) or the
      tolerance: the Hessian is singular or indefinite, or the steps are too
      few. Where values are traced, by `jax.jit` for instance, the result is nan
      instead.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> params = bj.BilevelParams(jnp.float32(3.0), jnp.float32(3.0))
    >>> print(bj.diagnostics.hypergradient(problem, params))
    6.0
  """
  conjugate = linear_solvers.conjugate_gradient(steps, tolerance=tolerance)

  def solve(operator, right, start):
    found = conjugate(operator, right, start)
    left = optax.tree.norm(optax.tree.sub(right, operator(found)))
    size = optax.tree.norm(right)
    room = jnp.maximum(tolerance, jnp.finfo(size.dtype).eps ** (1 / 3))
    return _checked(
      found,
      left <= room * size,
      lambda: (
        'hypergradient: conjugate gradients leave a relative residual of '
        f'{left / size:.1e}: the lower Hessian is singular or indefinite here, '
        'or its condition needs more steps or float64. Add a strongly convex '
        'term to the lower loss, and evaluate at its lower_minimiser.'
      ),
    )

  terms = _implicit.implicit_terms(
    problem, params, batch, solve=solve, lower_set=lower_set
  )
  return optax.tree.add(terms.direct, terms.correction)


class HypergradientDistance(NamedTuple):
  """How the penalised upper gradient differs from the hypergradient.

  Attributes:
    distance: norm of the difference.
    relative: the same, divided by the norm of the hypergradient.
    cosine: of the angle between the two.
  """

  distance: chex.Array
  relative: chex.Array
  cosine: chex.Array


def hypergradient_distance(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  penalty: chex.Numeric,
  value: Any,
  solve_steps: int = 1000,
  linear_steps: int = 1000,
) -> HypergradientDistance:
  r"""Compares the penalised gradient with the hypergradient.

  .. math::
    \nabla_x f(x, y) + \gamma (\nabla_x g(x, y) - \nabla_x g(x, w))
    \quad \text{with} \quad
    \nabla_x f - \nabla_{xy} g \, [\nabla_{yy} g]^{-1} \nabla_y f
    \text{ at the lower minimiser}

  At the minimum over y of the penalised loss and with an exact value sequence,
  the distance is of the order :math:`1 / \gamma`. The two slopes of the lower
  loss are compared as in `penalty_gap`, without the rounding of a difference.

  Args:
    problem: the upper and the lower loss.
    params: the two variables of a run.
    batch: the batch of both losses.
    penalty: the weight :math:`\gamma`.
    value: the value sequence :math:`w`, `bj.auxiliaries(state)['value']`.
    solve_steps: steps of the solve for the lower minimiser.
    linear_steps: steps of the linear solve.

  Returns:
    A `HypergradientDistance` of scalars.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> x = jnp.float32(3.0)  # min_y f + 9 g is at y = 0.9 x
    >>> found = bj.diagnostics.hypergradient_distance(
    ...   problem, bj.BilevelParams(x, 0.9 * x), penalty=9.0, value=x,
    ... )
    >>> print(found.relative.round(3), found.cosine)
    0.1 1.0
  """
  upper = base.Loss(problem.upper, 'upper')
  lower = base.Loss(problem.lower, 'lower')
  x, y = params

  def penalised(x):
    gap = _value_gap.accurate_gap(lower, x, y, value, batch)
    return upper(x, y, batch) + penalty * gap

  minimiser = lower_minimiser(problem, params, batch, steps=solve_steps)
  exact = hypergradient(
    problem, params._replace(lower=minimiser), batch, steps=linear_steps
  )
  ours = jax.grad(penalised)(x)
  distance = optax.tree.norm(optax.tree.sub(ours, exact))
  size, our_size = optax.tree.norm(exact), optax.tree.norm(ours)
  return HypergradientDistance(
    distance=distance,
    relative=distance / size,
    cosine=optax.tree.vdot(ours, exact) / (size * our_size),
  )


def feasibility(
  params: Any, **sets: Projection | None
) -> dict[str, chex.Array]:
  r"""How far sequences are outside their sets.

  .. math::
    \| z - \Pi(z) \|

  Args:
    params: a NamedTuple of sequences.
    **sets: by name of a sequence, its projection, as in `project`.

  Returns:
    The Euclidean distance by name, in units of the sequence.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> params = bj.BilevelParams(jnp.float32(-2.0), jnp.float32(1.0))
    >>> positive = optax.projections.projection_non_negative
    >>> print(bj.diagnostics.feasibility(params, upper=positive)['upper'])
    2.0
  """
  return {
    name: optax.tree.norm(
      optax.tree.sub(getattr(params, name), set_(getattr(params, name)))
    )
    for name, set_ in sets.items()
    if set_ is not None
  }
