"""Penalty-based bilevel gradient descent: value gap and gradient norm."""

import functools

from bilevel_jax import aggregators, descent, oracles, types


def _penalised(oracle, penalty, rescale, fused):
  """A penalised oracle in its fused form, or as two rows and their weights."""
  if penalty is None:
    raise ValueError(
      'the penalty is a weight or a schedule, got None: bj.suggest gives one; '
      'bj.bome needs none.'
    )
  if fused:
    return oracle(penalty=penalty, rescale=rescale)
  weigh = aggregators.scale_by_penalty(penalty, rescale=rescale)
  return oracles.aggregated(oracle(), weigh)


def v_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
  rescale: bool = True,
  fused: bool = True,
  quadrature: int | None = None,
) -> descent.Solver:
  r"""V-PBGD: descends the upper loss plus a multiple of the lower value gap.

  With a third sequence :math:`w` that follows the lower loss's minimiser,

  .. math::
    w_{k+1} &= w_k - \beta \nabla_y g(x_k, w_k) \quad \text{(T times)} \\
    d_k &= c_k \, [ \nabla f(x_k, y_k)
      + \gamma_k (\nabla g(x_k, y_k) - (\nabla_x g(x_k, w_{k+1}), 0)) ] \\
    (x, y)_{k+1} &= \Pi [ (x, y)_k - \alpha d_k ], \qquad
    c_k = \min(1 / \gamma_k, 1)

  It is first-order unless `quadrature` is set. The lower loss need not be
  convex, but its gradient may vanish only at minimisers (the
  Polyak-Lojasiewicz inequality). The result has a gap of the order
  :math:`1 / \gamma^2`; the number of steps grows with :math:`\gamma`.

  The lower variable minimises the penalised loss, so that it has seen the upper
  data. Train it again on the lower loss alone before you report a result.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`; a constant, or a schedule from the number
      of updates so far. A linear ramp from 0 helps if the lower variable starts
      far from its minimiser.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    value: how the value sequence moves, for instance
      `bj.Sequence(optax.sgd(0.1), steps=5)` for :math:`T = 5`; by default one
      step with the optimiser of `lower`. It starts at the lower variable. With
      `restart=True` it does so in each update, as in the authors' analysis, but
      not in their experiments. It stays in the lower variable's set.
    rescale: whether to multiply by :math:`c_k`.
    fused: whether to use one scalar loss and one backward pass. False gives the
      same updates by two rows and `scale_by_penalty`, as an example for other
      aggregators.
    quadrature: None for the gap as a difference of two losses, which in float32
      is mostly rounding at penalties above about 1,000. A number of nodes, for
      instance 2, for the gap and its slope in x as an integral: see
      `value_gap`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`, `gap_rounding`, and `bj.auxiliaries` the value sequence.

  Raises:
    ValueError: if the penalty is negative or a set is empty.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.v_pbgd(toy.problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> params, _ = bj.testing.run(solver, toy.params, 1000)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  low = types.as_sequence(lower, 'lower')
  gap = functools.partial(oracles.value_gap, problem, quadrature=quadrature)
  # The value sequence moves first: the gap is taken at its new value.
  return descent.descend(
    oracles.lower_gradient(problem, of='value'),
    _penalised(gap, penalty, rescale, fused),
    upper=upper,
    lower=low,
    value=types.value_sequence(value, low),
  )


def g_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  rescale: bool = True,
  fused: bool = True,
) -> descent.Solver:
  r"""G-PBGD: descends the upper loss plus a multiple of the lower slope.

  .. math::
    (x, y)_{k+1} = \Pi \left[ (x, y)_k - \alpha c_k \nabla \left(
      f + \tfrac{\gamma_k}{2} \| \nabla_y g \|^2 \right)(x_k, y_k) \right],
      \qquad c_k = \min(1 / \gamma_k, 1)

  It has one loop, no added sequence and one Hessian-vector product per step. If
  the lower loss is not convex, it can stop at points that do not solve the
  problem: see `gradient_norm`. With a lower set, it is right only for
  minimisers in the interior of the set, because the penalty ignores the set.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    rescale: whether to multiply by :math:`c_k`.
    fused: as in `v_pbgd`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower` and
    `penalty`, half the squared norm of the slope.

  Raises:
    ValueError: if the penalty is negative or a set is empty.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.g_pbgd(toy.problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> params, _ = bj.testing.run(solver, toy.params, 1000)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  norm = functools.partial(oracles.gradient_norm, problem)
  return descent.descend(
    _penalised(norm, penalty, rescale, fused),
    upper=upper,
    lower=lower,
  )
