"""How far a run is from what it approximates: gap, hypergradient, sets."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import linear_solvers, types
from bilevel_jax.oracles import _implicit, base
from bilevel_jax.projections import AffineSet, Projection


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
      needs no step size.
    steps: how many steps.

  Returns:
    The lower variable after `steps` steps. Compilable.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> square = lambda x, y, batch: jnp.sum((y - 2 * x) ** 2)
    >>> params = bj.BilevelParams(jnp.float32(1.5), jnp.zeros(2))
    >>> problem = bj.BilevelProblem(square, square)
    >>> print(bj.diagnostics.lower_minimiser(problem, params, steps=9))
    [3. 3.]
  """
  lower = base.Loss(problem.lower, 'lower')
  loss = lambda y: lower(params.upper, y, batch)
  solver = optax.with_extra_args_support(optimiser or optax.lbfgs())

  def body(carry, _):
    y, state = carry
    value, slope = jax.value_and_grad(loss)(y)
    updates, state = solver.update(
      slope, state, y, value=value, grad=slope, value_fn=loss
    )
    moved = optax.apply_updates(y, updates)
    # A line search at a minimum can only lose to rounding: keep the better.
    better = loss(moved) <= value
    y = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, y)
    return (y, state), None

  start = (params.lower, solver.init(params.lower))
  (y, _), _ = jax.lax.scan(body, start, length=steps)
  return y


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

  Unlike `bj.values(state)['gap']`, it does not trust the value sequence.

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
    >>> gap = bj.diagnostics.penalty_gap(bj.BilevelProblem(square, square), params, steps=9)
    >>> print(gap)
    4.0
  """
  lower = base.Loss(problem.lower, 'lower')
  y = lower_minimiser(problem, params, batch, optimiser=optimiser, steps=steps)
  here = lower(params.upper, params.lower, batch)
  return here - lower(params.upper, y, batch)


def hypergradient(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  steps: int = 100,
  tolerance: float = 1e-6,
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
    tolerance: at which relative residual they end.
    lower_set: the lower variable's equations, as in `implicit`.

  Returns:
    A pytree of the structure of the upper variable.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> params = bj.BilevelParams(jnp.float32(3.0), jnp.float32(3.0))
    >>> print(bj.hypergradient(problem, params))
    6.0
  """
  terms = _implicit.implicit_terms(
    problem,
    params,
    batch,
    solve=linear_solvers.conjugate_gradient(steps, tolerance=tolerance),
    lower_set=lower_set,
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
  linear_steps: int = 100,
) -> HypergradientDistance:
  r"""Compares the penalised gradient with the hypergradient.

  .. math::
    \nabla_x f(x, y) + \gamma (\nabla_x g(x, y) - \nabla_x g(x, w))
    \quad \text{with} \quad
    \nabla_x f - \nabla_{xy} g \, [\nabla_{yy} g]^{-1} \nabla_y f
    \text{ at the lower minimiser}

  At the minimum over y of the penalised loss and with an exact value sequence,
  the distance is of the order :math:`1 / \gamma`.

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
    gap = lower(x, y, batch) - lower(x, value, batch)
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
