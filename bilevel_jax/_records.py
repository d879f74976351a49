"""Checks of the records of sequences: starts, loops, steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, types
from bilevel_jax.oracles import base

Records = dict[str, types.Sequence]


class Loop(NamedTuple):
  """The evaluations of one oracle in an update.

  Attributes:
    steps: the number of evaluations.
    looping: names of the sequences that move in each evaluation.
    batch: the batch of evaluation t.
  """

  steps: int
  looping: tuple[str, ...]
  batch: Callable[[Any], Any]


def make_loop(
  oracle: Any, records: Records, batch: Any, state: Any, z: Any
) -> Loop:
  """Derives the loop of an oracle from the records of its sequences."""
  ats: set[Any] = {s.batch_at for s in records.values()}
  if ats == {None} and all(s.steps == 1 for s in records.values()):
    return Loop(1, (), lambda t: batch)
  inner_batch = batch
  if len(picks := ats - {None}) == 1:
    # The batch of an inner step may have another shape.
    (pick,) = picks
    inner_batch = jax.eval_shape(pick, batch, jnp.int32(0))
  names = base.moved_by(oracle, inner_batch, state, z)
  require_records(names, records)
  moving = {n: records[n] for n in names}
  steps = max(s.steps for s in moving.values())
  looping = tuple(n for n, s in moving.items() if s.steps == steps)
  ats = {moving[n].batch_at for n in looping}
  if any(s.steps not in (1, steps) for s in moving.values()):
    raise ValueError(
      f'one oracle moves the sequences {", ".join(names)}, but they take '
      f'{", ".join(str(s.steps) for s in moving.values())} steps: give all of '
      'them the same number of steps, or 1.'
    )
  batches = {s.batch_at for s in moving.values()} - {None}
  if len(ats) > 1 or batches - ats:
    raise ValueError(
      f'one oracle moves the sequences {", ".join(names)} and sees one batch '
      'in each evaluation, but their batch_at differ: define one function and '
      f'give it to {", ".join(looping)}. Sequences with fewer than {steps} '
      'steps may leave it out.'
    )
  (at,) = ats
  pick_or_all = at or (lambda batch, t: batch)
  return Loop(steps, looping, lambda t: pick_or_all(batch, jnp.int32(t)))


def starts(records: Records, params: Any) -> dict[str, Callable[[Any], Any]]:
  """The starts of the sequences that are in the solver's state only."""
  _sequences.refuse_state(params, 'the parameters are')
  _sequences.require_sequences(params, (), 'descend')
  own = params._fields
  for name, record in records.items():
    if name in own and record.start is not None and not record.restart:
      raise ValueError(
        f'the parameters already have the sequence {name}: rename the added '
        'sequence, leave out its start, or set restart=True to return to the '
        'start in each update.'
      )
    if record.start is None and (record.restart or name not in own):
      raise ValueError(
        f'the sequence {name} is not among the parameters {own}: correct its '
        'name, or give its record a start, that is a function from the '
        'parameters to its first value.'
        if name not in own
        else f'the sequence {name} has restart=True but no start: give its '
        'record a start.'
      )
  return {n: s.start for n, s in records.items() if s.start and n not in own}


def require_records(names: Any, records: Records) -> None:
  """Raises ValueError if a sequence that has a gradient has no record."""
  for name in names:
    if name not in records:
      raise ValueError(
        f'the sequence {name} has a gradient but no optimiser: give '
        f'{name}=..., optax.set_to_zero() to hold it.'
      )


def move(
  link: optax.GradientTransformationExtraArgs,
  name: str,
  gradient: Any,
  state: Any,
  param: Any,
  extra_args: dict[str, Any],
) -> tuple[Any, Any]:
  """An optimiser's step; where it wants a loss, the error names the remedy."""
  try:
    return link.update(gradient, state, param, **extra_args)
  except TypeError as error:
    if 'value_fn' not in str(error) and 'argument' not in str(error):
      raise
    raise TypeError(
      f'the optimiser of {name} needs more than gradients ({error}): line '
      'searches, for instance of optax.lbfgs, need the loss. Use an optimiser '
      'that needs gradients only, for instance optax.adam.'
    ) from error
