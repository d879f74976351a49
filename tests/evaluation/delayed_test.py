"""Stale parameters: the order of service and the version of each worker."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


def where():
  """An oracle that returns its parameters and the worker's number.

  The k-th parameters are k, so its result is the version of its parameters.
  """

  def update_fn(batch, state, params=None, *, worker=-1, **extra_args):
    del extra_args
    return (params, jnp.asarray(worker)), state

  return bj.oracles.Oracle(lambda params: (), update_fn)


def run(updates, *args, **kwargs):
  """Versions, workers and delays of a run, each (updates,)."""
  oracle = bj.evaluation.delayed(where(), *args, **kwargs)

  def body(state, k):
    (version, worker), state = oracle.update(None, state, jnp.float32(k))
    return state, (version, worker, bj.values(state)['delay'])

  start = oracle.init(jnp.float32(0))
  return jax.lax.scan(body, start, jnp.arange(updates))[1]


def test_round_robin_delays_by_the_other_workers():
  """Also with a bound above the delays."""
  k = np.arange(12)
  for workers, bound in ((1, None), (3, None), (4, 6)):
    version, worker, delay = jax.jit(
      lambda n=workers, b=bound: run(12, n, bound=b)
    )()
    np.testing.assert_array_equal(delay, np.minimum(k, workers - 1))
    np.testing.assert_array_equal(version, k - delay)
    np.testing.assert_array_equal(worker, k % workers)


def test_traced_numbers_of_workers_share_a_program():
  numbers = jnp.array([1, 2, 5])
  run_one = lambda n: run(9, n, bound=4)
  together = jax.jit(jax.vmap(run_one))(numbers)
  for i, n in enumerate((1, 2, 5)):
    alone = jax.jit(lambda n=n: run(9, n, bound=4))()
    for mapped, single in zip(together, alone, strict=True):
      np.testing.assert_array_equal(mapped[i], single)


@pytest.mark.parametrize('bound', [3, 4, 9])
def test_random_service_keeps_the_bound(bound):
  """Every worker computes with the version from its last service."""
  keys = jax.random.split(jax.random.key(0), 3)
  one = lambda key: run(1500, 4, bound=bound, service='random', key=key)
  runs = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))
  for version, worker, delay in zip(*runs, strict=True):
    handed = dict.fromkeys(range(4), 0)
    for k in range(1500):
      assert version[k] == handed[int(worker[k])] == k - delay[k]
      handed[int(worker[k])] = k + 1
    assert delay.max() <= bound
    # Four gradients are in progress, so on average three precede each one.
    np.testing.assert_allclose(delay[20:].mean(), 3, atol=0.05)
    assert bound == 3 or set(np.unique(delay)) == set(range(bound + 1))
    counts = np.bincount(worker, minlength=4)
    np.testing.assert_allclose(counts / 1500, 0.25, atol=0.04)
    if bound == 3:
      np.testing.assert_array_equal(worker[4:], worker[:-4])
  assert len({tuple(workers[:20]) for workers in runs[1]}) == 3


def test_sampled_delays_are_uniform():
  version, worker, delay = jax.jit(
    lambda: run(6000, 2, bound=4, service='sampled', key=1)
  )()
  k = np.arange(6000)
  np.testing.assert_array_equal(version, k - delay)
  np.testing.assert_array_equal(worker, k % 2)
  assert np.all(delay <= np.minimum(k, 4))
  share = np.bincount(delay.astype(int), minlength=5) / 6000
  np.testing.assert_allclose(share, 0.2, atol=0.03)


def test_each_inner_step_is_a_version():
  """With two lower steps per update, delays count evaluations."""
  loss = lambda p, batch: (p.x - batch) ** 2 / 2
  oracle = bj.evaluation.delayed(bj.gradient(loss, of='x'), 2)
  solver = bj.descend(oracle, x=bj.Sequence(optax.sgd(0.25), steps=2))
  params = bj.sequences(x=jnp.float32(1.0))
  state, step = solver.init(params), jax.jit(solver.update)
  points = [1.0]
  for k in range(4):
    updates, state = step(jnp.float32(k), state, params)
    params = bj.apply_updates(params, updates)
    for _ in range(2):
      stale = points[max(len(points) - 2, 0)]
      points.append(points[-1] - 0.25 * (stale - k))
    np.testing.assert_allclose(params.x, points[-1], rtol=1e-6)
    assert bj.values(state)['delay'] == 1
  assert bj.counts(state)['gradients/loss'] == 8


def test_means_over_parts_are_inside_the_delay():
  """Parts of a batch do not count as evaluations; SAGA's table goes around."""
  loss = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
  late = bj.evaluation.delayed(bj.gradient(loss), 2)
  parts = bj.evaluation.accumulate(late, 2)
  table = bj.evaluation.saga(late, 1)
  batch = jnp.arange(4.0)
  states = [one.init(jnp.float32(0)) for one in (late, parts, table)]
  steps = [jax.jit(one.update) for one in (late, parts, table)]
  for k in range(4):
    for i, step in enumerate(steps):
      evaluated, states[i] = step(batch, states[i], jnp.float32(k))
      np.testing.assert_allclose(evaluated, max(k - 1, 0) - 1.5, rtol=1e-6)


def test_a_penalty_method_with_stale_gradients_still_solves_its_problem():
  square = lambda target: lambda x, y, batch: jnp.sum((y - target(x)) ** 2)
  problem = bj.BilevelProblem(square(lambda x: 1.0), square(lambda x: x))
  late = lambda o: bj.evaluation.delayed(o, 3, service='random', bound=6, key=0)
  sgd = optax.sgd(0.03)
  solver = bj.v_pbgd(problem, penalty=10.0, upper=sgd, lower=sgd)
  solver = bj.evaluation.wrapped(solver, late)
  params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))

  def body(carry, _):
    params, state = carry
    updates, state = solver.update(None, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = (params, solver.init(params))
  (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=4000))(
    start
  )
  np.testing.assert_allclose(params.upper, 1, atol=1e-2)
  assert bj.counts(state)['gradients/lower'] == 3 * 4000


@pytest.mark.parametrize(
  'args, kwargs, error, message',
  [
    ((0,), {}, ValueError, 'whole number of workers >= 1, got 0'),
    ((2.5,), {}, ValueError, 'whole number of workers'),
    ((4,), {'bound': 2}, ValueError, 'the bound is at least 3, got 2'),
    ((1,), {'bound': -1}, ValueError, 'bound` >= 0'),
    ((2,), {'service': 'fifo'}, ValueError, 'round_robin, random, sampled'),
    ((2,), {'service': 'random'}, TypeError, 'pass key='),
    ((jnp.int32(2),), {}, ValueError, 'traced number of workers needs a bound'),
  ],
)
def test_errors(args, kwargs, error, message):
  with pytest.raises(error, match=message):
    bj.evaluation.delayed(where(), *args, **kwargs)


@pytest.mark.parametrize(
  'other, message',
  [
    ({'a': np.zeros(4)}, r"\['a'\] of shape \(3,\), got \(4,\): call init"),
    # Fewer axes or entries would broadcast into the stored parameters.
    ({'a': np.float32(0)}, r'of shape \(3,\), got \(\)'),
    ({'b': np.zeros(3)}, 'of the structure'),
  ],
)
def test_parameters_of_another_shape_are_an_error(other, message):
  loss = bj.gradient(lambda params, batch: jnp.sum(params['a'] ** 2))
  oracle = bj.evaluation.delayed(loss, workers=2)
  state = oracle.init({'a': jnp.zeros(3)})
  with pytest.raises(ValueError, match=message):
    oracle.update(None, state, other)
