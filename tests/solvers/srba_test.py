"""SRBA: when its estimates are fresh, and where it ends on finite data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import Row


def _row(wrap, rate):
  sgd = optax.sgd(rate)
  solver = bj.solvers.srba(contract.PROBLEM, period=2, upper=sgd, lower=sgd)
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'srba',
    _row,
    {},
    random_counts=(
      'gradients/lower',
      'gradients/upper',
      'hessian_vector_products/lower',
    ),
  ),
)


def test_is_exact_on_noisy_parts_where_soba_is_not(x64):
  """Noise of mean zero over four parts, constant steps."""
  noise = jnp.array([1.0, -2.0, 3.0, -2.0])

  def noisy(loss):
    # Also in the curvature, so that differences on one part are not exact.
    return lambda x, y, batch: (
      loss(x, y, None)
      + jnp.mean(batch) * (x + 2 * y).sum()
      + jnp.mean(batch) * (y**2).sum() / 20
    )

  problem = bj.BilevelProblem(*map(noisy, problems.QUADRATIC[:2]))
  rates = {'upper': optax.sgd(0.1), 'lower': optax.sgd(0.2)}
  pick = {'small_batch': lambda batch: batch[0]}
  pick['large_batch'] = lambda batch: batch[1]
  ends = {}
  for name, solver in {
    'srba': bj.solvers.srba(problem, period=4, **pick, **rates),
    'soba': bj.soba(problem, **rates),
  }.items():

    def body(k, carry, solver=solver, name=name):
      params, state = carry
      small = noise[jnp.array([(7 * k) % 4])]
      batch = (small, noise) if name == 'srba' else small
      updates, state = solver.update(batch, state, params)
      return bj.apply_updates(params, updates), state

    run = jax.jit(lambda c, body=body: jax.lax.fori_loop(0, 4_000, body, c))
    start = problems.start()
    params, _ = run((start, solver.init(start)))
    ends[name] = np.abs(params.upper - problems.SOLUTION).max()
  assert ends['srba'] < 1e-8
  assert ends['soba'] > 1e-2


def test_counts_a_fresh_estimate_once_and_a_difference_twice():
  toy = bj.testing.toy_problem()
  sgd = optax.sgd(0.1)
  solver = bj.solvers.srba(toy.problem, period=3, upper=sgd, lower=sgd)
  _, state = bj.testing.run(solver, toy.params, 7)
  assert bj.counts(state)['gradients/lower'] == 3 + 2 * 4


def test_a_period_of_none():
  sgd = optax.sgd(0.1)
  with pytest.raises(ValueError, match='evaluations in a period >= 1, got 0'):
    bj.solvers.srba(contract.PROBLEM, period=0, upper=sgd, lower=sgd)
