"""Natural policy gradients of softmax policies with known visits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.oracles import base


def natural(
  oracle: Any,
  weights: Callable[[Any], Any],
  *,
  of: str = 'lower',
) -> base.Oracle:
  r"""Converts gradients in logits to natural gradients with known visits.

  .. math::
    d_{s, a} = \frac{\partial_{z_{s, a}}}{w(s) \, \pi_z(a | s)}

  For a return with the visits w this is minus the advantage. Unlike a plain
  gradient, it does not vanish with the probability of an action or a state.

  Args:
    oracle: an oracle with a gradient in tables of logits.
    weights: maps all parameters to the visits, (states,), or to a pytree of
      them for a pytree of tables. Logits of a state whose visits are exactly 0
      do not move. `state_visits` gives exact zeros for unreachable states;
      visits from other solvers need them too.
    of: the sequence of logits.

  Returns:
    An oracle like the argument, except for that sequence.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> loss = lambda p, batch: -jax.nn.softmax(p.lower)[0] @ jnp.arange(2.0)
    >>> oracle = bj.gradient(loss, of='lower')
    >>> oracle = bj.rl.natural(oracle, lambda params: jnp.ones(1))
    >>> params = bj.BilevelParams(None, jnp.array([[0.0, -9.0]]))
    >>> gradients, _ = oracle.update(None, oracle.init(params), params)
    >>> print(gradients.lower.round(2))
    [[ 0. -1.]]

  References:
    Kakade, A Natural Policy Gradient, 2001.
  """

  def update(batch, state, params=None, **extra_args):
    gradients, state = oracle.update(batch, state, params, **extra_args)

    def divide(visits, slope, logits):
      mass = visits[:, None] * jax.nn.softmax(logits)
      # Unvisited states and actions of negligible probability do not move. A
      # threshold on visits would have to know their rounding, which depends on
      # the processor; `state_visits` has none in unreachable states.
      small = mass < jnp.finfo(mass.dtype).tiny
      divided = jnp.where(small, 0, slope / jnp.where(small, 1, mass))
      return divided.astype(slope.dtype)

    slopes = jax.tree.map(
      divide, weights(params), getattr(gradients, of), getattr(params, of)
    )
    return gradients._replace(**{of: slopes}), state

  return base.wrapped(
    oracle,
    oracle.init,
    update,
    again=lambda other: natural(other, weights, of=of),
  )
