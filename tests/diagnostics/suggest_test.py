"""Suggested settings on quadratics and on the toy; words for losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

F = np.diag([1.0, 3.0, 0.5, 2.0])
G = np.array(
  [[2.0, 0.3, 0.5, 0], [0.3, 1.0, 0, 0.2], [0.5, 0, 3.0, 0.1], [0, 0.2, 0.1, 1]]
)
PULL = np.array([0.0, 0.0, 1.0, -2.0])


def quadratic(matrix, pull):
  def loss(x, y, batch):
    z = jnp.concatenate([x['a'], y])
    return z @ matrix @ z / 2 + pull @ z

  return loss


PROBLEM = bj.BilevelProblem(quadratic(F, PULL), quadratic(G, 0 * PULL))
PARAMS = bj.BilevelParams({'a': np.zeros(2)}, np.zeros(2))
KEY = jax.random.key(0)


def suggest(**kwargs):
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, PARAMS)
    settings = {'steps': 300} | kwargs
    found = bj.suggest(PROBLEM, params, key=KEY, **settings)
    return bj.diagnostics.Suggestion(*map(np.asarray, found))


Q = PULL[2:] @ np.linalg.solve(G[2:, 2:], PULL[2:])


def test_curvatures_are_exact_on_quadratics():
  found = suggest(penalty=1.0)
  largest = lambda matrix: np.linalg.eigvalsh(matrix).max()
  np.testing.assert_allclose(found.upper_curvature, largest(F), rtol=1e-6)
  np.testing.assert_allclose(found.lower_curvature, largest(G), rtol=1e-6)
  np.testing.assert_allclose(
    found.value_curvature, largest(G[2:, 2:]), rtol=1e-6
  )


def test_penalty_by_gap_and_by_accuracy():
  by_gap = suggest(gap=1e-4)
  np.testing.assert_allclose(by_gap.penalty, np.sqrt(Q / 2e-4), rtol=1e-5)
  np.testing.assert_allclose(by_gap.gap, 1e-4, rtol=1e-5)
  np.testing.assert_allclose(
    suggest(accuracy=1e-2).penalty, Q / 1e-2, rtol=1e-5
  )


@pytest.mark.parametrize('penalty', [0.2, 1.0, 40.0])
def test_steps_are_below_the_curvature_of_what_is_descended(penalty):
  found = suggest(penalty=penalty, safety=1.0)
  scale = min(1 / penalty, 1)
  total = np.linalg.eigvalsh(scale * (F + penalty * G)).max()
  assert 0.5 < found.upper * total <= 1 + 1e-9
  assert found.lower == found.upper


def solver_of(problem, found, **kwargs):
  return bj.v_pbgd(
    problem,
    penalty=found.penalty,
    upper=optax.sgd(found.upper),
    lower=optax.sgd(found.lower),
    value=optax.sgd(found.value),
    **kwargs,
  )


def run(solver, params, steps):
  def step(carry, _):
    params, state = carry
    updates, state = solver.update(None, state, params)
    return (bj.apply_updates(params, updates), state), bj.values(state)

  return jax.lax.scan(step, (params, solver.init(params)), length=steps)


def test_suggested_settings_reach_the_suggested_gap():
  """The pull is measured at the solution of a first run."""
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, PARAMS)
    for _ in range(2):
      found = bj.suggest(PROBLEM, params, key=KEY, gap=1e-4)
      (params, _), values = run(solver_of(PROBLEM, found), params, 5000)
    np.testing.assert_allclose(values['gap'][-1], 1e-4, rtol=0.1)
    assert bj.diagnose(values, gap=1e-4).verdict == 'fine'


def _toy_upper(x, y, batch):
  del batch
  wave = jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x))
  return wave + 0.5 * jnp.log((4 * x - 2) ** 2 + 1)


def _toy_lower(x, y, batch):
  del batch
  return (x + y) ** 2 + x * jnp.sin(x + y) ** 2


TOY = bj.BilevelProblem(_toy_upper, _toy_lower)
TOY_MINIMA = np.array([0.3824, 1.2152, 2.8296])


def test_suggested_settings_converge_on_the_toy():
  box = functools.partial(
    optax.projections.projection_box, lower=0.0, upper=3.0
  )

  @jax.jit
  @jax.vmap
  def end(key):
    one, two, three = jax.random.split(key, 3)
    x = jax.random.uniform(one, (), minval=0.0, maxval=3.0)
    y = jax.random.uniform(two, (), minval=-5.0, maxval=8.5)
    params = bj.BilevelParams(x, y)
    found = bj.suggest(TOY, params, key=three, penalty=10.0, spread=1, points=8)
    solver = solver_of(TOY, found, upper_set=box)
    (params, _), values = run(solver, params, 4000)
    return params, values['gap'][-1], found.upper

  params, gap, rate = end(jax.random.split(jax.random.key(5), 64))
  distance = np.abs(np.asarray(params.upper)[:, None] - TOY_MINIMA).min(axis=1)
  assert np.mean(distance < 0.1) >= 0.98
  assert np.abs(gap).max() < 1e-2
  assert np.all((rate > 0.003) & (rate < 0.5))


def test_a_lower_loss_that_is_not_convex_still_gives_a_penalty():
  problem = bj.BilevelProblem(
    lambda x, y, batch: (y * jnp.array([1.0, 3.0])).sum(),
    lambda x, y, batch: -((y - x) ** 2).sum(),
  )
  params = bj.BilevelParams(jnp.zeros(2), jnp.ones(2))
  found = bj.suggest(problem, params, gap=1e-2, key=KEY)
  assert np.isfinite(found.penalty) and found.penalty > 0


@pytest.mark.parametrize(
  ('kwargs', 'said'),
  [
    ({}, 'one of gap'),
    ({'gap': 1.0, 'penalty': 1.0}, 'one of gap'),
    ({'gap': 1.0, 'safety': 2.5}, 'between 0 and 2'),
    ({'gap': 1.0, 'steps': 0}, '>= 1'),
  ],
)
def test_errors(kwargs, said):
  with pytest.raises(ValueError, match=said):
    suggest(**kwargs)


# Words. Each from a real run of the quadratic, not from a made-up series.


def history(penalty=20.0, rate=0.2, value=0.3, steps=2000, start=1.0):
  params = bj.BilevelParams({'a': jnp.full(2, start)}, jnp.full(2, -start))
  solver = bj.v_pbgd(
    PROBLEM,
    penalty=penalty,
    upper=optax.sgd(rate),
    lower=optax.sgd(rate),
    value=optax.sgd(value),
  )
  return jax.jit(lambda p: run(solver, p, steps)[1])(params)


def test_fine():
  assert bj.diagnose(history()).verdict == 'fine'


def test_a_value_sequence_that_lags():
  found = bj.diagnose(history(value=1e-6, steps=400))
  assert found.verdict == 'lagging' and 'inner steps' in found.words


def test_steps_too_large_for_the_penalty():
  # Between one and two over the curvature: it turns at each step.
  found = bj.diagnose(history(rate=0.62, steps=40))
  assert found.verdict == 'oscillating' and 'suggest' in found.words


def test_divergence():
  assert bj.diagnose(history(rate=3.0)).verdict == 'diverged'


def test_a_penalty_so_stiff_that_the_upper_loss_creeps():
  found = bj.diagnose(history(penalty=5000.0), gap=1e-2)
  assert found.verdict == 'stiff' and 'smaller' in found.words


def test_a_penalty_too_small_for_the_gap():
  found = bj.diagnose(history(penalty=2.0), gap=1e-6)
  assert found.verdict == 'loose' and 'multiply' in found.words


def test_a_history_of_something_else():
  with pytest.raises(ValueError, match='missing'):
    bj.diagnose({'upper': np.ones(9)})
  with pytest.raises(ValueError, match='at least 8'):
    bj.diagnose(dict.fromkeys(('upper', 'lower', 'gap'), np.ones(3)))
