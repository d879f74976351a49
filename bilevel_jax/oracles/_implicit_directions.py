"""A nested problem's three coupled directions, its linear system a sequence."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, types
from bilevel_jax.oracles import base

_ALL = ('upper', 'lower', 'linear')


def _both(batch: Any) -> tuple[Any, Any]:
  return batch, batch


def implicit_directions(
  problem: types.BilevelProblem,
  *,
  of: str | Sequence[str] = _ALL,
  rows: bool = False,
  batches: Callable[[Any], tuple[Any, Any]] = _both,
) -> base.Oracle:
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
    of: the sequence, or those, whose directions are wanted, where they move in
      turn; all three by default. What the others alone need is not evaluated.
    rows: whether to return a `Jacobian` with what comes from :math:`f` and
      what comes from :math:`g` as two rows, for `saga` with samples of their
      own, instead of the sums.
    batches: the batches of the upper and of the lower loss, from the batch; by
      default both get the whole.

  Returns:
    An oracle for the sequences `upper`, `lower` and `linear`. It measures
    `upper` and `lower`, or what of the two it evaluates.

  Raises:
    ValueError: if `of` names another sequence, or with `rows`.
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
  wanted = (of,) if isinstance(of, str) else tuple(of)
  if not wanted or set(wanted) - set(_ALL):
    raise ValueError(f'implicit_directions is of some of {_ALL}, got {of!r}.')
  upper = base.Loss(problem.upper, 'upper')
  lower = base.Loss(problem.lower, 'lower')
  # Which losses, and how far, the directions asked for need.
  curved = set(wanted) != {'lower'}

  def fn(params, batch, inner):
    x, y, v = params.upper, params.lower, params.linear
    above, below = batches(batch)
    values, outputs = {}, {}
    f_x = f_y = cross = product = None
    if curved:
      (values['upper'], outputs['upper']), (f_x, f_y) = jax.value_and_grad(
        upper.full, (0, 1), has_aux=True
      )(x, y, above)

    def slopes(y):
      (value, found), slope = jax.value_and_grad(
        lower.full, (0, 1), has_aux=True
      )(x, y, below)
      return slope, (value, found)

    if curved:
      # Forward over reverse: the lower gradient comes with the products.
      (_, g_y), (cross, product), kept = jax.jvp(
        slopes, (y,), (v,), has_aux=True
      )
    else:
      (_, g_y), kept = slopes(y)
    values['lower'], outputs['lower'] = kept
    zero = lambda tree: optax.tree.zeros_like(tree)
    minus = lambda tree: optax.tree.scale(-1, tree)
    terms = {
      'upper': lambda: (f_x, minus(cross)),
      'lower': lambda: (zero(g_y), g_y),
      'linear': lambda: (minus(f_y), product),
    }
    pair = lambda *r: jnp.stack(r)
    join = pair if rows else jnp.add
    found = {
      name: g_y
      if name == 'lower' and not rows
      else jax.tree.map(join, *terms[name]())
      for name in wanted
    }
    directions = _sequences.only(params, **found)
    return (
      [values[name] for name in names],
      types.Jacobian(directions) if rows else directions,
      inner,
      *base.outputs_of(problem, **outputs),
    )

  names = ('upper', 'lower') if curved else ('lower',)
  counts = {'gradients/lower': 1}
  if curved:
    counts = {
      'gradients/upper': 1,
      **counts,
      'hessian_vector_products/lower': 1,
    }
  return base.oracle(
    fn,
    names,
    counts=counts,
    moves=wanted,
    needs=_ALL,
    outputs=base.outputs_only(problem, *names),
    linear=True,
  )
