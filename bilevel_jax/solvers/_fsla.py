"""FSLA: steps of the lower variable, the linear system and x in turn."""

from bilevel_jax import descent, evaluation, oracles, types


def fsla(
  problem: types.BilevelProblem,
  *,
  decay: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  linear: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""FSLA: one loop without an inverse Hessian, with recursive momentum for x.

  .. math::
    y_{k+1} &= y_k - \rho \nabla_y g(x_k, y_k) \\
    v_{k+1} &= v_k - \rho [ \nabla_{yy} g(x_k, y_{k+1}) v_k
      - \nabla_y f(x_k, y_{k+1}) ] \\
    d_k &= G(x_k, y_{k+1}, v_{k+1})
      + (1 - a_k) [ d_{k-1} - G(x_{k-1}, y_k, v_k) ] \\
    x_{k+1} &= x_k - \gamma d_k, \qquad
    G = \nabla_x f - \nabla_{xy} g \, v

  The sequences are those of `soba`, but they move in turn, and
  `bj.evaluation.storm` corrects the direction of the upper variable.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex.
    decay: :math:`a_k` in [0, 1], a constant or a schedule from the number of
      updates so far; 1 for no correction.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    linear: how :math:`v` moves; by default with the optimiser of `lower`.

  Returns:
    A solver for `BilevelParams`; `bj.auxiliaries` gives the sequence `linear`.

  Raises:
    ValueError: if a constant decay is not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.fsla(
    ...   toy.problem, decay=0.5, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 200)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Li, Gu and Huang, `A Fully Single Loop Algorithm for Bilevel Optimization
    without Hessian Inverse <https://arxiv.org/abs/2112.04660>`_, 2022.
  """
  turn = lambda of: oracles.implicit_directions(problem, of=of)
  low = types.as_sequence(lower, 'lower')
  return descent.descend(
    turn('lower'),
    turn('linear'),
    evaluation.storm(turn('upper'), decay),
    upper=upper,
    lower=low,
    linear=types.linear_sequence(linear, low),
  )
