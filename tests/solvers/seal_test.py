"""Scores of rows: rankings, rows that rest, a divisor that is carried."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import PENALISED, Row
from tests.tiers import first

ROWS_HELD = 24  # More than a batch has.


def _losses(params, batch):
  """One number for each row."""
  error = params['z'] - batch['e'].astype(params['z'].dtype)
  return 1 + (error**2).sum(-1) / 2


def _row(value=None):
  def make(wrap, penalty, rate):
    del wrap
    optimiser = optax.adam if value is None else optax.sgd
    return bj.solvers.seal(
      contract.flat_loss,
      _losses,
      scores=bj.solvers.RowScores(
        optimiser(rate), ROWS_HELD, lambda batch: batch['at']
      ),
      penalty=penalty,
      lower=optax.sgd(rate),
      value=value and bj.Sequence(optax.sgd(rate), steps=value),
    )

  return make


_COUNTS = {'gradients/upper': 1, 'gradients/lower': 1}
ROWS = (
  Row(
    'seal',
    _row(),
    _COUNTS,
    params=contract.flat_params,
    hyper=PENALISED,
    parts='none',
    wraps=False,
    devices=True,
  ),
  Row(
    'seal, the full form',
    _row(value=2),
    {**_COUNTS, 'gradients/lower': 3, 'losses/lower': 1},
    params=contract.flat_params,
    hyper=PENALISED,
    parts='none',
    wraps=False,
  ),
)


def static(losses, order, selector, **given):
  """Scores after batches of rows whose losses nothing moves."""
  losses = jnp.asarray(losses, jnp.float32)
  solver = bj.solvers.seal(
    lambda y, batch: y * 0.0,
    lambda y, batch: losses[batch] + 0 * y,
    scores=bj.solvers.RowScores(
      selector, len(losses), lambda batch: batch, **given
    ),
    penalty=1.0,
    lower=optax.sgd(0.1),
  )

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = (jnp.float32(0.0), solver.init(jnp.float32(0.0)))
  run = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows)[0])
  return run(start, jnp.asarray(order))[1]


def epochs(rows, size, count, seed=0):
  """Batches of whole epochs."""
  rng = np.random.default_rng(seed)
  order = [rng.permutation(rows) for _ in range(count)]
  return np.concatenate(order).reshape(-1, size)


def dropped(scores, share=0.2):
  """The rows of the lowest scores."""
  return set(np.argsort(np.asarray(scores))[: int(share * len(scores))])


def test_whole_epochs_rank_as_the_losses_do():
  """So do descent and mirror descent; Adam has forgotten how large they are."""
  losses = np.random.default_rng(1).gamma(4.0, 0.5, 512)
  worst, order = dropped(-losses), epochs(512, 32, 3)
  ways = {
    'descent': {'selector': optax.sgd(0.1)},
    'mirror': {'selector': optax.sgd(0.1), 'weights': 'mirror'},
    'sigmoid': {'selector': optax.sgd(0.1), 'weights': 'sigmoid'},
    'adam': {'selector': optax.adam(5e-3)},
  }
  scores = {
    name: static(losses, order, **how).sequences['selector']
    for name, how in ways.items()
  }
  agreed = {n: len(worst & dropped(s)) / len(worst) for n, s in scores.items()}
  assert min(agreed[n] for n in ('descent', 'mirror', 'sigmoid')) >= 0.95
  assert agreed['adam'] < 0.8, agreed


def test_rows_that_are_not_seen_rest_and_under_dense_adam_they_rise():
  losses = jnp.asarray(np.random.default_rng(2).gamma(4.0, 0.5, 64))
  batch, rate, steps = jnp.arange(8), 5e-3, 20
  for how in (optax.sgd(0.1, 0.9), optax.adam(rate), optax.adamw(rate)):
    found = static(losses, np.tile(batch, (steps, 1)), selector=how)
    scores = found.sequences['selector']
    assert np.all(np.asarray(scores[8:]) == 0) and np.all(scores[:8] < 0)

  # The same problem with all rows in one softmax: the published program.
  def mean(scores):
    p = 64 * jax.nn.softmax(scores)
    return jnp.mean(p[batch] * losses[batch])

  def step(carry, _):
    scores, state = carry
    updates, state = adam.update(jax.grad(mean)(scores), state, scores)
    return (optax.apply_updates(scores, updates), state), None

  adam, scores = optax.adam(rate), jnp.zeros(64)
  run = jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])
  dense, _ = run((scores, adam.init(scores)))
  np.testing.assert_allclose(dense[8:], rate * steps, rtol=0.02)


def test_a_row_has_an_age_of_its_own_and_schedules_count_updates():
  """By Adam in plain Python, for rows that come at other times."""
  losses = np.array([1.0, 2.0, 3.0, 0.5])
  order = np.array([[0, 1], [0, 2], [0, 3], [3, 3], [2, 1]])
  rate = lambda k: 0.1 / (1 + k)
  scores, first, second, age = np.zeros((4, 4))
  for k, batch in enumerate(order):
    p = np.exp(scores) / np.exp(scores).mean()
    total = np.zeros(4)
    np.add.at(total, batch, p[batch] * losses[batch] / 2)
    at = np.unique(batch)
    age[at] += 1
    first[at] = 0.9 * first[at] + 0.1 * total[at]
    second[at] = 0.999 * second[at] + 0.001 * total[at] ** 2
    root = np.sqrt(second[at] / (1 - 0.999 ** age[at])) + 1e-8
    scores[at] -= rate(k) * first[at] / (1 - 0.9 ** age[at]) / root
  found = static(losses, order, selector=optax.adam(rate))
  np.testing.assert_allclose(found.sequences['selector'], scores, rtol=2e-4)


@pytest.mark.parametrize('rate', [0.01, 3.0, 60.0])
def test_the_divisor_is_that_of_all_rows(rate):
  """Also where nearly all of the weight moves at once."""
  losses = np.random.default_rng(3).gamma(1.0, 1.0, 12)
  order = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 5], [9, 10, 11, 0, 1]] * 5)
  found = static(losses, order, selector=optax.sgd(rate), weights='mirror')
  table = np.asarray(found.sequences['selector'], np.float64)
  wanted = np.log(np.mean(np.exp(table - table.max()))) + table.max()
  np.testing.assert_allclose(np.sum(found.level), wanted, rtol=1e-5, atol=1e-5)


def test_the_divisor_of_many_rows_and_seeds_is_that_of_all_rows():
  """Also from updates that move few of the rows, each seed by its own."""
  rows, size, steps = 200_000, 16, 12
  rng = np.random.default_rng(0)
  losses = jnp.asarray(rng.gamma(1.0, 1.0, rows), jnp.float32)
  order = jnp.asarray(rng.integers(rows, size=(2, steps, size)))
  # The last rows are those of nodes that are not full.
  order = order.at[:, 0, 0].set(rows - 1)

  def run(order, scale):
    solver = bj.solvers.seal(
      lambda y, batch: y * 0.0,
      lambda y, batch: -scale * losses[batch] + 0 * y,
      scores=bj.solvers.RowScores(
        optax.sgd(1.0), rows, lambda batch: batch, 'mirror'
      ),
      penalty=1.0,
      lower=optax.sgd(0.1),
    )
    params = jnp.float32(0.0)
    body = lambda state, batch: (solver.update(batch, state, params)[1], None)
    state, _ = jax.lax.scan(body, solver.init(params), order)
    return state.sequences['selector'], state.level

  table, level = jax.jit(jax.vmap(run))(order, jnp.array([1.0, 200.0]))
  table = np.asarray(table, np.float64)
  top = table.max(1)
  wanted = top + np.log(np.mean(np.exp(table - top[:, None]), axis=1))
  # What moved is most of the sum in one seed, and little in the other.
  assert wanted[0] < 1e-2 and wanted[1] > 10
  np.testing.assert_allclose(level.sum(1), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('rows', [64, 5000, 200_000])
@pytest.mark.parametrize('score', first([1e30, 1e4, -1e4, 1e9]))
def test_weights_of_large_scores_are_those_of_their_differences(rows, score):
  """Also where a spacing of floats at a score is above the logarithm of N."""
  # A row far above the others, or below: N and 0, or N / (N - 1) and 0.
  solver = bj.solvers.seal(
    lambda y, batch: y * 0.0,
    lambda y, batch: batch['losses'] + 0 * y,
    scores=bj.solvers.RowScores(
      optax.sgd(1.0), rows, lambda batch: batch['at'], 'mirror'
    ),
    penalty=1.0,
    lower=optax.sgd(0.1),
  )
  params, step = jnp.float32(0.0), jax.jit(solver.update)
  batch = {'at': jnp.array([3, 3]), 'losses': jnp.full(2, -score)}
  _, state = step(batch, solver.init(params), params)
  np.testing.assert_array_equal(
    bj.auxiliaries(state)['selector'][3:5], [np.float32(score), 0]
  )
  for at, above, below in ((3, rows, 0.0), (4, 0.0, rows / (rows - 1))):
    batch = {'at': jnp.array([at]), 'losses': jnp.ones(1)}
    weight = bj.values(step(batch, state, params)[1])['lower']
    np.testing.assert_allclose(weight, above if score > 0 else below, rtol=1e-5)


def test_an_update_touches_no_more_than_its_rows():
  """Whatever is as long as the table is a scatter into it, for seeds too."""
  rows = 100_000

  def outside(jaxpr, found):
    for eqn in jaxpr.eqns:
      inner = [v for v in eqn.params.values() if hasattr(v, 'jaxpr')]
      inner += eqn.params.get('branches', ())
      for part in inner:
        outside(part.jaxpr, found)
      if not inner and any(rows in v.aval.shape for v in eqn.outvars):
        found.append(eqn.primitive.name)
    return found

  for selector in (optax.sgd(0.1), optax.adam(0.1)):
    solver = bj.solvers.seal(
      lambda y, batch: y**2,
      lambda y, batch: (y - batch) ** 2,
      scores=bj.solvers.RowScores(selector, rows, lambda batch: batch),
      penalty=1.0,
      lower=optax.sgd(0.1),
    )
    params, batch = jnp.float32(1.0), jnp.arange(4)
    state = solver.init(params)
    traced = jax.make_jaxpr(solver.update)(batch, state, params)
    assert set(outside(traced.jaxpr, [])) == {'scatter'}
    seeds = jnp.ones(2)
    state = jax.vmap(solver.init)(seeds)
    update = jax.vmap(solver.update, (None, 0, 0))
    traced = jax.make_jaxpr(update)(batch, state, seeds)
    assert set(outside(traced.jaxpr, [])) == {'scatter'}


def test_other_indices_are_found():
  for wrong in (-1, 4):
    state = static([1.0] * 4, [[0, wrong]], selector=optax.sgd(0.1))
    assert np.isnan(bj.values(state)['lower'])


def test_what_is_wrong_is_said():
  scores = bj.solvers.RowScores(optax.sgd(0.1), 4, lambda batch: batch)
  fine = {'scores': scores, 'penalty': 1.0, 'lower': optax.sgd(0.1)}
  loss = lambda y, batch: y**2
  rows = lambda y, batch: (y - batch) ** 2
  record = bj.Sequence(optax.sgd(0.1), batch_at=lambda batch, t: batch)
  twice, change = bj.Sequence(optax.sgd(0.1), steps=2), scores._replace
  for wrong, said in (
    ({'scores': change(rows=0)}, 'whole number of rows'),
    ({'scores': change(weights='exp')}, "weights is one of .*, got 'exp'"),
    ({'penalty': -1.0}, 'the penalty is a weight >= 0'),
    ({'scores': change(optimiser=twice)}, 'a bare optimiser'),
    ({'lower': record}, 'lower has a batch_at'),
    ({'value': record}, 'value has a batch_at'),
  ):
    with pytest.raises(ValueError, match=said):
      bj.solvers.seal(loss, rows, **(fine | wrong))
  params, batch = jnp.float32(1.0), jnp.arange(2)

  def call(rows=rows, **more):
    solver = bj.solvers.seal(loss, rows, **(fine | more))
    jax.eval_shape(solver.update, batch, solver.init(params), params)

  with pytest.raises(TypeError, match='do not take their mean'):
    call(lambda y, batch: jnp.mean((y - batch) ** 2))
  with pytest.raises(TypeError, match='whole numbers'):
    call(scores=change(at=lambda batch: batch / 2))


def test_the_share_falls_by_epochs_and_stays():
  schedule = bj.solvers.seal_penalty(0.9, decay=0.3, epoch=5, minimum=0.2)
  found = 1 / (1 + np.array([schedule(k) for k in (0, 4, 5, 10, 15, 1000)]))
  np.testing.assert_allclose(found, [0.9, 0.9, 0.6, 0.3, 0.2, 0.2], rtol=1e-6)
  for wrong in (
    {'start': 0.0},
    {'epoch': 0},
    {'minimum': 0.0},
    {'decay': -1.0},
  ):
    with pytest.raises(ValueError, match='seal_penalty'):
      bj.solvers.seal_penalty(**({'decay': 0.1, 'epoch': 5} | wrong))
