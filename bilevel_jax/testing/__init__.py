r"""Checks of the contract for methods, and problems with known solutions.

One `Row` checks your own method::

    import bilevel_jax as bj, optax
    from bilevel_jax import testing

    def make(wrap, rate):
      sgd = optax.sgd(rate)
      solver = my_method(testing.PROBLEM, upper=sgd, lower=sgd)
      return bj.evaluation.wrapped(solver, wrap)

    testing.check(testing.Row('my_method', make, {'gradients/lower': 3}))

The report lists each broken promise, what differs, and which field of the row
may be wrong. `QUICK` and `LIGHT` suit every run of the tests, `FULL` has all
promises on one device, and `DEVICES` the promises on eight devices.

The shapes of the problem expose mistakes. Only parameters have 10 coordinates:
an array of the method's state whose last axis is 10 counts as coordinates and
must be sharded like them. Noise enters both levels. Coordinates do not mix, so
also compare the numbers with a step written by hand, on `coupled_problem` for
instance.

This package needs only what the library needs: no test runner, no checkpoints.
"""

from bilevel_jax.testing._check import (
  DEVICES,
  FULL,
  LIGHT,
  QUICK,
  broken_promises,
  check,
  report,
)
from bilevel_jax.testing._compare import Broken
from bilevel_jax.testing._problem import (
  COORDINATES,
  EXAMPLES,
  INNER,
  OBJECTIVES,
  PENALISED,
  PENALTY,
  PROBLEM,
  RATE,
  X_SET,
  Y_SET,
  by_descent,
  flat_loss,
  flat_params,
  inner_batch,
  lower_loss,
  nested_params,
  random_batch,
  three_losses,
  upper_loss,
  with_sequence,
)
from bilevel_jax.testing._row import Row
from bilevel_jax.testing._solved import (
  Solved,
  coupled_problem,
  run,
  toy_problem,
)

__all__ = [
  'COORDINATES',
  'DEVICES',
  'EXAMPLES',
  'FULL',
  'INNER',
  'LIGHT',
  'OBJECTIVES',
  'PENALISED',
  'PENALTY',
  'PROBLEM',
  'QUICK',
  'RATE',
  'X_SET',
  'Y_SET',
  'Broken',
  'Row',
  'Solved',
  'broken_promises',
  'by_descent',
  'check',
  'coupled_problem',
  'flat_loss',
  'flat_params',
  'inner_batch',
  'lower_loss',
  'nested_params',
  'random_batch',
  'report',
  'run',
  'three_losses',
  'toy_problem',
  'upper_loss',
  'with_sequence',
]
