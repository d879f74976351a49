"""Tests of LV-HBA on its authors' problem, and of one step by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import PENALISED, Row


def _row(wrap, penalty, rate):
  sgd = optax.sgd(rate)
  joint = bj.projections.Joint(
    lambda pair: jax.tree.map(lambda z: jnp.clip(z, -2.0, 2.0), pair),
    ('upper',),
  )
  solver = bj.solvers.lv_hba(
    contract.PROBLEM,
    lambda x, y: y['b'] + x['a'] / 4 - 1,
    penalty=penalty,
    upper=sgd,
    lower=bj.Sequence(sgd, set=joint),
    value=sgd,
    multipliers=bj.solvers.Multipliers(sgd, sgd, proximity=(1.0, 1.0)),
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'lv_hba',
    _row,
    {
      'gradients/upper': 1,
      'gradients/lower': 3,
      'gradients/proximal': 1,
      'projections/lower+upper': 1,
      'projections/multiplier': 1,
      'projections/proximal': 1,
    },
    hyper=PENALISED,
  ),
)

SIZE = 10
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, b: (
    jnp.sum((x - y[1]) ** 2) / 2 + jnp.sum((y[0] - 1) ** 2) / 2
  ),
  lower=lambda x, y, b: y[0] @ y[0] / 2 - x @ y[0] + y[1].sum(),
)


def height(x, y):
  """The authors' constraint, that the sum is at least zero."""
  return -(x.sum() + y.sum())[None]


def nearest(pair):
  """To the half space of pairs whose sum is at least zero."""
  y, x = pair
  short = jnp.minimum(y.sum() + x.sum(), 0) / (3 * SIZE)
  return y - short, x - short


def solver(scale):
  sgd = optax.sgd
  return bj.solvers.lv_hba(
    PROBLEM,
    height,
    penalty=lambda k: scale * (k + 1.0) ** 0.3,
    upper=sgd(0.008),
    lower=bj.Sequence(
      sgd(0.008), set=bj.projections.Joint(nearest, ('upper',))
    ),
    value=sgd(0.01),
    multipliers=bj.solvers.Multipliers(sgd(0.01), sgd(0.02)),
  )


