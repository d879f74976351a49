"""Where PBGD-Free ends at the wrong point, and ALT-PBGD at the right one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from tests import contract
from tests.contract import INNER, PENALISED, Row


def _row(method):
  def make(wrap, penalty, rate):
    sgd, at = optax.sgd(rate), contract.inner_batch
    solver = getattr(bj.solvers, method)(
      contract.PROBLEM,
      penalty=penalty,
      upper=sgd,
      lower=bj.Sequence(sgd, steps=INNER, batch_at=at),
    )
    return bj.evaluation.wrapped(solver, wrap)

  return make


ROWS = (
  Row(
    'pbgd_free',
    _row('pbgd_free'),
    {'gradients/upper': INNER + 1, 'gradients/lower': INNER},
    hyper=PENALISED,
    covers=('penalised_lower_gradient',),
  ),
  Row(
    'alt_pbgd',
    _row('alt_pbgd'),
    {'gradients/upper': INNER + 1, 'gradients/lower': 2 * INNER + 2},
    hyper=PENALISED,
    same_as='f2sa, two loops',
    light=True,
  ),
)

PENALTY = 15.0
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: x**2 + 10 * y,
  lower=lambda x, y, batch: (y - x + 1) ** 2,
)


def end_of(method, **rates):
  box = lambda z: jnp.clip(z, -8.0, 1.5)
  solver = method(
    PROBLEM,
    penalty=PENALTY,
    upper=bj.Sequence(optax.sgd(0.01), set=box),
    lower=bj.Sequence(optax.sgd(0.1), set=box, steps=10),
    **rates,
  )
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(1.0))

  def step(carry, _):
    params, state = carry
    updates, state = solver.update(None, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = (params, solver.init(params))
  (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=1500))(start)
  return np.array(params)


def test_the_upper_slope_alone_solves_nothing_where_the_upper_loss_is_steep():
  # At x = 0 the slope in x vanishes, whatever y does.
  np.testing.assert_allclose(
    end_of(bj.solvers.pbgd_free), [0, -1 - 5 / PENALTY], atol=1e-3
  )


def test_with_the_lower_solutions_known_the_same_steps_reach_the_answer():
  np.testing.assert_allclose(
    end_of(bj.solvers.alt_pbgd), [-5, -6 - 5 / PENALTY], atol=2e-3
  )


def test_alternating_is_the_fully_first_order_method_in_two_loops():
  batches = jnp.array([0.5, -0.3, 0.2])
  problem = bj.BilevelProblem(
    lambda x, y, b: jnp.cosh(y - b).sum() + x @ x / 2,
    lambda x, y, b: jnp.sum((y - jnp.sin(x) - b) ** 2) + (y**4).sum() / 8,
  )
  sgd = optax.sgd(0.1)
  how = {
    'penalty': lambda k: 1.0 + k,
    'upper': sgd,
    'lower': bj.Sequence(sgd, steps=3),
  }
  ends = []
  for method in (bj.f2sa, bj.solvers.alt_pbgd):
    params = bj.BilevelParams(jnp.array([0.4, -0.2]), jnp.zeros(2))
    solver = method(problem, **how)
    state = solver.init(params)
    for batch in batches:
      updates, state = solver.update(batch, state, params)
      params = optax.apply_updates(params, updates)
    ends.append(params)
  jax.tree.map(np.testing.assert_array_equal, *ends)
