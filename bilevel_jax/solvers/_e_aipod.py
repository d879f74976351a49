"""E-AiPOD: lazy lower projections, relaxed or lazy upper projections."""

import math
from typing import NamedTuple

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
  """The result of `implicit` as a gradient of the sequence `correction`.

  The sequence starts at zero in each update, so that one step of size one moves
  it to the correction.
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
  upper, _ = base.checked_losses(problem)

  def fn(params, batch, inner):
    (value, output), (slope,) = upper.with_slopes(0)(
      params.upper, params.lower, batch
    )
    gradient = optax.tree.add(slope, params.correction)
    more = base.requested_outputs(problem, upper=output)
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
  r"""E-AiPOD: projects the lower variable at random, the upper one rarely.

  The lower variable takes S steps, each projected with probability p and
  corrected by a control variate (`bj.projections.Lazy`). The upper variable
  takes T steps with one correction term, and one projection:

  .. math::
    w_k &= \nabla F(x_k, y_{k+1}) - \nabla_x f(x_k, y_{k+1}) \\
    x^{(t+1)} &= x^{(t)} - \alpha \, (\nabla_x f(x^{(t)}, y_{k+1}) + w_k),
      \quad t = 0, \dots, T - 1, \quad x^{(0)} = x_k \\
    x_{k+1} &= \Pi_X ( (1 - \delta) x_k + \delta x^{(T)} )

  With p = 1, T = 1 and :math:`\delta = 1` its iterates are those of `aipod`.
  The lower variable is in its set only right after a projection. With T > 1,
  intermediate steps leave the upper set, where the gradient differs. With a
  constant step size this gives an error of the order :math:`\alpha (T - 1)`; a
  decreasing step size removes it.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex
      along its set.
    upper: how the upper variable moves, with T `steps`. A plain `set` is
      enforced once, after all steps; `bj.projections.Relaxed` extrapolates by
      :math:`\delta` before; `bj.projections.Lazy` projects each step with a
      probability and its own control variate, our reading of the paper's second
      variant, see `e_aipod_plan`.
    lower: how the lower variable moves, with S `steps`. Its `set` is a
      `bj.projections.Lazy` affine set with the probability p, of the order
      sqrt(lower step size * strong convexity).
    solve: the linear solver, or a `bj.linear_solvers.LinearSystem`, see
      `implicit`; by default ten conjugate gradients.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`,
    `bj.counts` the evaluated projections.

  Raises:
    TypeError: if the lower set is not a `Lazy` affine set.
    ValueError: if a number of steps is below 1, a probability outside (0, 1] or
      a constant relaxation below 1; at init, if a set is empty.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
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
    >>> params, state = bj.testing.run(solver, params, 200)
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
      'e_aipod takes the lower set bj.projections.Lazy(set, probability, key), '
      f'got {type(low.set).__name__}: use Lazy to project at random, or aipod '
      'to project each step.'
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
  """Settings of `e_aipod` for a given accuracy.

  Attributes:
    iterations: updates of the solver.
    inner_steps: S.
    upper_steps: T.
    upper_rate: step size of the upper variable.
    lower_rate: step size of the lower variable.
    probability: probability of a lower projection in a step.
    upper_probability: probability of an upper projection in a step, or None.
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
  r"""Chooses the settings of `e_aipod` for an accuracy.

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
  :math:`\epsilon^{-3/2} / T^{3/4}` lower projections; we derived its exponents
  from these. For a second variant the paper's abstract claims
  :math:`\epsilon^{-3/2}` projections at both levels; we know no description of
  it. `long_loops` (the same algorithm with long loops) and `lazy_upper` (random
  projections at both levels) are our two readings with this number of
  projections. Neither is a result of the paper.

  Args:
    accuracy: :math:`\epsilon`, in (0, 1].
    variant: `first`, `long_loops` or `lazy_upper`.
    upper_steps: T of `first`.
    strong_convexity: strong convexity of the lower loss along its set, for
      p = sqrt(lower step size * strong convexity).
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
  rounded = lambda number: max(1, round(number))
  inner_steps, relaxation, upper_probability = 1, 1.0, None
  if variant == 'first':
    iterations = rounded(accuracy**-2 / upper_steps)
    low, relaxation = iterations**-0.5, math.sqrt(upper_steps)
  elif variant == 'long_loops':
    iterations = rounded(accuracy**-1.5)
    inner_steps = upper_steps = rounded(accuracy**-0.5)
    low, relaxation = accuracy, math.sqrt(upper_steps)
  elif variant == 'lazy_upper':
    iterations, upper_steps, low = rounded(accuracy**-2), 1, accuracy
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
