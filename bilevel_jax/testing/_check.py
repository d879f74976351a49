"""Checks a row of the contract and reports all promises that it breaks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bilevel_jax.testing import (
  _case,
  _compare,
  _devices,
  _promises,
  _row,
)

# Takes a case and raises an error if the promise is broken.
Promise = Callable[[Any], None]

# Find most faults with two compiled programs per row.
LIGHT: tuple[Promise, ...] = (
  _promises.compiles_once_and_keeps_types,
  _promises.moves,
  _promises.counts_evaluations,
  _promises.passes_oracles_to_wrap,
  _promises.matches_another_row,
  _promises.stays_in_its_sets,
)
# What the default tests check of each row.
QUICK: tuple[Promise, ...] = (
  *LIGHT,
  _promises.keeps_bfloat16,
  _promises.scan_vmap_schedules_and_accumulate,
)
# What the slow tests check of each row.
FULL: tuple[Promise, ...] = (
  *LIGHT,
  _promises.keeps_types_of_parameters,
  _promises.resumes_from_a_checkpoint,
  _promises.accepts_injected_hyperparameters,
  _promises.scan_vmap_schedules_and_accumulate,
)
# Need eight devices: XLA_FLAGS=--xla_force_host_platform_device_count=8.
DEVICES: tuple[Promise, ...] = (
  _devices.sharded_parameters_and_batch,
  _devices.mapped_devices,
)


def broken_promises(
  row: _row.Row,
  promises: Iterable[Promise] = FULL,
  *,
  others: Mapping[str, _row.Row] | None = None,
  restore: Callable[[Any, Any], Any] = _promises.through_numpy,
) -> dict[str, str]:
  """Checks all promises of a row and collects the broken ones.

  Args:
    row: the method's row.
    promises: `LIGHT`, `QUICK`, `FULL` or `DEVICES`, or some of their functions.
    others: further rows by name, needed if the row has a `same_as`.
    restore: simulates a checkpoint: maps (state, a state of the same structure)
      to the restored state. By default the state goes through NumPy arrays.

  Returns:
    The error message of each broken promise, by promise; empty if all hold.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> from bilevel_jax import testing
    >>> def make(wrap, rate):
    ...   oracle = wrap(bj.gradient(testing.flat_loss))
    ...   return optax.chain(oracle, optax.sgd(rate))
    >>> row = testing.Row(
    ...   'sgd', make, {'gradients/loss': 2}, params=testing.flat_params
    ... )
    >>> list(testing.broken_promises(row, testing.LIGHT))
    ['counts evaluations']
  """
  broken: dict[str, str] = {}
  try:
    case = _case.Case(row, restore, others)
  except Exception as error:
    return {'runs three updates': _compare.describe(error)}
  for promise in promises:
    try:
      promise(case)
    except Exception as error:
      name = getattr(promise, '__name__', str(promise)).replace('_', ' ')
      broken[name] = _compare.describe(error)
  return broken


def report(row: _row.Row, broken: Mapping[str, str]) -> str:
  """Formats the broken promises of a row as text.

  Example:
    >>> from bilevel_jax import testing
    >>> row = testing.Row('sgd', None, {})
    >>> print(testing.report(row, {'moves': 'no parameter moves'}))
    sgd:
    * moves
      no parameter moves
  """
  parts = [f'* {promise}\n  {text}' for promise, text in broken.items()]
  return '\n'.join([f'{row.name}:', *parts])


def check(
  row: _row.Row, promises: Iterable[Promise] = FULL, **kwargs: Any
) -> None:
  """Raises an error that lists the promises that a method breaks.

  Each method of the library works under `jit`, `vmap`, `lax.scan` and
  `inject_hyperparams`, with schedules and micro-batches; it compiles once,
  keeps dtypes and shapes, stays in its sets, counts its evaluations, and
  resumes bit for bit.

  Args:
    row: the method's row.
    promises: as in `broken_promises`.
    **kwargs: as in `broken_promises`.

  Raises:
    Broken: if a promise is broken; the message names each broken promise, what
      differs, and which field of the row may be wrong.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> from bilevel_jax import testing
    >>> def make(wrap, rate):
    ...   oracle = wrap(bj.gradient(testing.flat_loss))
    ...   return optax.chain(oracle, optax.sgd(rate))
    >>> testing.check(
    ...   testing.Row(
    ...     'sgd', make, {'gradients/loss': 1}, params=testing.flat_params
    ...   ),
    ...   testing.LIGHT,
    ... )
  """
  broken = broken_promises(row, promises, **kwargs)
  _compare.require(not broken, report(row, broken))
