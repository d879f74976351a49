"""Order of evaluations and of data, on two parabolas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.xright import methods


def losses():
  """Losses whose minimisers depend on the batch number."""

  def towards(sign):
    def loss(x, number):
      if isinstance(number, dict):
        number = number['at']
      return (x - sign * (1.0 + number)) ** 2 / 2

    return loss

  return {'sft': towards(1.0), 'dpo': towards(-2.0)}


def run(name, plan, steps=12):
  oracle = methods.oracle(name, losses(), plan, key=jax.random.key(0))
  refresh = {'sft': {'at': jnp.float32(0)}, 'dpo': {'at': jnp.float32(0)}}

  def body(carry, step):
    x, state = carry
    batch = methods.batch(name, step, refresh)
    gradient, state = oracle.update(batch, state, x)
    return (x - 0.1 * gradient, state), gradient

  x = jnp.float32(0.5)
  (x, state), gradients = jax.jit(
    lambda x: jax.lax.scan(body, (x, oracle.init(x)), jnp.arange(steps))
  )(x)
  return np.asarray(gradients), {k: int(v) for k, v in bj.counts(state).items()}


def plain(chosen, x=0.5):
  """Gradients of a sequence of objectives, which count their own batches."""
  taken, gradients = {'sft': 0, 'dpo': 0}, []
  for name in chosen:
    sign = {'sft': 1.0, 'dpo': -2.0}[name]
    gradient = x - sign * (1 + taken[name])
    taken[name] += 1
    gradients.append(gradient)
    x -= 0.1 * gradient
  return gradients


@pytest.mark.parametrize(
  ('name', 'chosen'),
  [
    ('sequential', 9 * ['sft'] + 3 * ['dpo']),
    ('reversed', 3 * ['dpo'] + 9 * ['sft']),
    ('demonstrations', 12 * ['sft']),
    ('comparisons', 12 * ['dpo']),
  ],
)
def test_stages_read_their_own_data_from_its_start(name, chosen):
  gradients, counts = run(name, methods.Plan(mixing_ratio=0.25, steps=12))
  np.testing.assert_allclose(gradients, plain(chosen), rtol=1e-5)
  assert sum(counts.values()) == 12


def test_both_losses_are_weighted_by_the_mixing_ratio():
  gradients, counts = run('mix', methods.Plan(mixing_ratio=0.25, steps=12))
  x, expected = 0.5, []
  for step in range(12):
    expected.append(0.75 * (x - (1 + step)) + 0.25 * (x + 2 * (1 + step)))
    x -= 0.1 * expected[-1]
  np.testing.assert_allclose(gradients, expected, rtol=1e-5)
  assert counts == {'gradients/sft': 12, 'gradients/dpo': 12}


def test_alright_has_its_mixing_ratio_and_only_drawn_objectives_advance():
  gradients, counts = run('alright', methods.Plan(mixing_ratio=0.25, steps=12))
  assert counts == {'gradients/sft': 9, 'gradients/dpo': 3}
  # The gradient shows which objective was drawn.
  x, chosen = 0.5, []
  for gradient in gradients:
    taken = {n: chosen.count(n) for n in ('sft', 'dpo')}
    options = {'sft': x - (1 + taken['sft']), 'dpo': x + 2 * (1 + taken['dpo'])}
    chosen.append(min(options, key=lambda n: abs(options[n] - gradient)))
    x -= 0.1 * gradient
  np.testing.assert_allclose(gradients, plain(chosen), rtol=1e-4)


def test_maxright_evaluates_its_rows_and_takes_the_larger_gap():
  plan = methods.Plan(
    mixing_ratio=0.5,
    steps=12,
    optima=(0.5, 1.0),
    refresh_every=3,
    cached_losses_rate=0.5,
  )
  gradients, counts = run('maxright', plan)
  x, taken, expected = 0.5, {'sft': 0, 'dpo': 0}, []
  cached_losses = {}
  sign = {'sft': 1.0, 'dpo': -2.0}
  best = {'sft': 0.5, 'dpo': 1.0}
  for step in range(12):
    if step % 3 == 0:
      cached_losses = {n: (x - s) ** 2 / 2 for n, s in sign.items()}
    gaps = {n: loss - best[n] for n, loss in cached_losses.items()}
    name = max(gaps, key=gaps.get)
    at = sign[name] * (1 + taken[name])
    cached_losses[name] += 0.5 * ((x - at) ** 2 / 2 - cached_losses[name])
    taken[name] += 1
    expected.append(x - at)
    x -= 0.1 * (x - at)
  np.testing.assert_allclose(gradients, expected, rtol=1e-4)
  assert counts['gradients/sft'] == taken['sft'] and 0 < taken['dpo'] < 12
  assert counts['losses/sft'] == counts['losses/dpo'] == 4


@pytest.mark.parametrize('name', methods.AGGREGATORS)
def test_aggregators_see_both_gradients(name):
  gradients, counts = run(name, methods.Plan(mixing_ratio=0.5, steps=12))
  assert np.all(np.isfinite(gradients))
  assert counts['gradients/objectives'] == 24
  # At 0.5 both gradients point in opposite directions.
  if name == 'mgda':
    np.testing.assert_allclose(gradients[0], 0, atol=1e-6)


def test_an_unknown_method_is_refused_with_the_known_ones():
  with pytest.raises(harness.SettingsError, match="'max'; known: sequential"):
    methods.oracle('max', losses(), methods.Plan(0.5, 3), key=0)
  with pytest.raises(harness.SettingsError, match='unknown method'):
    methods.check('dpo')


def test_an_optimiser_behind_any_method():
  oracle = methods.oracle(
    'alright', losses(), methods.Plan(0.5, 4), key=jax.random.key(1)
  )
  solver = optax.chain(oracle, optax.adam(1e-2))
  x = jnp.float32(0.0)
  updates, _ = solver.update({'refresh': ()}, solver.init(x), x)
  np.testing.assert_allclose(abs(updates), 1e-2, rtol=1e-4)
