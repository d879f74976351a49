"""Oracles that are not linear in their samples, in parts and on devices.

The reference is a dense ridge regression. Each part's Hessian is nearly
singular, so the mean of the parts' hypergradients is wrong.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

P = jax.sharding.PartitionSpec
ROWS, SIZE, PARTS = 32, 6, 4


def upper(x, y, batch):
  return jnp.mean((batch['v'] @ y - batch['c']) ** 2) / 2


def lower(x, y, batch):
  fit = jnp.mean((batch['a'] @ y - batch['b']) ** 2) / 2
  return fit + jnp.exp(x) * jnp.sum(y**2) / 2


PROBLEM = bj.BilevelProblem(upper, lower)
# Both levels depend on samples, so the mean of products is not the product of
# means.
LEVELS = (
  lambda x, batch: batch['a'].T @ (batch['a'] @ x) / batch['a'].shape[0],
  lambda z, batch: jnp.mean((batch['v'] @ z - batch['c']) ** 2) / 2,
)


def data(dtype):
  rng = np.random.default_rng(0)
  batch = {n: rng.normal(size=(ROWS, SIZE)) for n in 'av'}
  batch |= {n: rng.normal(size=ROWS) for n in 'bc'}
  y, z = rng.normal(size=(2, SIZE))
  params = bj.sequences(
    upper=np.float64(-4.0), lower=y, value=z, main=y, level_1=z
  )
  cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
  return cast(batch), cast(params)


def oracles():
  """Oracles by name, most of them not linear in the samples."""
  return {
    'implicit': bj.evaluation.together(
      bj.lower_gradient(PROBLEM),
      bj.implicit(
        PROBLEM, solve=bj.linear_solvers.conjugate_gradient(2 * SIZE)
      ),
    ),
    'norm': bj.gradient_norm(PROBLEM),
    'fused': bj.gradient_norm(PROBLEM, penalty=3.0),
    'chain': bj.compositional(LEVELS),
    'gap': bj.value_gap(PROBLEM),  # This one is linear.
    'storm': bj.evaluation.storm(
      bj.implicit(
        PROBLEM, solve=bj.linear_solvers.LinearSystem(warm_start=False)
      ),
      0.5,
    ),
  }


def reference(batch, params):
  """The results of the oracles, from dense matrices in float64."""
  a, b, v, c = (np.asarray(batch[n], np.float64) for n in 'abvc')
  x, y, z = (np.asarray(p, np.float64) for p in params[:3])
  ridge = np.exp(x)
  hessian = a.T @ a / ROWS + ridge * np.eye(SIZE)
  f_y = v.T @ (v @ y - c) / ROWS
  g_y = hessian @ y - a.T @ b / ROWS
  g_of = lambda y: np.mean((a @ y - b) ** 2) / 2 + ridge * y @ y / 2
  hyper = -ridge * y @ np.linalg.solve(hessian, f_y)
  slope_x, slope_y = ridge * y @ g_y, hessian @ g_y
  f = np.mean((v @ y - c) ** 2) / 2
  f_z = v.T @ (v @ z - c) / ROWS
  return {
    'implicit': ((hyper, g_y), {'upper': f, 'lower': g_of(y)}),
    'norm': (
      ([0, slope_x], [f_y, slope_y]),
      {'upper': f, 'lower': g_of(y), 'penalty': g_y @ g_y / 2},
    ),
    # Divided by the penalty, which is above one.
    'fused': ((slope_x, f_y / 3 + slope_y), {}),
    'chain': ((a.T @ (a @ f_z) / ROWS, z - a.T @ (a @ y) / ROWS), {}),
    'gap': (
      ([0, ridge * (y @ y - z @ z) / 2], [f_y, g_y]),
      {'gap': g_of(y) - g_of(z)},
    ),
    'storm': ((hyper,), {'upper': f}),
  }


COUNTS = {
  'implicit': {'gradients/lower': 1, 'gradients/upper': 1},
  'norm': {'gradients/lower': 1, 'hessian_vector_products/lower': 1},
  'chain': {'values/level_0': 1, 'gradients/level_1': 1},
  'gap': {'gradients/upper': 1, 'gradients/lower': 2},
  'fused': {},
  'storm': {'gradients/upper': 2},
}


def evaluate(wrap, names=('implicit', 'norm', 'chain')):
  """Evaluates some of them, as one function of (parameters, batch)."""
  wrapped = {name: wrap(oracles()[name]) for name in names}

  def run(params, batch):
    results = {}
    for name, oracle in wrapped.items():
      gradient, state = oracle.update(batch, oracle.init(params), params)
      rows = getattr(gradient, 'rows', gradient)
      leaves = tuple(jax.tree.leaves(rows))
      results[name] = (leaves, dict(bj.values(state)), dict(bj.counts(state)))
    return results

  return run


def compare(results, expected, tolerance, times=1):
  near = functools.partial(
    np.testing.assert_allclose, rtol=tolerance, atol=tolerance
  )
  for name, (actual_leaves, measured, counts) in results.items():
    gradients, values = expected[name]
    for one, two in zip(actual_leaves, gradients, strict=True):
      near(one, two, err_msg=name)
    for key, value in values.items():
      near(measured[key], value, err_msg=name)
    for key, number in COUNTS[name].items():
      assert counts[key] == number * times, (name, key)


def mean(oracle):
  return bj.evaluation.mean_over(oracle, 'data')


def accumulate_parts(oracle):
  return bj.evaluation.accumulate(oracle, PARTS)


@pytest.mark.parametrize(
  ('dtype', 'tolerance'),
  [
    pytest.param(jnp.float32, 3e-4, marks=pytest.mark.slow),
    (jnp.float64, 1e-9),
  ],
)
def test_parts_give_the_results_of_the_batch(dtype, tolerance):
  with jax.enable_x64(dtype == jnp.float64):
    batch, params = data(dtype)
    expected = reference(batch, params)
    split = bj.evaluation.split_batch(batch, PARTS)
    same = jax.tree.map(lambda x: jnp.stack([x] * PARTS), params)
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    check = functools.partial(compare, expected=expected, tolerance=tolerance)
    check(jax.jit(evaluate(accumulate_parts))(params, batch), times=PARTS)
    axis = {'axis_name': 'data'}
    run = evaluate(mean, ('implicit',))
    check(first(jax.jit(jax.vmap(run, **axis))(same, split)))
    check(first(jax.pmap(run, **axis)(same, split)))
    check(sharded(evaluate(mean))(params, batch))


def sharded(run, checked=True):
  kinds = (jax.sharding.AxisType.Auto,)
  return jax.jit(
    jax.shard_map(
      run,
      mesh=jax.make_mesh((PARTS,), ('data',), axis_types=kinds),
      in_specs=(P(), P('data')),
      out_specs=P(),
      check_vma=checked,
    )
  )


def test_parts_on_devices_and_inside_wrappers():
  batch, params = data(jnp.float32)
  check = functools.partial(
    compare, expected=reference(batch, params), tolerance=3e-4
  )
  others = ('fused', 'gap', 'storm')
  check(jax.jit(evaluate(accumulate_parts, others))(params, batch), times=PARTS)
  check(sharded(evaluate(mean, ('implicit',)), False)(params, batch))
  halves = lambda o: bj.evaluation.accumulate(o, 2)
  for wrap in (lambda o: mean(halves(o)), lambda o: halves(mean(o))):
    run = evaluate(wrap, ('storm',))
    check(sharded(run)(params, batch), times=2)


@pytest.mark.slow
def test_solvers_step_as_on_the_batch():
  batch, params = data(jnp.float32)
  params = bj.BilevelParams(params.upper, params.lower)
  sgd = optax.sgd(0.1)
  line = bj.projections.affine_set(jnp.ones((1, SIZE)), jnp.ones(1))
  lazy = bj.projections.Lazy(line, 0.5, key=0)
  lower_in = lambda set_: bj.Sequence(sgd, steps=2, set=set_)
  solvers = {
    'aipod': functools.partial(bj.aipod, lower=lower_in(line)),
    'e_aipod': functools.partial(bj.e_aipod, lower=lower_in(lazy)),
    'bome': functools.partial(bj.bome, lower=sgd, value=sgd),
    'v_pbsgd': functools.partial(
      bj.solvers.v_pbsgd,
      lower=sgd,
      penalty=2.0,
      value=bj.solvers.RandomStop(0.1, 3, key=0),
    ),
  }

  @jax.jit
  def ends(params, batch):
    results = {}
    for name, make in solvers.items():
      unwrapped = make(PROBLEM, upper=sgd)
      for solver in (
        unwrapped,
        bj.evaluation.wrapped(unwrapped, accumulate_parts),
      ):
        updates, _ = solver.update(batch, solver.init(params), params)
        results.setdefault(name, []).append(updates)
    return results

  for name, (unwrapped, parted) in ends(params, batch).items():
    for one, two in zip(unwrapped, parted, strict=True):
      np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5, err_msg=name)


def refused():
  losses = lambda params, batch: jnp.stack([batch.mean() * params] * 2)
  return [
    bj.unrolled(PROBLEM, lower=bj.Sequence(optax.sgd(0.1), steps=2)),
    bj.prox_linear(PROBLEM, penalty=1.0, step=0.1),
    bj.oracles.fused_moco(losses, 2),
    bj.multi_objective(losses, 2, gramian=True),
    bj.oracle(lambda p, batch, inner: ((), p, inner), ()),
    # A chain hides its parts, and its aggregator is not linear.
    optax.chain(bj.value_gap(PROBLEM), bj.aggregators.dynamic_barrier(1.0)),
  ]


@pytest.mark.parametrize(
  ('wrapper_name', 'wrap', 'remedy'),
  [
    ('accumulate', lambda o: bj.evaluation.accumulate(o, 2), 'whole batch'),
    ('mean_over', mean, 'give jax.jit a sharded batch'),
    ('saga', lambda o: bj.evaluation.saga(o, 2), 'storm'),
    ('independent', lambda o: bj.evaluation.independent(o, 2), 'its rows'),
  ],
)
def test_errors_for_other_oracles_name_the_remedy(wrapper_name, wrap, remedy):
  others = refused()
  if wrapper_name in ('saga', 'independent'):
    # They average losses inside, and have no gradient for a part.
    others += [bj.implicit(PROBLEM), bj.gradient_norm(PROBLEM)]
    others += [bj.evaluation.storm(bj.gradient(lambda p, b: p), 0.5)]
  for oracle in others:
    message = (
      f'^{wrapper_name} takes means.*not linear in its samples.*{remedy}'
    )
    with pytest.raises(ValueError, match=message):
      wrap(oracle)
    # Storm accepts any oracle, since it evaluates two points on one batch.
    bj.evaluation.storm(oracle, 0.5)


def test_a_custom_oracle_declares_that_it_is_linear():
  fn = lambda params, batch, inner: ((), params * batch.mean(), inner)
  oracle = accumulate_parts(bj.oracle(fn, (), linear=True))
  params = jnp.float32(2.0)
  results, _ = oracle.update(jnp.arange(8.0), oracle.init(params), params)
  assert results == 7.0


def test_gradients_in_place_of_the_batch_are_an_error():
  """An optax transformation around a solver would pass them."""
  sgd = optax.sgd(0.1)
  solver = bj.v_pbgd(PROBLEM, penalty=1.0, upper=sgd, lower=sgd)
  params = bj.BilevelParams(jnp.float32(0.0), jnp.zeros(SIZE))
  state = solver.init(params)
  with pytest.raises(TypeError, match=re.escape('optax.MultiSteps')):
    solver.update(params, state, params)
