"""Regimes of E-AiPOD: one update by NumPy, rounds by hand, ratios, draws."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import (
  client_digits,
  federated_run,
  regimes,
  regimes_cells,
  regimes_problem,
  regimes_report,
  tasks,
)

SETTINGS = regimes.PRESETS['smoke']
# Quadratics with different curvatures and targets per client.
CURVATURE = np.array([0.5, 1.0, 2.0])
TARGET = np.array([-1.0, 0.5, 2.0])
ALPHA, BETA, PRODUCTS, P = 0.3, 0.2, 2, 0.5
SEED = 3


def make_federation():
  def lower(x, y, batch):
    curvature, target = batch.train
    return jnp.sum(curvature * (y - x - target) ** 2) / 2

  def upper(x, y, batch):
    _, target = batch.train
    return jnp.sum((y - target) ** 2) / 2 + jnp.sum(x**2) / 8

  task = tasks.Task(bj.BilevelProblem(upper, lower), None, None)
  return federated_run.Federation(task, 3, None, PRODUCTS, linear_rate=None)


def update(method):
  """Takes one update of the code from x = 1, y = (0, 0, 0)."""
  hyper = {
    'upper_rate': ALPHA,
    'lower_rate': BETA,
    'projection_key': jnp.uint32(SEED),
  }
  solver = federated_run.make_solver(method, make_federation(), hyper)
  params = bj.BilevelParams(jnp.ones(3), jnp.zeros(3))
  batch = client_digits.Batch((jnp.array(CURVATURE), jnp.array(TARGET)), ())
  updates, state = jax.jit(solver.update)(batch, solver.init(params), params)
  rounds = sum(
    n for name, n in bj.counts(state).items() if name.startswith('rounds/')
  )
  return bj.apply_updates(params, updates), int(rounds)


def move_upper(x, y, common):
  """The upper variable after one step, and the rounds until then."""
  slope, curvature = y - TARGET, CURVATURE
  if common:
    slope, curvature = (np.full(3, z.mean()) for z in (slope, curvature))
  q = term = BETA * slope
  for _ in range(PRODUCTS):
    term = (1 - BETA * curvature) * term
    q = q + term
  x = x - ALPHA * (x / 4 + CURVATURE * q)
  return x.mean(), (1 + PRODUCTS if common else 0) + 1


@pytest.mark.parametrize('variant', regimes_cells.METHODS[1:])
@pytest.mark.parametrize('steps', [1, 4])
def test_an_update_of_each_rival_in_numpy(variant, steps):
  cell = regimes_cells.Cell(0, steps, 3)
  method = regimes_cells.make_method(variant, cell, 2, 3)
  x, y, rounds = np.ones(3), np.zeros(3), 0
  gradient = lambda y: CURVATURE * (y - x - TARGET)
  for _ in range(2):
    start, z = y, y
    common = gradient(start).mean()
    for _ in range(steps):
      correction = 0.0
      if variant == 'fednest':
        correction = common - gradient(start)
      z = z - BETA * (gradient(z) + correction)
    # The gradient and the result; of a single step, they are the same mean.
    rounds += 2 if variant == 'fednest' and steps > 1 else 1
    y = np.full(3, z.mean())
  upper, spent = move_upper(x, y, common=variant != 'lfednest')
  params, counted = update(method)
  np.testing.assert_allclose(params.lower, y, rtol=1e-5)
  np.testing.assert_allclose(params.upper, upper, rtol=1e-5)
  assert counted == rounds + spent
  assert counted == federated_run.rounds_per_update(method, PRODUCTS)


def test_an_update_of_e_aipod_in_numpy():
  cell = regimes_cells.Cell(0, round(1 / P), 3)
  method = regimes_cells.make_method('e_aipod', cell, 4, 3)
  key = jax.random.fold_in(jax.random.key(SEED), zlib.crc32(b'lower'))
  x, y, r, projections = np.ones(3), np.zeros(3), np.zeros(3), 0
  for _ in range(8):
    key, now = jax.random.split(key)
    free = y - BETA * (CURVATURE * (y - x - TARGET) - r)
    y = free
    if jax.random.uniform(now) < P:
      y = np.full(3, (free - BETA / P * r).mean())
      r = r + P / BETA * (y - free)
      projections += 1
  assert 0 < projections < 8
  upper, spent = move_upper(x, y, common=True)
  params, counted = update(method)
  np.testing.assert_allclose(params.lower, y, rtol=1e-5)
  np.testing.assert_allclose(params.upper, upper, rtol=1e-5)
  assert counted == projections + spent


@pytest.mark.parametrize('name', regimes_cells.METHODS)
def test_only_participating_clients_count(name):
  cell = regimes_cells.Cell(0, 2, 2)
  method = regimes_cells.make_method(name, cell, 2, 3)
  params, counted = update(method)
  # All clients continue from the mean of the two.
  assert np.ptp(params.lower) < 1e-6 and np.ptp(params.upper) < 1e-6
  if name != 'e_aipod':  # Its number of projections is random.
    assert counted == {'fednest': 8, 'local_sgd': 6, 'lfednest': 3}[name]


def test_rounds_of_an_update_by_hand():
  rounds = lambda name, steps, part: federated_run.rounds_per_update(
    regimes_cells.make_method(name, regimes_cells.Cell(1, steps, part), 3, 20),
    5,
  )
  assert [rounds('e_aipod', steps, 20) for steps in (1, 20)] == [10, 10]
  assert rounds('e_aipod', 10, 2) == 11
  assert [rounds('fednest', steps, 20) for steps in (1, 20)] == [10, 13]
  assert rounds('local_sgd', 20, 20) == 10
  assert rounds('lfednest', 20, 2) == 4


def test_ratio_is_a_paired_geometric_mean():
  one, other = np.array([20.0, 30, 45]), np.array([40.0, 50, 60])
  found = regimes_report.log_ratio_interval(one, other, 100)
  logs = np.log(one / other)
  low, high = scipy.stats.t.interval(
    0.95, 2, loc=logs.mean(), scale=scipy.stats.sem(logs)
  )
  np.testing.assert_allclose(found.mean, np.exp(logs.mean()))
  np.testing.assert_allclose(found.ends, np.exp([low, high]))
  # A rival that misses the goal counts with the limit: an upper bound.
  other[2] = np.inf
  censored = regimes_report.log_ratio_interval(one, other, 90)
  np.testing.assert_allclose(censored.per_seed, [0.5, 0.6, 0.5])
  text = regimes_report.describe(censored, one, other)
  assert text.startswith('≤ 0.53 (')
  one[0] = np.inf
  missed = regimes_report.log_ratio_interval(one, other, 90)
  assert np.isnan(missed.mean)
  assert regimes_report.describe(missed, one, other) == 'neither'
  assert regimes_report.describe(missed, one, np.ones(3)) == 'missed'


def make_result(rounds, score):
  point = {'upper_rate': 1.0, 'lower_rate': 0.1, 'lower_rounds': 3}
  return regimes_cells.Result(np.array(rounds), score, point, (), {})


def test_tuning_fixes_the_regime():
  table = {}
  # Tuned and reported rounds of E-AiPOD and FedNest.
  for steps, tuned, reported in (
    (1, (10, 90), (10.0, 90.0)),  # AiPOD.
    (5, (30, 40), (20.0, 80.0)),
    (10, (30, 50), (30.0, 40.0)),
    (20, (150, 400), (10.0, 90.0)),  # Misses the goal in tuning.
  ):
    cell = regimes_cells.Cell(1, steps, 20)
    for name in regimes_cells.METHODS:
      i = int(name != 'e_aipod')
      score = -float(tuned[i]) - 100 * (name == 'lfednest')
      rounds = [reported[i], 2 * reported[i]]
      table[cell, name] = make_result(rounds, score)
  results = harness.Results()
  regimes_report.add_rounds(results, table)
  regime = regimes_report.add_ratios(results, table, 100)
  metrics = results.metrics()
  assert regime == {'split': 'shards1', 'steps': 10, 'part': 20}
  assert metrics['rounds_ratio/regime'] == pytest.approx(0.75)
  assert metrics['rival_ratio/regime'] == pytest.approx(0.75)
  assert metrics['vectors/e_aipod/shards1/steps=5/part=20'] == 20 * 30
  assert metrics['best_steps/fednest/shards1'] == 5
  # E-AiPOD with one local step, FedNest with five.
  # The seeds of 10 and 20 rounds against 80 and the limit of 100.
  expected = np.sqrt(10 / 80 * 20 / 100)
  found = metrics['tuned_rounds_ratio/fednest/shards1']
  assert found == pytest.approx(expected)


def test_heterogeneity_changes_only_the_assignment():
  pool, _ = regimes_problem.load_pool(None, SETTINGS)
  draw = lambda shards, seed: regimes_problem.draw_clients(
    pool, SETTINGS, shards, seed
  )
  equal, split, other = draw(0, 5), draw(1, 5), draw(1, 6)
  for part, count in (('train', 24), ('validation', 16)):
    assert equal[part].labels.shape == split[part].labels.shape == (4, count)
    pixels = [
      np.sort(draws[part].images.reshape(4 * count, -1), axis=0)
      for draws in (equal, split, other)
    ]
    np.testing.assert_array_equal(*pixels[:2])
    assert np.any(pixels[0] != pixels[2])
  classes = [len(np.unique(row)) for row in split['train'].labels]
  assert np.mean(classes) < 0.7 * len(np.unique(equal['train'].labels[0]))
  # Validation digits of a client have the classes of its training digits.
  for train, validation in zip(
    split['train'].labels, split['validation'].labels, strict=True
  ):
    shares = [
      np.bincount(z, minlength=10) / len(z) for z in (train, validation)
    ]
    # Total variation; only blocks at class boundaries differ.
    assert np.abs(shares[0] - shares[1]).sum() / 2 < 0.25


def test_cells_by_hand():
  cells = regimes_cells.list_cells(regimes.Settings())
  assert len(cells) == len({*cells}) == 16 + 8
  assert regimes_cells.Cell(1, 20, 20) in cells
  assert regimes_cells.Cell(0, 10, 2) in cells


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'shards': (7,)}, 'divisible by 5 times'),
    ({'shares': (0.5,)}, 'start with 1'),
    ({'pooling': 3}, 'must divide 28'),
  ],
)
def test_invalid_settings(changes, match):
  with pytest.raises(ValueError, match=match):
    regimes.check(dataclasses.replace(SETTINGS, **changes))


def test_too_few_digits_are_an_error():
  pool, _ = regimes_problem.load_pool(None, SETTINGS)
  settings = dataclasses.replace(SETTINGS, clients=1_000)
  with pytest.raises(ValueError, match='too few for 1000 clients'):
    regimes_problem.draw_clients(pool, settings, 1, 0)


@pytest.mark.slow
def test_runs_and_writes_its_results(options, results, tmp_path):
  settings = dataclasses.replace(
    SETTINGS, shards=(1,), local_steps=(5,), shares=(1.0,)
  )
  harness.execute(regimes.main, options(settings))
  stored = results()
  assert not {*stored['tuning_seeds']} & {*stored['seeds']}
  assert stored['regime'] == {'split': 'shards1', 'steps': 5, 'part': 4}
  metrics = stored['metrics']
  assert metrics['best_accuracy'] > metrics['control_accuracy']
  for name in regimes_cells.METHODS:
    assert metrics[f'lower_rounds/{name}/shards1/steps=5/part=4'] == 3
    assert f'seeds_reaching/{name}/shards1/steps=5/part=4' in metrics
  assert (tmp_path / 'regimes.png').stat().st_size > 5000
