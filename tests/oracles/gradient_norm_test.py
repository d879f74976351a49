import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import PENALISED, Row


def _row(wrap, penalty, rate):
  oracle = wrap(bj.gradient_norm(contract.PROBLEM, penalty=penalty))
  return contract.by_descent(oracle, upper=rate, lower=rate)


ROWS = (
  Row(
    'gradient_norm',
    _row,
    {
      'gradients/upper': 1,
      'gradients/lower': 1,
      'hessian_vector_products/lower': 1,
    },
    hyper=PENALISED,
    same_as='g_pbgd',
    parts='none',
    light=True,
  ),
)


def evaluate(oracle, params, batch):
  return jax.jit(oracle.update)(batch, oracle.init(params), params)


def half_norm(params, batch):
  lower = lambda y: problems.rough_lower(params.upper, y, batch)[0]
  return optax.tree.norm(jax.grad(lower)(params.lower), squared=True) / 2


def test_rows_by_finite_differences(x64):
  params, batch = problems.rough_params(), problems.rough_batch()
  oracle = bj.gradient_norm(problems.ROUGH)
  jacobian, state = evaluate(oracle, params, batch)
  exact = jax.tree.map(
    lambda *rows: jnp.stack(rows),
    problems.by_differences(lambda p: problems.rough_upper(*p, batch), params),
    problems.by_differences(lambda p: half_norm(p, batch), params),
  )
  chex.assert_trees_all_close(jacobian.rows, exact, atol=1e-7)
  chex.assert_trees_all_close(
    bj.values(state),
    {
      'upper': problems.rough_upper(*params, batch),
      'lower': problems.rough_lower(*params, batch)[0],
      'penalty': half_norm(params, batch),
    },
    rtol=1e-12,
  )


def test_closed_form_on_a_quadratic(x64):
  # f = x y, g = h (y - a x)^2 / 2, half its squared slope h^2 (y - a x)^2 / 2.
  a, h, x, y = 2.0, 3.0, 0.7, -0.4
  problem = bj.BilevelProblem(
    lambda x, y, b: x * y, lambda x, y, b: h * (y - a * x) ** 2 / 2
  )
  params = bj.BilevelParams(jnp.float64(x), jnp.float64(y))
  rows = evaluate(bj.gradient_norm(problem), params, None)[0].rows
  error = h**2 * (y - a * x)
  np.testing.assert_allclose(rows.upper, [y, -a * error], rtol=1e-14)
  np.testing.assert_allclose(rows.lower, [x, error], rtol=1e-14)


@pytest.mark.parametrize('rescale', [True, False])
def test_fused_is_the_weighed_rows_at_each_count(x64, rescale):
  params, batch = problems.rough_params(), problems.rough_batch()
  schedule = lambda count: 3.0 * count
  fused = bj.gradient_norm(problems.ROUGH, penalty=schedule, rescale=rescale)
  rows = bj.gradient_norm(problems.ROUGH)
  link = bj.aggregators.scale_by_penalty(schedule, rescale=rescale)
  rows = optax.chain(rows, link)
  one, two = jax.jit(fused.update), jax.jit(rows.update)
  states = [fused.init(params), rows.init(params)]
  for _ in range(3):
    ours, states[0] = one(batch, states[0], params)
    theirs, states[1] = two(batch, states[1], params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-11)


def test_ignores_other_sequences():
  params = problems.rough_params(0, jnp.float32)
  more = bj.sequences(**params._asdict(), extra=jnp.ones(3))
  batch = problems.rough_batch(0, jnp.float32)
  oracle = bj.gradient_norm(problems.ROUGH)
  jacobian, _ = jax.eval_shape(lambda p: evaluate(oracle, p, batch), more)
  assert jacobian.rows.extra is None


def test_the_lower_loss_that_is_no_scalar_is_named():
  problem = bj.BilevelProblem(problems.rough_upper, lambda x, y, b: b)
  params = problems.rough_params(0, jnp.float32)
  with pytest.raises(TypeError, match=r'the lower loss returned .*\(4, 3\)'):
    evaluate(
      bj.gradient_norm(problem), params, problems.rough_batch(0, jnp.float32)
    )


def test_a_missing_sequence_is_named():
  params = bj.sequences(upper=jnp.ones(2))
  with pytest.raises(
    TypeError, match='an oracle works on the sequences upper, lower'
  ):
    evaluate(bj.gradient_norm(problems.ROUGH), params, None)
