"""DB-MTL: gradients of log losses, scaled to equal lengths."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _rows


def db_mtl(
  objectives: int,
  *,
  decay: types.ScalarOrSchedule = 0.9,
  rest: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
  r"""DB-MTL: balances losses by logarithms and gradients by lengths.

  .. math::
    q_m \leftarrow \beta q_m + (1 - \beta) \nabla \log (f_m + 10^{-8}), \qquad
    d = \sum_m \frac{\max_i \| q_i \|}{\| q_m \|} q_m

  A zero running mean is left out.

  Args:
    objectives: the number of rows.
    decay: :math:`\beta` in [0, 1], a constant or a schedule; the authors let it
      fall as a power of the number of updates. The mean starts at zero.
    rest: names of the sequences outside the weighting, as in the oracle.

  Returns:
    A transformation from a `Jacobian` with positive losses to one gradient. The
    weights in its state are those of the running means.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian`.
    ValueError: if they have another number of rows or no losses, or the decay
      is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.db_mtl(2, decay=0.0), jnp.zeros(2)
    >>> rows = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    >>> jacobian = bj.Jacobian(rows, values=jnp.array([1.0, 6.0]))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print(direction.round(3))  # Lengths 2 and 1/2 become 2.
    [2. 2.]

  References:
    Lin, Jiang, Ye, Zhang, Chen, Chen, Liu and Kwok, `Dual-Balancing for
    Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, 2023.
  """
  _checks.within('db_mtl', 'decay', decay, 0, 1)
  rest = tuple(rest)

  def aggregate(jacobian, state):
    _rows.require_tracked('db_mtl', state.inner, jacobian)
    dtype = state.weights.dtype
    logs = 1 / (jacobian.values + 1e-8)
    keep = _by_weights.current(decay, state)

    def move(old, row, scale):
      new = row.astype(old.dtype) * scale.astype(old.dtype)
      return old + (1 - keep).astype(old.dtype) * (new - old)

    one = lambda old, row, scale: jax.tree.map(
      lambda a, b: move(a, b, scale), old, row
    )
    means = jax.vmap(one)(state.inner, jacobian.rows, logs)
    gramian = _rows.gramian(types.Jacobian(means))
    lengths = gramian.lengths.astype(dtype)
    weights = _trees.ratio(jnp.max(lengths), lengths)
    weights = _rows.in_range(gramian, weights)
    direction = _rows.weigh(types.Jacobian(means), weights)
    return _trees.cast_like(direction, jacobian.rows), weights, means

  start = lambda params, dtype: _rows.tracked(
    'db_mtl', objectives, params, rest
  )
  return _by_weights.aggregator(
    'db_mtl', objectives, aggregate, start, rows=True, losses=True
  )
