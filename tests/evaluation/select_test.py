"""Selection of one objective per update: references, cost and limits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import RATE, Row


def _losses(counts_as=None):
  """Two objectives of the contract's variable with different curvatures."""
  curved = lambda scale: (
    lambda params, batch: (
      scale * contract.flat_loss({'z': params['z'] - scale}, batch)
    )
  )
  return {
    name: bj.gradient(curved(scale), name=name, counts_as=counts_as)
    for name, scale in (('near', 1.0), ('far', 2.0))
  }


SHARED = {'batch_at': lambda batch, t: batch}


def _pair(share):
  """Weights of two objectives from a number or a schedule."""
  if callable(share):
    return lambda count: _pair(share(count))
  return jnp.stack([1 - jnp.asarray(share), jnp.asarray(share)])


def _select(wrap, rule):
  parts = {n: wrap(one) for n, one in _losses('loss').items()}
  oracle = bj.evaluation.select(parts, rule, **SHARED)
  return optax.chain(oracle, optax.sgd(RATE))


def _drawn(wrap, share):
  return _select(wrap, bj.evaluation.at_random(_pair(share), key=0))


def _furthest(wrap, share):
  rule = bj.evaluation.largest_gap(
    _pair(share), optima=[0.0, 0.0], refresh_every=2, share=0.5
  )
  return _select(wrap, rule)


def _given(wrap):
  """The batch names its objective."""
  parts = {n: wrap(one) for n, one in _losses('loss').items()}
  oracle = bj.evaluation.select(parts, bj.evaluation.as_given())

  def update_fn(batch, state, params=None, **extra_args):
    # The contract's batches are for both objectives; this row uses one.
    parts = [{'far': batch}, {'near': batch}]
    update = lambda part: oracle.update(part, state, params, **extra_args)
    _, state = update(parts[0])
    return oracle.update(parts[1], state, params, **extra_args)

  both = optax.GradientTransformationExtraArgs(oracle.init, update_fn)
  return optax.chain(both, optax.sgd(RATE))


def _mixed(wrap, share):
  parts = {n: wrap(one) for n, one in _losses().items()}
  oracle = bj.evaluation.mixed(parts, _pair(share), **SHARED)
  return optax.chain(oracle, optax.sgd(RATE))


def _own(make, wrap, **by_name):
  """A named solver on the contract's three losses, as three functions."""
  losses = [
    lambda params, batch, m=m: contract.three_losses(params, batch)[m]
    for m in range(contract.OBJECTIVES)
  ]
  oracle = make(losses, weights=[0.2, 0.3, 0.5], **SHARED, **by_name)
  oracle = bj.evaluation.wrapped(oracle, wrap)
  return optax.chain(oracle, optax.sgd(RATE))


_FLAT = {'params': contract.flat_params}
_EACH = tuple(f'gradients/objective_{m}' for m in range(contract.OBJECTIVES))

ROWS = (
  Row(
    'select, at_random',
    _drawn,
    {'gradients/loss': 1},
    covers=('at_random',),
    hyper={'share': 0.9},
    devices=True,
    **_FLAT,
  ),
  Row(
    'select, largest_gap',
    _furthest,
    {'gradients/loss': 1},
    random_counts=('losses/near', 'losses/far'),
    covers=('largest_gap',),
    hyper={'share': 0.3},
    devices=True,
    **_FLAT,
  ),
  Row(
    'select, in_sequence',
    lambda wrap: _select(wrap, bj.evaluation.in_sequence([2])),
    {'gradients/loss': 1},
    covers=('in_sequence',),
    hyper={},
    light=True,
    **_FLAT,
  ),
  Row(
    'select, as_given',
    _given,
    {'gradients/loss': 2},
    covers=('as_given',),
    hyper={},
    light=True,
    **_FLAT,
  ),
  Row(
    'mixed',
    _mixed,
    {'gradients/near': 1, 'gradients/far': 1},
    hyper={'share': 0.3},
    **_FLAT,
  ),
  Row(
    'alright',
    lambda wrap: _own(bj.solvers.alright, wrap, key=0, even=True),
    {},
    random_counts=_EACH,
    hyper={},
    light=True,
    **_FLAT,
  ),
  Row(
    'maxright',
    lambda wrap: _own(bj.solvers.maxright, wrap, optima=[0.0, 0.1, -0.2]),
    {},
    random_counts=(*_EACH, *(n.replace('gradients', 'losses') for n in _EACH)),
    hyper={},
    light=True,
    **_FLAT,
  ),
)

