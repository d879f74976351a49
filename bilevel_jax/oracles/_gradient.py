"""The gradient of one loss, in all parameters or in one sequence."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from bilevel_jax import _sequences
from bilevel_jax.oracles import _oracle


def gradient(
  loss: Callable[[Any, Any], Any],
  *,
  name: str = 'loss',
  of: str | None = None,
  counts_as: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The gradient of a loss: turns any optax optimiser into a solver.

  .. math::
    d = \nabla_z \, \ell(z, batch)

  Args:
    loss: a function of (parameters, batch) to a scalar, or to
      (scalar, auxiliary).
    name: the name of the loss in `bj.values`.
    of: the one sequence to differentiate; the others get None. By default all
      of the parameters.
    counts_as: the loss under which `bj.counts` counts the gradient; by default
      its name.

  Returns:
    An oracle.

  Raises:
    TypeError: at the call, if the loss is not a scalar, or if the parameters
      have no sequence `of`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> solver = optax.chain(bj.gradient(loss), optax.adam(0.1))
    >>> params = jnp.zeros(3)
    >>> state = solver.init(params)
    >>> for _ in range(200):
    ...   updates, state = solver.update(jnp.ones(3), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.round(2), bj.counts(state))
    [1. 1. 1.] {'gradients/loss': 200}
  """
  loss = _oracle.scalar_loss(loss, name)

  def fn(params, batch, inner):
    if of is None:
      value, slope = jax.value_and_grad(loss)(params, batch)
      return (value,), slope, inner
    _sequences.require_sequences(params, (of,), f'gradient(of={of!r})')
    value, slope = jax.value_and_grad(
      lambda field: loss(params._replace(**{of: field}), batch)
    )(getattr(params, of))
    return (value,), _sequences.only(params, **{of: slope}), inner

  cost = {f'gradients/{counts_as or name}': 1}
  return _oracle.oracle(fn, (name,), counts=cost)
