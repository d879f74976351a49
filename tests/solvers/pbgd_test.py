import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, PENALISED, PROBLEM, X_SET, Y_SET, Row

S = bj.Sequence


def _v_pbgd(wrap, penalty, rate, **given):
  sgd = optax.sgd(rate)
  given = {'upper': sgd, 'lower': sgd} | given
  solver = bj.v_pbgd(PROBLEM, penalty=penalty, **given)
  return bj.evaluation.wrapped(solver, wrap)


def _from_lower(wrap, penalty, rate):
  value = S(
    optax.sgd(rate), steps=INNER, batch_at=contract.inner_batch, restart=True
  )
  return _v_pbgd(wrap, penalty, rate, value=value)


def _g_pbgd(wrap, penalty, rate, **given):
  sgd = optax.sgd(rate)
  given = {'upper': sgd, 'lower': sgd} | given
  solver = bj.g_pbgd(PROBLEM, penalty=penalty, **given)
  return bj.evaluation.wrapped(solver, wrap)


def _in_sets(make):
  def made(wrap, penalty, rate):
    upper, lower = (S(optax.sgd(rate), set=s) for s in (X_SET, Y_SET))
    return make(wrap, penalty, rate, upper=upper, lower=lower)

  return made


_GAP = {'gradients/upper': 1, 'gradients/lower': 3}
_NORM = {
  'gradients/upper': 1,
  'gradients/lower': 1,
  'hessian_vector_products/lower': 1,
}
_SETS = {'projections/upper': 1, 'projections/lower': 1}
_PENALISED = {'hyper': PENALISED}

ROWS = (
  Row(
    'v_pbgd',
    _v_pbgd,
    _GAP,
    covers=('wrapped',),
    devices=True,
    **_PENALISED,
  ),
  Row(
    'v_pbgd, by rows',
    functools.partial(_v_pbgd, fused=False),
    _GAP,
    same_as='v_pbgd',
    light=True,
    **_PENALISED,
  ),
  Row(
    'v_pbgd, quadrature',
    functools.partial(_v_pbgd, quadrature=1),
    _GAP | {'gradients/lower': 2, 'hessian_vector_products/lower': 1},
    light=True,
    **_PENALISED,
  ),
  Row(
    'v_pbgd, from the lower variable, three inner batches',
    _from_lower,
    {'gradients/upper': 1, 'gradients/lower': 2 + INNER},
    **_PENALISED,
  ),
  Row(
    'v_pbgd, in sets',
    _in_sets(_v_pbgd),
    _GAP | _SETS | {'projections/value': 1},
    sets={'upper': X_SET, 'lower': Y_SET, 'value': Y_SET},
    light=True,
    **_PENALISED,
  ),
  Row('g_pbgd', _g_pbgd, _NORM, parts='none', devices=True, **_PENALISED),
  Row(
    'g_pbgd, by rows',
    functools.partial(_g_pbgd, fused=False),
    _NORM,
    same_as='g_pbgd',
    parts='none',
    light=True,
    **_PENALISED,
  ),
  Row(
    'g_pbgd, in sets',
    _in_sets(_g_pbgd),
    _NORM | _SETS,
    sets={'upper': X_SET, 'lower': Y_SET},
    parts='none',
    light=True,
    **_PENALISED,
  ),
)

X_RATE, Y_RATE, W_RATE = 0.11, 0.07, 0.13
STEPS = 8
# Zero at first: seen only if the penalty is read before the update. By
# eighths, which are exact in float32.
RAMP = optax.linear_schedule(0.0, 6.0, 8)
SOLVERS = {'v_pbgd': bj.v_pbgd, 'g_pbgd': bj.g_pbgd}


def optimisers():
  return {'upper': optax.sgd(X_RATE), 'lower': optax.sgd(Y_RATE)}


def batches_of(step):
  """A batch of three parts, for three inner steps."""
  return jnp.stack([problems.rough_batch(3 * step + t) for t in range(3)])


def whole(loss):
  return lambda x, y, batch: loss(x, y, batch.reshape(-1, 3))


ROUGH = bj.BilevelProblem(*map(whole, problems.ROUGH[:2]))


def descend(tree, slope, rate):
  return jax.tree.map(lambda z, s: z - rate * s, tree, slope)


def factors(step):
  gamma = float(RAMP(step))
  return gamma, (1 / gamma if gamma > 1 else 1.0)


def lower(x, y, batch):
  return ROUGH.lower(x, y, batch)[0]


