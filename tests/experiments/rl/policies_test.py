"""Shapes of networks; stored and drawn policies."""

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import harness
from experiments.rl import environments, networks, policies


def make(env):
  known = environments.make(env)
  agent = networks.agent(known.shape, known.environment.actions)
  return agent.init(jax.random.key(0))


@pytest.mark.parametrize(
  'env',
  [
    'CartPole-v1',
    'Pendulum-v1',
    pytest.param('SpaceInvaders-MinAtar', marks=pytest.mark.slow),
  ],
)
def test_a_policy_is_saved_loaded_and_drawn(env, tmp_path):
  params = make(env)
  policy = policies.Policy(env, params.actor, {'training_return': 3.0})
  path = policies.save(tmp_path / 'policy.npz', policy)
  loaded = policies.load(path)
  assert (loaded.env, loaded.about) == (env, {'training_return': 3.0})
  jax.tree.map(np.testing.assert_array_equal, loaded.actor, params.actor)
  key = jax.random.key(1)
  if env == 'Pendulum-v1':
    with pytest.raises(
      harness.SettingsError, match='Pendulum-v1 cannot be drawn'
    ):
      policies.render(loaded, tmp_path / 'it.gif', key=key)
    frames, total = policies.play(loaded, key=key, limit=5)
    assert len(frames) == 5 and total < 0
    return
  total = policies.render(
    loaded, tmp_path / 'it.gif', key=key, limit=60, frames=7
  )
  with Image.open(tmp_path / 'it.gif') as image:
    assert 1 < image.n_frames <= 7 and image.size[0] >= 100
  frames, again = policies.play(loaded, key=key, limit=60)
  assert total == again
  if env == 'CartPole-v1':
    assert total == len(frames)


@pytest.mark.slow
def test_a_policy_of_a_game_is_loaded_and_drawn(tmp_path):
  pytest.importorskip('ale_py')
  agent = networks.agent((84, 84, 4), 18)
  actor = agent.init(jax.random.key(0)).actor
  path = tmp_path / 'policy.npz'
  policies.save(path, policies.Policy('Seaquest', actor, {}))
  loaded = policies.load(path)
  key = jax.random.key(1)
  policies.render(loaded, tmp_path / 'it.gif', key=key, limit=6, frames=3)
  with Image.open(tmp_path / 'it.gif') as image:
    assert image.n_frames <= 3 and image.size == (160, 210)
  agent = networks.agent((4,), 2)
  actor = agent.init(jax.random.key(0)).actor
  policies.save(path, policies.Policy('CartPole', actor, {}))
  frames, total = policies.play(policies.load(path), key=key, limit=60)
  assert total == len(frames)


def test_files_without_a_policy_are_refused(tmp_path):
  with pytest.raises(harness.MissingDataError, match='no policy in'):
    policies.load(tmp_path / 'absent.npz')
  path = tmp_path / 'policy.npz'
  path.write_bytes(b'PK nonsense')
  with pytest.raises(harness.DamagedDataError, match='no policy'):
    policies.load(path)
  params = make('CartPole-v1')
  policies.save(path, policies.Policy('Acrobot-v1', params.actor, {}))
  with pytest.raises(harness.DamagedDataError, match='no weights for Acrobot'):
    policies.load(path)
  np.savez(path, a=np.ones(2))
  with pytest.raises(harness.DamagedDataError, match='the array is missing'):
    policies.load(path)


def test_networks_of_pixels_and_their_hidden_layer():
  """Expected sizes: 84 to 20 to 9, 32 channels, 256 units."""
  net = networks.network((84, 84, 4), 6, **networks.body((84, 84, 4)))
  weights = jax.eval_shape(net.init, jax.random.key(0))
  sizes = sorted(x.size for x in jax.tree.leaves(weights))
  expected = [6, 16, 32, 256, 6 * 256, 8 * 8 * 4 * 16, 4 * 4 * 16 * 32]
  assert sizes == sorted([*expected, 9 * 9 * 32 * 256])
  picture = np.zeros((84, 84, 4), np.uint8)
  assert jax.eval_shape(net.apply, weights, picture).shape == (6,)
  trunk = networks.network((10, 10, 4), 0, **networks.body((10, 10, 4)))
  weights = trunk.init(jax.random.key(0))
  assert trunk.apply(weights, np.ones((10, 10, 4))).shape == (128,)


def test_networks_of_pictures_that_are_not_square():
  """Expected sizes: 30 x 40 to 28 x 38, 16 channels, 128 units."""
  shape = (30, 40, 3)
  net = networks.network(shape, 3, **networks.body(shape))
  weights = jax.eval_shape(net.init, jax.random.key(0))
  sizes = sorted(x.size for x in jax.tree.leaves(weights))
  assert sizes == sorted(
    [3, 16, 128, 3 * 128, 3 * 3 * 3 * 16, 28 * 38 * 16 * 128]
  )
  picture = np.ones(shape, np.float32)
  assert jax.eval_shape(net.apply, weights, picture).shape == (3,)


def test_a_convolution_agrees_with_lax():
  """With a stride that does not divide the size."""
  net = harness.pure(lambda rngs: networks.Convolution(3, 5, 4, 2, rngs))
  weights, rng = net.init(jax.random.key(0)), np.random.default_rng(0)
  picture = rng.normal(size=(11, 9, 3)).astype(np.float32)
  kernel = weights['dense']['kernel'].reshape(4, 4, 3, 5)
  expected = jax.lax.conv_general_dilated(
    picture[None],
    kernel,
    (2, 2),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )[0]
  output = net.apply(weights, picture)
  np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
