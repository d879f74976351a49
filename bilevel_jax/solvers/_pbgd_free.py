"""PBGD-Free: inner loops on the penalised lower problem."""

from bilevel_jax import descent, oracles, types
from bilevel_jax.oracles import base


def pbgd_free(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
) -> descent.Solver:
  r"""PBGD-Free: x follows the upper slope at the penalised lower solution.

  .. math::
    y_{k+1} &= \Pi [ y - \beta c_k ( \nabla_y f(x_k, y)
      + \gamma_k \nabla_y g(x_k, y) ) ] \quad \text{(K times)} \\
    x_{k+1} &= \Pi [ x_k - \alpha \nabla_x f(x_k, y_{k+1}) ], \qquad
    c_k = \min(1 / \gamma_k, 1)

  It has no value sequence: one copy of the lower variable and one gradient of
  each loss per step. It omits the derivative of the lower solution in x. So it
  is right only if the upper loss is flat around the lower solutions in the
  sense of its authors, as in fine-tuning a shared model. Otherwise it ends at a
  wrong
  point: for f = x^2 + 10 y and g = (y - x + 1)^2 over [-8, 1.5] at x = 0. The
  solution is x = -5, which `alt_pbgd` finds.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, with K `steps`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`.

  Raises:
    ValueError: if the penalty is negative or a set is empty.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.pbgd_free(
    ...   toy.problem, penalty=10.0,
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.1), steps=3),
    ... )

  References:
    Jiang, Xiao, Chen and Chen, `Beyond Value Functions
    <https://arxiv.org/abs/2507.20400>`_, 2025.
  """
  upper_loss, _ = base.checked_losses(problem)
  wanted = problem.outputs
  direct = oracles.gradient(
    lambda params, batch: upper_loss.full(params.upper, params.lower, batch),
    name='upper',
    of='upper',
    outputs=(lambda p: wanted(p).get('upper')) if wanted else None,
  )
  return descent.descend(
    oracles.penalised_lower_gradient(problem, penalty=penalty),
    direct,
    upper=upper,
    lower=lower,
  )