# Three coupled quadratics in three variables, one of them singular.
_DRAW = np.random.default_rng(3).normal
_ROOTS = _DRAW(size=(3, 3, 3))
_ROOTS[1, 2] = 0
CURVES = np.einsum('mij,mik->mjk', _ROOTS, _ROOTS) / 3
LINES = _DRAW(size=(3, 3))
ROWS_OF_DATA = _DRAW(size=(3, 16, 3))  # A stream of 16 rows for each objective.


def quadratic(m):
  """Objective m of its own row of data; it is not 0 at 0."""

  def loss(x, row):
    curve, line = (jnp.asarray(a[m], x.dtype) for a in (CURVES, LINES))
    return x @ curve @ x / 2 + (line + row) @ x + 0.3 * m

  return loss


def value_and_slope(m, x, row):
  slope = CURVES[m] @ x + LINES[m] + row
  return x @ CURVES[m] @ x / 2 + (LINES[m] + row) @ x + 0.3 * m, slope


def oracles():
  return [bj.gradient(quadratic(m), name=f'f{m}') for m in range(3)]


def own_stream(m):
  """Row t of the objective's stream, cyclically."""
  return lambda data, t: data[m, t % 16]


STREAMS = [own_stream(m) for m in range(3)]


def run(oracle, dtype, steps=12):
  """Points, gradients and the last state of a run, in one program."""
  with jax.enable_x64(dtype == np.float64):
    solver = optax.chain(oracle, optax.sgd(0.1))
    start = jnp.array([0.5, -1.0, 0.2], dtype)
    data = jnp.asarray(ROWS_OF_DATA, dtype)

    def body(carry, _):
      x, state = carry
      updates, state = solver.update(data, state, x)
      record = (updates, state[0], bj.values(state))
      return (optax.apply_updates(x, updates), state), record

    scan = lambda x: jax.lax.scan(body, (x, solver.init(x)), length=steps)[1]
    return jax.tree.map(
      lambda leaf: np.asarray(leaf),
      jax.jit(scan)(start),
    )


TOLERANCE = {
  np.float32: {'rtol': 2e-4, 'atol': 2e-4},
  np.float64: {'rtol': 1e-9, 'atol': 1e-9},
}


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_the_largest_gap_matches_numpy(dtype):
  """Estimates, their refresh on other rows, ties, and separate streams."""
  weights, optima = np.array([0.3, 0.3, 0.4]), np.array([-0.4, -1.0, -0.6])
  every, share = 5, 0.6
  rule = bj.evaluation.largest_gap(
    weights, optima=optima, refresh_every=every, share=share
  )
  oracle = bj.evaluation.select(
    oracles(),
    rule,
    batch_at=STREAMS,
    refresh_at=[lambda data, t, m=m: data[m].mean(0) for m in range(3)],
  )
  updates, states, _values = run(oracle, dtype)
  x, taken, memo = np.array([0.5, -1.0, 0.2]), np.zeros(3, int), np.zeros(3)
  for k in range(12):
    if k % every == 0:
      memo = np.array(
        [value_and_slope(m, x, ROWS_OF_DATA[m].mean(0))[0] for m in range(3)]
      )
    m = int(np.argmax(weights * (memo - optima)))
    value, slope = value_and_slope(m, x, ROWS_OF_DATA[m, taken[m]])
    memo[m] += share * (value - memo[m])
    taken[m] += 1
    assert states.selected[k] == m
    np.testing.assert_allclose(updates[k], -0.1 * slope, **TOLERANCE[dtype])
    np.testing.assert_allclose(states.rule.memo[k], memo, **TOLERANCE[dtype])
    np.testing.assert_array_equal(states.taken[k], taken)
    x = x - 0.1 * slope
  assert np.all(taken > 0)  # Otherwise the rule is not exercised.
  counts = {n: c[..., -1] for n, c in states.report.counts.items()}
  assert counts == {f'losses/objective_{m}': 3 for m in range(3)}


def test_an_estimate_is_exact_after_a_huge_first_loss():
  """An update by differences would round to 0 or give NaN."""
  named = lambda name: bj.gradient(lambda x, b: b + 0 * x, name=name)
  rule = bj.evaluation.largest_gap([1, 1], optima=[0, 0], refresh_every=None)
  oracle = bj.evaluation.select([named('a'), named('b')], rule)
  for first in (1e9, np.inf):
    params = jnp.float32(0.0)
    state = oracle.init(params)
    for loss in (first, 5.0):
      state = oracle.update((jnp.float32(loss), 1.0), state, params)[1]
      assert state.rule.memo.tolist() == [loss, 1]


