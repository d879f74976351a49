"""Words for runs: bad ones of a table, and good ones, all really run."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

diagnose = bj.diagnostics.diagnose

# One weight of a ridge regression: the upper loss is 1.26 at the start, -4, and
# least at 0.25, where it is 0.42; the curvatures below are up to 3 + exp(x).
_RNG = np.random.default_rng(4)
_FEATURES = _RNG.normal(size=(2, 8, 6))
_TARGETS = _FEATURES @ (_RNG.normal(size=6) * 0.7) + _RNG.normal(size=(2, 8))
BATCH = (
  jnp.asarray(_FEATURES, jnp.float32),
  jnp.asarray(_TARGETS, jnp.float32),
)
STEPS = 2000


def _error(y, batch, part):
  return jnp.mean((batch[0][part] @ y - batch[1][part]) ** 2) / 2


RIDGE = bj.BilevelProblem(
  upper=lambda x, y, batch: _error(y, batch, 1),
  lower=lambda x, y, batch: (
    _error(y, batch, 0) + jnp.exp(x) * jnp.sum(y**2) / 2
  ),
)


class Setting(NamedTuple):
  """Settings of one run; by default, a good one.

  Attributes:
    penalty: its last weight.
    ramp: share of the updates in which it rises from zero.
    upper: step size of the weight's logarithm.
    lower: step size of the regression.
    value: step size of the value sequence.
    momentum: of both.
    noise: standard deviation of what each update adds to the targets.
    x: where the weight's logarithm starts, with the regression near solved.
  """

  penalty: float = 50.0
  ramp: float = 0.0
  upper: float = 2.0
  lower: float = 0.1
  value: float = 0.1
  momentum: float = 0.5
  noise: float = 0.0
  x: float = -4.0


class Bad(NamedTuple):
  """A bad run, what it is called, and what that is told from.

  Attributes:
    verdict: the right word.
    said: what is in the words.
    setting: how it is run.
    steps: how many of the updates are looked at.
    kwargs: arguments of `diagnose`.
    at_the_end: whether the problem and the last params are given.
  """

  verdict: str
  said: str
  setting: Setting
  steps: int = STEPS
  kwargs: Mapping[str, float] = MappingProxyType({})
  at_the_end: bool = False


NONE = {'momentum': 0.0}
BAD = {
  'no finite loss': Bad(
    'diverged', 'not finite', Setting(lower=3.0, value=3.0)
  ),
  'growth without end': Bad(
    'diverged', 'grow', Setting(lower=0.7, value=0.7, **NONE), 300
  ),
  'value step too large': Bad(
    'overshooting',
    'decrease this step',
    Setting(value=1.0, upper=0.01, lower=0.2, penalty=10.0, **NONE),
    16,
  ),
  'value step a little too large': Bad(
    'overshooting',
    'decrease this step',
    Setting(value=0.663, upper=1e-6, lower=0.2, penalty=10.0, **NONE),
    800,
  ),
  'value step too small': Bad(
    'lagging',
    'value sequence',
    Setting(value=1e-3, upper=0.1, lower=0.2, **NONE),
  ),
  'lower step too large': Bad(
    'oscillating', 'lower', Setting(lower=0.66, value=0.3, **NONE)
  ),
  'upper step too large': Bad(
    'oscillating',
    'the upper variable for long waves',
    Setting(upper=10.0, lower=0.003, value=0.003, penalty=20.0, **NONE),
  ),
  'penalty far too large': Bad(
    'unconverged',
    'not converged',
    Setting(penalty=1e4, upper=0.2, lower=0.2, value=0.2),
  ),
  'penalty far too large for the gap': Bad(
    'stiff',
    'penalty',
    Setting(penalty=1e4, upper=0.2, lower=0.2, value=0.2),
    kwargs={'gap': 1e-3},
  ),
  'penalty so large that nothing moves': Bad(
    'stiff',
    '0.42',
    Setting(penalty=1e6, upper=0.2, lower=0.2, value=0.2),
    at_the_end=True,
  ),
  'lower step too small': Bad(
    'unconverged',
    'not converged',
    Setting(lower=1e-4, upper=0.2, penalty=10.0, value=0.2),
  ),
  'upper step too small': Bad(
    'unconverged', 'not converged', Setting(upper=1e-2)
  ),
  'upper step far too small': Bad(
    'unconverged', '0.42', Setting(upper=1e-5), at_the_end=True
  ),
  'thrown where nothing pulls': Bad(
    'unconverged', 'decrease it to', Setting(upper=0.1, x=-9.0), at_the_end=True
  ),
  'penalty too small': Bad(
    'weak', 'too weak', Setting(penalty=2.0), at_the_end=True
  ),
  'penalty far too small': Bad(
    'weak', 'too weak', Setting(penalty=0.5), at_the_end=True
  ),
  'no penalty': Bad('weak', 'too weak', Setting(penalty=0.0), at_the_end=True),
  'gap above what is wanted': Bad(
    'loose', 'multiply', Setting(penalty=10.0), kwargs={'gap': 1e-6}
  ),
}
GOOD = {
  'constant': Setting(),
  'ramp over half': Setting(ramp=0.5),
  'ramp over all': Setting(ramp=1.0),
  'without momentum': Setting(**NONE),
  'at rest from the start': Setting(x=0.25),
  'noise': Setting(noise=0.3, lower=0.05, value=0.05, **NONE),
  'noise, ramp': Setting(noise=0.3, lower=0.05, value=0.05, ramp=0.5, **NONE),
}


def _solved(x):
  gram = _FEATURES[0].T @ _FEATURES[0] / 8 + np.exp(x) * np.eye(6)
  return np.linalg.solve(gram, _FEATURES[0].T @ _TARGETS[0] / 8)


@functools.cache
def runs():
  """All runs by name: the losses of every update, and the last params."""
  settings = {name: bad.setting for name, bad in BAD.items()} | GOOD
  table = Setting(*np.array(list(settings.values()), np.float32).T)
  starts = bj.BilevelParams(
    table.x, np.stack([_solved(x) + 0.1 for x in table.x]).astype(np.float32)
  )

  @jax.jit
  @jax.vmap
  def run(setting, params):
    def penalty(count):
      grown = count / jnp.maximum(setting.ramp * STEPS, 1)
      return setting.penalty * jnp.where(
        setting.ramp > 0, jnp.minimum(grown, 1), 1
      )

    sgd = functools.partial(optax.sgd, momentum=setting.momentum)
    solver = bj.v_pbgd(
      RIDGE,
      penalty=penalty,
      upper=optax.sgd(setting.upper),
      lower=sgd(setting.lower),
      value=sgd(setting.value),
    )

    def step(carry, key):
      params, state = carry
      noise = setting.noise * jax.random.normal(key, (2, 8))
      batch = (BATCH[0], BATCH[1] + noise)
      updates, state = solver.update(batch, state, params)
      return (optax.apply_updates(params, updates), state), bj.values(state)

    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, _), values = jax.lax.scan(
      step, (params, solver.init(params)), keys
    )
    return params, values

  everything = jax.tree.map(np.asarray, run(table, starts))
  return {
    name: jax.tree.map(lambda leaf, row=row: leaf[row], everything)
    for row, name in enumerate(settings)
  }


@pytest.mark.parametrize('name', BAD)
def test_bad_runs(name):
  bad, (params, values) = BAD[name], runs()[name]
  history = {key: series[: bad.steps] for key, series in values.items()}
  at = (RIDGE, params, BATCH) if bad.at_the_end else ()
  found = diagnose(history, *at, **bad.kwargs)
  assert (found.verdict, bad.said in found.words) == (bad.verdict, True), found


@pytest.mark.parametrize('name', GOOD)
def test_good_runs(name):
  """By the history alone, and with a look from the end."""
  params, values = runs()[name]
  if GOOD[name].noise:
    mean = lambda series: np.convolve(series, np.full(50, 1 / 50), 'valid')
    values = {key: mean(series) for key, series in values.items()}
  for at, verdict in (((), 'settled'), ((RIDGE, params, BATCH), 'fine')):
    found = diagnose(values, *at)
    assert found.verdict == verdict, found
  # The penalty is enough for this accuracy, and not for that.
  assert diagnose(values, *at, accuracy=0.02).verdict == 'fine'
  assert diagnose(values, *at, accuracy=1e-3).verdict == 'weak'


def at_the_solution(dtype, **given):
  """A run at a penalty of 1e5 from its own solution, in a dtype."""
  penalty, rows, size = 1e5, 64, 5
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=(rows, size)) for _ in range(2))
  t, s = (rng.normal(size=rows) + 3 for _ in range(2))
  fit = lambda a, t, y: jnp.mean((a @ y - t) ** 2) / 2
  problem = bj.BilevelProblem(
    lambda x, y, batch: fit(batch[2], batch[3], y),
    lambda x, y, batch: fit(batch[0], batch[1] + x, y),
  )
  solve = lambda a, t: np.linalg.solve(a.T @ a, a.T @ t)
  joined = np.concatenate([penalty**0.5 * a, b])
  both = np.concatenate([penalty**0.5 * t, s])
  params = bj.BilevelParams(
    jnp.asarray(0, dtype), jnp.asarray(solve(joined, both), dtype)
  )
  batch = jax.tree.map(lambda z: jnp.asarray(z, dtype), (a, t, b, s))
  hold = optax.sgd(0.0)
  solver = bj.v_pbgd(
    problem,
    penalty=penalty,
    upper=hold,
    lower=hold,
    value=bj.Sequence(hold, start=lambda z: jnp.asarray(solve(a, t), dtype)),
    **given,
  )

  def step(carry, _):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return (optax.apply_updates(params, updates), state), bj.values(state)

  run = jax.jit(lambda c: jax.lax.scan(step, c, length=16)[1])
  return run((params, solver.init(params)))


def test_a_gap_within_its_rounding_is_named_and_no_lag(x64):
  seen = at_the_solution(jnp.float32)
  found = diagnose(seen)
  assert found.verdict == 'rounding' and 'float64' in found.words, found
  # A negative one is no lag either, and no sign that the penalty is weak.
  below = seen | {'gap': -np.abs(seen['gap']) - 1e-7}
  assert diagnose(below).verdict == 'rounding'
  assert diagnose(below, gap=1e-9).verdict == 'rounding'
  # By an integral or in wider floats, it is known.
  near = at_the_solution(jnp.float32, quadrature=1)
  wide = at_the_solution(jnp.float64)
  np.testing.assert_allclose(near['gap'], wide['gap'], rtol=0.1)
  assert diagnose(near).verdict == diagnose(wide).verdict == 'settled'
  assert 'diagnose(history, problem, params' in diagnose(near).words
  # A lag that is small beside the losses is one.
  assert diagnose(wide | {'gap': -wide['gap']}).verdict == 'lagging'


def _steady(gap, upper=1.0, lower=0.1, **more):
  """A history in which nothing changes."""
  names = {'upper': upper, 'lower': lower, 'gap': gap} | more
  return {name: np.full(64, value) for name, value in names.items()}


def test_a_small_lag_hides_no_other_verdict():
  # The problem of the box: x = 0.5 is not the best x, which is 1.
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  half, one = (
    bj.BilevelParams(jnp.full(2, x), jnp.full(2, x)) for x in (0.5, 1.0)
  )
  # It is small beside the losses, but more than their rounding.
  history = _steady(-1e-5, gap_rounding=4.8e-8)
  assert diagnose(history).verdict == 'lagging'
  assert diagnose(history, problem, half).verdict == 'stiff'
  assert diagnose(history, problem, one).verdict == 'fine'
  # The penalty decides whether it matters.
  assert diagnose(history, problem, half, penalty=1e4).verdict == 'lagging'
  assert diagnose(history, penalty=1.0).verdict == 'lagging'
  assert diagnose(history, penalty=1e-3).verdict == 'settled'
  assert diagnose(history, problem, half, accuracy=1e-5).verdict == 'lagging'
  # Remedies that hold whether or not the steps are already equal.
  words = diagnose(history, penalty=3.0).words
  assert '-3e-05 by the penalty' in words and 'its own value=' in words


def test_a_rounded_gap_names_remedies_that_are_left():
  for dtype, left, taken in (
    (np.float32, ['quadrature=2', 'float64'], []),
    (np.float64, ['quadrature=2'], ['float64']),
    (None, ['if the run is in float32'], ['quadrature']),
  ):
    error = 1e-11 if dtype is None else 4 * float(np.finfo(dtype).eps)
    found = diagnose(_steady(0.0, lower=1.0, gap_rounding=error))
    assert found.verdict == 'rounding'
    assert all(word in found.words for word in left), found
    assert not any(word in found.words for word in taken), found


def test_it_prints_the_verdict_and_the_remedy():
  printed = str(diagnose(_steady(-0.1)))
  assert printed.startswith('lagging: the value sequence lags')
  assert 'Decrease the step of the upper variable' in printed


def test_losses_that_are_never_finite_are_not_of_the_steps():
  for history in (_steady(np.nan), {'upper': np.full(9, np.nan)}):
    found = diagnose(history | {'lower': history['upper']})
    assert found.verdict == 'diverged' and 'batch' in found.words, found
    assert 'step sizes' not in found.words


def test_a_solver_without_a_gap_is_told_which_checks_apply():
  history = {name: np.ones(9) for name in ('upper', 'lower')}
  with pytest.raises(ValueError, match=r'aid_bilevel.*hypergradient.*minim'):
    diagnose(history)


def test_a_history_of_something_else():
  with pytest.raises(ValueError, match='missing'):
    diagnose({'upper': np.ones(9)})
  names = ('upper', 'lower', 'gap')
  with pytest.raises(ValueError, match='at least 8'):
    diagnose(dict.fromkeys(names, np.ones(3)))
  with pytest.raises(ValueError, match='together'):
    diagnose(dict.fromkeys(names, np.ones(9)), RIDGE)


def test_the_end_of_a_box_is_an_end():
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  half = jnp.full(2, 0.5)
  params = bj.BilevelParams(half, half)
  # As a list of what `bj.values` gives, one a step.
  history = [{'upper': 0.5, 'lower': 1e-5, 'gap': 1e-5}] * 50
  look = lambda **given: bj.diagnose(
    history, problem, params, accuracy=0.02, **given
  )
  assert look().verdict != 'fine'
  box = bj.diagnostics.WalkSettings(upper_set=lambda x: jnp.clip(x, 0, 0.5))
  assert look(walk=box).verdict == 'fine'


def _unused_weight(optimiser):
  """RHG where no example uses the second weight: values of 20 updates."""
  features = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    lower=lambda x, y, batch: jnp.sum((features @ y - x) ** 2),
  )
  solver = bj.rhg(
    problem, upper=optax.sgd(0.1), lower=bj.Sequence(optimiser, steps=5)
  )
  params = bj.BilevelParams(jnp.float32(0.5), jnp.zeros(2))

  def step(carry, _):
    updates, state = solver.update(None, carry[1], carry[0])
    after = optax.apply_updates(carry[0], updates)
    return (after, state), bj.values(state)

  start = (params, solver.init(params))
  (params, _), values = jax.jit(lambda: jax.lax.scan(step, start, length=20))()
  return params, values


def test_a_root_at_zero_in_an_unrolled_loop_is_named():
  params, values = _unused_weight(optax.adam(0.1))
  assert jnp.isnan(params.upper)
  found = bj.diagnose(values)
  assert found.verdict == 'diverged' and 'eps_root=1e-8' in found.words
  params, values = _unused_weight(optax.adam(0.1, eps_root=1e-8))
  assert jnp.isfinite(params.upper)
  with pytest.raises(ValueError, match=r"\['gap'\] are missing"):
    bj.diagnose(values)


def test_losses_without_a_gap_that_grow_before_they_end():
  grows = np.append(10.0 ** np.arange(12), [np.inf, np.nan])
  found = bj.diagnose({'upper': grows, 'lower': np.ones(14)})
  assert found.verdict == 'diverged' and 'eps_root' not in found.words
  assert 'from step 12 on' in found.words
