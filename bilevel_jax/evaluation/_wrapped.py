"""Wrappers around the oracles of a solver, from outside."""

from typing import Any

from bilevel_jax import parts, types


def wrapped(solver: Any, wrapper: types.Wrapper) -> Any:
  """Wraps each oracle of a solver: the same solver, evaluated elsewhere.

  The wrapper goes around an oracle and the aggregator behind it. It goes inside
  what corrects, delays, combines or selects other oracles (`storm`, `saga`,
  `recursive`, `delayed`, `together`, `select`), around each of these. So the
  correction of `sustain` is one of mean gradients, and the table of `saba` one
  of stale directions.

  Args:
    solver: a solver or an oracle.
    wrapper: from an oracle to an oracle, for instance
      `lambda oracle: bj.evaluation.accumulate(oracle, 4)`.

  Returns:
    A solver, or an oracle.

  Raises:
    TypeError: if the parts cannot be seen, as of an `optax.chain`.
    ValueError: if the solver depends on its own oracles.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - batch.mean()) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.v_pbgd(problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> parts = bj.evaluation.wrapped(
    ...   solver, lambda oracle: bj.evaluation.accumulate(oracle, 2)
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> _, state = parts.update(jnp.ones(4), parts.init(params), params)
    >>> bj.counts(state)['gradients/upper']
    2
  """
  if isinstance(solver, parts.Oracle):
    return parts.around(solver, wrapper)
  if not isinstance(solver, parts.Solver):
    raise TypeError(
      'wrapped sees no oracle in a transformation such as optax.chain: wrap '
      'the oracle before it is chained, or chain by '
      f'bj.oracles.aggregated(oracle, ...); got {type(solver).__name__}.'
    )
  if solver.again is None:
    raise ValueError(
      'wrapped: this solver depends on its own oracles, which take no wrapper.'
    )
  return solver.again(*(parts.around(o, wrapper) for o in solver.oracles))
