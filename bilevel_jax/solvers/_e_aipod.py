"""E-AiPOD: equality-constrained bilevel descent that seldom projects."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from bilevel_jax import _sequences, combinators, oracles, projections, types
from bilevel_jax.oracles import _oracle
from bilevel_jax.solvers import _aid


def _remember(
  oracle: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Puts an oracle's upper gradient into the sequence `correction`."""

  def update_fn(batch, state, params=None, **extra_args):
    gradients, state = oracle.update(batch, state, params, **extra_args)
    new = optax.tree.sub(gradients.upper, params.correction)
    return _sequences.only(params, correction=new), state

  return optax.GradientTransformationExtraArgs(oracle.init, update_fn)


def _corrected(
  problem: types.BilevelProblem,
) -> optax.GradientTransformationExtraArgs:
  """The upper loss's direct gradient plus the sequence `correction`."""
  upper = _oracle.scalar_loss(problem.upper, 'upper')

  def fn(params, batch, inner):
    value, slope = jax.value_and_grad(upper)(params.upper, params.lower, batch)
    gradient = optax.tree.add(slope, params.correction)
    return (value,), _sequences.only(params, upper=gradient), inner

  return oracles.oracle(fn, ('upper',), counts={'gradients/upper': 1})


def e_aipod(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  probability: types.ScalarOrSchedule,
  lower_set: projections.AffineSet | None = None,
  upper_set: projections.Projection | None = None,
  inner_steps: int = 1,
  upper_steps: int = 1,
  relaxation: types.ScalarOrSchedule = 1.0,
  upper_probability: types.ScalarOrSchedule | None = None,
  control_variate: bool = True,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  upper_batch: Callable[[Any, Any], Any] | None = None,
  solve: oracles.Solve | None = None,
  linear_batch: Callable[[Any, Any], Any] | None = None,
  warm_start: bool = False,
  key: Any = 0,
  wrap: _aid.Wrapper = _aid.same,
) -> optax.GradientTransformationExtraArgs:
  r"""E-AiPOD: projects the lower variable by a coin, the upper one rarely.

  Below, S steps that are projected with probability p, and corrected by a
  control variate (`lazy_projection`); above, T steps with one correction term,
  and one projection:

  .. math::
    w_k &= \nabla F(x_k, y_{k+1}) - \nabla_x f(x_k, y_{k+1}) \\
    x^{(t+1)} &= x^{(t)} - \alpha \, (\nabla_x f(x^{(t)}, y_{k+1}) + w_k),
      \quad t = 0, \dots, T - 1, \quad x^{(0)} = x_k \\
    x_{k+1} &= \Pi_X ( (1 - \delta) x_k + \delta x^{(T)} )

  With p = 1, T = 1 and :math:`\delta = 1`, the iterates of `aipod`. The lower
  variable is in its set only right after a projection. With T > 1 the steps in
  between leave the upper set, where the gradient differs: with a constant step
  size the result is off by the order of :math:`\alpha (T - 1)`, which a step
  size that falls removes.

  Args:
    problem: the upper and the lower loss, the lower one strongly convex along
      its set.
    upper: optimiser of the upper variable, one step for each of the T.
    lower: optimiser of the lower variable.
    probability: p in (0, 1] of a lower projection in a step, a constant or a
      schedule from the number of lower steps so far; of the order
      sqrt(lower step size * strong convexity).
    lower_set: the lower variable's equations, see `affine_set`; None for none.
    upper_set: projects the upper variable; None for the whole space.
    inner_steps: lower steps S in one update.
    upper_steps: upper steps T in one update.
    relaxation: :math:`\delta \ge 1`, how far to go beyond x^(T); a constant or
      a schedule from the number of updates so far.
    upper_probability: None for the one projection above; or a probability with
      which each of the T steps is projected lazily, as those below, with a
      control variate of its own: our reading of the paper's second variant, see
      `e_aipod_plan`. The relaxation then has to be 1.
    control_variate: False leaves it out: a control that does not converge.
    inner_batch: the batch of lower step t, from (batch, t); by default the
      whole batch.
    upper_batch: the batch of upper step t, likewise.
    solve: the linear solver, see `implicit`; by default ten conjugate
      gradients.
    linear_batch: the batch of product t of the solver, likewise.
    warm_start: whether the solver starts from its last solution.
    key: PRNG key of the coins and of a random solver, or a whole number.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`,
    `bj.counts` the projections that were made.

  Raises:
    TypeError: if `lower_set` is no `AffineSet`.
    ValueError: if a number of steps is below 1, a probability outside (0, 1], a
      constant relaxation below 1, or relaxation and `upper_probability` are
      both given; at init, if a set has no point in it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.e_aipod(
    ...   problem, upper=optax.sgd(0.05), lower=optax.sgd(0.3),
    ...   probability=0.3, inner_steps=5, upper_steps=2,
    ...   lower_set=bj.affine_set([[1.0, 1.0]], [1.0]),
    ...   upper_set=bj.affine_set([[1.0, -1.0]], [1.0]),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(3), bj.counts(state)['projections/upper'])
    [ 0.5 -0.5] 200

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.
  """
  if isinstance(relaxation, (int, float)) and not relaxation >= 1:
    raise ValueError(f'relaxation is at least 1, got {relaxation}.')
  relaxed = not isinstance(relaxation, (int, float)) or relaxation != 1
  if upper_probability is not None and relaxed:
    raise ValueError(
      'upper_probability projects within the upper steps, which leaves nothing '
      'to relax: leave relaxation at 1, or upper_probability at None.'
    )
  below = _aid.lower_descent(
    problem,
    wrap,
    lower,
    projections.lazy_projection(
      probability,
      key=key,
      control_variate=control_variate,
      lower=lower_set,
    ),
  )
  correction = oracles.implicit(
    problem,
    solve=solve,
    lower_set=lower_set,
    warm_start=warm_start,
    linear_batch=linear_batch,
    key=key,
    direct=False,
  )

  above = optax.chain(
    wrap(_corrected(problem)), combinators.per_sequence(upper=upper)
  )
  if upper_probability is None:
    above = optax.chain(
      combinators.repeat(above, upper_steps, upper_batch),
      optax.scale_by_schedule(relaxation)
      if callable(relaxation)
      else optax.scale(relaxation),
      projections.project(upper=upper_set),
    )
  else:
    lazily = projections.lazy_projection(
      upper_probability,
      key=key,
      control_variate=control_variate,
      upper=upper_set,
    )
    above = combinators.repeat(
      optax.chain(above, lazily), upper_steps, upper_batch
    )
  return combinators.auxiliary(
    combinators.alternate(
      combinators.repeat(below, inner_steps, inner_batch),
      _remember(wrap(correction)),
      above,
    ),
    restart=('correction',),
    correction=lambda params: optax.tree.zeros_like(params.upper),
  )


