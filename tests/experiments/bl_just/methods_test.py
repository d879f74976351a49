"""Tests plans and steps against steps by hand and the library's V-PBGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments.bl_just import methods

SHARES = methods.Shares(0.4, 0.2, 0.1, 2)
MATRIX = ((2.0, 0.5, 0.1), (0.5, 1.0, -0.3), (0.1, -0.3, 1.5))


def _ctc(z, batch):
  mixed = jnp.array(MATRIX) @ z.encoder + z.recogniser
  return jnp.sum(jnp.tanh(mixed) ** 2 * batch) + jnp.sum(z.encoder**4)


def _ssl(z, batch):
  return jnp.sum((z.encoder * z.predictor - batch) ** 2)


def _params():
  return bj.sequences(
    encoder=jnp.array([0.3, -0.2, 0.5]),
    recogniser=jnp.array([0.1, 0.3, -0.4]),
    predictor=jnp.array([1.0, -0.5, 0.7]),
  )


def test_plans_have_equal_numbers_of_updates():
  plans = {name: methods.plan(name, 50, SHARES) for name in methods.TITLES}
  counts = {name: methods.gradients(plan) for name, plan in plans.items()}
  ssl, both, ctc = range(3)
  # Two rounds of 5 and 17 or 18, then 5.
  expected = [ssl] * 5 + [both] * 17 + [ssl] * 5 + [both] * 18 + [ctc] * 5
  assert plans['bl_just'].tolist() == expected
  assert plans['pretrain'].tolist() == [ssl] * 20 + [ctc] * 30
  assert plans['joint'].tolist() == [both] * 45 + [ctc] * 5
  assert plans['no_exploration'].tolist() == [both] * 45 + [ctc] * 5
  assert plans['no_tuning'].tolist()[-1] == both
  assert counts['bl_just'] == {'ctc': 40, 'ssl': 45}
  assert counts['supervised'] == {'ctc': 50, 'ssl': 0}
  # As many gradients as BL-JUST takes of both.
  assert counts['supervised_longer'] == {'ctc': 85, 'ssl': 0}
  others = set(methods.TITLES) - {'supervised_longer'}
  assert {len(plans[name]) for name in others} == {50}


@pytest.mark.parametrize('wide', [False, True])
def test_joint_steps_are_those_by_hand(wide):
  """AdamW by hand; the penalty rises, and touches no head."""
  steps = methods.StepSizes(
    0.1, 0.05, 0.01, 0.5, decay=0.02, clip=0.7, warmup_steps=2
  )
  plan = np.full(6, 1, np.int8)
  solver = methods.solver('no_tuning', plan, steps, _ctc, _ssl)
  with jax.enable_x64(wide):
    params = jax.tree.map(lambda x: jnp.asarray(x, float), _params())
    state, update = solver.init(params), jax.jit(solver.update)
    expected = {name: np.array(x) for name, x in params._asdict().items()}
    moments = {name: (np.zeros(3), np.zeros(3)) for name in expected}
    rng = np.random.default_rng(0)
    for k in range(6):
      batch = {'ctc': rng.uniform(size=3), 'ssl': rng.normal(size=3)}
      updates, state = update(batch, state, params)
      params = bj.apply_updates(params, updates)
      e, r, p = (expected[n] for n in ('encoder', 'recogniser', 'predictor'))
      mixed = np.array(MATRIX) @ e + r
      inner = 2 * np.tanh(mixed) * (1 - np.tanh(mixed) ** 2) * batch['ctc']
      off = 2 * (e * p - batch['ssl'])
      penalty = 0.5 * k / 5
      slopes = {
        'encoder': np.array(MATRIX).T @ inner + 4 * e**3 + penalty * off * p,
        'recogniser': inner,
        'predictor': off * e,
      }
      fall = 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * k / 6))
      # One of ten updates, at least one, is the warm-up.
      rate = 0.1 * fall
      for name, slope in slopes.items():
        slope = slope / max(1.0, np.linalg.norm(slope) / 0.7)
        first, second = moments[name]
        first = 0.9 * first + 0.1 * slope
        second = 0.98 * second + 0.02 * slope**2
        moments[name] = first, second
        direction = (first / (1 - 0.9 ** (k + 1))) / (
          np.sqrt(second / (1 - 0.98 ** (k + 1))) + 1e-8
        )
        expected[name] = expected[name] - rate * (
          direction + 0.02 * expected[name]
        )
    assert bj.values(state)['ctc'] > 0 and bj.values(state)['ssl'] > 0
  for name, value in expected.items():
    np.testing.assert_allclose(
      getattr(params, name), value, rtol=1e-7 if wide else 1e-3
    )


def test_joint_steps_equal_v_pbgd_with_a_constant_value():
  sgd = optax.sgd(0.1)
  batch = {'ctc': jnp.ones(3), 'ssl': jnp.zeros(3)}
  head = _params().predictor
  problem = bj.BilevelProblem(
    upper=lambda x, y, b: _ctc(
      bj.sequences(encoder=y, recogniser=x, predictor=head), b['ctc']
    ),
    lower=lambda x, y, b: _ssl(
      bj.sequences(encoder=y, recogniser=x, predictor=head), b['ssl']
    ),
  )
  solver = bj.v_pbgd(problem, penalty=0.3, upper=sgd, lower=sgd, rescale=False)
  params = bj.BilevelParams(_params().recogniser, _params().encoder)
  moved, _ = solver.update(batch, solver.init(params), params)
  joint = bj.descend(
    bj.oracles.aggregated(
      bj.multi_objective(
        [_ctc, _ssl],
        ('ctc', 'ssl'),
        rest=('recogniser', 'predictor'),
        per_task=True,
      ),
      bj.aggregators.scale_by_penalty(0.3, rescale=False),
    ),
    encoder=sgd,
    recogniser=sgd,
    predictor=sgd,
  )
  updates, _ = joint.update(batch, joint.init(_params()), _params())
  np.testing.assert_allclose(updates.encoder, moved.lower, rtol=1e-6)
  np.testing.assert_allclose(updates.recogniser, moved.upper, rtol=1e-6)


def test_updates_of_one_loss_keep_the_other_head():
  steps = methods.StepSizes(0.1, 0.05, 0.01, 0.5)
  plan = methods.plan('bl_just', 10, SHARES)
  solver = methods.solver('bl_just', plan, steps, _ctc, _ssl)
  params = _params()
  state = solver.init(params)
  updates, state = solver.update({'ssl': jnp.ones(3)}, state, params)
  assert updates.recogniser is None and np.abs(updates.encoder).max() > 0
  updates, state = solver.update({'ctc': jnp.ones(3)}, state, params)
  assert updates.predictor is None
  # The first step of Adam has the step size of the fine-tuning.
  np.testing.assert_allclose(np.abs(updates.encoder), 0.01, rtol=0.02)


def test_each_method_has_its_penalty_and_its_step_sizes():
  """The first step of Adam has the length of the step size."""
  steps = methods.StepSizes(0.1, 0.05, 0.01, 0.5, decay=0.0, clip=1e9)
  ctc = lambda z, batch: jnp.sum(z.encoder + z.recogniser) * batch
  ssl = lambda z, batch: -3 * jnp.sum(z.encoder + z.predictor) * batch
  params = _params()

  def moved(method, losses):
    plan = methods.plan(method, 10, SHARES)
    solver = methods.solver(method, plan, steps, ctc, ssl)
    updates, _ = solver.update(
      dict.fromkeys(losses, jnp.ones([])), solver.init(params), params
    )
    return float(updates.encoder[0])

  both = 'ctc', 'ssl'
  # Gradients of 1 and -3: half of the second changes the sign of the sum.
  assert moved('joint', both) == pytest.approx(0.1, rel=1e-3)
  assert moved('bl_just', both) == pytest.approx(-0.1, rel=1e-3)
  for method, losses, size in (
    ('supervised', ['ctc'], 0.1),
    ('pretrain', ['ctc'], 0.1),
    ('pretrain', ['ssl'], 0.05),
    ('bl_just', ['ssl'], 0.05),
    ('joint', ['ctc'], 0.01),
  ):
    assert abs(moved(method, losses)) == pytest.approx(size, rel=1e-3)


def test_exploration_decays_on_request():
  plan, updates = np.zeros(9, np.int8), {}
  for schedule in ('constant', 'decaying'):
    # Without weight decay, equal gradients give updates of equal sizes.
    steps = methods.StepSizes(
      *(0.1, 0.05, 0.01, 0.5), decay=0.0, exploration=schedule
    )
    solver = methods.solver('bl_just', plan, steps, _ctc, _ssl)
    params, sizes = _params(), []
    state = solver.init(params)
    for _ in plan:
      batch = {'ssl': jnp.array([0.2, 0.1, -0.3])}
      update, state = solver.update(batch, state, params)
      sizes.append(np.asarray(update.encoder))
    updates[schedule] = np.array(sizes)
  cosine = optax.cosine_decay_schedule(1.0, 9, 0.01)(jnp.arange(9))
  np.testing.assert_allclose(
    updates['decaying'], updates['constant'] * np.asarray(cosine)[:, None], 1e-5
  )