def v_pbgd_by_hand(params, inner_steps, start):
  """The method as the paper writes it, in plain jax."""
  slope = jax.jit(jax.grad(lower, (0, 1)))
  above = jax.jit(jax.grad(ROUGH.upper, (0, 1)))
  x, y = params
  w, points = y, []
  for k in range(STEPS):
    batch = batches_of(k)
    gamma, scale = factors(k)
    if start == 'lower':
      w = y
    for t in range(inner_steps):
      now = batch[t] if inner_steps > 1 else batch
      w = descend(w, slope(x, w, now)[1], W_RATE)
    f_x, f_y = above(x, y, batch)
    g_x, g_y = slope(x, y, batch)
    v_x, _ = slope(x, w, batch)
    d_x = jax.tree.map(
      lambda f, g, v, c=scale, m=gamma: c * (f + m * (g - v)), f_x, g_x, v_x
    )
    d_y = jax.tree.map(lambda f, g, c=scale, m=gamma: c * (f + m * g), f_y, g_y)
    x, y = descend(x, d_x, X_RATE), descend(y, d_y, Y_RATE)
    points.append((bj.BilevelParams(x, y), w))
  return points


def g_pbgd_by_hand(params):
  def half_norm(x, y, batch):
    slope = jax.grad(lower, 1)(x, y, batch)
    return sum((s**2).sum() for s in jax.tree.leaves(slope)) / 2

  above = jax.jit(jax.grad(ROUGH.upper, (0, 1)))
  penalty = jax.jit(jax.grad(half_norm, (0, 1)))
  (x, y), points = params, []
  for k in range(STEPS):
    batch = batches_of(k)
    gamma, scale = factors(k)
    d = jax.tree.map(
      lambda f, p, c=scale, m=gamma: c * (f + m * p),
      above(x, y, batch),
      penalty(x, y, batch),
    )
    x, y = descend(x, d[0], X_RATE), descend(y, d[1], Y_RATE)
    points.append(bj.BilevelParams(x, y))
  return points


def run(solver, params, batch_at=batches_of, steps=STEPS):
  @jax.jit
  def step(params, state, batch):
    updates, state = solver.update(batch, state, params)
    return optax.apply_updates(params, updates), state

  state, points = solver.init(params), []
  for k in range(steps):
    params, state = step(params, state, batch_at(k))
    points.append((params, state))
  return points


@pytest.mark.parametrize(
  ('inner_steps', 'start', 'fused'),
  [(1, 'persistent', True), (3, 'persistent', False), (3, 'lower', True)],
)
def test_v_pbgd_equals_the_method_by_hand(x64, inner_steps, start, fused):
  params = problems.rough_params()
  solver = bj.v_pbgd(
    ROUGH,
    penalty=RAMP,
    value=S(
      optax.sgd(W_RATE),
      steps=inner_steps,
      batch_at=(lambda b, t: b[t]) if inner_steps > 1 else None,
      restart=start == 'lower',
    ),
    fused=fused,
    **optimisers(),
  )
  expected = v_pbgd_by_hand(params, inner_steps, start)
  for (ours, state), (theirs, w) in zip(run(solver, params), expected):
    chex.assert_trees_all_close(ours, theirs, rtol=1e-9, atol=1e-10)
    value = bj.auxiliaries(state)['value']
    chex.assert_trees_all_close(value, w, rtol=1e-9, atol=1e-10)


def test_g_pbgd_equals_the_method_by_hand(x64):
  params = problems.rough_params()
  solver = bj.g_pbgd(ROUGH, penalty=RAMP, **optimisers())
  expected = g_pbgd_by_hand(params)
  for (ours, _), theirs in zip(run(solver, params), expected):
    chex.assert_trees_all_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('name', SOLVERS)
def test_the_first_step_of_a_ramp_has_no_penalty(x64, name):
  params, batch = problems.rough_params(), batches_of(0)
  solver = SOLVERS[name](ROUGH, penalty=RAMP, **optimisers())
  ((after, _),) = run(solver, params, steps=1)
  f_x, f_y = jax.grad(ROUGH.upper, (0, 1))(*params, batch)
  chex.assert_trees_all_close(
    after,
    bj.BilevelParams(
      descend(params.upper, f_x, X_RATE), descend(params.lower, f_y, Y_RATE)
    ),
    rtol=1e-12,
  )


def test_the_value_sequence_has_the_optimiser_of_lower_by_default(x64):
  params = problems.rough_params()
  make = functools.partial(bj.v_pbgd, ROUGH, penalty=2.0, **optimisers())
  ours = run(make(), params, steps=3)[-1][0]
  theirs = run(make(value=optax.sgd(Y_RATE)), params, steps=3)[-1][0]
  chex.assert_trees_all_equal(ours, theirs)


