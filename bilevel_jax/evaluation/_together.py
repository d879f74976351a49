"""Several oracles at one point, combined into one."""

from typing import Any

import optax

from bilevel_jax import _sequences
from bilevel_jax.oracles import base


def together(*oracles: optax.GradientTransformation) -> base.Oracle:
  r"""Evaluates several oracles of different sequences at one point.

  .. math::
    d = (d_1(z), \dots, d_n(z))

  Args:
    *oracles: oracles of different sequences.

  Returns:
    An oracle for all of their sequences.

  Raises:
    ValueError: without oracles; at the call, if two oracles return a gradient
      for one sequence.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> one = bj.gradient(lambda p, batch: p.a**2, of='a', name='one')
    >>> two = bj.gradient(lambda p, batch: p.a * p.b, of='b', name='two')
    >>> oracle = bj.evaluation.together(one, two)
    >>> params = bj.sequences(a=jnp.float32(3.0), b=jnp.float32(1.0))
    >>> slopes, _ = oracle.update(None, oracle.init(params), params)
    >>> print(slopes.a, slopes.b)
    6.0 3.0
  """
  if not oracles:
    raise ValueError('together takes at least one oracle.')
  parts = [base.as_oracle(one) for one in oracles]
  declared: list[Any] = [part.moves for part in parts]
  moves = None if None in declared else sum(declared, ())

  def init_fn(params):
    return tuple(part.init(params) for part in parts)

  def update_fn(batch, state, params=None, **extra_args):
    fields: dict[str, Any] = {}
    after = []
    for part, inner in zip(parts, state, strict=True):
      gradients, inner = part.update(batch, inner, params, **extra_args)
      _sequences.require_gradients(gradients, params, 'together')
      for name, gradient in gradients._asdict().items():
        if gradient is None:
          continue
        if name in fields:
          raise ValueError(
            f'together: two oracles have a gradient for the sequence {name}: '
            'pass them to descend one after the other, or add their losses.'
          )
        fields[name] = gradient
      after.append(inner)
    return _sequences.only(params, **fields), tuple(after)

  linear, averaged = all(map(base.is_linear, parts)), None
  if not linear and all(map(base.has_mean, parts)):
    averaged = lambda mean: together(
      *(base.take_mean(part, mean, 'together') for part in parts)
    )
  return base.Oracle(
    init_fn,
    update_fn,
    moves,
    linear=linear,
    averaged=averaged,
    within=lambda wrapper: together(
      *(base.around(part, wrapper) for part in parts)
    ),
  )