def test_solves_its_authors_problem():
  method = solver(1.0)
  params = bj.BilevelParams(jnp.ones(SIZE), jnp.ones((2, SIZE)))

  def step(carry, _):
    params, state = carry
    updates, state = method.update(None, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = (params, method.init(params))
  run = jax.jit(lambda c: jax.lax.scan(step, c, length=20_000)[0])
  params, _ = run(start)
  found = np.concatenate([params.upper[None], params.lower])
  wanted = np.repeat([[-0.3], [0.7], [-0.4]], SIZE, axis=1)
  distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
  assert distance < 0.02  # .0105 in a check of the published equations.
  assert -height(*params) > -1e-5  # The joint set holds.


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_takes_the_steps_of_its_equations(dtype):
  with jax.enable_x64(dtype == 'float64'):
    draw = np.random.default_rng(0).normal
    x, y = draw(size=SIZE), draw(size=(2, SIZE))
    params = bj.BilevelParams(jnp.array(x, dtype), jnp.array(y, dtype))
    method = solver(0.5)
    state, update = method.init(params), jax.jit(method.update)
    for _ in range(3):
      updates, state = update(None, state, params)
      params = optax.apply_updates(params, updates)
    theirs = by_hand(x, y, 3)
    kept = bj.auxiliaries(state)
    ours = (*params, kept['value'], kept['multiplier'], kept['proximal'])
    for one, two in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(
        one, two, rtol=1e-10 if dtype == 'float64' else 1e-4, atol=1e-6
      )


def by_hand(x, y, updates, eta=0.01, alpha=0.008, beta=0.02, scale=0.5):
  w, dual, z = y.copy(), np.zeros(1), np.zeros(1)
  for k in range(updates):
    slope = np.stack([w[0] - x, np.ones(SIZE)])  # of g at w
    new_w = w - eta * (slope - dual + (w - y) / 10)
    above = -(x.sum() + w.sum())
    dual = np.clip(dual + eta * (above - (dual - z) / 10), 0, 1e3)
    w, c = new_w, scale * (k + 1.0) ** 0.3
    f_x, f_y = x - y[1], np.stack([y[0] - 1, y[1] - x])
    dx = f_x / c - y[0] + w[0] + dual
    dy = f_y / c + np.stack([y[0] - x, np.ones(SIZE)]) - (y - w) / 10
    x, y = x - alpha * dx, y - alpha * dy
    short = min(x.sum() + y.sum(), 0) / (3 * SIZE)
    x, y = x - short, y - short
    z = np.clip(z + beta * (dual - z) / 10, 0, 1e3)
  return x, y, w, dual, z


def _bounded(penalty=1.0, keep=nearest, **more):
  """The same with one step size, and its set or none."""
  sgd = optax.sgd(0.1)
  joint = keep and bj.projections.Joint(keep, ('upper',))
  return bj.solvers.lv_hba(
    PROBLEM,
    height,
    penalty=penalty,
    upper=sgd,
    lower=bj.Sequence(sgd, set=joint),
    value=sgd,
    multipliers=bj.solvers.Multipliers(sgd, sgd, **more),
  )


def test_refuses_a_length_that_is_not_positive():
  with pytest.raises(ValueError, match='positive proximity'):
    _bounded(proximity=(0.0, 1.0))


def test_refuses_variables_without_a_set():
  """Nothing else would keep the constraint."""
  with pytest.raises(ValueError, match=r'bj.projections.Joint\(project'):
    _bounded(keep=None)


@pytest.mark.parametrize('penalty', [0.0, -1.0, lambda k: k**0.3])
def test_refuses_a_penalty_that_is_not_positive(penalty):
  with pytest.raises(ValueError, match='the penalty is a weight > 0'):
    _bounded(penalty)


def test_a_traced_penalty_that_is_not_positive_gives_nan():
  params = bj.BilevelParams(jnp.ones(SIZE), jnp.ones((2, SIZE)))

  @jax.jit
  def updates(penalty):
    method = _bounded(penalty)
    return method.update(None, method.init(params), params)[0].upper

  assert jnp.isnan(updates(-1.0)).all() and jnp.isnan(updates(0.0)).all()
  assert jnp.isfinite(updates(1.0)).all()


def test_the_error_is_of_order_one_over_the_penalty(x64):
  """What docs/choosing.md says of the lower variable; half of it at 2c."""
  # Curvature 2 below; the inequality y <= x + 5 stays inactive.
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 3.0) ** 2 + (x - 2.0) ** 2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  joint = bj.projections.half_space({'lower': 1.0, 'upper': -1.0}, 5.0)
  off = []
  for penalty in (20.0, 40.0):
    step = optax.sgd(0.1)
    solver = bj.solvers.lv_hba(
      problem,
      lambda x, y: jnp.sum(y - x) - 5.0,
      penalty=penalty,
      upper=step,
      lower=bj.Sequence(step, set=joint),
      value=step,
      multipliers=bj.solvers.Multipliers(step, step, proximity=(1.0, 1.0)),
    )
    start = bj.BilevelParams(jnp.zeros(1), jnp.zeros(1))
    params, _ = bj.testing.run(solver, start, 20_000)
    x, y = params.upper[0], params.lower[0]
    slope = abs(2 * (y - 3))
    expected = slope * (1 + 1 / (1.0 * 2)) / (penalty * 2)
    np.testing.assert_allclose(abs(y - x), expected, rtol=0.2)
    off.append(float(abs(x - 2.5)))
  np.testing.assert_allclose(off[0] / off[1], 2, rtol=0.2)
