"""Coupled sequences, whose increments depend on all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _functions, _sequences
from bilevel_jax.oracles import base

# (params, batch) -> increment, of the structure of one sequence.
Increment = Callable[[Any, Any], Any]


def coupled(
  increments: Mapping[str, Increment],
  *,
  batch_of: Callable[[Any, str], Any] | None = None,
) -> base.Oracle:
  r"""Evaluates the increments of named sequences at one point.

  .. math::
    d^n = -h^n(z^0, \dots, z^N; \xi^n)

  The sign is that of a gradient, so that any optax optimiser steps along the
  increment. An increment need not be a gradient; temporal differences,
  fixed-point residuals and Newton directions are increments too. Wrappers that
  take means over samples take means of the increments.

  Args:
    increments: by name of a sequence, a function from (parameters, batch) to
      its increment. The other sequences do not move.
    batch_of: the batch of an increment, from (batch, name), for instance its
      own samples; by default the whole batch.

  Returns:
    An oracle; `bj.values` gives `increment/name`, the norm of each increment,
    and `bj.counts` gives `increments/name`.

  Raises:
    ValueError: without increments; at the call, if an increment has another
      structure or shape than its sequence.
    TypeError: at the call, if the parameters lack a sequence.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.coupled({
    ...   'main': lambda z, batch: z.tracker - z.main,
    ...   'tracker': lambda z, batch: batch - z.tracker,
    ... })
    >>> params = bj.sequences(main=jnp.float32(0.0), tracker=jnp.float32(1.0))
    >>> gradients, _ = oracle.update(3.0, oracle.init(params), params)
    >>> print(gradients.main, gradients.tracker)
    -1.0 -2.0

  References:
    Shen and Chen, `A Single-Timescale Analysis for Stochastic Approximation
    with Multiple Coupled Sequences <https://arxiv.org/abs/2206.10414>`_, 2022.
  """
  if not isinstance(increments, Mapping) or not increments:
    raise ValueError(
      'coupled takes a dict with the increment of at least one sequence, got '
      f'{increments!r}.'
    )
  increments = dict(increments)
  part = batch_of or (lambda batch, name: batch)
  arguments = ('params', 'batch')
  for name, increment in increments.items():
    _functions.check(f'the increment of {name}', increment, arguments)

  def evaluate(name, params, batch):
    with _functions.explained(
      f'the increment of {name}', arguments, (params, batch)
    ):
      return increments[name](params, batch)

  def fn(params, batch, inner):
    moves = {n: evaluate(n, params, part(batch, n)) for n in increments}
    for name, move in moves.items():
      if move is None:
        raise ValueError(
          f'the increment of {name} is None: return an array for each leaf of '
          'the sequence, or leave the sequence out of the increments.'
        )
    gradients = _sequences.only(
      params, **{n: jax.tree.map(jnp.negative, m) for n, m in moves.items()}
    )
    _sequences.require_gradients(gradients, params, 'coupled')
    return [optax.tree.norm(move) for move in moves.values()], gradients, inner

  return base.oracle(
    fn,
    [f'increment/{name}' for name in increments],
    counts={f'increments/{name}': 1 for name in increments},
    moves=increments,
    linear=True,
  )
