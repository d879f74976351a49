"""AiPOD, E-AiPOD and AID: identities between them, convergence, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import COORDINATES, INNER, Row

S = bj.Sequence
Lazy, Relaxed = bj.projections.Lazy, bj.projections.Relaxed

# Equations: x on a line; y too, on one that moves with x.
_X_ROWS = np.zeros((2, COORDINATES))
_X_ROWS[:, :2] = [[1.0, 1.0], [2.0, 2.0]]
_Y_ROWS = np.zeros((1, COORDINATES))
_Y_ROWS[0, :2] = [1.0, -0.5]
X_LINE = bj.projections.affine_set(_X_ROWS, [1.25, 2.5])
Y_LINE = bj.projections.affine_set(
  _Y_ROWS, [0.4], coupling=lambda x: -0.25 * x['a'][:1]
)


def _row(wrap, rate, solver='aid_bilevel', upper=(), lower=(), **given):
  sgd = optax.sgd(rate)
  solver = getattr(bj, solver)(
    contract.PROBLEM,
    upper=S(sgd, **dict(upper)),
    lower=S(sgd, **dict(lower)),
    **given,
  )
  return bj.evaluation.wrapped(solver, wrap)


def _lazily(wrap, rate):
  line = Lazy(Y_LINE, 0.5, key=jax.random.key(2))
  below = {'steps': INNER, 'batch_at': contract.inner_batch, 'set': line}
  above = {'steps': 2, 'set': Relaxed(X_LINE, 1.25)}
  return _row(wrap, rate, 'e_aipod', above, below)


_COST = {'gradients/upper': 1, 'gradients/lower': 1}
_PRODUCTS = {'random_counts': ('hessian_vector_products/lower',)}

ROWS = (
  Row('aid_bilevel', _row, _COST, keys=True, parts='none', **_PRODUCTS),
  Row(
    'aipod',
    functools.partial(
      _row, solver='aipod', upper={'set': X_LINE}, lower={'set': Y_LINE}
    ),
    _COST | {'projections/lower': 1, 'projections/upper': 1},
    sets={'upper': X_LINE},
    spacings=8,
    parts='none',
    devices=True,
    **_PRODUCTS,
  ),
  Row(
    'e_aipod',
    _lazily,
    {
      'gradients/lower': INNER,
      'gradients/upper': 3,
      'projections/upper': 1,
    },
    random_counts=('hessian_vector_products/lower', 'projections/lower'),
    sets={'upper': X_LINE},
    spacings=8,
    keys=True,
    parts='none',
  ),
)

RNG = np.random.default_rng(0)
ONTO = RNG.normal(size=(2, 3))
MATRIX = np.concatenate([ONTO, ONTO.sum(0, keepdims=True)])  # Rank 2 of 3.
H = RNG.normal(size=(3, 4)) / 2
RIGHT = MATRIX @ RNG.normal(size=3)
UPPER_SET = bj.projections.affine_set(RNG.normal(size=(1, 4)), [0.5])


def coupling(x):
  return MATRIX.astype(x.dtype) @ jnp.tanh(H.astype(x.dtype) @ x)


LOWER_SET = bj.projections.affine_set(MATRIX, RIGHT, coupling=coupling)


def upper_loss(x, y, batch):
  del batch
  return jnp.sum((y - 1) ** 2) + jnp.sum(x**2) / 2 + jnp.sin(x[0] + y[0])


def lower_loss(x, y, batch):
  del batch
  return jnp.sum((y - x[:3]) ** 2) / 2 + jnp.sum(jnp.cosh(y)) / 4


PROBLEM = bj.BilevelProblem(upper_loss, lower_loss)


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


def aipod(rate=0.05, optimiser=optax.sgd, lower_set=LOWER_SET):
  return bj.aipod(
    PROBLEM,
    upper=S(optimiser(rate), set=UPPER_SET),
    lower=S(optax.sgd(0.3), steps=3, set=lower_set),
  )


def e_aipod(
  probability=0.4,
  rate=0.05,
  *,
  optimiser=optax.sgd,
  steps=1,
  relaxation=1.0,
  control=True,
  upper_set=None,
  lower_set=LOWER_SET,
):
  return bj.e_aipod(
    PROBLEM,
    upper=S(
      optimiser(rate),
      steps=steps,
      set=upper_set or Relaxed(UPPER_SET, relaxation),
    ),
    lower=S(
      optax.sgd(0.3),
      steps=3,
      set=Lazy(lower_set, probability, key=0, control_variate=control),
    ),
  )


def test_e_aipod_that_always_projects_is_aipod_to_float_precision():
  _, _, first = run(aipod(0.02, optax.adam), 30)
  _, _, second = run(e_aipod(1.0, 0.02, optimiser=optax.adam), 30)
  chex.assert_trees_all_close(first, second, rtol=2e-6, atol=2e-6)


@functools.cache
def _measure():
  """The projected hypergradient at the exact lower minimiser, and its gap."""
  still = bj.aipod(
    PROBLEM,
    upper=S(optax.sgd(0.0), set=UPPER_SET),
    lower=S(optax.sgd(0.3), set=LOWER_SET),
  )

  @jax.jit
  def found(params):
    exact, _ = problems.solve(still, 400, params)
    slope = bj.hypergradient(
      PROBLEM, exact, lower_set=LOWER_SET, tolerance=1e-12
    )
    gap = jnp.max(jnp.abs(exact.lower - params.lower))
    return jnp.linalg.norm(UPPER_SET.tangent(slope)), gap

  return found


def stationarity(params):
  return tuple(map(float, _measure()(params)))


@pytest.mark.slow
@pytest.mark.parametrize(
  'make',
  [
    aipod,
    e_aipod,
    lambda: e_aipod(0.4, 0.02, relaxation=2.5),
    lambda: e_aipod(0.4, upper_set=Lazy(UPPER_SET, 0.5, key=0)),
  ],
  ids=['aipod', 'lazily below', 'relaxed', 'both lazily'],
)
def test_converges_to_a_stationary_point_in_both_sets(x64, make):
  params, state, _ = run(make(), 1500, params_of(jnp.float64))
  slope, gap = stationarity(params)
  assert slope < 1e-6
  assert gap < 1e-6
  for set_, z in (
    (UPPER_SET, params.upper),
    (lambda y: LOWER_SET(y, params.upper), params.lower),
  ):
    assert np.abs(z - set_(z)).max() < 1e-6
  assert bj.values(state)['outside_range'] < 1e-12


def test_several_upper_steps_are_biased_in_proportion_to_the_step_size(x64):
  slopes = []
  for rate in (0.02, 0.01):
    params, _, _ = run(
      e_aipod(rate=rate, steps=3), 3000, params_of(jnp.float64)
    )
    slope, gap = stationarity(params)
    assert gap < 1e-6
    slopes.append(slope)
  assert slopes[0] < 5e-3
  np.testing.assert_allclose(slopes[0] / slopes[1], 2, rtol=0.1)


def test_without_the_control_variate_it_does_not(x64):
  params, _, _ = run(
    e_aipod(steps=2, control=False), 1500, params_of(jnp.float64)
  )
  assert stationarity(params)[1] > 1e-2


def test_stays_in_the_upper_set_for_large_relaxations():
  """Projected first and relaxed after, the error would grow 4 times a step."""
  solver = e_aipod(0.5, 0.002, steps=4, relaxation=5.0)
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
    upper=S(
      optax.sgd(0.1),
      steps=3,
      batch_at=lambda batch, t: batch[t],
      set=Relaxed(None, 2.0),
    ),
    lower=optax.sgd(1.0),
    solve=bj.linear_solvers.dense_solve(),
  )
  batch = jnp.array([1.0, 2.0, 4.0])
  params = bj.BilevelParams(jnp.float32(0.5), jnp.float32(0.0))
  updates, state = jax.jit(solver.update)(batch, solver.init(params), params)
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
  for solve, key in (
    (bj.linear_solvers.conjugate_gradient(2), None),
    (bj.linear_solvers.neumann(10, 0.4), None),
    (bj.linear_solvers.nystrom(2, 1e-3), None),
    (bj.linear_solvers.random_neumann(6, 0.4), 0),
  ):
    solver = bj.aid_bilevel(
      problem,
      upper=optax.sgd(0.05),
      lower=S(optax.sgd(0.4), steps=3),
      solve=bj.linear_solvers.LinearSystem(solve, key=key),
    )
    start = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    params, _ = problems.solve(solver, 400, start)
    np.testing.assert_allclose(params.upper, target, atol=1e-3)


@pytest.mark.parametrize(
  ('make', 'error', 'match'),
  [
    (lambda: e_aipod(relaxation=0.5), ValueError, 'factor is .*>= 1'),
    (lambda: e_aipod(0.0), ValueError, 'probability is in'),
    (lambda: e_aipod(steps=0), ValueError, 'steps >= 1'),
    (
      lambda: e_aipod(lower_set=optax.projections.projection_non_negative),
      TypeError,
      'lower set of equations',
    ),
    (
      lambda: bj.e_aipod(
        PROBLEM, upper=optax.sgd(0.1), lower=S(optax.sgd(0.1), set=LOWER_SET)
      ),
      TypeError,
      'bj.projections.Lazy.*aipod to project each step',
    ),
  ],
)
def test_arguments_out_of_range(make, error, match):
  with pytest.raises(error, match=match):
    make()


def test_a_start_whose_equations_contradict_each_other_is_an_error():
  bad = bj.projections.affine_set(MATRIX, RIGHT + np.array([0.0, 0.0, 1.0]))
  for solver in (aipod(lower_set=bad), e_aipod(lower_set=bad)):
    with pytest.raises(ValueError, match='range of A'):
      solver.init(params_of())


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


def test_a_plan_fills_the_records_of_the_solver():
  plan = bj.solvers.e_aipod_plan(0.04, variant='lazy_upper', lower_rate=0.5)
  solver = bj.e_aipod(
    PROBLEM,
    upper=S(
      optax.sgd(plan.upper_rate),
      steps=plan.upper_steps,
      set=Lazy(UPPER_SET, plan.upper_probability, key=1),
    ),
    lower=S(
      optax.sgd(plan.lower_rate),
      steps=plan.inner_steps,
      set=Lazy(LOWER_SET, plan.probability, key=1),
    ),
  )
  params, _ = problems.solve(solver, plan.iterations, params_of())
  assert all(np.all(np.isfinite(z)) for z in params)


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [((2.0, 'first'), 'accuracy'), ((0.1, 'third'), 'variant is')],
)
def test_plans_out_of_range(arguments, match):
  with pytest.raises(ValueError, match=match):
    bj.solvers.e_aipod_plan(arguments[0], variant=arguments[1])
