"""MEHA: the value gap of a Moreau envelope, for nonconvex lower losses."""

from bilevel_jax import descent, oracles, types


def meha(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  proximity: float,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""MEHA: one first-order loop on the Moreau envelope of the lower problem.

  .. math::
    w_{k+1} &= w_k - \eta [ \nabla_y g(x_k, w_k)
      + (w_k - y_k) / \gamma ] \\
    d_k &= c_k \, [ \nabla f(x_k, y_k) + \sigma_k ( \nabla g(x_k, y_k)
      - (\nabla_x g(x_k, w_{k+1}), (y_k - w_{k+1}) / \gamma) ) ]

  It is `v_pbgd` with a value sequence that stays near the lower variable. For a
  small :math:`\gamma`, its problem is strongly convex even if the lower loss is
  not convex. The gap and the gradient of the penalty are smaller than those of
  the value function. Both variables move at once; the authors evaluate the
  slope in y at the new :math:`x_{k+1}`.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\sigma_k \ge 0`, a constant or a slowly rising schedule.
    proximity: :math:`\gamma > 0`; below 1 / (largest negative curvature of the
      lower loss).
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    value: how the value sequence moves; by default with the optimiser of
      `lower`.

  Returns:
    A solver for `BilevelParams`, as `v_pbgd`.

  Raises:
    ValueError: if the penalty is negative or the proximity not positive.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.meha(
    ...   toy.problem, penalty=10.0, proximity=1.0,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Liu, Liu, Yao, Zeng and Zhang, `Moreau Envelope for Nonconvex Bi-Level
    Optimization <https://arxiv.org/abs/2405.09927>`_, 2024.
  """
  if not proximity > 0:
    raise ValueError(f'proximity is a length > 0, got {proximity}.')
  low = types.as_sequence(lower, 'lower')
  return descent.descend(
    oracles.lower_gradient(problem, of='value', proximity=proximity),
    oracles.value_gap(problem, penalty=penalty, proximity=proximity),
    upper=upper,
    lower=low,
    value=types.value_sequence(value, low),
  )
