"""CAGrad: the best worst case within a ball around the mean gradient."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows

_TRIES = 60


def cagrad(
  objectives: int, *, radius: float = 0.4
) -> optax.GradientTransformationExtraArgs:
  r"""CAGrad: raises the least progress, within a ball around the mean gradient.

  .. math::
    d = \arg\max_{d} \min_m \nabla f_m^\top d \quad \text{where} \quad
    \| d - g_0 \| \le c \| g_0 \|, \quad g_0 = \frac{1}{M} \sum_m \nabla f_m

  Of several maximisers, the one nearest to :math:`g_0`: where a gradient
  vanishes, that is :math:`g_0` itself unless it conflicts with another one.

  For a given least progress :math:`t`, the nearest direction is a quadratic
  program, and its distance from :math:`g_0` is convex in :math:`t`; a
  safeguarded Newton's method finds the :math:`t` at which it is the radius.

  Args:
    objectives: the number of rows.
    radius: :math:`c`, dimensionless, usually in (0, 1); 0 gives the mean.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or the radius is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.cagrad(2, radius=0.5)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    >>> found, _ = link.update(jacobian, link.init(params), params)
    >>> print((2 * found).round())
    [3. 3.]

  References:
    Liu, Liu, Jin, Stone and Liu, `Conflict-Averse Gradient Descent for
    Multi-task Learning <https://arxiv.org/abs/2110.14048>`_, 2021.
  """
  _checks.within('cagrad', 'radius', radius, 0)

  def search(lengths, products, nearest, data):
    """The push away from the mean; all in units of the mean's length.

    Args:
      lengths: of the rows.
      products: of the mean with the rows of length one.
      nearest: from products to the shortest vector that has at least them: its
        length, and a tuple whose first part is its weights.
      data: arrays on which `nearest` depends.
    """
    room = 64 * jnp.finfo(lengths.dtype).eps
    shortest, longest = jnp.min(lengths), jnp.max(lengths)
    reach = jnp.asarray(radius, lengths.dtype)
    # The least progress is counted in short rows where it is positive, in long
    # ones where it is negative; nothing can be gained along a zero row.
    gain = _trees.ratio(shortest, lengths)
    loss = _trees.ratio(longest, lengths)

    def going(carry):
      low, high, _, _, count = carry
      return (high - low > room / 32) & (count < _TRIES)

    def narrow(carry):
      low, high, progress, best, count = carry
      wanted = progress * jnp.where(progress > 0, gain, loss) - products
      length, push = nearest(wanted)
      inside = length <= reach * (1 + room)
      best = jax.tree.map(lambda x, y: jnp.where(inside, x, y), push, best)
      low = jnp.where(inside, progress, low)
      high = jnp.where(inside & (length < reach * (1 - room)), high, progress)
      # The length is convex: from outside, Newton's method stays outside.
      slope = push[0] @ jnp.where(low >= 0, gain, loss)
      newton = progress - (length - reach) * _trees.ratio(length, slope)
      fits = (low < newton) & (newton < high)
      progress = jnp.where(fits, newton, (low + high) / 2)
      return low, high, progress, best, count + 1

    most = jnp.where(shortest > 0, 1 + reach, 0)
    zero = jnp.zeros_like(reach)
    _, first = jax.eval_shape(nearest, products)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    start = (zero - 1, most, zero, none, 0)
    return _quadratic.loop(going, narrow, start, (lengths, products, data))[3]

  def choose(found):
    lengths, cosines = found.lengths, found.cosines
    longest = jnp.max(lengths)
    # The mean as weights of rows of length one, in units of its own length.
    share = _trees.ratio(lengths, longest) / objectives
    size = jnp.sqrt(jnp.maximum(share @ cosines @ share, 0))
    mean = _trees.ratio(share, size)

    def nearest(wanted):
      push = _quadratic.nonnegative_qp(cosines, wanted)
      return jnp.sqrt(jnp.maximum(push @ wanted, 0)), (push,)

    (push,) = search(lengths, cosines @ mean, nearest, cosines)
    return _rows.of_unit_rows(found, (mean + push) * size, longest)

  def choose_exactly(factor):
    lengths, lower = factor.lengths, factor.lower
    longest = jnp.max(lengths)
    columns = _quadratic.full_rank(lower)
    share = _trees.ratio(lengths, longest) / objectives
    mean = columns @ share
    size = jnp.linalg.norm(mean)
    mean = _trees.ratio(mean, size)

    def nearest(wanted):
      push = _quadratic.nonnegative_factored(columns, wanted)
      return jnp.linalg.norm(push.image), push

    push, image = search(lengths, mean @ columns, nearest, columns)
    pulls = share + size * push
    direction = (longest * size * (mean + image))[:objectives]
    return direction, _rows.of_unit_rows(factor, pulls, longest)

  return _by_weights.by_gramian_or_factor(
    'cagrad', objectives, choose, choose_exactly
  )
