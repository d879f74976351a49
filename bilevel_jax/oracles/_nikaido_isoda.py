"""The Nikaido-Isoda penalty: the gap to an equilibrium of two players."""

import jax

from bilevel_jax import types
from bilevel_jax.oracles import _gradient, _penalised, _value_gap, base


def nikaido_isoda(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule | None = None,
  rescale: bool = True,
) -> base.Oracle:
  r"""Gradients of an upper loss and of the gap of a lower zero-sum game.

  The lower variable is a pair :math:`(a, b)`; a minimises a payoff :math:`J`
  and b maximises it. The rows are those of the upper loss and of the function
  of Nikaido and Isoda,

  .. math::
    \nabla f(x, a, b), \qquad
    \nabla_{(x, a, b)} \left[ J(x, a, b') - J(x, a', b) \right]

  where the sequence named `value` is the pair :math:`(a', b')` of best
  responses to b and to a. It is constant in the derivative. By the theorem of
  Danskin, the result is the gradient of :math:`\max_{b'} J(x, a, b') -
  \min_{a'} J(x, a', b)`, which is zero at an equilibrium and positive
  elsewhere.

  Args:
    problem: the upper loss, and as its lower loss the payoff J(x, (a, b),
      batch), a scalar.
    penalty: None for two rows for an aggregator; a weight or a schedule for the
      fused form, as in `value_gap`.
    rescale: whether to divide the fused form by the penalty if that is above
      one.

  Returns:
    An oracle for parameters with the sequences `upper`, `lower`, `value`. It
    measures `upper`, `lower` (the payoff), `gap` and `gap_rounding`, an
    estimate of the rounding error of `gap`. A gap below minus `gap_rounding`
    means that the best responses lag.

  Raises:
    ValueError: if the penalty is negative.
    TypeError: at the call, if a loss is not a scalar or the lower variable is
      not a pair.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(  # Equilibrium at a = b = x / 2.
    ...   upper=lambda x, y, batch: y[0],
    ...   lower=lambda x, y, batch: y[0]**2 - y[1]**2 - x * (y[0] - y[1]),
    ... )
    >>> nash = (jnp.float32(1.0), jnp.float32(1.0))
    >>> params = bj.sequences(upper=jnp.float32(2.0), lower=nash, value=nash)
    >>> oracle = bj.oracles.nikaido_isoda(problem)
    >>> jacobian, state = oracle.update(None, oracle.init(params), params)
    >>> print(bj.values(state)['gap'], jacobian.rows.upper[1])
    0.0 0.0

  References:
    Shen, Yang and Chen, `Principled Penalty-based Methods for Bilevel
    Reinforcement Learning and RLHF <https://arxiv.org/abs/2402.06886>`_, 2024.
    Nikaido and Isoda, Note on non-cooperative convex games, 1955.
  """
  _, payoff = base.checked_losses(problem)

  def gap(x, y, params, batch, known):
    del known
    a, b = _pair(y)
    best_a, best_b = _pair(jax.lax.stop_gradient(params.value))
    between, outputs = payoff.full(x, jax.lax.stop_gradient((a, b)), batch)
    above = payoff(x, (a, best_b), batch)
    low = payoff(x, (best_a, b), batch)
    rounding = _value_gap.rounding_error(above, low)
    return above - low, (between, outputs, rounding)

  # Checks the lower variable before the user's losses see it.
  above = lambda x, y, batch: problem.upper(x, _pair(y), batch)
  counts = {'gradients/upper': 1, 'gradients/lower': 2}
  height = _penalised.Penalty(gap, ('gap', 'gap_rounding'), counts)
  return _penalised.penalised(
    problem._replace(upper=above),
    height,
    penalty=penalty,
    rescale=rescale,
  )


def best_responses(problem: types.BilevelProblem) -> base.Oracle:
  r"""Slopes for the two players' best responses, the sequence `value`.

  .. math::
    \nabla_{a'} J(x, a', b), \qquad - \nabla_{b'} J(x, a, b')

  Args:
    problem: as in `nikaido_isoda`.

  Returns:
    An oracle that measures as `value` the difference of the two payoffs, which
    descends to minus the gap.

  Raises:
    TypeError: at the call, if the payoff is not a scalar or the lower variable
      is not a pair.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y[0],
    ...   lower=lambda x, y, batch: y[0]**2 - y[1]**2 - x * (y[0] - y[1]),
    ... )
    >>> zero = (jnp.float32(0.0), jnp.float32(0.0))
    >>> params = bj.sequences(upper=jnp.float32(2.0), lower=zero, value=zero)
    >>> oracle = bj.oracles.best_responses(problem)
    >>> gradients, _ = oracle.update(None, oracle.init(params), params)
    >>> print(gradients.value[0], gradients.value[1])
    -2.0 -2.0

  References:
    Shen, Yang and Chen, `Principled Penalty-based Methods for Bilevel
    Reinforcement Learning and RLHF <https://arxiv.org/abs/2402.06886>`_, 2024.
  """
  _, payoff = base.checked_losses(problem)

  def loss(params, batch):
    (a, b), (best_a, best_b) = _pair(params.lower), _pair(params.value)
    low = payoff(params.upper, (best_a, b), batch)
    return low - payoff(params.upper, (a, best_b), batch)

  return _gradient.gradient(loss, name='value', of='value', counts_as='lower')


def _pair(y):
  """The two players' variables; raises TypeError unless it is a pair."""
  if not isinstance(y, tuple | list) or len(y) != 2:
    raise TypeError(
      'the lower variable of a zero-sum game is a pair (a, b), where a '
      f'minimises the payoff and b maximises it, got {type(y).__name__}.'
    )
  return y
