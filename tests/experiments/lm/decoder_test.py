"""The decoder against plain NumPy: all families, scaled positions, parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import decoder, hugging_face, lora
from tests.experiments.lm import reference

SMALL = config_lib.Config(
  family='llama',
  layers=3,
  width=24,
  hidden=40,
  heads=6,
  kv_heads=2,
  head_width=8,
  vocabulary=50,
  rope_base=1e4,
  norm_epsilon=1e-5,
  tied=True,
)
CONFIGS = {
  'llama': SMALL,
  'smollm3': dataclasses.replace(SMALL, family='smollm3', unrotated=(0, 2)),
  'llama, untied, llama3 positions': dataclasses.replace(
    SMALL,
    tied=False,
    rope_base=500.0,
    rope_scaling=config_lib.RopeScaling(8.0, 1.0, 4.0, 64),
  ),
  'qwen2, linear positions': dataclasses.replace(
    SMALL,
    family='qwen2',
    qkv_bias=True,
    rope_scaling=config_lib.RopeScaling(2.0),
  ),
  'qwen3': dataclasses.replace(
    SMALL, family='qwen3', qk_norm=True, head_width=10, kv_heads=3
  ),
}
TOKENS = np.random.default_rng(0).integers(0, 50, size=(2, 33))


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_are_those_of_plain_numpy(name):
  config = CONFIGS[name]
  params = decoder.init(config, 0)
  tensors = dict(hugging_face.named_tensors(config, params))
  fields = config_lib.to_hugging_face(config)
  run = jax.jit(lambda p, t: decoder.forward(config, p, t))
  result = run(params, TOKENS)
  for row, actual in zip(TOKENS, result):
    expected = reference.forward(fields, tensors, row)
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)
  # A config.json says all of it.
  assert config_lib.from_hugging_face(fields) == dataclasses.replace(
    config, context=2048
  )
  # What is padded at the end changes nothing before it.
  padded = np.concatenate([TOKENS[:, :20], 0 * TOKENS[:, 20:]], 1)
  np.testing.assert_allclose(run(params, padded)[:, :20], result[:, :20], 1e-5)


@pytest.mark.parametrize('name', ['llama', 'qwen3'])
def test_in_float64_nothing_is_rounded_to_float32(name, x64):
  del x64
  config = CONFIGS[name]
  params = decoder.init(config, 0, jnp.float64)
  tensors = dict(hugging_face.named_tensors(config, params))
  segments = np.where(np.arange(33) < 20, 1, 2)[None]

  def run(params, tokens):
    x = decoder.embed(params, tokens)
    x = decoder.run_layers(config, params['layers'], x, segments=segments)
    return decoder.logits(config, params, x)

  (result,) = jax.jit(run)(params, TOKENS[:1])
  assert result.dtype == jnp.float64
  fields = config_lib.to_hugging_face(config)
  for part in (slice(20), slice(20, None)):
    expected = reference.forward(fields, tensors, TOKENS[0][part])
    np.testing.assert_allclose(result[part], expected, rtol=1e-10, atol=1e-10)


def test_a_model_in_two_parts_and_with_adapters_is_one_model():
  config = SMALL
  params = decoder.init(config, 1)
  # As numpy arrays: slices of them are no programs.
  params = jax.tree.map(np.asarray, params)
  lower, upper = decoder.split_layers(params, 1)
  adapters = lora.init(
    upper, jax.random.key(2), rank=2, weights=('q', 'v', 'down')
  )
  zero = adapters
  adapters = {
    n: w
    if n.endswith('.a')
    else w + 0.1 * jnp.cos(jnp.arange(w.size)).reshape(w.shape)
    for n, w in adapters.items()
  }

  @jax.jit
  def run(adapters, merged):
    x = decoder.trunk(config, lower, TOKENS)
    top = lora.attach(upper, adapters, scale=0.7)
    x = decoder.run_layers(config, top['layers'], x, remat=True)
    return (
      decoder.logits(config, upper, x),
      decoder.forward(config, merged, TOKENS),
    )

  actual, full = run(zero, params)
  np.testing.assert_allclose(actual, full, rtol=1e-4, atol=1e-5)
  merged = jax.jit(lambda a: lora.merge(params, a, scale=0.7))(adapters)
  changed, full = run(adapters, merged)
  np.testing.assert_allclose(changed, full, rtol=2e-4, atol=2e-5)
  assert np.abs(changed - actual).max() > 0.1
  np.testing.assert_array_equal(
    merged['layers']['q'][0], params['layers']['q'][0]
  )
  with pytest.raises(harness.UserError, match='merge the adapters first'):
    dict(hugging_face.named_tensors(config, lora.attach(params, adapters)))
  with pytest.raises(harness.UserError, match='one or more of q, k'):
    lora.init(params, jax.random.key(0), rank=2, weights=('embed',))


def test_derivatives_with_layers_computed_anew():
  params = decoder.init(SMALL, 0)

  def loss(params, remat):
    result = decoder.forward(SMALL, params, TOKENS, remat=remat)
    return jnp.mean(jax.nn.logsumexp(result, axis=-1))

  both = jax.jit(lambda p: [jax.grad(loss)(p, r) for r in (False, True)])
  for one, two in zip(*map(jax.tree.leaves, both(params))):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_split_layers_keep_their_rotary_positions():
  config = CONFIGS['smollm3']
  params = decoder.init(config, 0)
  expected = decoder.forward(config, params, TOKENS)
  for first in (1, 2):
    lower, upper = decoder.split_layers(params, first)
    x = decoder.trunk(config, lower, TOKENS)
    x = decoder.run_layers(config, upper['layers'], x)
    actual = decoder.logits(config, upper, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_supported_is_said():
  fields = config_lib.to_hugging_face(SMALL)
  for change, words in (
    ({'model_type': 'gpt2'}, "model_type='gpt2'.*llama, mistral, qwen2"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'hidden_size': None}, "no field 'hidden_size'"),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2}}, "type 'yarn'"),
    ({'num_key_value_heads': 4}, 'not a multiple of 4'),
    ({'use_sliding_window': True}, 'use_sliding_window=True'),
    (
      {'model_type': 'mistral', 'sliding_window': 4096},
      'sliding_window=4096',
    ),
  ):
    with pytest.raises(harness.UserError, match=words):
      config_lib.from_hugging_face({**fields, **change})
  mistral = {**fields, 'model_type': 'mistral'}
  assert config_lib.from_hugging_face(mistral) == dataclasses.replace(
    SMALL, family='mistral', context=2048
  )
  del mistral['sliding_window']
  with pytest.raises(harness.UserError, match='4096 if missing'):
    config_lib.from_hugging_face(mistral)
  smollm3 = {**fields, 'model_type': 'smollm3', 'num_hidden_layers': 9}
  with pytest.raises(harness.DamagedDataError, match='expected 9 numbers'):
    config_lib.from_hugging_face(smollm3)
  for name in ('no_rope_layers', 'rope_theta', 'tie_word_embeddings'):
    del smollm3[name]
  config = config_lib.from_hugging_face(smollm3)
  assert config.unrotated == (3, 7) and config.tied
  assert config.rope_base == 2e6
  newer = {**fields, 'rope_scaling': None, 'rope_theta': None}
  del newer['rope_theta']
  newer['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 7.0}
  assert config_lib.from_hugging_face(newer).rope_base == 7.0


def test_the_backward_pass_stores_only_products_of_layers():
  params = decoder.init(SMALL, 0)
  rows, length, config = 2, 33, SMALL
  x = jnp.zeros((rows, length, config.width))

  def stored(x):
    run = lambda x: decoder.run_layers(config, params['layers'], x)
    return jax.vjp(run, x)[1]

  # Without the stacked weights themselves, which have no rows.
  weights = {w.shape for w in jax.tree.leaves(params['layers'])}
  arrays = [
    a
    for a in jax.tree.leaves(jax.eval_shape(stored, x))
    if a.shape[:1] == (config.layers,) and a.shape not in weights
  ]
  queries = config.heads * config.head_width
  keys = config.kv_heads * config.head_width
  # x, o; q and attention; k and v; gate and up; scores.
  numbers = 2 * config.width + 2 * queries + 2 * keys + 2 * config.hidden
  numbers += config.heads * length
  total = sum(a.size for a in arrays)
  assert total <= config.layers * rows * length * numbers
