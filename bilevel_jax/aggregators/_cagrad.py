"""CAGrad: the best worst-case progress in a ball around the mean gradient."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows

_MAX_STEPS = 60


def cagrad(
  objectives: int, *, radius: float = 0.4
) -> optax.GradientTransformationExtraArgs:
  r"""CAGrad: maximises the worst progress in a ball around the mean gradient.

  .. math::
    d = \arg\max_{d} \min_m \nabla f_m^\top d \quad \text{where} \quad
    \| d - g_0 \| \le c \| g_0 \|, \quad g_0 = \frac{1}{M} \sum_m \nabla f_m

  Of several maximisers it takes the one nearest to :math:`g_0`: if a gradient
  is zero, that is :math:`g_0` itself unless it conflicts with another gradient.

  For a given worst progress :math:`t`, the nearest direction is a quadratic
  program, and its distance from :math:`g_0` is convex in :math:`t`; a
  safeguarded Newton method finds the :math:`t` at which it equals the radius.

  Args:
    objectives: the number of rows.
    radius: :math:`c`, dimensionless, usually in (0, 1); 0 gives the mean.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or the radius is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.cagrad(2, radius=0.5)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print((2 * direction).round())
    [3. 3.]

  References:
    Liu, Liu, Jin, Stone and Liu, `Conflict-Averse Gradient Descent for
    Multi-task Learning <https://arxiv.org/abs/2110.14048>`_, 2021.
  """
  _checks.within('cagrad', 'radius', radius, 0)

  def search(lengths, products, nearest, data):
    """The shift away from the mean, in units of the mean's length.

    Args:
      lengths: lengths of the rows.
      products: inner products of the mean with the unit rows.
      nearest: maps lower bounds on inner products with the unit rows to the
        shortest vector that satisfies them: its length, and a tuple that starts
        with its weights.
      data: arrays on which `nearest` depends.
    """
    tolerance = 64 * jnp.finfo(lengths.dtype).eps
    shortest, longest = jnp.min(lengths), jnp.max(lengths)
    reach = jnp.asarray(radius, lengths.dtype)
    # Positive progress is in units of the shortest row, negative progress in
    # units of the longest; a zero row allows no positive progress.
    gain = _trees.ratio(shortest, lengths)
    loss = _trees.ratio(longest, lengths)

    def condition(carry):
      low, high, _, _, count = carry
      return (high - low > tolerance / 32) & (count < _MAX_STEPS)

    def narrow(carry):
      low, high, progress, best, count = carry
      bounds = progress * jnp.where(progress > 0, gain, loss) - products
      length, push = nearest(bounds)
      inside = length <= reach * (1 + tolerance)
      best = jax.tree.map(lambda x, y: jnp.where(inside, x, y), push, best)
      low = jnp.where(inside, progress, low)
      well_inside = inside & (length < reach * (1 - tolerance))
      high = jnp.where(well_inside, high, progress)
      # The length is convex, so Newton steps from outside stay outside.
      slope = push[0] @ jnp.where(low >= 0, gain, loss)
      newton = progress - (length - reach) * _trees.ratio(length, slope)
      fits = (low < newton) & (newton < high)
      progress = jnp.where(fits, newton, (low + high) / 2)
      return low, high, progress, best, count + 1

    high = jnp.where(shortest > 0, 1 + reach, 0)
    zero = jnp.zeros_like(reach)
    _, shapes = jax.eval_shape(nearest, products)
    no_push = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = (zero - 1, high, zero, no_push, 0)
    data = (lengths, products, data)
    return _quadratic.loop(condition, narrow, start, data)[3]

  def choose(gram):
    lengths, cosines = gram.lengths, gram.cosines
    longest = jnp.max(lengths)
    # The mean as weights of unit rows, in units of its own length.
    share = _trees.ratio(lengths, longest) / objectives
    size = jnp.sqrt(jnp.maximum(share @ cosines @ share, 0))
    mean = _trees.ratio(share, size)

    def nearest(bounds):
      push = _quadratic.nonnegative_qp(cosines, bounds)
      return jnp.sqrt(jnp.maximum(push @ bounds, 0)), (push,)

    (push,) = search(lengths, cosines @ mean, nearest, cosines)
    return _rows.row_weights(gram, (mean + push) * size, longest)

  def choose_exactly(factor):
    lengths, lower = factor.lengths, factor.lower
    longest = jnp.max(lengths)
    columns = _quadratic.full_rank(lower)
    share = _trees.ratio(lengths, longest) / objectives
    mean = columns @ share
    size = jnp.linalg.norm(mean)
    mean = _trees.ratio(mean, size)

    def nearest(bounds):
      push = _quadratic.nonnegative_factored(columns, bounds)
      return jnp.linalg.norm(push.image), push

    push, image = search(lengths, mean @ columns, nearest, columns)
    unit_weights = share + size * push
    direction = (longest * size * (mean + image))[:objectives]
    return direction, _rows.row_weights(factor, unit_weights, longest)

  return _by_weights.by_gramian_or_factor(
    'cagrad', objectives, choose, choose_exactly
  )
