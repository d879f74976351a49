"""Directions of both variables and of the linear system as a sequence."""

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
  r"""Directions of both variables and of the linear system of their coupling.

  .. math::
    d^y = \nabla_y g, \qquad
    d^v = \nabla_{yy} g \, v - \nabla_y f, \qquad
    d^x = \nabla_x f - \nabla_{xy} g \, v

  Where the first two vanish, the third is the gradient of the upper loss at the
  lower minimiser. Each is a sum of terms that are linear in the samples, so
  that samples give no bias. One product of the Hessian with the sequence
  `linear` serves :math:`d^x` and :math:`d^v`.

  Args:
    problem: the upper and the lower loss.
    of: the sequence or sequences whose directions are evaluated, for sequences
      that move in turn; by default all three.
    rows: whether to return a `Jacobian` with the terms of :math:`f` and of
      :math:`g` as two rows instead of their sums, for `saga` with separate
      samples.
    batches: the batches of the upper and of the lower loss, from the batch; by
      default both get the whole batch.

  Returns:
    An oracle for the sequences `upper`, `lower` and `linear`. It measures
    `upper` and `lower`, as far as it evaluates them.

  Raises:
    ValueError: if `of` names another sequence.
    TypeError: at the call, if a loss is not a scalar or a sequence is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> x, y, v = jnp.array([1.0, 3.0, 2.0])
    >>> params = bj.sequences(upper=x, lower=y, linear=v)
    >>> oracle = bj.implicit_directions(problem)
    >>> directions, _ = oracle.update(None, oracle.init(params), params)
    >>> print(directions.upper, directions.lower, directions.linear)
    4.0 4.0 -2.0

  References:
    Dagreou, Ablin, Vaiter and Moreau, `A framework for bilevel optimization
    that enables stochastic and global variance reduction algorithms
    <https://arxiv.org/abs/2201.13409>`_, 2022.
  """
  wanted = (of,) if isinstance(of, str) else tuple(of)
  if not wanted or set(wanted) - set(_ALL):
    raise ValueError(f'implicit_directions: of is among {_ALL}, got {of!r}.')
  upper, lower = base.checked_losses(problem)
  # Whether the upper loss and a Hessian-vector product are needed.
  curved = set(wanted) != {'lower'}

  def fn(params, batch, inner):
    x, y, v = params.upper, params.lower, params.linear
    above, below = batches(batch)
    values, outputs = {}, {}
    f_x = f_y = cross = product = None
    if curved:
      measured, (f_x, f_y) = upper.with_slopes(0, 1)(x, y, above)
      values['upper'], outputs['upper'] = measured

    def slopes(y):
      measured, slope = lower.with_slopes(0, 1)(x, y, below)
      return slope, measured

    if curved:
      # Forward over reverse gives the lower gradient and the products.
      (_, g_y), (cross, product), measured = jax.jvp(
        slopes, (y,), (v,), has_aux=True
      )
    else:
      (_, g_y), measured = slopes(y)
    values['lower'], outputs['lower'] = measured
    zero = lambda tree: optax.tree.zeros_like(tree)
    minus = lambda tree: optax.tree.scale(-1, tree)
    terms = {
      'upper': lambda: (f_x, minus(cross)),
      'lower': lambda: (zero(g_y), g_y),
      'linear': lambda: (minus(f_y), product),
    }
    pair = lambda *r: jnp.stack(r)
    join = pair if rows else jnp.add
    fields = {
      name: g_y
      if name == 'lower' and not rows
      else jax.tree.map(join, *terms[name]())
      for name in wanted
    }
    directions = _sequences.only(params, **fields)
    return (
      [values[name] for name in names],
      types.Jacobian(directions) if rows else directions,
      inner,
      *base.requested_outputs(problem, **outputs),
    )

  names = ('upper', 'lower') if curved else ('lower',)
  counts = {'gradients/lower': 1}
  if curved:
    counts = {'gradients/upper': 1} | counts
    counts['hessian_vector_products/lower'] = 1
  return base.oracle(
    fn,
    names,
    counts=counts,
    moves=wanted,
    needs=_ALL,
    outputs=base.outputs_only(problem, *names),
    linear=True,
  )
