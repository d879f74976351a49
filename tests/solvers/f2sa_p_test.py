"""Tests of F2SA-p: the order of its bias, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import INNER, PENALISED, Row


def _row(wrap, penalty, rate):
  sgd, at = optax.sgd(rate), contract.inner_batch
  solver = bj.solvers.f2sa_p(
    contract.PROBLEM,
    order=2,
    penalty=penalty,
    upper=sgd,
    lower=bj.Sequence(sgd, steps=INNER, batch_at=at),
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'f2sa_p',
    _row,
    {'gradients/upper': 2 * INNER + 2, 'gradients/lower': 2 * INNER + 2},
    hyper=PENALISED,
  ),
)

NU = 0.05
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) / 2,
  lower=lambda x, y, batch: jnp.sum((y - x) ** 2) / 2,
)


def slope_ratio(order):
  """The direction at the lower solutions, over the exact hypergradient."""
  solver = bj.solvers.f2sa_p(
    PROBLEM,
    order=order,
    penalty=1 / NU,
    upper=optax.sgd(1.0),
    # The curvatures are 1 + j nu: some steps do.
    lower=bj.Sequence(optax.sgd(0.95), steps=60),
  )
  params = bj.BilevelParams(jnp.array([3.0, -2.0]), jnp.zeros(2))
  updates, _ = jax.jit(solver.update)(None, solver.init(params), params)
  return -updates.upper / (params.upper - 1)


def test_the_bias_falls_with_the_order():
  with jax.enable_x64(True):
    one, two, three = (slope_ratio(order) for order in (1, 2, 3))
    np.testing.assert_allclose(one, 1 / (1 + NU), rtol=1e-9)
    np.testing.assert_allclose(two, 1 / (1 - NU**2), rtol=1e-9)
    # Published errors of a check: 4.8e-2, 2.5e-3, 2.3e-4.
    errors = [float(abs(r - 1).max()) for r in (one, two, three)]
    np.testing.assert_allclose(errors, [4.8e-2, 2.5e-3, 2.3e-4], rtol=0.03)


def test_order_one_is_the_fully_first_order_method():
  sgd = optax.sgd(0.1)
  params = bj.BilevelParams(jnp.array([0.5, -1.0]), jnp.zeros(2))
  updates = []
  # Its y descends f + penalty g over the penalty: the same direction.
  for make in (bj.f2sa, lambda *a, **k: bj.solvers.f2sa_p(*a, order=1, **k)):
    solver = make(
      PROBLEM, penalty=4.0, upper=sgd, lower=bj.Sequence(sgd, steps=3)
    )
    update, _ = jax.jit(solver.update)(None, solver.init(params), params)
    updates.append(update)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *updates
  )


def _of_penalty(penalty):
  sgd = optax.sgd(0.1)
  return bj.solvers.f2sa_p(
    PROBLEM, order=2, penalty=penalty, upper=sgd, lower=sgd
  )


@pytest.mark.parametrize('penalty', [0.0, -1.0, lambda k: k * 0.1])
def test_refuses_a_penalty_that_is_not_positive(penalty):
  with pytest.raises(ValueError, match='the penalty is a weight > 0'):
    _of_penalty(penalty)


def test_a_traced_penalty_that_is_not_positive_gives_nan():
  params = bj.BilevelParams(jnp.ones(2), jnp.zeros(2))

  @jax.jit
  def updates(penalty):
    solver = _of_penalty(penalty)
    return solver.update(None, solver.init(params), params)[0].upper

  assert jnp.isnan(updates(-1.0)).all() and jnp.isnan(updates(0.0)).all()
  assert jnp.isfinite(updates(1.0)).all()


def test_refuses_an_order_below_one():
  with pytest.raises(ValueError, match='whole number of terms as `order` >= 1'):
    bj.solvers.f2sa_p(
      PROBLEM, order=0, penalty=1.0, upper=optax.sgd(1.0), lower=optax.sgd(1.0)
    )