class EAipodPlan(NamedTuple):
  """Settings of `e_aipod` for an accuracy; all but the first are arguments.

  Attributes:
    iterations: updates of the solver.
    inner_steps: S.
    upper_steps: T.
    upper_rate: step size of the upper variable.
    lower_rate: step size of the lower variable.
    probability: of a lower projection in a step.
    upper_probability: of an upper projection in a step, or None.
    relaxation: delta.
  """

  iterations: int
  inner_steps: int
  upper_steps: int
  upper_rate: float
  lower_rate: float
  probability: float
  upper_probability: float | None
  relaxation: float


def e_aipod_plan(
  accuracy: float,
  *,
  variant: str = 'first',
  upper_steps: int = 1,
  strong_convexity: float = 1.0,
  upper_rate: float = 1.0,
  lower_rate: float = 1.0,
) -> EAipodPlan:
  r"""How the settings of `e_aipod` scale with the accuracy asked for.

  Up to constants and logarithms, for a squared stationarity measure of
  :math:`\epsilon`:

  ============ =================== ================= =================
  variant      updates K           S, T              lower step
  ============ =================== ================= =================
  `first`      eps^-2 / T          1, T              K^-1/2
  `long_loops` eps^-3/2            eps^-1/2 both     eps
  `lazy_upper` eps^-2              1, 1              eps
  ============ =================== ================= =================

  `first` needs of the order :math:`\epsilon^{-2} / T` upper and
  :math:`\epsilon^{-3/2} / T^{3/4}` lower projections; the exponents are a
  derivation from that. For a second variant the paper's abstract claims
  :math:`\epsilon^{-3/2}` projections at both levels, and no description of it
  is known to us. `long_loops` (the same algorithm with long loops) and
  `lazy_upper` (both levels projected by coins) are two readings that count so
  many projections. They are ours: neither is a result of the paper.

  Args:
    accuracy: :math:`\epsilon`, in (0, 1].
    variant: `first`, `long_loops` or `lazy_upper`.
    upper_steps: T of `first`.
    strong_convexity: of the lower loss along its set; with the lower step size
      it sets p = sqrt(step * strong convexity).
    upper_rate: the constant of the upper step size.
    lower_rate: the constant of the lower step size.

  Returns:
    An `EAipodPlan`.

  Raises:
    ValueError: if the accuracy is not in (0, 1] or the variant is unknown.

  Example:
    >>> import bilevel_jax as bj
    >>> plan = bj.e_aipod_plan(0.01, variant='long_loops')
    >>> print(plan.iterations, plan.inner_steps, plan.upper_steps)
    1000 10 10

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.
  """
  if not 0 < accuracy <= 1:
    raise ValueError(f'accuracy is in (0, 1], got {accuracy}.')
  whole = lambda number: max(1, round(number))
  inner_steps, relaxation, upper_probability = 1, 1.0, None
  if variant == 'first':
    iterations = whole(accuracy**-2 / upper_steps)
    low, relaxation = iterations**-0.5, math.sqrt(upper_steps)
  elif variant == 'long_loops':
    iterations = whole(accuracy**-1.5)
    inner_steps = upper_steps = whole(accuracy**-0.5)
    low, relaxation = accuracy, math.sqrt(upper_steps)
  elif variant == 'lazy_upper':
    iterations, upper_steps, low = whole(accuracy**-2), 1, accuracy
  else:
    raise ValueError(
      f"variant is 'first', 'long_loops' or 'lazy_upper', got {variant!r}."
    )
  step = lower_rate * low
  probability = min(1.0, math.sqrt(step * strong_convexity))
  if variant == 'lazy_upper':
    upper_probability = min(1.0, math.sqrt(accuracy))
  return EAipodPlan(
    iterations=iterations,
    inner_steps=inner_steps,
    upper_steps=upper_steps,
    upper_rate=upper_rate / (upper_steps * math.sqrt(iterations)),
    lower_rate=step,
    probability=probability,
    upper_probability=upper_probability,
    relaxation=relaxation,
  )
