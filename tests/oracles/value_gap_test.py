import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import COORDINATES, PENALISED, Row


def _row(wrap, penalty, rate):
  oracle = wrap(bj.value_gap(contract.PROBLEM, penalty=penalty))
  return contract.by_descent(oracle, upper=rate, lower=rate)


ROWS = (
  Row(
    'value_gap',
    _row,
    {'gradients/upper': 1, 'gradients/lower': 2},
    params=contract.with_sequence(value=np.linspace(-0.5, 1.0, COORDINATES)),
    hyper=PENALISED,
    same_as='scale_by_penalty',
    light=True,
  ),
)


def rough(dtype=None):
  params = problems.rough_params(0, dtype)
  away = problems.rough_params(1, dtype).lower
  return bj.sequences(**params._asdict(), value=away)


def evaluate(oracle, params, batch):
  return jax.jit(oracle.update)(batch, oracle.init(params), params)


def test_rows_by_finite_differences(x64):
  params, batch = rough(), problems.rough_batch()
  jacobian, state = evaluate(bj.value_gap(problems.ROUGH), params, batch)
  x, y, w = params

  def gap(p):
    lower = lambda y: problems.rough_lower(p.upper, y, batch)[0]
    return lower(p.lower) - lower(w)

  here = bj.BilevelParams(x, y)
  above = lambda p: problems.rough_upper(*p, batch)
  exact = jax.tree.map(
    lambda *rows: jnp.stack(rows),
    problems.by_differences(above, here),
    problems.by_differences(gap, here),
  )
  found = bj.BilevelParams(jacobian.rows.upper, jacobian.rows.lower)
  chex.assert_trees_all_close(found, exact, atol=1e-8)
  assert jacobian.rows.value is None
  below = problems.rough_lower(x, y, batch)[0]
  chex.assert_trees_all_close(
    bj.values(state),
    {'upper': above(here), 'lower': below, 'gap': gap(here)},
    rtol=1e-12,
  )


def test_closed_form_on_a_quadratic(x64):
  # f = x y, g = h (y - a x)^2 / 2.
  a, h, x, y, w = 2.0, 3.0, 0.7, -0.4, 1.1
  problem = bj.BilevelProblem(
    lambda x, y, b: x * y, lambda x, y, b: h * (y - a * x) ** 2 / 2
  )
  params = bj.sequences(
    upper=jnp.float64(x), lower=jnp.float64(y), value=jnp.float64(w)
  )
  rows = evaluate(bj.value_gap(problem), params, None)[0].rows
  in_x = -a * h * (y - a * x) + a * h * (w - a * x)
  np.testing.assert_allclose(rows.upper, [y, in_x], rtol=1e-14)
  np.testing.assert_allclose(rows.lower, [x, h * (y - a * x)], rtol=1e-14)


@pytest.mark.parametrize('rescale', [True, False])
def test_fused_is_the_weighed_rows_at_each_count(x64, rescale):
  params, batch = rough(), problems.rough_batch()
  schedule = lambda count: 3.0 * count  # 0, 3, 6
  fused = bj.value_gap(problems.ROUGH, penalty=schedule, rescale=rescale)
  rows = bj.value_gap(problems.ROUGH)
  link = bj.aggregators.scale_by_penalty(schedule, rescale=rescale)
  rows = optax.chain(rows, link)
  one, two = jax.jit(fused.update), jax.jit(rows.update)
  states = [fused.init(params), rows.init(params)]
  for _ in range(3):
    ours, states[0] = one(batch, states[0], params)
    theirs, states[1] = two(batch, states[1], params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-11)
    chex.assert_trees_all_close(
      bj.values(states[0]), bj.values(states[1]), rtol=1e-11
    )


@pytest.mark.parametrize('penalty', [None, 2.0])
def test_the_value_sequence_is_stopped_in_w_and_live_in_x(x64, penalty):
  params, batch = rough(), problems.rough_batch()
  oracle = bj.value_gap(problems.ROUGH, penalty=penalty)
  gradients = lambda p: evaluate(oracle, p, batch)[0]
  field = lambda g: (g if penalty else g.rows).upper
  # With y = w, the slope of the gap in x is none; it is with w elsewhere.
  level = params._replace(value=params.lower)
  only_upper = evaluate(
    bj.value_gap(problems.ROUGH, penalty=0.0), params, batch
  )[0]
  half = 0.5 if penalty else 1.0
  part = lambda g: jax.tree.map(lambda x: x if penalty else x.sum(0), field(g))
  chex.assert_trees_all_close(
    part(gradients(level)),
    jax.tree.map(lambda x: half * x, only_upper.upper),
    rtol=1e-12,
  )
  far = part(gradients(params))
  assert not np.allclose(far['a'], half * only_upper.upper['a'])
  # No derivative of what the oracle gives passes the stopped sequence's loss.
  of_gap = lambda w: bj.values(
    evaluate(oracle, params._replace(value=w), batch)[1]
  )['gap']
  slope = jax.grad(of_gap)(params.value)
  chex.assert_trees_all_equal(slope, jax.tree.map(jnp.zeros_like, slope))


def test_a_lagging_value_sequence_gives_a_negative_gap():
  problem = bj.BilevelProblem(lambda x, y, b: y, lambda x, y, b: (y - x) ** 2)
  one = jnp.float32(1.0)
  params = bj.sequences(upper=one, lower=one, value=jnp.float32(3.0))
  _, state = evaluate(bj.value_gap(problem), params, None)
  assert bj.values(state)['gap'] == -4.0


@pytest.mark.parametrize(
  ('which', 'message'),
  [
    (bj.BilevelProblem(lambda x, y, b: y, problems.rough_lower), 'the upper'),
    (bj.BilevelProblem(problems.rough_upper, lambda x, y, b: b), 'the lower'),
  ],
)
@pytest.mark.parametrize('penalty', [None, 1.0])
def test_the_loss_that_is_no_scalar_is_named(which, message, penalty):
  params, batch = rough(jnp.float32), problems.rough_batch(0, jnp.float32)
  with pytest.raises(TypeError, match=f'{message} loss returned'):
    evaluate(bj.value_gap(which, penalty=penalty), params, batch)


def test_a_missing_value_sequence_is_named():
  params = problems.rough_params(0, jnp.float32)
  with pytest.raises(
    TypeError, match='an oracle works on the sequences upper, lower, value'
  ):
    evaluate(bj.value_gap(problems.ROUGH), params, None)


@pytest.mark.parametrize('penalty', [-1.0, lambda count: 5.0 - count])
def test_negative_penalty(penalty):
  with pytest.raises(ValueError, match='weight >= 0'):
    bj.value_gap(problems.ROUGH, penalty=penalty)
