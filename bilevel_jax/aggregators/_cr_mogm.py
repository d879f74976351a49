"""CR-MOGM: running means of the weights of another aggregator."""

import optax

from bilevel_jax import _checks, types
from bilevel_jax.aggregators import _by_weights


def cr_mogm(
  objectives: int,
  aggregator: optax.GradientTransformation,
  *,
  decay: types.ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""CR-MOGM: averages the weights of an aggregator during the run.

  .. math::
    d_k = J^\top w_k, \qquad w_k = \alpha_k w_{k-1} + (1 - \alpha_k) \hat w_k,
    \quad w_{-1} = \mathbf{1} / M

  where :math:`\hat w` are the weights of the aggregator. With noisy gradients
  these depend on the noise; their running mean depends on it less, which
  reduces the bias of the direction.

  Args:
    objectives: the number of rows :math:`M`.
    aggregator: an aggregator with weights for that many rows: `mgda`, `cagrad`
      or `pcgrad` for instance.
    decay: :math:`\alpha_k` in [0, 1], a constant or a schedule.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: at init, if the aggregator has no weights; at the call, if the
      incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or the decay is out of
      range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.cr_mogm(2, bj.aggregators.mgda(2), decay=0.5)
    >>> params, rows = jnp.zeros(2), jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> direction, state = link.update(
    ...   bj.Jacobian(rows), link.init(params), params
    ... )
    >>> print(state.weights, direction)  # Half of (1/2, 1/2), half of (1, 0).
    [0.75 0.25] [1.5 0. ]

  References:
    Zhou, Zhang, Jiang, Zhong, Gu and Zhu, On the Convergence of Stochastic
    Multi-Objective Gradient Manipulation and Beyond, NeurIPS 2022.
  """
  _checks.within('cr_mogm', 'decay', decay, 0, 1)
  if not isinstance(aggregator, optax.GradientTransformation):
    raise TypeError(
      'cr_mogm takes an aggregator, for instance '
      f'bj.aggregators.mgda(objectives), got {aggregator!r}.'
    )
  evaluated = optax.with_extra_args_support(aggregator)

  def start(params, dtype):
    del dtype
    inner = evaluated.init(params)
    if not hasattr(inner, 'weights'):
      raise TypeError(
        'cr_mogm averages the weights of an aggregator, but the state of this '
        f'one, {type(inner).__name__}, has no weights: pass '
        'bj.aggregators.mgda(objectives) for instance.'
      )
    return inner

  def choose(jacobian, state):
    # The compiler removes its direction, which is unused.
    _, inner = evaluated.update(jacobian, state.inner)
    keep = _by_weights.current(decay, state)
    return keep * state.weights + (1 - keep) * inner.weights, inner

  return _by_weights.by_weights('cr_mogm', objectives, choose, start)
