"""The toy: optima against a grid, samples, and a small run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.xright import toy, toy_problem


def plain_losses(grid):
  """Both losses by their definitions, for thetas (points, 2)."""
  logits = np.stack([grid[:, 0], grid[:, 1], -grid.sum(1)], 1)
  lp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  sft = -(0.7 * lp[:, 0] + 0.15 * lp[:, 1] + 0.15 * lp[:, 2])
  pairs = {(1, 0): 0.45, (0, 1): 0.1, (1, 2): 0.3, (2, 1): 0.15}
  dpo = 0
  for (won, lost), frequency in pairs.items():
    margin = lp[:, won] - lp[:, lost]  # The reference is uniform.
    dpo = dpo + frequency * np.log1p(np.exp(-margin))
  return sft, dpo


@pytest.mark.slow
@pytest.mark.parametrize('ratio', [0.5, 0.2])
def test_optima_and_gaps_are_those_of_a_fine_grid(ratio):
  side = np.linspace(-2, 2, 1201)
  grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
  sft, dpo = plain_losses(grid)
  best = toy_problem.optima(ratio)
  larger = np.maximum((1 - ratio) * (sft - best.sft), ratio * (dpo - best.dpo))
  mix = (1 - ratio) * sft + ratio * dpo
  for least, values in zip(best, (sft, dpo, mix, larger)):
    # At a kink the error of the grid is a slope times its spacing.
    assert 0 <= values.min() - least + 1e-9 < 2e-3
  at = grid[::97_000]
  gaps = jax.vmap(lambda x: toy_problem.gaps(x, ratio, best))(jnp.asarray(at))
  np.testing.assert_allclose(gaps['mix'], mix[::97_000] - best.mix, atol=2e-6)
  np.testing.assert_allclose(
    gaps['max'], larger[::97_000] - best.max, atol=2e-6
  )
  # The optima of the objectives differ.
  assert best.max > 0.01


def test_samples_have_the_frequencies_of_the_data():
  draw = jax.jit(jax.vmap(toy_problem.draw))
  drawn = draw(jax.random.split(jax.random.key(0), 20_000))
  for samples, frequencies in zip(drawn, toy_problem.ALL_DATA):
    np.testing.assert_allclose(samples.mean(0), frequencies, atol=0.012)
    np.testing.assert_array_equal(samples.sum(1), 1)


@pytest.mark.slow
def test_a_small_run_shows_the_difference_and_its_table(tmp_path):
  settings = toy.Settings(
    horizons=(128, 2_048), methods=('sequential', 'maxright')
  )
  options = harness.Options(
    workdir=tmp_path,
    seeds=tuple(range(16)),
    data_dir=None,
    save_seconds=1e9,
    settings=settings,
    preset='smoke',
    paper='xright',
    binary='toy',
  )
  harness.execute(toy.main, options)
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  assert metrics['gap_exponent/sequential/max'] > -0.1
  assert metrics['gap_exponent/maxright/max'] < -0.25
  ratio = metrics['gap_ratio/maxright']
  assert 15 < ratio - metrics['gap_ratio/maxright/half_width'] < ratio
  assert (tmp_path / 'toy.png').exists()


def test_stages_change_at_half_of_each_member_s_own_run():
  settings = toy.Settings()
  make_solver = toy.make_solver(settings, 'sequential', toy_problem.optima(0.5))
  context = harness.Context(
    (), (), {'horizon': jnp.int32(4)}, jax.random.key(0), None, 0
  )

  def ends(horizon):
    solver = make_solver(context._replace(hyper={'horizon': horizon}))
    batch = tuple(jnp.asarray(a, jnp.float32) for a in toy_problem.ALL_DATA)

    def body(carry, _):
      x, state = carry
      updates, state = solver.update(batch, state, x)
      return (optax.apply_updates(x, updates), state), x

    start = (jnp.zeros(2), solver.init(jnp.zeros(2)))
    return jax.lax.scan(body, start, length=5)[1]

  points = jax.jit(jax.vmap(ends))(jnp.array([4, 6]))
  for path, horizon in zip(np.asarray(points), (4, 6)):
    x = jnp.zeros(2)
    for k in range(4):
      loss = toy_problem.LOSSES[k >= horizon // 2]
      data = jnp.asarray(toy_problem.ALL_DATA[k >= horizon // 2], jnp.float32)
      x = x - 2 / horizon**0.5 * jax.grad(loss)(x, data)
      np.testing.assert_allclose(path[k + 1], x, rtol=1e-5)


def test_wrong_settings():
  for match, values in (
    ('increasing', {'horizons': (1_024, 256)}),
    ('is even', {'horizons': (256, 300)}),
    ('methods=sgd', {'methods': ('sgd',)}),
    ('mixing_ratio has to be below 1', {'mixing_ratio': 1.0}),
  ):
    with pytest.raises(ValueError, match=match):
      settings = toy.Settings(**values)
      settings_lib.check(settings)
      toy.check(settings)