def test_the_running_optimum_is_the_smallest_estimate_and_ties_take_the_first():
  rule = bj.evaluation.largest_gap([1.0, 1.0], optima='running')
  oracle = bj.evaluation.select(
    [bj.gradient(lambda x, b: b * x, name=n) for n in 'ab'], rule
  )
  x = jnp.float32(1.0)
  state, step = oracle.init(x), jax.jit(oracle.update)
  record = []
  for batch in ((3.0, 5.0), (2.0, 0.0), (4.0, 7.0), (1.0, 4.0)):
    _, state = step(tuple(map(jnp.float32, batch)), state, x)
    record.append((int(state.selected), *state.rule.optima))
  # At the third update the first loss is 4, two above its smallest value. It is
  # chosen again, since the other estimate equals its smallest value.
  assert [s[0] for s in record] == [0, 0, 0, 0]
  np.testing.assert_array_equal(
    [s[1:] for s in record], [(3, 5), (2, 5), (2, 5), (1, 5)]
  )
  # A loss that is NaN is not chosen.
  lost = state.rule._replace(memo=jnp.array([jnp.nan, 9.0]))
  _, state = step((x, x), state._replace(rule=lost), x)
  assert state.selected == 1


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_the_mix_is_the_weighted_sum(dtype):
  schedule = lambda k: jnp.stack([1 - k / 16, k / 32, k / 32])
  oracle = bj.evaluation.mixed(oracles(), schedule, batch_at=STREAMS)
  updates, _, values = run(oracle, dtype)
  x = np.array([0.5, -1.0, 0.2])
  for k in range(12):
    weights = np.array([1 - k / 16, k / 32, k / 32])
    both = [value_and_slope(m, x, ROWS_OF_DATA[m, k]) for m in range(3)]
    slope = sum(w * s for w, (_, s) in zip(weights, both))
    np.testing.assert_allclose(updates[k], -0.1 * slope, **TOLERANCE[dtype])
    for m in range(3):
      np.testing.assert_allclose(
        values[f'f{m}'][k], both[m][0], **TOLERANCE[dtype]
      )
    x = x - 0.1 * slope


def indices(rule, steps, number):
  """The choices of a rule over updates, in one program."""

  def body(carry, count):
    state, taken = carry
    index, state = rule.choose(state, count, taken)
    return (state, taken.at[index].add(1)), index

  start = (rule.init(number, jnp.float32), jnp.zeros(number, jnp.int32))
  scan = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(steps))[1])
  return np.asarray(scan(start))


def test_draws_have_the_weights_as_frequencies():
  weights = np.array([0.0, 0.55, 0.25, 0.2])
  steps = 20_000
  drawn = indices(bj.evaluation.at_random(3 * weights, key=1), steps, 4)
  count = np.bincount(drawn, minlength=4) / steps
  np.testing.assert_allclose(count, weights, atol=0.012)  # 3 deviations.
  # Independent of the previous draw.
  pairs = np.mean((drawn[1:] == 1) & (drawn[:-1] == 1))
  assert pairs == pytest.approx(0.55**2, abs=0.012)
  even = indices(bj.evaluation.at_random(weights, key=1, even=True), steps, 4)
  for first in (0, 117, 9_999):  # Any window has almost the expected shares.
    here = np.bincount(even[first : first + 100], minlength=4)
    np.testing.assert_allclose(here, 100 * weights, atol=4)
  assert (
    even
    == indices(bj.evaluation.at_random(weights, key=1, even=True), steps, 4)
  ).all()
  # Also for the largest counts.
  rule = bj.evaluation.at_random(weights, key=1, even=True)
  late = jnp.array([0, 2**31 - 200, 0, 0], jnp.int32)
  places = jax.vmap(
    lambda k: rule.choose(rule.init(4, jnp.float32), k, late.at[2].set(k))[0]
  )(jnp.arange(150))
  np.testing.assert_allclose(
    np.bincount(places, minlength=4) / 150, weights, atol=0.03
  )


