"""AiPOD, E-AiPOD and AID: identities between them, convergence, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

RNG = np.random.default_rng(0)
ONTO = RNG.normal(size=(2, 3))
MATRIX = np.concatenate([ONTO, ONTO.sum(0, keepdims=True)])  # Rank 2 of 3.
H = RNG.normal(size=(3, 4)) / 2
RIGHT = MATRIX @ RNG.normal(size=3)
UPPER_SET = bj.projections.affine_set(RNG.normal(size=(1, 4)), [0.5])
LOWER_SET = bj.projections.affine_set(
  MATRIX, RIGHT, coupling=lambda x: MATRIX @ jnp.tanh(jnp.asarray(H) @ x)
)


def upper_loss(x, y, batch):
  del batch
  return jnp.sum((y - 1) ** 2) + jnp.sum(x**2) / 2 + jnp.sin(x[0] + y[0])


def lower_loss(x, y, batch):
  del batch
  return jnp.sum((y - x[:3]) ** 2) / 2 + jnp.sum(jnp.cosh(y)) / 4


PROBLEM = bj.BilevelProblem(upper_loss, lower_loss)
SETS = {'upper_set': UPPER_SET, 'lower_set': LOWER_SET}


def params_of(dtype=jnp.float32):
  return bj.BilevelParams(jnp.zeros(4, dtype) + 0.2, jnp.zeros(3, dtype))


def run(solver, steps, params=None):
  params = params_of() if params is None else params

  @jax.jit
  def go(params, state):
    def body(carry, _):
      params, state = carry
      updates, state = solver.update(None, state, params)
      params = bj.apply_updates(params, updates)
      return (params, state), params

    return jax.lax.scan(body, (params, state), length=steps)

  (params, state), points = go(params, solver.init(params))
  return params, state, points


def make(solver, rate=0.05, **kwargs):
  given = {'lower': optax.sgd(0.3), 'inner_steps': 3} | SETS | kwargs
  return solver(PROBLEM, upper=optax.sgd(rate), **given)


def test_e_aipod_that_always_projects_is_aipod_to_float_precision():
  for upper in (optax.sgd(0.05), optax.adam(0.02)):
    one = bj.aipod(
      PROBLEM, upper=upper, lower=optax.sgd(0.3), inner_steps=3, **SETS
    )
    two = bj.e_aipod(
      PROBLEM,
      upper=upper,
      lower=optax.sgd(0.3),
      inner_steps=3,
      probability=1.0,
      upper_steps=1,
      relaxation=1.0,
      **SETS,
    )
    _, _, first = run(one, 30)
    _, _, second = run(two, 30)
    chex.assert_trees_all_close(first, second, rtol=2e-6, atol=2e-6)


def stationarity(params):
  """The projected hypergradient at the exact lower minimiser, and its gap."""
  x, y = params
  solve = bj.aipod(PROBLEM, upper=optax.sgd(0.0), lower=optax.sgd(0.3), **SETS)
  exact, _, _ = run(solve, 400, bj.BilevelParams(x, y))
  slope = bj.hypergradient(PROBLEM, exact, lower_set=LOWER_SET, tolerance=1e-12)
  along = UPPER_SET.tangent(slope)
  return float(jnp.linalg.norm(along)), float(jnp.max(jnp.abs(exact.lower - y)))


@pytest.mark.parametrize(
  'solver',
  [
    lambda: make(bj.aipod),
    lambda: make(bj.e_aipod, probability=0.4),
    lambda: make(bj.e_aipod, probability=0.4, rate=0.02, relaxation=2.5),
    lambda: make(bj.e_aipod, probability=0.4, upper_probability=0.5),
  ],
  ids=['aipod', 'lazily below', 'relaxed', 'both lazily'],
)
def test_converges_to_a_stationary_point_in_both_sets(solver):
  with jax.enable_x64(True):
    params, state, _ = run(solver(), 1500, params_of(jnp.float64))
    slope, gap = stationarity(params)
    assert slope < 1e-6
    assert gap < 1e-6
    outside = bj.diagnostics.feasibility(
      params,
      upper=UPPER_SET,
      lower=lambda y: LOWER_SET(y, params.upper),
    )
    assert max(outside.values()) < 1e-6
    assert bj.values(state)['outside_range'] < 1e-12


def test_several_upper_steps_are_biased_in_proportion_to_the_step_size():
  with jax.enable_x64(True):
    slopes = []
    for rate in (0.02, 0.01):
      solver = make(bj.e_aipod, probability=0.4, upper_steps=3, rate=rate)
      params, _, _ = run(solver, 3000, params_of(jnp.float64))
      slope, gap = stationarity(params)
      assert gap < 1e-6
      slopes.append(slope)
    assert slopes[0] < 5e-3
    np.testing.assert_allclose(slopes[0] / slopes[1], 2, rtol=0.1)


def test_without_the_control_variate_it_does_not():
  with jax.enable_x64(True):
    solver = make(
      bj.e_aipod, probability=0.4, upper_steps=2, control_variate=False
    )
    params, _, _ = run(solver, 1500, params_of(jnp.float64))
    assert stationarity(params)[1] > 1e-2


def test_stays_in_the_upper_set_for_large_relaxations():
  """Projected first and relaxed after, the error would grow 4 times a step."""
  solver = make(
    bj.e_aipod, probability=0.5, upper_steps=4, rate=0.002, relaxation=5.0
  )
  params, state, points = run(solver, 300)
  gap = jax.vmap(lambda x: jnp.linalg.norm(x - UPPER_SET(x)))(points.upper)
  assert float(gap.max()) < 2e-6
  assert bj.counts(state)['projections/upper'] == 300
  assert np.all(np.isfinite(params.upper))


def test_upper_steps_use_one_correction_and_their_own_batches():
  """By hand: f = (x - b_t)^2 / 2 + y, g = (y - x)^2 / 2, so w = 1."""
  solver = bj.e_aipod(
    bj.BilevelProblem(
      upper=lambda x, y, b: jnp.mean((x - b) ** 2) / 2 + y,
      lower=lambda x, y, b: (y - x) ** 2 / 2,
    ),
    upper=optax.sgd(0.1),
    lower=optax.sgd(1.0),
    probability=1.0,
    upper_steps=3,
    relaxation=2.0,
    upper_batch=lambda batch, t: batch[t],
    solve=bj.linear_solvers.dense_solve(),
  )
  batch = jnp.array([1.0, 2.0, 4.0])
  params = bj.BilevelParams(jnp.float32(0.5), jnp.float32(0.0))
  updates, state = solver.update(batch, solver.init(params), params)
  x = 0.5
  for b in batch:
    x -= 0.1 * ((x - b) + 1)
  np.testing.assert_allclose(updates.upper, 2 * (x - 0.5), rtol=1e-5)
  np.testing.assert_allclose(updates.lower, 0.5, rtol=1e-6)
  np.testing.assert_allclose(bj.auxiliaries(state)['correction'], 1, rtol=1e-5)
  assert bj.counts(state)['gradients/upper'] == 4


def test_aid_solves_with_each_linear_solver():
  target = jnp.array([1.0, -2.0])
  problem = bj.BilevelProblem(
    upper=lambda x, y, b: jnp.sum((y - target) ** 2),
    lower=lambda x, y, b: jnp.sum(jnp.array([1.0, 2.0]) * (y - x) ** 2) / 2,
  )
  for solve in (
    bj.linear_solvers.conjugate_gradient(2),
    bj.linear_solvers.neumann(10, 0.4),
    bj.linear_solvers.nystrom(2, 1e-3),
    bj.linear_solvers.random_neumann(6, 0.4),
  ):
    solver = bj.aid_bilevel(
      problem,
      upper=optax.sgd(0.05),
      lower=optax.sgd(0.4),
      inner_steps=3,
      solve=solve,
    )
    start = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    params, _, _ = run(solver, 400, start)
    np.testing.assert_allclose(params.upper, target, atol=1e-3)


@pytest.mark.parametrize(
  ('arguments', 'error', 'match'),
  [
    ({'relaxation': 0.5}, ValueError, 'relaxation is at least 1'),
    (
      {'relaxation': 2.0, 'upper_probability': 0.5},
      ValueError,
      'nothing to relax',
    ),
    ({'probability': 0.0}, ValueError, 'probability is in'),
    ({'upper_steps': 0}, ValueError, 'steps >= 1'),
    (
      {'lower_set': optax.projections.projection_non_negative},
      TypeError,
      'lower sets of equations',
    ),
  ],
)
def test_arguments_out_of_range(arguments, error, match):
  with pytest.raises(error, match=match):
    make(bj.e_aipod, **({'probability': 0.5} | arguments))


def test_a_start_whose_equations_contradict_each_other_is_an_error():
  bad = bj.projections.affine_set(MATRIX, RIGHT + np.array([0.0, 0.0, 1.0]))
  for solver in (bj.aipod, bj.e_aipod):
    given = {'probability': 0.5} if solver is bj.e_aipod else {}
    with pytest.raises(ValueError, match='range of A'):
      make(solver, lower_set=bad, **given).init(params_of())


def test_plans_count_projections_as_they_say():
  """Exponents of projections in the accuracy, between 1e-2 and 1e-4."""

  def projections(accuracy, variant):
    plan = bj.solvers.e_aipod_plan(accuracy, variant=variant, lower_rate=1.0)
    lower = plan.iterations * plan.inner_steps * plan.probability
    upper = plan.iterations
    if plan.upper_probability is not None:
      upper = upper * plan.upper_steps * plan.upper_probability
    return np.array([lower, upper])

  expected = {
    'first': [1.5, 2.0],
    'long_loops': [1.5, 1.5],
    'lazy_upper': [1.5, 1.5],
  }
  for variant, exponents in expected.items():
    few, many = (projections(a, variant) for a in (1e-2, 1e-4))
    np.testing.assert_allclose(
      np.log(many / few) / np.log(100), exponents, atol=0.02
    )
  longer = bj.solvers.e_aipod_plan(0.01, upper_steps=16)
  short = bj.solvers.e_aipod_plan(0.01)
  assert longer.iterations == short.iterations / 16
  ratio = longer.iterations * longer.probability
  ratio /= short.iterations * short.probability
  np.testing.assert_allclose(ratio, 16**-0.75, rtol=1e-3)
  assert longer.relaxation == 4


def test_a_plan_is_arguments_of_the_solver():
  plan = bj.solvers.e_aipod_plan(0.04, variant='lazy_upper', lower_rate=0.5)
  given = plan._asdict()
  steps = given.pop('iterations')
  upper, lower = (optax.sgd(given.pop(f'{n}_rate')) for n in ('upper', 'lower'))
  solver = bj.e_aipod(PROBLEM, upper=upper, lower=lower, **given, **SETS)
  params, _, _ = run(solver, steps)
  assert all(np.all(np.isfinite(z)) for z in params)


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [((2.0, 'first'), 'accuracy'), ((0.1, 'third'), 'variant is')],
)
def test_plans_out_of_range(arguments, match):
  with pytest.raises(ValueError, match=match):
    bj.solvers.e_aipod_plan(arguments[0], variant=arguments[1])
