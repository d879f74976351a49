"""PCD: one objective comes first, the others have to make some progress."""

import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def pcd(
  objectives: int,
  *,
  progress: types.ScalarOrSchedule = 0.02,
  decay: float = 0.999,
) -> optax.GradientTransformationExtraArgs:
  r"""PCD: turns the first gradient as little as the others' progress asks for.

  With gradients of about unit length, :math:`q_m = \nabla f_m / \sqrt{v_m +
  10^{-8}}`, where :math:`v` is a running mean of their squared lengths,

  .. math::
    d \propto \arg\min_d \| d - q_1 \|^2 \quad \text{where} \quad
    q_m^\top d \ge \tau \| q_m \|^2, \quad m = 2, \dots, M

  of the length of :math:`\nabla f_1`. Where the others conflict with each other
  so that no direction serves all of them, :math:`d = \nabla f_1`.

  Args:
    objectives: the number of rows :math:`M`; the first is the one that counts.
    progress: :math:`\tau` in [0, 1], a constant or a schedule.
    decay: of the running mean, in [0, 1]; it starts at zero, and is that short
      for all objectives alike.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or a number is out of
      range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.pcd(2, progress=0.0), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [-5.0, 5.0]]))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print(direction.round(2))  # At a right angle to the second gradient.
    [0.71 0.71]

  References:
    Varam and AlHajri, `Not All Objectives Are Born Equal: Priority-Constrained
    Descent for Hierarchical Multi-Objective Optimization
    <https://arxiv.org/abs/2606.29521>`_, 2026.
  """
  _checks.within('pcd', 'progress', progress, 0, 1)
  _checks.within('pcd', 'decay', decay, 0, 1)

  def choose(gramian, state):
    lengths, cosines = gramian.lengths, gramian.cosines
    # Keeps the root of the running mean: squares may leave the range of floats.
    old, new = jnp.sqrt(decay), jnp.sqrt(1 - decay)
    root = jnp.hypot(old * state.inner, new * lengths)
    sizes = lengths / jnp.hypot(root, 1e-4)
    # In units of the first, with multipliers of rows of length one.
    wanted = (
      _by_weights.current(progress, state) * sizes - cosines[0] * sizes[0]
    )
    others = jnp.arange(objectives) > 0
    matrix = jnp.where(others[:, None] & others, cosines, 0)
    scale = jnp.max(jnp.abs(wanted))
    wanted = jnp.where(others, _trees.ratio(wanted, scale), 0)
    push = _quadratic.nonnegative_qp(matrix, wanted)
    # No direction serves all others where the multipliers grow without bound.
    room = jnp.sqrt(jnp.finfo(lengths.dtype).eps)
    served = jnp.all(matrix @ push >= wanted - room)
    pulls = jnp.where(served, scale * push, 0).at[0].set(sizes[0])
    size = jnp.sqrt(jnp.maximum(pulls @ cosines @ pulls, 0))
    pulls = _trees.ratio(pulls, size)
    return _rows.of_unit_rows(gramian, pulls, lengths[0]), root

  start = lambda params, dtype: jnp.zeros([objectives], dtype)
  return _by_weights.by_gramian('pcd', objectives, choose, start)
