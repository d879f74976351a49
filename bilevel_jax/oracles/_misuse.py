"""Errors for calls of solvers in a wrong place or order."""

import sys
import types as types_of_python
from typing import Any

import optax

from bilevel_jax import _sequences, types


def require_batch(batch: Any, params: Any) -> None:
  """Raises TypeError for missing parameters or arguments in another order."""
  if params is None:
    raise TypeError(
      'an oracle evaluates losses at the parameters: call '
      'solver.update(batch, state, params).'
    )
  _sequences.refuse_state(batch, 'the batch is')
  _sequences.refuse_state(params, 'the parameters are')
  is_sequences = _sequences.is_sequences(params)
  if isinstance(batch, types.BilevelParams) and not is_sequences:
    raise TypeError(
      'the batch is a BilevelParams, but the parameters are '
      f'{type(params).__name__}: call solver.update(batch, state, params), in '
      'this order.'
    )
  if is_sequences and type(batch) is type(params):
    raise TypeError(
      f'the batch is a {type(batch).__name__}, like the parameters: a solver '
      'takes a batch where optax takes gradients. Put transformations of '
      'gradients (optax.MultiSteps, optax.apply_if_finite) around an optimiser '
      'within the solver, and bj.evaluation.accumulate around its oracle.'
    )


# Modules of optax whose transformations add or skip gradients.
_READ_GRADIENTS = (
  'optax.transforms._accumulation',
  'optax.transforms._conditionality',
)


def refuse_around() -> None:
  """Raises TypeError behind a link, or inside wrappers that read gradients.

  They would fail later, or average batches instead of gradients. `init` is the
  only call before that, so the calling frames are inspected.
  """
  frame: types_of_python.FrameType | None = sys._getframe(1)
  link = None
  while frame is not None:
    module = frame.f_globals.get('__name__', '')
    if module.partition('.')[0] not in ('bilevel_jax', 'optax'):
      return
    if module == optax.chain.__module__:
      # Of the function that calls each `fn` of `init_fns`, and of its loop.
      link = frame.f_locals.get('fn', link)
      if link not in (None, frame.f_locals.get('init_fns', [link])[0]):
        raise TypeError(
          'a solver or an oracle is not the first link of optax.chain, and '
          'earlier links would change its batch: write optax.chain(oracle, '
          'optimiser).'
        )
    if module in _READ_GRADIENTS:
      name = frame.f_code.co_qualname.partition('.')[0]
      raise TypeError(
        f'optax.{name} wraps a solver or an oracle, and would treat its batch '
        'as gradients: wrap an optimiser within the solver instead, or the '
        'oracle in bj.evaluation.accumulate for the mean over parts of a batch.'
      )
    frame = frame.f_back
