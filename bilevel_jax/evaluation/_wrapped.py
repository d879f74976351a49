"""Wrappers around each oracle of a finished solver."""

from typing import Any

from bilevel_jax import parts, types


def wrapped(solver: Any, wrapper: types.Wrapper) -> Any:
  """Wraps each oracle of a solver.

  The wrapper goes around an oracle together with its aggregator. If an oracle
  is itself a wrapper that corrects, delays, combines or selects others
  (`storm`, `saga`, `recursive`, `delayed`, `together`, `select`), the new
  wrapper goes inside, around each of these. So `sustain` corrects mean
  gradients, and `saba` stores stale directions in its table.

  Args:
    solver: a solver or an oracle.
    wrapper: a function from an oracle to an oracle, for instance
      `lambda oracle: bj.evaluation.accumulate(oracle, 4)`.

  Returns:
    A solver, or an oracle.

  Raises:
    TypeError: if the oracles are hidden, as in an `optax.chain`.
    ValueError: if the solver depends on its own oracles.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> toy, sgd = bj.testing.toy_problem(), optax.sgd(0.1)
    >>> solver = bj.v_pbgd(toy.problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> halves = bj.evaluation.wrapped(
    ...   solver, lambda oracle: bj.evaluation.accumulate(oracle, 2)
    ... )
    >>> state = halves.init(toy.params)
    >>> _, state = halves.update(jnp.ones(4), state, toy.params)
    >>> bj.counts(state)['gradients/upper']
    2
  """
  if isinstance(solver, parts.Oracle):
    return parts.around(solver, wrapper)
  if not isinstance(solver, parts.Solver):
    raise TypeError(
      'wrapped finds no oracle in a transformation such as optax.chain, got '
      f'{type(solver).__name__}: wrap the oracle before it is chained, or '
      'chain by bj.oracles.aggregated(oracle, ...).'
    )
  if solver.again is None:
    raise ValueError(
      'wrapped: this solver depends on its own oracles, which take no wrapper.'
    )
  return solver.again(*(parts.around(o, wrapper) for o in solver.oracles))
