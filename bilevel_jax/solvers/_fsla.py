"""FSLA: lower step, step of the linear system and upper step in turn."""

from bilevel_jax import descent, evaluation, oracles, types


def fsla(
  problem: types.BilevelProblem,
  *,
  decay: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  linear: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""FSLA: one loop without an inverse Hessian, and momentum for the upper one.

  .. math::
    y_{k+1} &= y_k - \rho \nabla_y g(x_k, y_k) \\
    v_{k+1} &= v_k - \rho [ \nabla_{yy} g(x_k, y_{k+1}) v_k
      - \nabla_y f(x_k, y_{k+1}) ] \\
    d_k &= G(x_k, y_{k+1}, v_{k+1})
      + (1 - a_k) [ d_{k-1} - G(x_{k-1}, y_k, v_k) ] \\
    x_{k+1} &= x_k - \gamma d_k, \qquad
    G = \nabla_x f - \nabla_{xy} g \, v

  The sequences of `soba`, each seeing the ones before it already moved, and the
  correction of `bj.evaluation.storm` on the last of them.

  Args:
    problem: the upper and the lower loss, the lower one strongly convex.
    decay: :math:`a_k` in [0, 1], a constant or a schedule from the number of
      updates so far; 1 for no correction.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves; likewise.
    linear: how :math:`v` moves; by default by the optimiser of `lower`.

  Returns:
    A solver for `BilevelParams`; `bj.auxiliaries` gives the sequence `linear`.

  Raises:
    ValueError: if a constant decay is not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.solvers.fsla(
    ...   problem, decay=0.5, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
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
