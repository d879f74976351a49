"""Several independent Jacobians at one point, from the parts of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, states, types
from bilevel_jax.evaluation import _parts
from bilevel_jax.oracles import base


def independent(
  oracle: optax.GradientTransformation,
  samples: int,
  *,
  split: Callable[[Any, int], Any] = _parts.deal_batch,
) -> base.Oracle:
  r"""Evaluates an oracle's Jacobian on several independent parts of a batch.

  For aggregators that multiply two Jacobians and need uncorrelated noise
  (`modo`, `sdmgrad`), and for `moco` with several samples.

  Args:
    oracle: returns a `Jacobian` that is linear in the samples, so that that of
      each part is unbiased.
    samples: the number of parts, at least 1.
    split: maps (batch, samples) to a pytree with a leading axis of samples; for
      instance `lambda batch, n: batch` for batches that are already stacked.

  Returns:
    An oracle to a `Jacobian` that has the rows of the first sample, then those
    of the second, and so on; its `rest` is their mean. `bj.counts` counts each
    evaluation.

  Raises:
    TypeError: at the call, if the oracle does not return a `Jacobian`.
    ValueError: if `samples` is below 1 or the oracle is not linear in its
      samples; at the call, if a batch does not split.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> losses = lambda x, batch: jnp.stack([x * batch.mean(), x * 2.0])
    >>> oracle = bj.evaluation.independent(bj.multi_objective(losses, 2), 2)
    >>> params = jnp.float32(1.0)
    >>> jacobian, _ = oracle.update(
    ...   jnp.array([1.0, 3.0]), oracle.init(params), params
    ... )
    >>> print(jacobian.rows)
    [1. 2. 3. 2.]
  """
  _checks.whole_number('independent', 'samples', samples)
  remedy = 'wrap bj.multi_objective(losses), and aggregate its rows'
  base.require_linear(oracle, 'independent', remedy)
  inner = base.as_oracle(oracle)

  def update_fn(batch, state, params=None, **extra_args):
    batches = split(batch, samples)
    jacobians, measured = [], []
    for i in range(samples):
      part = jax.tree.map(lambda leaf, i=i: leaf[i], batches)
      before = state
      jacobian, state = inner.update(part, state, params, **extra_args)
      if i < samples - 1:
        state = states.hold_updates(state, before)
      if not isinstance(jacobian, types.Jacobian):
        raise TypeError(
          'independent stacks the rows of Jacobians, got '
          f'{type(jacobian).__name__}: wrap an oracle that returns rows, '
          'bj.multi_objective(losses) for instance.'
        )
      jacobians.append(jacobian)
      measured.append(states.measured(state))
    join = lambda *leaves: jnp.concatenate(leaves)

    def average(*leaves):
      inexact = jnp.issubdtype(leaves[0].dtype, jnp.inexact)
      return sum(leaves[1:], leaves[0]) / samples if inexact else leaves[-1]

    joined = types.Jacobian(
      rows=jax.tree.map(join, *(j.rows for j in jacobians)),
      rest=jax.tree.map(average, *(j.rest for j in jacobians)),
      values=jax.tree.map(join, *(j.values for j in jacobians)),
    )
    means = jax.tree.map(average, *measured)
    return joined, states.replace_measured(state, means)

  return inner._replace(update=update_fn, averaged=None, within=None)
