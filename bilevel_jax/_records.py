"""What records of sequences say, checked: starts, loops, steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, types
from bilevel_jax.oracles import base

Records = dict[str, types.Sequence]


class Loop(NamedTuple):
  """How often one oracle is evaluated in an update, and on which batches.

  Attributes:
    steps: evaluations.
    looping: names of the sequences that move in each of them.
    batch: the batch of evaluation t.
  """

  steps: int
  looping: tuple[str, ...]
  batch: Callable[[Any], Any]


def loop_of(
  oracle: Any, records: Records, batch: Any, state: Any, z: Any
) -> Loop:
  """Reads the loop of an oracle off the records of what it moves."""
  ats: set[Any] = {s.batch_at for s in records.values()}
  if ats == {None} and all(s.steps == 1 for s in records.values()):
    return Loop(1, (), lambda t: batch)
  inner_batch = batch
  if len(picks := ats - {None}) == 1:
    # What an inner step sees may differ in shape, and in nothing else.
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
      f'the sequences {", ".join(names)} move by one oracle, but take '
      f'{", ".join(str(s.steps) for s in moving.values())} steps: give all of '
      'them the same number of steps, or 1.'
    )
  batches = {s.batch_at for s in moving.values()} - {None}
  if len(ats) > 1 or batches - ats:
    raise ValueError(
      f'the sequences {", ".join(names)} move by one oracle, whose evaluations '
      'see one batch each, but their batch_at differ: define one function and '
      f'give it to {", ".join(looping)}. Sequences that take fewer than '
      f'{steps} steps may leave it out.'
    )
  (at,) = ats
  pick_or_all = at or (lambda batch, t: batch)
  return Loop(steps, looping, lambda t: pick_or_all(batch, jnp.int32(t)))


def starts(records: Records, params: Any) -> dict[str, Callable[[Any], Any]]:
  """By name, the starts of the sequences that only the solver has."""
  _sequences.refuse_state(params, 'the parameters are')
  _sequences.require_sequences(params, (), 'descend')
  own = params._fields
  for name, record in records.items():
    if name in own and record.start is not None and not record.restart:
      raise ValueError(
        f'the parameters already have the sequence {name}: give the added '
        'one another name, leave out its start, or set restart=True to go '
        'back to it in each update.'
      )
    if record.start is None and (record.restart or name not in own):
      raise ValueError(
        f'the sequence {name} is not among the parameters {own}: correct its '
        'name, or give its record a start, a function from the parameters to '
        'its first value.'
        if name not in own
        else f'the sequence {name} restarts: give its record a start.'
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
      f'the optimiser of {name} asks for more than gradients ({error}): line '
      'searches, optax.lbfgs for instance, need the loss itself. Take one that '
      'steps along gradients alone, optax.adam for instance.'
    ) from error