def test_other_optimisers_are_each_sequence_s_own(x64):
  # One adam step is one rate along the sign of the slope, in every leaf.
  params = problems.rough_params()
  rates = {'upper': 0.1, 'lower': 0.02, 'value': 0.005}
  adams = {name: optax.adam(rate) for name, rate in rates.items()}
  solver = bj.v_pbgd(ROUGH, penalty=1.0, **adams)
  ((after, state),) = run(solver, params, steps=1)
  moved = optax.tree.sub(after, params)._asdict()
  moved['value'] = optax.tree.sub(bj.auxiliaries(state)['value'], params.lower)
  for name, rate in rates.items():
    for leaf in jax.tree.leaves(moved[name]):
      np.testing.assert_allclose(np.abs(leaf), rate, rtol=1e-4)


# The counter-example of the paper: x plays no part.
#   f = sin^2(y - 2 pi / 3), g = y^2 + 2 sin^2 y, minimised at 0.
# At y = 2 pi / 3: f' = 0 and g'' = 2 + 4 cos(2 y) = 0, so that the slope of
# f + gamma / 2 (g')^2 is 0 for every gamma; but g' is not.
TRAP = 2 * np.pi / 3
COUNTER = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.sin(y - TRAP) ** 2 + 0 * x,
  lower=lambda x, y, batch: y**2 + 2 * jnp.sin(y) ** 2 + 0 * x,
)


GAMMAS = np.array([1.0, 10.0, 100.0, 1000.0])


def from_each(name, problem, start, rate, updates):
  """Ends of runs with each penalty, from one start."""

  @jax.jit
  @jax.vmap
  def ends(gamma, updates):
    sgd = optax.sgd(rate)
    solver = SOLVERS[name](problem, penalty=gamma, upper=sgd, lower=sgd)
    params = jax.tree.map(jnp.float64, start)

    def body(_, carry):
      params, state = carry
      moves, state = solver.update(None, state, params)
      return optax.apply_updates(params, moves), state

    carry = (params, solver.init(params))
    params, state = jax.lax.fori_loop(0, updates, body, carry)
    return params, bj.values(state)

  return ends(GAMMAS, np.broadcast_to(updates, GAMMAS.shape))


def test_g_pbgd_stays_where_v_pbgd_leaves(x64):
  # The same start, steps and step size for both; the value sequence may start
  # at the lower variable, since x, the only thing it moves, plays no part.
  start = bj.BilevelParams(0.0, TRAP)
  stays, _ = from_each('g_pbgd', COUNTER, start, 0.1, 500)
  assert np.abs(stays.lower - TRAP).max() < 1e-9
  leaves, _ = from_each('v_pbgd', COUNTER, start, 0.1, 500)
  y = np.asarray(leaves.lower)
  slope = np.sin(2 * (y - TRAP)) / GAMMAS + 2 * y + 2 * np.sin(2 * y)
  assert np.abs(slope).max() < 1e-9
  assert np.all(np.abs(y) < 0.2 / GAMMAS)


# f = (y - 1)^2 / 2 + x^2 / 2, g = (y - x)^2 / 2. The penalised loss is least at
# x = gamma e, y = 1 - x, e = y - x = 1 / (1 + 2 gamma); the gap is e^2 / 2.
QUADRATIC = bj.BilevelProblem(
  upper=lambda x, y, batch: (y - 1) ** 2 / 2 + x**2 / 2,
  lower=lambda x, y, batch: (y - x) ** 2 / 2,
)


@pytest.mark.parametrize('name', SOLVERS)
def test_the_gap_falls_as_the_inverse_square_of_the_penalty(x64, name):
  start = bj.BilevelParams(3.0, -2.0)
  # The slow direction's rate is 1 / gamma.
  updates = (400 + 200 * GAMMAS).astype(int)
  params, values = from_each(name, QUADRATIC, start, 0.4, updates)
  error = 1 / (1 + 2 * GAMMAS)
  np.testing.assert_allclose(params.upper, GAMMAS * error, rtol=1e-8)
  np.testing.assert_allclose(params.lower, 1 - GAMMAS * error, rtol=1e-8)
  gap = values['gap' if name == 'v_pbgd' else 'penalty']
  np.testing.assert_allclose(gap, error**2 / 2, rtol=1e-5)


