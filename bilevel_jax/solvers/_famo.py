"""FAMO: weights from the decrease of each loss, with one backward pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _sequences, _trees, parts, states, types
from bilevel_jax.oracles import _objectives, base


class FamoState(NamedTuple):
  """State of `famo`.

  Attributes:
    count: updates so far, an int32 scalar.
    logits: the logits of the weights, (objectives,).
    weights: the weights of the last update, (objectives,).
    slow: the state of the logits' optimiser.
    oracle: the state of the losses' oracle.
    optimiser: the state of the parameters' optimiser.
  """

  count: chex.Array
  logits: chex.Array
  weights: chex.Array
  slow: Any
  oracle: Any
  optimiser: Any


def _weighted_losses(several):
  """The gradient of the losses times `weights`, an extra argument."""

  def evaluate(params, batch):
    return several.linearise(params, batch, 'famo').values

  plain = base.oracle(
    lambda params, batch, inner: (evaluate(params, batch), None, inner),
    several.names,
    counts={'gradients/weighted': 0},
  )

  def update_fn(batch, state, params=None, *, weights=None, **extra_args):
    del extra_args
    _, state = plain.update(batch, state, params)
    if weights is None:
      return (), state
    slope = jax.grad(
      lambda p: jnp.vdot(weights, evaluate(p, batch).astype(weights.dtype))
    )(params)
    spent = states.add_counts(state.counts, {'gradients/weighted': 1})
    return slope, state._replace(counts=spent)

  return base.Oracle(plain.init, update_fn, linear=True)


def famo(
  losses: _objectives.Losses,
  objectives: int | Sequence[str] | None = None,
  *,
  optimiser: optax.GradientTransformation,
  weight_rate: types.ScalarOrSchedule = 0.025,
  weight_decay: float = 1e-3,
  minima: Any = 0.0,
) -> parts.Solver:
  r"""FAMO: equal relative decrease of all losses, by one backward pass.

  .. math::
    z = \operatorname{softmax}(\xi), \qquad
    d = c \sum_m \frac{z_m}{f_m - b_m} \nabla f_m, \quad
    c^{-1} = \sum_m \frac{z_m}{f_m - b_m}

  After the step of the optimiser along :math:`d`, the losses are evaluated
  again on the same batch, and :math:`\xi` moves by Adam along
  :math:`\nabla_\xi \, z(\xi)^\top ( \log (f - b) - \log (f^+ - b) )`.

  It is a solver, not an aggregator, because it needs the losses after the step.
  An update takes one gradient and three evaluations of the losses.

  Args:
    losses: as in `multi_objective`; they are above `minima`.
    objectives: as in `multi_objective`.
    optimiser: the optimiser of the parameters.
    weight_rate: step size of :math:`\xi`, a constant or a schedule.
    weight_decay: weight decay of :math:`\xi`.
    minima: :math:`b`, a number or (objectives,).

  Returns:
    A solver.

  Raises:
    TypeError: as `multi_objective` does.
    ValueError: as `multi_objective` does, or if `weight_decay` is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> losses = lambda x, batch: jnp.stack(
    ...   [jnp.sum((x - 1) ** 2) + 1, 9 * jnp.sum((x - 1) ** 2) + 1]
    ... )
    >>> solver = bj.solvers.famo(losses, 2, optimiser=optax.sgd(0.1))
    >>> params, _ = bj.testing.run(solver, jnp.zeros(2), 100)
    >>> print(params.round(2))
    [1. 1.]

  References:
    Liu, Feng, Stone and Liu, `FAMO: Fast Adaptive Multitask Optimization
    <https://arxiv.org/abs/2306.03792>`_, 2023.
  """
  several = _objectives.make_objectives('famo', losses, objectives)
  if not isinstance(weight_decay, jax.core.Tracer) and weight_decay < 0:
    raise ValueError(f'famo: weight_decay is >= 0, got {weight_decay}.')
  size = len(several.names)
  if np.ndim(minima) and np.shape(minima) != (size,):
    raise ValueError(
      f'famo: minima is a number or an array of {size} numbers, got '
      f'shape {np.shape(minima)}.'
    )
  inner = optax.with_extra_args_support(optimiser)
  slow = optax.chain(
    optax.add_decayed_weights(weight_decay), optax.scale_by_adam()
  )

  def height(state):
    values, _ = states.measured(state)[-1]
    stacked = jnp.stack([values[name] for name in several.names])
    return stacked - jnp.asarray(minima, stacked.dtype) + 1e-8

  def build(oracle):
    def init_fn(params):
      dtype = _trees.widest_dtype(params)
      logits = jnp.zeros([size], dtype)
      return FamoState(
        count=jnp.zeros([], jnp.int32),
        logits=logits,
        weights=jnp.full([size], 1 / size, dtype),
        slow=slow.init(logits),
        oracle=oracle.init(params),
        optimiser=inner.init(params),
      )

    def update_fn(batch, state, params=None, **extra_args):
      base.require_batch(batch, params)
      _, first = oracle.update(batch, state.oracle, params)
      before = height(first)
      share = jax.nn.softmax(state.logits)
      weights = share / before / jnp.sum(share / before)
      slope, measured = oracle.update(batch, first, params, weights=weights)
      updates, moved = inner.update(
        slope, state.optimiser, params, **extra_args
      )
      stepped = _sequences.apply_updates(params, updates)
      _, last = oracle.update(batch, measured, stepped)
      fall = jnp.log(before) - jnp.log(height(last))
      pull = jax.grad(lambda x: jnp.vdot(jax.nn.softmax(x), fall))(state.logits)
      change, slow_state = slow.update(pull, state.slow, state.logits)
      dtype = state.logits.dtype
      rate = weight_rate(state.count) if callable(weight_rate) else weight_rate
      return updates, FamoState(
        count=optax.safe_increment(state.count),
        logits=state.logits - jnp.asarray(rate, dtype) * change,
        weights=weights,
        slow=slow_state,
        oracle=states.replace_measured(last, states.measured(measured)),
        optimiser=moved,
      )

    return parts.Solver(init_fn, update_fn, (oracle,), again=build)

  return build(_weighted_losses(several))