def test_a_schedule_of_weights_and_stages():
  only = lambda k: jnp.where(k < 3, jnp.array([1.0, 0]), jnp.array([0, 1.0]))
  drawn = indices(bj.evaluation.at_random(only, key=0), 6, 2)
  np.testing.assert_array_equal(drawn, [0, 0, 0, 1, 1, 1])
  staged = indices(bj.evaluation.in_sequence([2, 1]), 6, 3)
  np.testing.assert_array_equal(staged, [0, 0, 1, 2, 2, 2])


def test_the_expected_draw_is_the_mix():
  """Over keys, at one point: unbiased, with the deviation of random draws."""
  weights = [0.2, 0.5, 0.3]
  x, data = jnp.array([0.5, -1.0, 0.2]), jnp.asarray(ROWS_OF_DATA, jnp.float32)

  def one(key):
    rule = bj.evaluation.at_random(weights, key=key)
    oracle = bj.evaluation.select(oracles(), rule, batch_at=STREAMS)
    return oracle.update(data, oracle.init(x), x)[0]

  actual = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
  mixed = bj.evaluation.mixed(oracles(), weights, batch_at=STREAMS)
  expected, _ = mixed.update(data, mixed.init(x), x)
  error = (actual.mean(0) - expected) / (actual.std(0) / 4000**0.5)
  assert np.all(np.abs(error) < 4)


def test_a_step_costs_one_objective():
  """The program has a branch for each of three objectives of rising cost."""
  sizes = (64, 128, 256)

  def loss(x, batch):
    return jnp.sum(jnp.tanh(batch @ x) ** 2)

  x = jnp.ones((32, 32))
  batch = tuple(jnp.ones((size, 32)) for size in sizes)

  def flops(solver):
    compiled = jax.jit(solver.update).lower(batch, solver.init(x), x).compile()
    analysis = compiled.cost_analysis()
    return (analysis if isinstance(analysis, dict) else analysis[0])['flops']

  by_name = dict(zip('abc', [bj.gradient(loss, name=n) for n in 'abc']))
  draw = bj.evaluation.at_random([1.0, 1.0, 1.0], key=0)
  one = flops(bj.evaluation.select(by_name, draw))
  # The analysis reports the most expensive branch of a conditional.
  dearest = flops(
    bj.evaluation.select(
      dict(a=by_name['a'], b=by_name['b'], c=by_name['c']),
      bj.evaluation.in_sequence([1, 1]),
    )
  )
  alone = jax.jit(jax.grad(loss)).lower(x, batch[2]).compile().cost_analysis()
  alone = (alone if isinstance(alone, dict) else alone[0])['flops']
  assert one == pytest.approx(alone, rel=0.05)
  assert dearest == pytest.approx(alone, rel=0.05)
  assert flops(bj.evaluation.mixed(by_name, [1, 1, 1])) > 1.6 * alone
  # The refresh of all losses has no backward passes.
  gap = bj.evaluation.largest_gap([1, 1, 1], optima=[0, 0, 0])
  refreshed = flops(bj.evaluation.select(by_name, gap))
  forward = jax.jit(loss).lower(x, batch[2]).compile().cost_analysis()
  forward = (forward if isinstance(forward, dict) else forward[0])['flops']
  assert refreshed < alone + 1.1 * forward * sum(sizes) / sizes[-1]


def test_works_with_aggregators_wrappers_and_sequences():
  """Rows, delays, micro-batches, and a new choice in each inner step."""
  x = jnp.array([0.5, -1.0, 0.2])
  pairs = lambda m: bj.multi_objective(
    [quadratic(m), quadratic((m + 1) % 3)], ('left', 'right')
  )
  rule = bj.evaluation.in_sequence([1, 1])
  shared = {'batch_at': lambda batch, t: batch}
  rows = bj.evaluation.select([pairs(m) for m in range(3)], rule, **shared)
  behind = bj.oracles.aggregated(rows, bj.aggregators.mgda(2))
  row = jnp.zeros(3)
  actual, state = behind.update(row, behind.init(x), x)
  alone = bj.oracles.aggregated(pairs(0), bj.aggregators.mgda(2))
  np.testing.assert_allclose(
    actual, alone.update(row, alone.init(x), x)[0], rtol=1e-5
  )
  assert bj.counts(state) == {'gradients/objectives': 2}

  losses = {
    n: bj.gradient(lambda p, b: jnp.sum((p.z - b) ** 2) / 2, of='z', name=n)
    for n in 'ab'
  }
  two = bj.evaluation.select(losses, bj.evaluation.in_sequence([1]))
  solver = bj.descend(
    bj.evaluation.storm(bj.evaluation.accumulate(two, 2), 1.0),
    z=bj.Sequence(optax.sgd(0.5), steps=2),
  )
  params = bj.sequences(z=jnp.zeros(1), other=jnp.ones(2))
  state, step = solver.init(params), jax.jit(solver.update)
  batch = {'a': jnp.array([[1.0], [3.0]]), 'b': jnp.array([[-4.0]] * 4)}
  batch = jax.tree.map(lambda leaf: leaf[:, 0], batch)
  for _ in range(2):
    updates, state = step(batch, state, params)
    params = bj.apply_updates(params, updates)
  # Stages count updates: both inner steps of the first update use `a`.
  z = 0.0
  for part in ('a', 'a', 'b', 'b'):
    n = batch[part].size / 2  # A sum over examples, in two parts.
    z -= 0.5 * n * (z - float(batch[part].mean()))
  np.testing.assert_allclose(params.z, [z], rtol=1e-5)


