"""ExcessMTL: larger weights for tasks far from their lowest possible loss."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _rows


def excess_mtl(
  objectives: int,
  *,
  rate: types.ScalarOrSchedule = 0.01,
  rest: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
  r"""ExcessMTL: weighs objectives by their excess risk.

  The excess, by how much a loss can still decrease, is estimated from the
  gradient and a diagonal curvature,

  .. math::
    S_m \leftarrow S_m + (\nabla f_m)^2, \qquad
    e_m = \sum_j \frac{(\nabla f_m)_j^2}{\sqrt{S_{mj} + 10^{-7}}}, \qquad
    w_m \leftarrow w_m \exp \left( \eta \frac{e_m}{e_m^0} \right), \quad
    \sum_m w_m = M

  and :math:`d = J^\top w`. The excess ignores the part of a loss that cannot
  decrease, for instance because labels are noisy. The first update determines
  :math:`e^0` and uses :math:`w = 1`. The excess of a task whose first gradient
  is zero stays zero.

  Args:
    objectives: the number of rows :math:`M`.
    rate: :math:`\eta \ge 0`, dimensionless; a constant or a schedule.
    rest: names of the sequences outside the weighting, as in the oracle.

  Returns:
    A transformation from a `Jacobian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian`.
    ValueError: if they have another number of rows, or the rate is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.excess_mtl(2, rate=1.0), jnp.zeros(2)
    >>> state = link.init(params)
    >>> for length in (1.0, 0.0):  # The first gradient vanishes.
    ...   rows = jnp.diag(jnp.array([length, 1.0]))
    ...   direction, state = link.update(bj.Jacobian(rows), state, params)
    >>> print((state.weights / state.weights[0]).round(1))  # exp(0), exp(0.7)
    [1. 2.]

  References:
    He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi and Zhao, `Robust Multi-Task
    Learning with Excess Risks <https://arxiv.org/abs/2402.02009>`_, 2024.
  """
  _checks.within('excess_mtl', 'rate', rate, 0)
  rest = tuple(rest)

  def choose(jacobian, state):
    _rows.require(jacobian, 'excess_mtl', objectives, rows=True)
    squares, first = state.inner
    _rows.require_tracked('excess_mtl', squares, jacobian)
    dtype = state.weights.dtype
    add = lambda s, row: s + row.astype(s.dtype) ** 2
    squares = jax.tree.map(add, squares, jacobian.rows)

    def excess(row, squares):
      curved = jax.tree.map(
        lambda g, s: g.astype(s.dtype) / jnp.sqrt(s + 1e-7), row, squares
      )
      return _trees.dot(row, curved).astype(dtype)

    excesses = jax.vmap(excess)(jacobian.rows, squares)
    is_first = state.count == 0
    first = jnp.where(is_first, excesses, first)
    growth = _by_weights.current(rate, state) * _trees.ratio(excesses, first)
    grown = jax.nn.softmax(jnp.log(state.weights) + growth)
    return jnp.where(is_first, 1, objectives * grown), (squares, first)

  def start(params, dtype):
    squares = _rows.tracked('excess_mtl', objectives, params, rest)
    return squares, jnp.zeros([objectives], dtype)

  return _by_weights.by_weights('excess_mtl', objectives, choose, start)
