"""DB-MTL: gradients of the losses' logarithms, made equally long."""

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
  r"""DB-MTL: balances losses by logarithms, and gradients by their lengths.

  .. math::
    q_m \leftarrow \beta q_m + (1 - \beta) \nabla \log (f_m + 10^{-8}), \qquad
    d = \sum_m \frac{\max_i \| q_i \|}{\| q_m \|} q_m

  A running mean that vanishes is left out.

  Args:
    objectives: the number of rows.
    decay: :math:`\beta` in [0, 1], a constant or a schedule; the authors let it
      fall as a power of the number of updates. The mean starts at zero.
    rest: names of the sequences that no weight touches, as in the oracle.

  Returns:
    A transformation from a `Jacobian` with positive losses to one gradient. Its
    weights are those of the running means.

  Raises:
    TypeError: if the incoming gradients are no Jacobian, or only a Gramian.
    ValueError: if they have another number of rows or no losses, or the decay
      is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.db_mtl(2, decay=0.0), jnp.zeros(2)
    >>> rows = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    >>> jacobian = bj.Jacobian(rows, values=jnp.array([1.0, 6.0]))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print(direction.round(3))  # Lengths 2 and 1/2, both made 2.
    [2. 2.]

  References:
    Lin, Jiang, Ye, Zhang, Chen, Chen, Liu and Kwok, `Dual-Balancing for
    Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, 2023.
  """
  _checks.within('db_mtl', 'decay', decay, 0, 1)
  rest = tuple(rest)

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, 'db_mtl', objectives, rows=True)
    _rows.require_tracked('db_mtl', state.inner, jacobian)
    dtype = state.weights.dtype
    logs = 1 / (_by_weights.values(jacobian, 'db_mtl', dtype) + 1e-8)
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
    direction = _trees.cast_like(direction, jacobian.rows)
    return (
      _rows.with_rest(direction, jacobian.rest),
      _by_weights.step(state, weights, means),
    )

  start = lambda params, dtype: _rows.tracked(
    'db_mtl', objectives, params, rest
  )
  init_fn = _by_weights.init('db_mtl', objectives, start)
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