def test_batches_and_streams_are_found_by_name():
  by_name = {n: bj.gradient(lambda x, b: b * x, name=n) for n in ('p', 'q')}
  x = jnp.float32(1.0)
  for batch, at in (
    ({'q': 7.0, 'p': 5.0}, None),
    ((5.0, 7.0), None),
    (2.0, {'q': lambda b, t: b + 5, 'p': lambda b, t: b + 3 + t}),
  ):
    oracle = bj.evaluation.select(
      by_name, bj.evaluation.in_sequence([1]), batch_at=at
    )
    first, state = oracle.update(batch, oracle.init(x), x)
    second, state = oracle.update(batch, state, x)
    assert (first, second) == (5, 7)
    assert bj.values(state)['q'] == 7


def test_values_are_the_latest_and_flags_mark_those_of_the_last_update():
  """In a chain, in `descend` and inside another selection."""
  by_name = {
    n: bj.gradient(lambda p, b, n=n: b * p.z.sum(), name=n) for n in ('p', 'q')
  }
  select, by_batch = bj.evaluation.select, bj.evaluation.as_given()
  oracle = select(by_name, by_batch)
  outer = select({'inner': oracle, 'r': bj.gradient(_r, name='r')}, by_batch)
  sgd = optax.sgd(0.0)
  for solver, wrap in (
    (optax.chain(oracle, sgd), lambda batch: batch),
    (bj.descend(oracle, z=sgd), lambda batch: batch),
    (bj.descend(outer, z=sgd), lambda batch: {'inner': batch}),
  ):
    params = _Z(jnp.ones(1))
    state = solver.init(params)
    assert not any(bj.diagnostics.evaluated(state).values())
    last = {'p': 0.0, 'q': 0.0}
    for name, loss in (('q', 7.0), ('p', 5.0), ('p', 6.0), ('q', 4.0)):
      _, state = solver.update(wrap({name: loss}), state, params)
      last[name] = loss
      values, flags = bj.values(state), bj.diagnostics.evaluated(state)
      assert {n: float(values[n]) for n in last} == last
      assert {n for n, flag in flags.items() if flag} == {name}
    if 'r' in flags:
      _, state = solver.update({'r': 2.0}, state, params)
      flags = bj.diagnostics.evaluated(state)
      assert {n for n, flag in flags.items() if flag} == {'r'}


class _Z(NamedTuple):
  z: jax.Array


def _r(params, batch):
  return batch * params.z.sum()


def test_a_batch_names_its_objective():
  by_name = {n: bj.gradient(lambda x, b: b * x, name=n) for n in ('p', 'q')}
  oracle = bj.evaluation.select(by_name, bj.evaluation.as_given())
  x = jnp.float32(1.0)
  state, step = oracle.init(x), jax.jit(oracle.update)
  for name, slope in (('q', 7.0), ('p', 5.0), ('q', 6.0)):
    actual, state = step({name: slope}, state, x)
    assert actual == slope
    assert state.selected == 'pq'.index(name)
  np.testing.assert_array_equal(state.taken, [1, 2])
  for batch in ({'p': 1.0, 'q': 1.0}, {'r': 1.0}, (1.0,)):
    with pytest.raises(TypeError, match='a dict of one batch, by one of'):
      oracle.update(batch, state, x)
  with pytest.raises(ValueError, match='batch_at has no effect'):
    bj.evaluation.select(by_name, bj.evaluation.as_given(), **SHARED)


