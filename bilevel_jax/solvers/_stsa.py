"""Stochastic approximation with coupled sequences, and step sizes for it."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from bilevel_jax import descent, oracles, types
from bilevel_jax.aggregators import _penalty

# (parameters, batch) -> increment, of the structure of one sequence.
Increment = Callable[[Any, Any], Any]


def stsa(
  increments: Mapping[str, Increment],
  *,
  steps: types.ScalarOrSchedule | Mapping[str, Any],
  order: str = 'simultaneous',
  batch_of: Callable[[Any, str], Any] | None = None,
) -> descent.Solver:
  r"""STSA: steps of any number of coupled sequences along their increments.

  .. math::
    z^n_{k+1} = \Pi^n [ z^n_k + \beta_{k,n} h^n(z_k; \xi^n_k) ],
    \qquad n = 0, \dots, N

  If the increments are strongly monotone in their own sequence, the joint
  system is stable and all steps are of one order, the error falls at the rate
  of a single sequence for any N. If the joint system is unstable with equal
  steps, for instance of a long chain of sequences, take larger steps of the
  inner sequences, by a constant factor.

  For averages of the iterates (Polyak and Ruppert), average the parameters in
  the loop with `optax.incremental_update(params, average, 1 / (k + 1))`.

  Args:
    increments: by name of a sequence, a function from (parameters, batch) to
      its increment.
    steps: the step size of all sequences, a constant or a schedule, for
      instance `power_schedule`; or by name of a sequence, a step size, any
      optax optimiser or a `Sequence`. To add noise to a sequence, use
      `optax.chain(optax.add_noise(...), optax.sgd(...))`.
    order: `simultaneous` evaluates all increments at one point; `alternating`
      moves the sequences in turn, in the order of `increments`.
    batch_of: the batch of an increment, from (batch, name).

  Returns:
    A solver for named sequences; sequences without an increment do not move.

  Raises:
    ValueError: without increments, if `order` is unknown, or if `steps` lacks a
      sequence.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> solver = bj.stsa(
    ...   {'x': lambda z, b: z.y - 2 * z.x, 'y': lambda z, b: z.x + 1 - z.y},
    ...   steps=bj.solvers.power_schedule(20.0, 1.0, 60.0),
    ... )
    >>> params = bj.sequences(x=jnp.float32(0.0), y=jnp.float32(0.0))
    >>> params, _ = bj.testing.run(solver, params, 500)
    >>> print(params.x.round(2), params.y.round(2))
    1.0 2.0

  References:
    Shen and Chen, `A Single-Timescale Analysis for Stochastic Approximation
    with Multiple Coupled Sequences <https://arxiv.org/abs/2206.10414>`_, 2022.
  """
  if order not in ('simultaneous', 'alternating'):
    raise ValueError(
      f"order is 'simultaneous' or 'alternating', got {order!r}."
    )
  if not isinstance(increments, Mapping):
    raise TypeError(
      'stsa takes a dict from names of sequences to their increments, got '
      f'{type(increments).__name__}.'
    )
  names = tuple(increments)
  by_name = steps if isinstance(steps, Mapping) else dict.fromkeys(names, steps)
  if set(by_name) != set(names):
    raise ValueError(
      f'stsa takes steps for the sequences {sorted(names)}, got them for '
      f'{sorted(by_name)}.'
    )
  kinds = (types.Sequence, optax.GradientTransformation)
  records = {}
  for name, step in by_name.items():
    if not isinstance(step, kinds):
      _penalty.checked_schedule(step, f'the step of {name}')
      step = optax.sgd(step)
    records[name] = step
  one_by_one = [(name,) for name in names]
  groups = [names] if order == 'simultaneous' else one_by_one
  directions = [
    oracles.coupled({n: increments[n] for n in some}, batch_of=batch_of)
    for some in groups
  ]
  return descent.descend(*directions, **records)
