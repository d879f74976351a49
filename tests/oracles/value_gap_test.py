import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import COORDINATES, PENALISED, Row


def _row(nodes):
  def make(wrap, penalty, rate):
    oracle = bj.value_gap(contract.PROBLEM, penalty=penalty, quadrature=nodes)
    return contract.by_descent(wrap(oracle), upper=rate, lower=rate)

  return make


ROWS = (
  Row(
    'value_gap',
    _row(None),
    {'gradients/upper': 1, 'gradients/lower': 2},
    params=contract.with_sequence(value=np.linspace(-0.5, 1.0, COORDINATES)),
    hyper=PENALISED,
    same_as='scale_by_penalty',
    light=True,
  ),
  Row(
    'value_gap, quadrature',
    _row(2),
    {
      'gradients/upper': 1,
      'gradients/lower': 1,
      'hessian_vector_products/lower': 2,
    },
    params=contract.with_sequence(value=np.linspace(-0.5, 1.0, COORDINATES)),
    hyper=PENALISED,
  ),
)


def small_gaps(name, penalties):
  """A coupled problem in float32, its solutions by penalty and their gaps.

  Solved in float64 by Newton steps; the reference is evaluated in float64 at
  the solutions rounded to float32.
  """
  rng = np.random.default_rng(0)
  rows, size = 500, 12
  table = lambda: jnp.asarray(rng.normal(size=(rows, size)), jnp.float32)
  signs = lambda a: jnp.sign(a @ rng.normal(size=size) + rng.normal(size=rows))
  ours, theirs = table(), table()
  if name == 'logistic':
    mix = table()[:size] / 4
    batch = (ours, signs(ours), theirs, signs(theirs), mix)
    fit = lambda a, t, y: jnp.mean(jax.nn.softplus(-t * (a @ y)))
    lower = lambda x, y, b: (
      fit(b[0], b[1], y) + jnp.mean(jnp.exp(x) * (b[4] @ y) ** 2) / 2
    )
    start = rng.normal(size=size) / 2 - 2
  else:
    batch = (ours, 1 + table()[:, 0], theirs, table()[:, 0], table())
    fit = lambda a, t, y: jnp.mean((a @ y - t) ** 2) / 2
    lower = lambda x, y, b: fit(b[0], b[1] + b[4] @ x, y)
    start = rng.normal(size=size)
  batch = jax.tree.map(lambda a: a.astype(jnp.float32), batch)
  problem = bj.BilevelProblem(lambda x, y, b: fit(b[2], b[3], y), lower)
  as_wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)
  x, data = jnp.asarray(start, jnp.float32), as_wide(batch)
  wide = as_wide(x)

  def solve(weight, penalty):
    loss = lambda y: (
      weight * problem.upper(wide, y, data) + penalty * lower(wide, y, data)
    )
    step = lambda y, _: (
      y - jnp.linalg.solve(jax.hessian(loss)(y), jax.grad(loss)(y)),
      None,
    )
    return jax.lax.scan(step, jnp.zeros(size), length=12)[0]

  def solution(penalty):
    y, w = (solve(c, p).astype(jnp.float32) for c, p in ((1, penalty), (0, 1)))
    gap = lambda x: lower(x, as_wide(y), data) - lower(x, as_wide(w), data)
    return bj.sequences(upper=x, lower=y, value=w), jax.value_and_grad(gap)(
      wide
    )

  params, exact = jax.jit(jax.vmap(solution))(jnp.asarray(penalties))
  return problem, batch, params, exact


@pytest.mark.parametrize('name', ['logistic', 'quadratic'])
def test_small_gaps_and_their_slopes_in_float32(x64, name):
  """Against float64; the difference is right to its rounding and no more."""
  penalties = 10.0 ** np.arange(1, 6)
  problem, batch, params, (gap, slope) = small_gaps(name, penalties)
  assert params.lower.dtype == jnp.float32

  @jax.jit
  def errors(params):
    def evaluate(params, nodes):
      oracle = bj.value_gap(problem, quadrature=nodes)
      jacobian, state = oracle.update(batch, oracle.init(params), params)
      values = bj.values(state)
      return values['gap'], values['gap_rounding'], jacobian.rows

    return [
      jax.vmap(lambda p, nodes=nodes: evaluate(p, nodes))(params)
      for nodes in (None, 2)
    ]

  for nodes, (found, rounding, rows) in zip(
    (0, 2), errors(params), strict=True
  ):
    error = np.abs(found - gap)
    # Two nodes leave an error of their own where the penalty is small.
    near = slice(1 if nodes else 0, None)
    assert np.all(error[near] <= rounding[near]), (error, rounding)
    relative = np.linalg.norm(rows.upper[:, 1] - slope, axis=1)
    relative /= np.linalg.norm(slope, axis=1)
    if nodes:
      assert np.all(error < 0.1 * gap), error / gap
      assert np.all(relative < 1e-3), relative
      y_rows = rows.lower
    else:
      # Why there is a keyword: what the difference cannot do.
      assert rounding[-1] > gap[-1]
      assert relative[-1] > 1e-3
      plain_rows = rows.lower
  # The slope in y is the same gradient.
  np.testing.assert_allclose(y_rows, plain_rows, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('penalty', [None, 3.0])
@pytest.mark.parametrize('proximity', [None, 0.5])
def test_quadrature_converges_to_the_difference(x64, penalty, proximity):
  params, batch = rough(), problems.rough_batch()
  given = {'penalty': penalty, 'proximity': proximity}
  ours = bj.value_gap(problems.ROUGH, quadrature=12, **given)
  plain = bj.value_gap(problems.ROUGH, **given)
  found, state = evaluate(ours, params, batch)
  wanted, plain_state = evaluate(plain, params, batch)
  chex.assert_trees_all_close(found, wanted, rtol=1e-8, atol=1e-8)
  near, exact = (dict(bj.values(s)) for s in (state, plain_state))
  assert near.pop('gap_rounding') < 1e-10 > exact.pop('gap_rounding')
  chex.assert_trees_all_close(near, exact, rtol=1e-8)
  with pytest.raises(ValueError, match='quadrature nodes >= 1, got 0'):
    bj.value_gap(problems.ROUGH, quadrature=0)


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
    {
      'upper': above(here),
      'lower': below,
      'gap': gap(here),
      'gap_rounding': 4
      * jnp.finfo(jnp.float64).eps
      * max(abs(x) for x in (below, below - gap(here))),
    },
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