def test_errors_name_cause_and_remedy():
  losses = [bj.gradient(lambda x, b: jnp.sum(x), name=n) for n in 'ab']
  random = bj.evaluation.at_random
  x = jnp.ones(2)
  for rule, words in (
    (random([1.0, 1.0, 1.0], key=0), r'2 objectives, .* shape \(3,\)'),
    (bj.evaluation.in_sequence([3, 3]), 'are for 3 objectives'),
    (
      bj.evaluation.largest_gap([1.0, 1.0], optima=[0.0]),
      r'optima have shape \(1,\)',
    ),
  ):
    with pytest.raises(ValueError, match=words):
      bj.evaluation.select(losses, rule).init(x)
  for make, words in (
    (lambda: random([-1.0, 2.0], key=0), 'a weight is a finite number >= 0'),
    (lambda: random([0.0, 0.0], key=0), 'no weight is above zero'),
    (lambda: random(0.5, key=0), 'one weight for each objective'),
    (
      lambda: bj.evaluation.largest_gap([1, 1], optima='guess'),
      "or 'running', got 'guess'",
    ),
    (
      lambda: bj.evaluation.largest_gap([1, 1], optima=[0, np.nan]),
      'an optimum',
    ),
    (lambda: bj.evaluation.in_sequence([0]), 'whole number of updates'),
    (lambda: bj.evaluation.select([], random([1.0], key=0)), 'at least one'),
  ):
    with pytest.raises(ValueError, match=words):
      make()
  with pytest.raises(TypeError, match='draws random numbers'):
    random([1.0, 1.0], key=None)
  rule = random([1.0, 1.0], key=0)
  with pytest.raises(TypeError, match='expected an oracle'):
    bj.evaluation.select([lambda x, b: x], rule)
  oracle = bj.evaluation.select(losses, rule)
  with pytest.raises(TypeError, match='tuple of 3, but there are 2'):
    oracle.update((1, 2, 3), oracle.init(x), x)
  with pytest.raises(TypeError, match=r"has the names \['a'\]"):
    oracle.update({'a': 1}, oracle.init(x), x)
  mismatched = [
    bj.oracle(lambda p, b, s, f=f: ((), f(p), s), ())
    for f in (lambda p: p, lambda p: {'a': p})
  ]
  for both in (
    bj.evaluation.select(mismatched, rule),
    bj.evaluation.mixed(mismatched, [1.0, 1.0]),
  ):
    with pytest.raises(ValueError, match='not move the same sequences'):
      both.update((x, x), both.init(x), x)
  named = [bj.gradient(lambda p, b: jnp.sum(p.a), of=n) for n in 'ab']
  with pytest.raises(ValueError, match=r"objective_1: .*'b'"):
    bj.evaluation.select(named, rule)
  gap = bj.evaluation.largest_gap([1.0, 1.0], optima=[0.0, 0.0])
  silent = bj.evaluation.select(
    [bj.oracle(lambda p, b, s: ((), p, s), ())] * 2, gap
  )
  with pytest.raises(TypeError, match='measures no loss'):
    silent.update((x, x), silent.init(x), x)
  for make in (bj.solvers.alright, bj.solvers.maxright):
    more = {'key': 0} if make is bj.solvers.alright else {'optima': [0.0, 0.0]}
    with pytest.raises(TypeError, match='evaluate all of them'):
      make(lambda x, b: x, weights=[1.0, 1.0], **more)
    with pytest.raises(ValueError, match='as many distinct names'):
      make([lambda x, b: x] * 2, ('a', 'a'), weights=[1.0, 1.0], **more)
    with pytest.raises(ValueError, match=r"outputs has the names \['c'\]"):
      make(
        [lambda x, b: x] * 2,
        ('a', 'b'),
        weights=[1.0, 1.0],
        outputs={'c': lambda x: x},
        **more,
      )


def test_auxiliary_outputs_of_the_selected_loss():
  losses = [lambda x, b, i=i: (i * x**2, (i + 1) * b) for i in range(2)]
  for make in (bj.solvers.alright, bj.solvers.maxright):
    more = {'key': 0} if make is bj.solvers.alright else {'optima': [0.0, 0.0]}
    oracle = make(
      losses, 'ab', weights=[0.0, 1.0], outputs={'b': jnp.zeros_like}, **more
    )
    x = jnp.float32(3.0)
    state = oracle.init(x)
    assert list(bj.outputs(state)) == ['b'] and bj.outputs(state)['b'] == 0
    _, state = oracle.update((jnp.float32(5.0),) * 2, state, x)
    assert bj.outputs(state)['b'] == 10
