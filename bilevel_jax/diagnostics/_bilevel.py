"""Errors of a run: value gap, hypergradient, distance from sets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _sequences, linear_solvers, types
from bilevel_jax.oracles import _implicit, _value_gap, base
from bilevel_jax.projections import AffineSet, Projection, _affine


def _checked(result: Any, valid: chex.Array, error: Callable[[], str]) -> Any:
  """Raises ValueError for an invalid result, or makes it NaN if traced."""
  if _affine.is_concrete(valid) and not valid:
    raise ValueError(error())
  return jax.tree.map(lambda a: jnp.where(valid, a, jnp.nan), result)


def lower_minimiser(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  optimiser: optax.GradientTransformation | None = None,
  steps: int = 1000,
) -> Any:
  """Minimises the lower loss for a fixed upper variable.

  Args:
    problem: the upper and the lower loss; only the lower loss is used.
    params: the upper variable, and the start of the lower variable.
    batch: the batch of the lower loss in all steps.
    optimiser: any optax optimiser; by default L-BFGS with a line search, which
      needs no step size, and then 100 steps without a line search.
    steps: the number of steps.

  Returns:
    The lower variable of smallest loss in `steps` steps; if losses differ by
    rounding only, that of smallest slope. It can be compiled.

  Raises:
    ValueError: if the loss is not finite, or the slope is still more than half
      of the decrease of the loss over the distance from the start. The loss is
      then unbounded below, or far from its minimum. In compiled functions, the
      result is NaN instead.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.testing.toy_problem().problem
    >>> params = bj.BilevelParams(jnp.full(2, 3.0), jnp.zeros(2))
    >>> print(bj.diagnostics.lower_minimiser(problem, params, steps=9))
    [3. 3.]
  """
  steps = _checks.whole_number('lower_minimiser', 'steps', steps)
  _, lower = base.checked_losses(problem)
  _sequences.require_sequences(params, ('upper', 'lower'), 'lower_minimiser')
  loss = lambda y: lower(params.upper, y, batch)

  def run(solver, y, best, length):
    solver = optax.with_extra_args_support(solver)

    def body(carry, _):
      y, state, best = carry
      value, slope = jax.value_and_grad(loss)(y)
      now = (y, value, optax.tree.norm(slope))
      # If losses differ by rounding only, the smaller slope is better.
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
    # One step more, because losses are measured before each step.
    (*_, best), values = jax.lax.scan(body, carry, length=length + 1)
    return best, values[0]

  infinite = jnp.asarray(jnp.inf, jax.eval_shape(loss, params.lower).dtype)
  best = (params.lower, infinite, infinite)
  solver = optimiser or optax.lbfgs()
  best, first = run(solver, params.lower, best, steps)
  if optimiser is None:
    # A line search stops at the rounding of the loss.
    best, _ = run(optax.lbfgs(1.0, linesearch=None), best[0], best, 100)
  y, value, slope = best
  # Near a minimum, the slope is smaller than the mean slope of the path.
  fall, moved = first - value, optax.tree.norm(optax.tree.sub(y, params.lower))
  room = jnp.finfo(value.dtype).eps ** 0.5
  noise = (fall < room * jnp.abs(value)) | (moved < room * optax.tree.norm(y))
  valid = jnp.isfinite(value) & (noise | (slope * moved <= fall / 2))
  return _checked(
    y,
    valid,
    lambda: (
      f'lower_minimiser: after {steps} steps the lower loss is {value:.3g} and '
      f'its slope still {slope:.3g}: it is unbounded below, or far from its '
      'minimum. Add a strongly convex term, take more steps or use another '
      'optimiser.'
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
  r"""The distance of the lower loss from its minimum, by solving for it.

  .. math::
    g(x, y) - \min_{y'} g(x, y')

  Unlike `bj.values(state)['gap']`, it does not depend on the value sequence. If
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
    >>> problem = bj.testing.toy_problem().problem
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.array([0.0, 2.0]))
    >>> print(bj.diagnostics.penalty_gap(problem, params, steps=9))
    4.0
  """
  _, lower = base.checked_losses(problem)
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
    steps: the largest number of conjugate-gradient steps.
    tolerance: the relative residual at which to stop; by default at rounding.
    lower_set: the lower variable's equations, as in `implicit`.

  Returns:
    A pytree of the structure of the upper variable.

  Raises:
    ValueError: if the relative residual of the linear system is above the cube
      root of rounding (5e-3 in float32, 6e-6 in float64) and above the
      tolerance: the Hessian is singular or indefinite, or the steps are too
      few. In compiled functions, the result is NaN instead.

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
    solution = conjugate(operator, right, start)
    residual = optax.tree.norm(optax.tree.sub(right, operator(solution)))
    size = optax.tree.norm(right)
    room = jnp.maximum(tolerance, jnp.finfo(size.dtype).eps ** (1 / 3))
    return _checked(
      solution,
      residual <= room * size,
      lambda: (
        'hypergradient: conjugate gradients stop at a relative residual of '
        f'{residual / size:.1e}: the lower Hessian is singular or indefinite, '
        'or ill-conditioned, so that it needs more steps or float64. Add a '
        'strongly convex term to the lower loss, and evaluate at its '
        'lower_minimiser.'
      ),
    )

  terms = _implicit.implicit_terms(
    problem, params, batch, solve=solve, lower_set=lower_set
  )
  return optax.tree.add(terms.direct, terms.correction)


class HypergradientDistance(NamedTuple):
  """The difference between the penalised upper gradient and the hypergradient.

  Attributes:
    distance: norm of the difference.
    relative: norm of the difference over the norm of the hypergradient.
    cosine: cosine of the angle between the two.
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
  the distance is of the order :math:`1 / \gamma`. The difference of the two
  lower slopes is evaluated as in `penalty_gap`, without cancellation.

  Args:
    problem: the upper and the lower loss.
    params: the two variables of a run.
    batch: the batch of both losses.
    penalty: the weight :math:`\gamma`.
    value: the value sequence :math:`w`, `bj.auxiliaries(state)['value']`.
    solve_steps: steps of `lower_minimiser`.
    linear_steps: conjugate-gradient steps.

  Returns:
    A `HypergradientDistance` of scalars.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> x = jnp.float32(3.0)  # min_y f + 9 g is at y = 0.9 x
    >>> result = bj.diagnostics.hypergradient_distance(
    ...   problem, bj.BilevelParams(x, 0.9 * x), penalty=9.0, value=x,
    ... )
    >>> print(result.relative.round(3), result.cosine)
    0.1 1.0
  """
  upper, lower = base.checked_losses(problem)
  x, y = params

  def penalised(x):
    gap = _value_gap.accurate_gap(lower, x, y, value, batch)
    return upper(x, y, batch) + penalty * gap

  minimiser = lower_minimiser(problem, params, batch, steps=solve_steps)
  exact = hypergradient(
    problem, params._replace(lower=minimiser), batch, steps=linear_steps
  )
  slope = jax.grad(penalised)(x)
  distance = optax.tree.norm(optax.tree.sub(slope, exact))
  size, slope_size = optax.tree.norm(exact), optax.tree.norm(slope)
  return HypergradientDistance(
    distance=distance,
    relative=distance / size,
    cosine=optax.tree.vdot(slope, exact) / (size * slope_size),
  )


def feasibility(
  params: Any, **sets: Projection | None
) -> dict[str, chex.Array]:
  r"""Distances of sequences from their sets.

  .. math::
    \| z - \Pi(z) \|

  Args:
    params: a NamedTuple of sequences.
    **sets: by name of a sequence, its projection.

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
