"""Problems on data: their solutions and slopes, and small runs that resume."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.stsa import (
  bilevel_zoo,
  label_cleaning,
  regularisation,
  tables,
)

DIGITS = dict(zip(label_cleaning.PARTS, (128, 64, 64, 100), strict=True))


@pytest.fixture(scope='module')
def penalties():
  return regularisation.make_regularisation(
    'breast_cancer', None, train=128, validation=256, batch_size=32
  )[0]


@pytest.fixture(scope='module')
def weights():
  return label_cleaning.make_cleaning(
    None, corruption=0.5, sizes=DIGITS, batch_size=32
  )[0]


def whole(problem):
  """Both losses as means over their fixed batches."""

  def mean(loss, which, batches):
    def of_all(x, y, data):
      one = lambda i: loss(x, y, {which: i, 'data': data})
      return jnp.mean(jax.vmap(one)(jnp.arange(batches)))

    return of_all

  f, g = problem.losses[:2]
  return bj.BilevelProblem(
    mean(f, 'upper', problem.batches[0]), mean(g, 'lower', problem.batches[1])
  )


def test_split_has_no_sample_twice_and_the_promised_curvature():
  table = tables.read('breast_cancer', None)
  parts = regularisation.split(table, train=128, validation=256, batch_size=32)
  flat = [np.asarray(z).reshape(-1, 31) for z in parts]
  assert [len(z) for z in flat] == [128, 256, 185]
  assert len(np.unique(np.concatenate(flat), axis=0)) == 569
  second = flat[0].T @ flat[0] / 128
  curvature = np.linalg.eigvalsh(second)[-1] / 4
  np.testing.assert_allclose(curvature, regularisation.CURVATURE, rtol=1e-4)
  with pytest.raises(harness.SettingsError, match='no test data'):
    regularisation.split(table, train=400, validation=200, batch_size=32)


def test_lower_solution_and_value(penalties):
  problem, data = whole(penalties), penalties.data
  x = penalties.start(jax.random.key(1)).upper
  y = regularisation.minimiser(x, data.train.reshape(-1, 31))
  slope = jax.grad(problem.lower, 1)(x, y, data)
  np.testing.assert_allclose(slope, 0, atol=2e-6)
  np.testing.assert_allclose(
    regularisation.value(x, data), problem.upper(x, y, data), rtol=1e-6
  )
  # The derivative through Newton's method is the hypergradient.
  found = bj.hypergradient(problem, bj.BilevelParams(x, y), data)
  through = jax.grad(regularisation.value)(x, data)
  np.testing.assert_allclose(found, through, rtol=2e-3, atol=1e-6)


def test_gap_is_above_the_least(penalties):
  gaps = [
    float(
      penalties.measure(penalties.start(jax.random.key(i)), penalties.data)[
        'gap'
      ]
    )
    for i in range(3)
  ]
  assert min(gaps) > 1e-3


def test_cleaning_drops_no_digit_and_pollutes_its_share(weights):
  train = weights.data['train']
  assert train.images.shape == (4, 32, 784)
  clean, _ = harness.load_digit_parts(None, DIGITS)
  wrong = train.labels.ravel() != clean['train'].labels
  assert np.mean(wrong) == 0.5
  # Images are moved and scaled, all alike.
  found = train.images.reshape(-1, 784)
  given = clean['train'].images
  factor = np.std(found - found[0]) / np.std(given - given[0])
  np.testing.assert_allclose(
    found - found[0], factor * (given - given[0]), atol=1e-4
  )
  assert weights.lower_size == 7_850
  # 64 clean digits teach something, but not all.
  assert 0.1 < weights.references['clean_part'] < 0.6


def test_a_weight_reaches_only_its_digit(weights):
  params = weights.start(jax.random.key(0))
  slope = jax.grad(weights.losses.lower)(
    params.upper, params.lower, {'lower': 2, 'data': weights.data}
  )
  moved = np.flatnonzero(slope)
  np.testing.assert_array_equal(moved, np.arange(64, 96))
  # A batch's curvature in the lower variable is at most about the promise.
  batch = {'lower': 1, 'data': weights.data}
  mean_of = lambda y: whole(weights).lower(params.upper + 30, y, weights.data)
  direction = jax.tree.map(jnp.ones_like, params.lower)
  for _ in range(10):
    direction = jax.jvp(jax.grad(mean_of), (params.lower,), (direction,))[1]
    size = optax.tree.norm(direction)
    direction = optax.tree.scale(1 / size, direction)
  assert size < 1.1 * label_cleaning.CURVATURE
  assert np.isfinite(weights.losses.lower(*params, batch))


def options_of(folder, **changes):
  settings = bilevel_zoo.Settings(
    methods=('control/direct', 'soba'),
    data_calls=1_200,
    table_sizes=(128, 256),
    digit_sizes=tuple(DIGITS.values()),
    corruptions=(0.5,),
    batch_size=32,
    lower_steps=(0.3,),
    ratios=(0.3,),
    exponents=(0.0,),
    seeds=2,
    records=10,
    **changes,
  )
  return harness.Options(
    'stsa', 'bilevel_zoo', 'quick', settings, str(folder), None, (0, 1)
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('problem', 'name'),
  [('regularisation', 'breast_cancer'), ('cleaning', 'corruption0.5')],
)
def test_a_small_run_and_again(tmp_path, problem, name):
  options = options_of(tmp_path, problem=problem)
  bilevel_zoo.main(options)

  def read():
    found = json.loads((tmp_path / 'results.json').read_text())['metrics']
    return {k: v for k, v in found.items() if not k.endswith('/seconds')}

  metrics = read()
  assert metrics[f'soba/{name}/of_control'] < 1
  assert (tmp_path / f'{problem}.png').exists()
  bilevel_zoo.main(options)  # From its checkpoints.
  assert read() == metrics


def test_the_packaged_data_is_enough_for_the_defaults():
  settings = bilevel_zoo.Settings(problem='regularisation')
  options = harness.Options(
    'stsa', 'bilevel_zoo', 'quick', settings, '', None, (0,)
  )
  (problem,), _ = bilevel_zoo.make_problems(options)
  assert problem.name == 'breast_cancer'
  assert problem.batches == (3, 4)
