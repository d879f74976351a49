"""Gradients of compositions of expectations."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from bilevel_jax import _sequences
from bilevel_jax.oracles import base

# (value of the level below, batch) -> value of this level.
Level = Callable[[Any, Any], Any]


def compositional(
  functions: Sequence[Level],
  *,
  of: str = 'all',
  batch_of: Callable[[Any, int], Any] | None = None,
) -> base.Oracle:
  r"""Gradients of a composition whose inner levels are tracked by sequences.

  For :math:`\min_x f^N(\dots f^1(f^0(x)))`, with a sequence :math:`y^n`
  that tracks :math:`f^{n-1}(y^{n-1})`, and :math:`y^0 = x`,

  .. math::
    d^x = \nabla f^0(x)^\top \nabla f^1(y^1)^\top \cdots \nabla f^N(y^N),
    \qquad d^n = y^n - f^{n-1}(y^{n-1})

  The chain rule uses the tracked values. With samples of the levels instead it
  would be biased, because a mean of products is not a product of means.

  Args:
    functions: :math:`f^0, \dots, f^N`, each from (value of the level below,
      batch) to any pytree, the last to a scalar.
    of: `all`, or `main` or `levels` for one of the two parts, if they move in
      turn or have different wrappers.
    batch_of: the batch of level n, from (batch, n); by default the whole batch.

  Returns:
    An oracle for the sequences `main` and `level_1` ... `level_N`. Except for
    `levels`, it measures `loss`, the last level at its tracked value.
    `bj.counts` counts values and gradients of each level.

  Raises:
    ValueError: without functions, or if `of` is unknown.
    TypeError: at the call, if a sequence is missing or the last level is not a
      scalar.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.compositional(
    ...   [lambda x, batch: 2 * x, lambda y, batch: (y - 1) ** 2]
    ... )
    >>> params = bj.sequences(main=jnp.float32(1.0), level_1=jnp.float32(3.0))
    >>> gradients, _ = oracle.update(None, oracle.init(params), params)
    >>> print(gradients.main, gradients.level_1)
    8.0 1.0

  References:
    Wang, Fang and Liu, `Stochastic Compositional Gradient Descent
    <https://arxiv.org/abs/1411.3803>`_, 2014.

    Yang, Wang and Fang, `Multi-Level Stochastic Gradient Methods for Nested
    Composition Optimization <https://arxiv.org/abs/1801.03600>`_, 2018.
  """
  *inside, outside = functions or (None,)
  if outside is None:
    raise ValueError('compositional takes at least one function.')
  if of not in ('all', 'main', 'levels'):
    raise ValueError(f"of is 'all', 'main' or 'levels', got {of!r}.")
  last = len(inside)
  names = tuple(f'level_{n}' for n in range(1, last + 1))
  part = batch_of or (lambda batch, level: batch)
  outside = base.Loss(outside, 'last level')

  def directions(mean, params, batch, inner):
    points = [params.main, *(getattr(params, name) for name in names)]
    fields: dict[str, Any] = {}
    loss: tuple[Any, ...] = ()
    slope = None
    if of != 'levels':
      value, slope = mean.of(
        lambda some, z: jax.value_and_grad(outside)(z, part(some, last)),
        batch,
        points[-1],
      )
      loss = (value,)

    def through(n, some, z, *slopes):
      """The value of a level, and the pullback of a slope."""
      here = lambda z: inside[n](z, part(some, n))
      if not slopes:
        return here(z), None
      value, back = jax.vjp(here, z)
      return value, back(*slopes)[0]

    for n in reversed(range(last)):
      slopes = () if of == 'levels' else (slope,)
      level = functools.partial(through, n)
      value, slope = mean.of(level, batch, points[n], *slopes)
      if of != 'main':
        fields[names[n]] = optax.tree.sub(points[n + 1], value)
    if of != 'levels':
      fields['main'] = slope
    return loss, _sequences.only(params, **fields), inner

  cost = {f'values/level_{n}': 1 for n in range(last)}
  if of != 'levels':
    cost |= {f'gradients/level_{n}': 1 for n in range(last + 1)}
  moves = (() if of == 'levels' else ('main',)) + (
    () if of == 'main' else names
  )
  linear = of == 'levels' or not inside
  at_once = functools.partial(directions, base.WHOLE)
  return base.oracle(
    at_once if linear else base.ByMean(directions),
    () if of == 'levels' else ('loss',),
    counts=cost,
    moves=moves,
    needs=('main', *names),
    linear=linear,
  )
