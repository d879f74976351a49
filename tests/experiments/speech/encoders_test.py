"""Tests encoders: padding, what is seen of the future, sizes."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import harness
from experiments.speech import encoders
from tests.tiers import first

SIZES = {'numbers': 3, 'width': 8, 'depth': 1, 'strides': (2, 2), 'size': 3}


def _run(kind, causal, features, lengths, **more):
  network = encoders.make(kind, **SIZES | {'heads': 2, 'causal': causal} | more)
  weights = network.init(jax.random.key(1))
  return jax.jit(network.apply)(weights, features, lengths)


@pytest.mark.parametrize('kind', first(encoders.KINDS))
def test_padding_changes_nothing(kind):
  rng = np.random.default_rng(0)
  short = rng.normal(size=(1, 11, 3)).astype(np.float32)
  long = np.concatenate([short, 1e3 * np.ones((1, 10, 3), np.float32)], axis=1)
  both = np.concatenate([long, rng.normal(size=(1, 21, 3))]).astype(np.float32)
  result, lengths = _run(kind, False, both, np.array([11, 21]))
  unpadded, few = _run(kind, False, short, np.array([11]))
  # Half, rounded up, twice.
  assert lengths.tolist() == [3, 6] and few.tolist() == [3]
  np.testing.assert_allclose(result[0, :3], unpadded[0, :3], atol=2e-5)
  assert result.shape == (2, 6, 8)


@pytest.mark.parametrize('kind', encoders.KINDS)
def test_a_causal_encoder_does_not_see_what_comes(kind):
  rng = np.random.default_rng(0)
  features = rng.normal(size=(1, 24, 3)).astype(np.float32)
  changed = features.copy()
  changed[:, 9:] += 1.0  # From within the third encoded frame on.
  lengths = np.array([24])
  before, _ = _run(kind, True, features, lengths)
  after, _ = _run(kind, True, changed, lengths)
  np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
  assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1e-2
  # The other kind does.
  noncausal, _ = _run(kind, False, features, lengths)
  noncausal_changed, _ = _run(kind, False, changed, lengths)
  assert np.abs(noncausal[:, 2] - noncausal_changed[:, 2]).max() > 1e-4


def test_dropout_is_drawn_and_keeps_the_mean():
  network = encoders.make('conv', **SIZES | {'heads': 2})
  weights = network.init(jax.random.key(0))
  features = np.ones((2, 8, 3), np.float32)
  lengths = np.array([8, 8])
  run = jax.jit(
    lambda key: network.apply(weights, features, lengths, key, 0.5)[0]
  )
  one, two = run(jax.random.key(0)), run(jax.random.key(1))
  assert np.abs(one - two).max() > 0.1
  factors = np.stack(encoders._dropped(jax.random.key(0), 0.25, 50, 20, 8))
  np.testing.assert_allclose(factors.mean(), 1, atol=0.03)
  np.testing.assert_allclose(np.unique(factors), [0, 4 / 3], rtol=1e-6)


def test_silence_has_a_slope_of_the_size_of_others():
  network = encoders.make('conv', **SIZES | {'depth': 4})
  weights = network.init(jax.random.key(0))
  slope = jax.jit(
    jax.grad(
      lambda weights, x: network.apply(weights, x, np.array([8]))[0][0, 0, 0]
    )
  )
  silence = np.zeros((1, 8, 3), np.float32)
  noise = np.random.default_rng(0).normal(size=(1, 8, 3)).astype(np.float32)
  result, other = (np.linalg.norm(slope(weights, x)) for x in (silence, noise))
  assert result < 1e3 * other


def test_wrong_sizes_are_named():
  with pytest.raises(harness.SettingsError, match=r'unknown encoder .lstm'):
    encoders.make('lstm', **SIZES)
  with pytest.raises(harness.SettingsError, match='4 heads'):
    encoders.make('conformer', **SIZES | {'width': 12})


def test_a_memory_is_the_plain_one():
  layer = nnx.split(encoders.OneWay(3, 2, nnx.Rngs(0)))
  graph, state = layer
  weights = nnx.to_pure_dict(state)
  x = np.random.default_rng(0).normal(size=(1, 5, 3))
  result = nnx.merge(graph, state)(jax.numpy.asarray(x, np.float32))
  kernel, bias = (np.asarray(weights['inner'][n]) for n in ('kernel', 'bias'))
  recurrent = np.asarray(weights['recurrent'])
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  cell = out = np.zeros(2)
  for t in range(5):
    z = x[0, t] @ kernel + bias + out @ recurrent
    write, keep, show = sigmoid(z[:2]), sigmoid(z[2:4]), sigmoid(z[4:6])
    cell = keep * cell + write * np.tanh(z[6:])
    out = show * np.tanh(cell)
    np.testing.assert_allclose(result[0, t], out, atol=1e-5)
  assert bias.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_positions_turn_pairs_as_complex_numbers():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, 3, 8)).astype(np.float32)
  result = encoders.decoder.rotate(x, encoders._rotary_angles(7, 8))
  pairs = x[..., :4] + 1j * x[..., 4:]
  speeds = np.array([10_000 ** (-i / 4) for i in range(4)])
  turned = pairs * np.exp(1j * np.arange(7)[:, None, None] * speeds)
  both = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(result, both, atol=1e-5)