@pytest.mark.parametrize('name', SOLVERS)
def test_rescale_off_is_the_plain_sum(x64, name):
  params = problems.rough_params()
  make = functools.partial(SOLVERS[name], ROUGH, penalty=4.0)
  plain = {'upper': optax.sgd(0.01), 'lower': optax.sgd(0.02)}
  scaled = {'upper': optax.sgd(0.04), 'lower': optax.sgd(0.08)}
  if name == 'v_pbgd':
    plain['value'] = scaled['value'] = optax.sgd(0.05)
  ours = run(make(rescale=False, **plain), params, steps=3)[-1][0]
  theirs = run(make(**scaled), params, steps=3)[-1][0]
  chex.assert_trees_all_close(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize('name', SOLVERS)
def test_inject_hyperparams_takes_what_is_no_number_as_static(name):
  params = problems.rough_params(0, jnp.float32)
  batch = batches_of(0).astype(jnp.float32)
  static = ('problem', 'upper', 'lower')
  if name == 'v_pbgd':
    static += ('value',)
  inject = optax.inject_hyperparams(
    SOLVERS[name], static_args=static, hyperparam_dtype=jnp.float32
  )
  ours = inject(ROUGH, penalty=RAMP, **optimisers())
  theirs = SOLVERS[name](ROUGH, penalty=RAMP, **optimisers())
  give = lambda step: batch
  (a, _), (b, state) = run(ours, params, give, 2)
  (c, _), (d, _) = run(theirs, params, give, 2)
  chex.assert_trees_all_close((a, b), (c, d), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state.hyperparams['penalty'], RAMP(1), rtol=1e-6)


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'penalty': -1.0}, r'penalty is a weight >= 0.* got -1'),
    (
      {'penalty': optax.linear_schedule(1.0, -1.0, 10)},
      r'penalty is a weight >= 0.* schedule at step 10',
    ),
    ({'penalty': '3'}, "penalty is a weight >= 0.* got '3'"),
    ({'penalty': True}, 'penalty is a weight >= 0.* got True'),
    ({'penalty': optax.sgd(0.1)}, 'penalty is a weight >= 0'),
  ],
)
@pytest.mark.parametrize('fused', [True, False])
def test_bad_arguments(name, kwargs, message, fused):
  with pytest.raises(ValueError, match=message):
    SOLVERS[name](
      ROUGH, **{'penalty': 1.0, 'fused': fused, **optimisers(), **kwargs}
    )


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.parametrize('sequence', ['upper', 'lower'])
def test_a_set_without_a_point_names_the_sequence(name, sequence):
  empty = functools.partial(optax.projections.projection_l2_ball, scale=-1.0)
  given = optimisers() | {sequence: S(optax.sgd(0.1), set=empty)}
  solver = SOLVERS[name](ROUGH, penalty=1.0, **given)
  # The lower set is also the value sequence's.
  message = rf'sequence ({sequence}|value) is empty: .* radius'
  with pytest.raises(ValueError, match=message):
    solver.init(problems.rough_params(0, jnp.float32))


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.parametrize('level', ['upper', 'lower'])
def test_a_loss_that_is_no_scalar_names_the_level(name, level):
  problem = ROUGH._replace(**{level: lambda x, y, batch: batch})
  solver = SOLVERS[name](problem, penalty=1.0, **optimisers())
  params = problems.rough_params(0, jnp.float32)
  batch = jnp.ones((3, 4, 3))
  with pytest.raises(
    TypeError, match=rf'the {level} loss returned .*\(3, 4, 3\).*jnp.mean'
  ):
    jax.eval_shape(solver.update, batch, solver.init(params), params)


@pytest.mark.parametrize('name', SOLVERS)
def test_a_loss_that_is_not_finite_is_named(name):
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.log(x) + y, lower=QUADRATIC.lower
  )
  sgd = optax.sgd(0.1)
  solver = SOLVERS[name](problem, penalty=1.0, upper=sgd, lower=sgd)
  params = bj.BilevelParams(jnp.float32(-1.0), jnp.float32(1.0))
  ((params, state),) = run(solver, params, lambda k: None, 1)
  with pytest.raises(FloatingPointError, match=r'not finite: loss upper'):
    bj.check_finite(params, state)


@pytest.mark.parametrize('name', SOLVERS)
def test_params_without_the_sequences(name):
  solver = SOLVERS[name](ROUGH, penalty=1.0, **optimisers())
  with pytest.raises(TypeError, match=r'BilevelParams'):
    solver.init({'upper': jnp.ones(2), 'lower': jnp.ones(2)})
