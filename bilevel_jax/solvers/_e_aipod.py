"""E-AiPOD: lazy projections below, relaxed or lazy ones above."""

import math
from typing import NamedTuple

import jax
import optax

from bilevel_jax import (
  _checks,
  _sequences,
  descent,
  linear_solvers,
  oracles,
  projections,
  types,
)
from bilevel_jax.oracles import base


def _minus_correction(oracle):
  """What `implicit` gives, as the descent of the sequence `correction`.

  That begins at zero in each update, so that one step of size one ends at it.
  """

  def update_fn(batch, state, params=None, **extra_args):
    gradients, state = oracle.update(batch, state, params, **extra_args)
    minus = optax.tree.scale(-1, gradients.upper)
    return _sequences.only(params, correction=minus), state

  return base.wrapped(
    oracle,
    oracle.init,
    update_fn,
    again=_minus_correction,
    moves=('correction',),
  )


def _corrected(problem):
  """The upper loss's direct gradient plus the sequence `correction`."""
  upper = base.Loss(problem.upper, 'upper')

  def fn(params, batch, inner):
    (value, found), slope = jax.value_and_grad(upper.full, has_aux=True)(
      params.upper, params.lower, batch
    )
    gradient = optax.tree.add(slope, params.correction)
    more = base.outputs_of(problem, upper=found)
    return (value,), _sequences.only(params, upper=gradient), inner, *more

  return base.oracle(
    fn,
    ('upper',),
    counts={'gradients/upper': 1},
    moves=('upper',),
    needs=('upper', 'lower', 'correction'),
    outputs=base.outputs_only(problem, 'upper'),
    linear=True,
  )


@_checks.system_in_solve
def e_aipod(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  solve: oracles.Solve | None = None,
) -> descent.Solver:
  r"""E-AiPOD: projects the lower variable by a coin, the upper one rarely.

  Below, S steps that are projected with probability p, and corrected by a
  control variate (`bj.projections.Lazy`); above, T steps with one correction
  term, and one projection:

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
    upper: how the upper variable moves, its `steps` being T. A plain `set` is
      projected on once, after all of them; `bj.projections.Relaxed` goes
      further before it by :math:`\delta`; `bj.projections.Lazy` projects each
      step with a probability and a control variate of its own, our reading of
      the paper's second variant, see `e_aipod_plan`.
    lower: how the lower variable moves, its `steps` being S, its `set` a
      `bj.projections.Lazy` affine set with the probability p, of the order
      sqrt(lower step size * strong convexity).
    solve: the linear solver, or a `bj.linear_solvers.LinearSystem` of one, see
      `implicit`; by default ten conjugate gradients.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`,
    `bj.counts` the projections that were made.

  Raises:
    TypeError: if the lower set is not a `Lazy` affine set.
    ValueError: if a number of steps is below 1, a probability outside (0, 1] or
      a constant relaxation below 1; at init, if a set has no point in it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> line = bj.projections.affine_set
    >>> solver = bj.e_aipod(
    ...   problem,
    ...   upper=bj.Sequence(
    ...     optax.sgd(0.05), steps=2, set=line([[1.0, -1.0]], [1.0])
    ...   ),
    ...   lower=bj.Sequence(
    ...     optax.sgd(0.3), steps=5,
    ...     set=bj.projections.Lazy(line([[1.0, 1.0]], [1.0]), 0.3, key=0),
    ...   ),
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
  low = types.as_sequence(lower, 'lower')
  high = types.as_sequence(upper, 'upper')
  if low.set is not None and not isinstance(low.set, projections.Lazy):
    raise TypeError(
      'e_aipod projects the lower variable by a coin: give it the set '
      f'bj.projections.Lazy(set, probability, key), got '
      f'{type(low.set).__name__}; aipod projects each step.'
    )
  if not isinstance(high.set, projections.Lazy | projections.Relaxed):
    high = high._replace(set=projections.Relaxed(high.set))
  correction = oracles.implicit(
    problem,
    solve=linear_solvers.as_system(solve, warm_start=False),
    lower_set=None if low.set is None else low.set.set,
    direct=False,
  )
  return descent.descend(
    oracles.lower_gradient(problem),
    _minus_correction(correction),
    _corrected(problem),
    upper=high,
    lower=low,
    correction=types.Sequence(
      optax.sgd(1.0),
      start=lambda params: optax.tree.zeros_like(params.upper),
      restart=True,
    ),
  )


class EAipodPlan(NamedTuple):
  """Settings of `e_aipod` for an accuracy, for its sequences' records.

  Attributes:
    iterations: updates of the solver.
    inner_steps: S.
    upper_steps: T.
    upper_rate: step size of the upper variable.
    lower_rate: step size of the lower variable.
    probability: of a lower projection in a step.
    upper_probability: of an upper projection in a step, or None.
    relaxation: delta, the factor of `bj.projections.Relaxed`.
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
    >>> plan = bj.solvers.e_aipod_plan(0.01, variant='long_loops')
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
