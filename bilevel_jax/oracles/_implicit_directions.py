"""A nested problem's three coupled directions, its linear system a sequence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, types
from bilevel_jax.oracles import _oracle


def _both(batch: Any) -> tuple[Any, Any]:
  return batch, batch


def implicit_directions(
  problem: types.BilevelProblem,
  *,
  rows: bool = False,
  batches: Callable[[Any], tuple[Any, Any]] = _both,
) -> optax.GradientTransformationExtraArgs:
  r"""Directions of both variables and of the linear system between them.

  .. math::
    d^y = \nabla_y g, \qquad
    d^v = \nabla_{yy} g \, v - \nabla_y f, \qquad
    d^x = \nabla_x f - \nabla_{xy} g \, v

  At the solution of the first two, the third is the gradient of the upper loss
  at the lower minimiser. Each is a sum of terms that are linear in samples,
  without bias; one product of a Hessian with the sequence `linear` serves
  :math:`d^x` and :math:`d^v`.

  Args:
    problem: the upper and the lower loss.
    rows: whether to return a `Jacobian` with what comes from :math:`f` and
      what comes from :math:`g` as two rows, for `saga` with samples of their
      own, instead of the sums.
    batches: the batches of the upper and of the lower loss, from the batch; by
      default both get the whole.

  Returns:
    An oracle for the sequences `upper`, `lower` and `linear`. It measures
    `upper` and `lower`.

  Raises:
    TypeError: at the call, if a loss is not a scalar or a sequence is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> x, y, v = jnp.array([1.0, 3.0, 2.0])
    >>> params = bj.sequences(upper=x, lower=y, linear=v)
    >>> oracle = bj.implicit_directions(problem)
    >>> found, _ = oracle.update(None, oracle.init(params), params)
    >>> print(found.upper, found.lower, found.linear)
    4.0 4.0 -2.0

  References:
    Dagreou, Ablin, Vaiter and Moreau, `A framework for bilevel optimization
    that enables stochastic and global variance reduction algorithms
    <https://arxiv.org/abs/2201.13409>`_, 2022.
  """
  upper = _oracle.scalar_loss(problem.upper, 'upper')
  lower = _oracle.scalar_loss(problem.lower, 'lower')

  def fn(params, batch, inner):
    _sequences.require_sequences(
      params, ('upper', 'lower', 'linear'), 'implicit_directions'
    )
    x, y, v = params.upper, params.lower, params.linear
    above, below = batches(batch)
    f, (f_x, f_y) = jax.value_and_grad(upper, (0, 1))(x, y, above)

    def slopes(y):
      value, slope = jax.value_and_grad(lower, (0, 1))(x, y, below)
      return slope, value

    # Forward over reverse: the lower gradient comes with the products.
    (_, g_y), (cross, product), g = jax.jvp(slopes, (y,), (v,), has_aux=True)
    if rows:
      zeros = optax.tree.zeros_like(g_y)
      one = (f_x, zeros, optax.tree.scale(-1, f_y))
      two = (optax.tree.scale(-1, cross), g_y, product)
      stacked = jax.tree.map(lambda *r: jnp.stack(r), one, two)
    else:
      stacked = (optax.tree.sub(f_x, cross), g_y, optax.tree.sub(product, f_y))
    directions = _sequences.only(
      params, **dict(zip(('upper', 'lower', 'linear'), stacked, strict=True))
    )
    return (f, g), types.Jacobian(directions) if rows else directions, inner

  return _oracle.oracle(
    fn,
    ('upper', 'lower'),
    counts={
      'gradients/upper': 1,
      'gradients/lower': 1,
      'hessian_vector_products/lower': 1,
    },
  )
