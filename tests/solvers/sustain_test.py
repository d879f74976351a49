"""SUSTAIN and MRBO: what recursive momentum takes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import RATE, Row


def _row(wrap, rate, decay, solver, **given):
  solver = getattr(bj.solvers, solver)(
    contract.PROBLEM,
    upper=optax.sgd(rate),
    lower=optax.sgd(rate),
    decay=decay,
    terms=2,
    step_size=0.5,
    **given,
  )
  return bj.evaluation.wrapped(solver, wrap)


_HYPER = {'hyper': {'rate': RATE, 'decay': 0.4}, 'parts': 'none'}
_TWICE = {'gradients/lower': 2, 'gradients/upper': 2}

ROWS = (
  Row(
    'sustain',
    functools.partial(_row, solver='sustain', key=0),
    _TWICE,
    random_counts=('hessian_vector_products/lower',),
    keys=True,
    **_HYPER,
  ),
  Row(
    'mrbo',
    functools.partial(_row, solver='mrbo'),
    _TWICE | {'hessian_vector_products/lower': 6},
    devices=True,
    **_HYPER,
  ),
)


def noisy(loss):
  """Adds a slope of mean zero in all variables."""
  return lambda x, y, batch: loss(x, y, batch) + batch @ jnp.concatenate([x, y])


def test_momentum_takes_out_noise():
  """Mean squared hypergradient of a run with noise, after its start."""
  params = problems.mixed_params()
  problem = bj.BilevelProblem(*map(noisy, problems.MIXED[:2]))

  @jax.jit
  @jax.vmap
  def spread(decay):
    solver = bj.solvers.mrbo(
      problem,
      upper=optax.sgd(0.02),
      lower=optax.sgd(0.05),
      terms=40,
      step_size=0.4,
      decay=lambda count: decay,
    )

    def body(carry, key):
      params, state = carry
      batch = jax.random.normal(key, (6,))
      updates, state = solver.update(batch, state, params)
      return (bj.apply_updates(params, updates), state), params.upper

    keys = jax.random.split(jax.random.key(1), 4_000)
    path = jax.lax.scan(body, (params, solver.init(params)), keys)[1][500:]
    return jnp.mean(jax.vmap(problems.mixed_hypergradient)(path) ** 2)

  little, all_of_it = spread(jnp.array([0.05, 1.0]))
  assert little < all_of_it / 2


def test_sustain_draws_one_length_for_both_points():
  # At a point that does not move, decay 0 keeps the first estimate exactly if
  # both evaluations draw one length of the series.
  solver = bj.solvers.sustain(
    problems.MIXED,
    upper=optax.sgd(1.0),
    lower=optax.sgd(0.0),
    terms=6,
    step_size=0.3,
    decay=0.0,
    key=0,
  )
  params = problems.mixed_params()._replace(lower=jnp.ones(3))
  state, step = solver.init(params), jax.jit(solver.update)
  first, state = step(None, state, params)
  for _ in range(4):
    again, state = step(None, state, params)
    np.testing.assert_allclose(again.upper, first.upper, rtol=1e-5)


def test_a_decay_outside_of_its_bounds():
  sgd = {'upper': optax.sgd(0.1), 'lower': optax.sgd(0.1)}
  with pytest.raises(ValueError, match='decay is in'):
    bj.solvers.sustain(
      problems.MIXED, terms=1, step_size=0.1, decay=-1.0, key=0, **sgd
    )
