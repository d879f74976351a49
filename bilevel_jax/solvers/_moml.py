"""MOML: several upper losses, through the steps of an inner optimiser."""

from collections.abc import Sequence

import optax

from bilevel_jax import aggregators, descent, oracles, types


def moml(
  problem: types.BilevelProblem,
  objectives: int | Sequence[str],
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  aggregator: optax.GradientTransformation | None = None,
  mode: str = 'reverse',
) -> descent.Solver:
  r"""MOML: descends several upper losses after T steps of the inner optimiser.

  .. math::
    y_{k+1} = y_T(x_k), \qquad
    x_{k+1} = x_k - \alpha \sum_m \lambda_m \nabla_x f_m(x_k, y_T(x_k))

  with the weights of `mgda`, or of another aggregator. To learn weights of
  training losses for several validation losses, take the lower loss
  :math:`\sum_i \operatorname{softmax}(x)_i \, \ell_i(y)`.

  Args:
    problem: the upper losses, one function to an array (objectives,) or to
      (array, auxiliary), and the lower loss.
    objectives: the number of upper losses, or their names.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: the inner optimiser, in a record with :math:`T` `steps`, as in `rhg`.
    aggregator: an aggregator for a row of each upper loss; by default `mgda`.
    mode: as in `unrolled`.

  Returns:
    A solver for `BilevelParams` that moves the lower variable to the end of
    the inner loop; `bj.values` gives the upper losses and `lower`.

  Raises:
    ValueError: as `unrolled`; if `lower` has a start without a restart.
    TypeError: if the optimiser of `lower` needs more than gradients.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> rows = lambda y: jnp.stack([(y - 1) ** 2, (y + 1) ** 2])
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: rows(y),
    ...   lower=lambda x, y, batch: jax.nn.softmax(x) @ rows(y),
    ... )
    >>> sgd = optax.sgd(0.4)
    >>> solver = bj.solvers.moml(
    ...   problem, 2, upper=sgd, lower=bj.Sequence(sgd, steps=3)
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.float32(5.0))
    >>> params, _ = bj.testing.run(solver, params, 50)
    >>> print(abs(params.lower) < 1)  # Pareto-optimal.
    True

  References:
    Ye, Lin, Yue, Guo, Xiao and Zhang, `Multi-Objective Meta Learning
    <https://arxiv.org/abs/2102.07121>`_, 2021.
  """
  oracle = oracles.unrolled(
    problem, lower=lower, objectives=objectives, mode=mode
  )
  count = len(objectives) if isinstance(objectives, Sequence) else objectives
  chosen = aggregators.mgda(count) if aggregator is None else aggregator
  return descent.descend(
    oracles.aggregated(oracle, chosen),
    upper=upper,
    # The gradient of the lower variable is its displacement.
    lower=optax.sgd(1.0),
  )
