"""Problems on data: solutions, gradients, and small runs that resume."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special

import bilevel_jax as bj
from experiments import harness, vision
from experiments.stsa import (
  bilevel_zoo,
  label_cleaning,
  regularisation,
  tables,
  zoo_problems,
)

DIGITS = dict(zip(label_cleaning.PARTS, (128, 64, 64, 100), strict=True))


@pytest.fixture(scope='module')
def penalties():
  table = tables.read('breast_cancer', None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(regularisation, 'STEPS', 50)
    return regularisation.make_regularisation(
      'breast_cancer', table, train=128, validation=256, batch_size=32
    )


@pytest.fixture(scope='module')
def weights():
  return label_cleaning.make_cleaning(
    None, corruption=0.5, sizes=DIGITS, batch_size=32
  )[0]


def full_batch(problem):
  """Means of both losses over their fixed batches."""

  def mean(loss, level, batches):
    def full_loss(x, y, data):
      one = lambda i: loss(x, y, {level: i, 'data': data})
      return jnp.mean(jax.vmap(one)(jnp.arange(batches)))

    return full_loss

  f, g = problem.losses[:2]
  return bj.BilevelProblem(
    mean(f, 'upper', problem.batches[0]), mean(g, 'lower', problem.batches[1])
  )


def test_split_is_disjoint_with_the_stated_curvature():
  table = tables.read('breast_cancer', None)
  parts = regularisation.split(table, train=128, validation=256, batch_size=32)
  flat = [np.asarray(z).reshape(-1, 31) for z in parts]
  assert [len(z) for z in flat] == [128, 256, 185]
  assert len(np.unique(np.concatenate(flat), axis=0)) == 569
  second = flat[0].T @ flat[0] / 128
  curvature = np.linalg.eigvalsh(second)[-1] / 4
  np.testing.assert_allclose(curvature, regularisation.CURVATURE, rtol=1e-4)
  with pytest.raises(harness.SettingsError, match='leave no test data'):
    regularisation.split(table, train=400, validation=200, batch_size=32)


def scipy_minimiser(penalty, train):
  """The lower solution by a trust region method, in float64."""

  def loss(y):
    fits = np.logaddexp(0, -(train @ y))
    return fits.mean() + penalty @ y**2 / 2

  def slope(y):
    return penalty * y - train.T @ scipy.special.expit(-train @ y) / len(train)

  def hessian(y):
    share = scipy.special.expit(-train @ y)
    weights = (share * (1 - share))[:, None]
    return train.T @ (weights * train) / len(train) + np.diag(penalty)

  result = scipy.optimize.minimize(
    loss,
    np.zeros(len(penalty)),
    jac=slope,
    hess=hessian,
    method='trust-exact',
    options={'gtol': 1e-13, 'maxiter': 1_000},
  )
  return result.x


@pytest.mark.slow
def test_lower_solution_agrees_with_scipy_at_all_penalties(penalties):
  train = np.asarray(penalties.data.train, np.float64).reshape(-1, 31)
  solve = jax.jit(regularisation.minimiser)
  mixed = np.linspace(-15, 15, 31)
  for logits in (np.zeros(31), np.full(31, -10.0), np.full(31, -15.0), mixed):
    penalty = scipy.special.expit(logits)
    expected = scipy_minimiser(penalty, train)
    y = solve(penalty.astype(np.float32), train.astype(np.float32))
    size = np.linalg.norm(expected)
    assert np.linalg.norm(y - expected) < 1e-5 * size
    with jax.enable_x64(True):
      assert np.linalg.norm(solve(penalty, train) - expected) < 1e-8 * size


@pytest.mark.slow
def test_value_and_its_derivative(penalties):
  problem, data = full_batch(penalties), penalties.data
  x = penalties.start(jax.random.key(1)).upper
  penalty = jax.nn.sigmoid(x)
  loss, slope, y = regularisation.value_and_slope(penalty, data)
  np.testing.assert_allclose(loss, problem.upper(x, y, data), rtol=1e-6)
  gradient = bj.hypergradient(problem, bj.BilevelParams(x, y), data)
  slope = slope * penalty * (1 - penalty)
  np.testing.assert_allclose(gradient, slope, rtol=2e-3, atol=1e-6)
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda z: jnp.asarray(np.asarray(z), float), data)
    both = jax.jit(lambda p: regularisation.value_and_slope(p, exact))
    penalty = jnp.asarray(penalty, float)
    change = (both(penalty + 1e-5)[0] - both(penalty - 1e-5)[0]) / 2e-5
    np.testing.assert_allclose(change, both(penalty)[1].sum(), rtol=1e-4)


def test_search_for_the_reference_value_is_cached(
  penalties, tmp_path, monkeypatch
):
  monkeypatch.setattr(regularisation, 'STEPS', 5)
  cache = tmp_path / 'least.json'
  uninterrupted = regularisation.best_value(penalties.data)
  with monkeypatch.context() as killed:
    write, count = regularisation.files.write_text, itertools.count()

    def kill(path, text):
      write(path, text)
      if next(count) == 1:
        raise KeyboardInterrupt

    killed.setattr(regularisation.files, 'write_text', kill)
    with pytest.raises(KeyboardInterrupt):
      regularisation.best_value(penalties.data, cache)
  assert regularisation.best_value(penalties.data, cache) == uninterrupted
  with monkeypatch.context() as ended:
    ended.setattr(regularisation, '_search', None)
    assert regularisation.best_value(penalties.data, cache) == uninterrupted
  cache.write_text(cache.read_text()[:50])  # Damaged: searches again.
  assert regularisation.best_value(penalties.data, cache) == uninterrupted


def test_gap_is_positive(penalties):
  gaps = [
    float(
      penalties.measure(penalties.start(jax.random.key(i)), penalties.data)[
        'gap'
      ]
    )
    for i in range(3)
  ]
  assert min(gaps) > 1e-3


@pytest.mark.slow
def test_cleaning_uses_all_digits_and_pollutes_a_fraction(weights):
  train = weights.data['train']
  assert train.images.shape == (4, 32, 784)
  clean, _ = vision.load_digits(None, DIGITS)
  wrong = train.labels.ravel() != clean['train'].labels
  assert np.mean(wrong) == 0.5
  # All images have the same shift and scale.
  scaled = train.images.reshape(-1, 784)
  images = clean['train'].pixels().images
  factor = np.std(scaled - scaled[0]) / np.std(images - images[0])
  np.testing.assert_allclose(
    scaled - scaled[0], factor * (images - images[0]), atol=1e-4
  )
  assert weights.lower_size == 7_850
  # The control with 64 clean digits learns something.
  assert 0.1 < weights.references['clean_part'] < 0.6


@pytest.mark.slow
def test_weight_affects_only_its_digit(weights):
  params = weights.start(jax.random.key(0))
  slope = jax.grad(weights.losses.lower)(
    params.upper, params.lower, {'lower': 2, 'data': weights.data}
  )
  moved = np.flatnonzero(slope)
  np.testing.assert_array_equal(moved, np.arange(64, 96))
  # Power iteration for the curvature in the lower variable.
  batch = {'lower': 1, 'data': weights.data}
  mean_loss = lambda y: full_batch(weights).lower(
    params.upper + 30, y, weights.data
  )
  direction = jax.tree.map(jnp.ones_like, params.lower)
  for _ in range(10):
    direction = jax.jvp(jax.grad(mean_loss), (params.lower,), (direction,))[1]
    size = optax.tree.norm(direction)
    direction = optax.tree.scale(1 / size, direction)
  assert size < 1.1 * label_cleaning.CURVATURE
  assert np.isfinite(weights.losses.lower(*params, batch))


def make_options(folder, **changes):
  settings = bilevel_zoo.Settings(
    methods=('control/direct', 'soba'),
    data_calls=1_200,
    table=zoo_problems.Tables(sizes=(128, 256)),
    digits=zoo_problems.Digits((0.5,), tuple(DIGITS.values())),
    batch_size=32,
    grid=bilevel_zoo.Grid((0.3,), (0.3,), (0.0,)),
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
def test_small_run_resumes(tmp_path, problem, name):
  options = make_options(tmp_path, problem=problem)
  harness.execute(bilevel_zoo.main, options)

  def read():
    metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
    return {k: v for k, v in metrics.items() if not k.startswith('seconds')}

  metrics = read()
  assert metrics[f'of_control/soba/{name}'] < 1
  assert (tmp_path / f'{problem}.png').exists()
  harness.execute(bilevel_zoo.main, options)  # From its checkpoints.
  assert read() == metrics


def test_defaults_work_with_packaged_data(tmp_path, monkeypatch):
  monkeypatch.setattr(regularisation, 'STEPS', 50)
  settings = bilevel_zoo.Settings(problem='regularisation')
  options = harness.Options(
    'stsa', 'bilevel_zoo', 'quick', settings, str(tmp_path), None, (0,)
  )
  (problem,), (source,) = zoo_problems.make_problems(options)
  assert problem.name == source.name == 'breast_cancer'
  assert problem.batches == (3, 4)
  assert zoo_problems.published(settings) == ['a9a', 'magic']


def test_table_of_a_user(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(regularisation, 'STEPS', 50)
  path = tmp_path / 'mine.csv'
  rng = np.random.default_rng(0)
  rows = [
    f'{a:.3f},{"yes" if a > 0 else "no"},{b:.3f}'
    for a, b in rng.normal(size=(300, 2))
  ]
  path.write_text('\n'.join(['one,bought,two', *rows]))
  settings = bilevel_zoo.Settings(
    problem='regularisation',
    table=zoo_problems.Tables((str(path),), ('bought',)),
  )
  options = harness.Options(
    'stsa', 'bilevel_zoo', 'quick', settings, str(tmp_path), None, (0,)
  )
  (problem,), (source,) = zoo_problems.make_problems(options)
  assert (problem.name, problem.data.train.shape[-1]) == ('mine.csv', 3)
  assert source.name == 'unknown table mine.csv'
  assert capsys.readouterr().out.startswith('Data: mine.csv, 300 samples, 2 ')
