"""Adapters of peft: what they do to a model, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import adapter_files, decoder, hugging_face, lora
from experiments.lm import config as config_lib
from tests.experiments.lm import reference
from tests.experiments.lm.decoder_test import SMALL, TOKENS

_WHY = 'needs the extra llm: pip install -e ".[experiments,llm]"'
safetensors = pytest.importorskip('safetensors.numpy', reason=_WHY)

RANK, ALPHA = 4, 6.0
MODULES = ('self_attn.q_proj', 'mlp.down_proj')
PREFIX = 'base_model.model.'


def write(folder, *, layers=(1, 2), suffix='', dora=False, **fields):
  """Adapters as peft has them, and its fields."""
  tensors = dict(hugging_face.named_tensors(SMALL, decoder.init(SMALL, 0)))
  rng = np.random.default_rng(1)
  adapters = {}
  for i in layers:
    for module in MODULES:
      name = f'model.layers.{i}.{module}'
      out, width = tensors[f'{name}.weight'].shape
      shapes = {'lora_A.weight': (RANK, width), 'lora_B.weight': (out, RANK)}
      for part, shape in shapes.items():
        adapters[f'{PREFIX}{name}.{part}'] = rng.normal(size=shape) / 4
      if dora:
        key = f'{PREFIX}{name}.lora_magnitude_vector{suffix}'
        adapters[key] = rng.uniform(0.5, 2, size=out)
  adapters = {n: np.float32(a) for n, a in adapters.items()}
  folder.mkdir(exist_ok=True)
  safetensors.save_file(adapters, folder / 'adapter_model.safetensors')
  fields = {
    'peft_type': 'LORA',
    'r': RANK,
    'lora_alpha': ALPHA,
    'lora_dropout': 0.05,
    'bias': 'none',
    'target_modules': ['q_proj', 'down_proj'],
    'init_lora_weights': True,
    'modules_to_save': None,
    'rank_pattern': {},
    'use_dora': dora,
    **fields,
  }
  (folder / 'adapter_config.json').write_text(json.dumps(fields))
  return tensors, adapters


def changed(tensors, adapters, scale, dora):
  """The weights with their adapters, by the formulas of the papers."""
  result = {n: np.float64(a) for n, a in tensors.items()}
  for key in adapters:
    if not key.endswith('.lora_A.weight'):
      continue
    name = key.removeprefix(PREFIX).removesuffix('.lora_A.weight')
    a = np.float64(adapters[f'{PREFIX}{name}.lora_A.weight'])
    b = np.float64(adapters[f'{PREFIX}{name}.lora_B.weight'])
    weight = result[f'{name}.weight'] + scale * b @ a
    if dora:
      (magnitude,) = (
        np.float64(array)
        for n, array in adapters.items()
        if n.startswith(f'{PREFIX}{name}.lora_magnitude_vector')
      )
      # A norm for each row of the layout (out, in).
      for row, size in enumerate(magnitude):
        weight[row] *= size / np.sqrt(np.sum(weight[row] ** 2))
    result[f'{name}.weight'] = weight
  return result


@pytest.mark.parametrize(
  ('fields', 'scale', 'dora', 'suffix'),
  [
    ({}, ALPHA / RANK, False, ''),
    ({'use_rslora': True}, ALPHA / RANK**0.5, False, ''),
    ({}, ALPHA / RANK, True, ''),
    ({'use_rslora': True}, ALPHA / RANK**0.5, True, '.weight'),
  ],
)
def test_logits_are_those_of_the_papers(tmp_path, fields, scale, dora, suffix):
  tensors, fields = write(tmp_path, dora=dora, suffix=suffix, **fields)
  adapters, result = adapter_files.load(tmp_path, SMALL)
  np.testing.assert_allclose(result, scale, rtol=1e-12)
  config_fields = config_lib.to_hugging_face(SMALL)
  expected = reference.forward(
    config_fields, changed(tensors, fields, scale, dora), TOKENS[0]
  )
  plain = reference.forward(config_fields, tensors, TOKENS[0])
  assert np.abs(plain - expected).max() > 0.1
  params = decoder.init(SMALL, 0)
  # The last layers have adapters: attached to the upper part of the model.
  lower, upper = decoder.split_layers(params, 1)

  @jax.jit
  def run(adapters):
    merged = lora.merge(params, adapters, scale=result)
    top = lora.attach(upper, adapters, scale=result)
    x = decoder.trunk(SMALL, lower, TOKENS[:1])
    x = decoder.run_layers(SMALL, top['layers'], x)
    attached = decoder.logits(SMALL, upper, x)
    return decoder.forward(SMALL, merged, TOKENS[:1]), attached

  for logits in run(adapters):
    np.testing.assert_allclose(logits[0], expected, rtol=5e-4, atol=5e-4)
  # And they are written as they were read.
  if not fields:
    out = adapter_files.export(tmp_path / 'b', SMALL, adapters, alpha=ALPHA)
    again, factor = adapter_files.load(out, SMALL)
    assert factor == result
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('peft_type', 'IA3'),
    ('bias', 'lora_only'),
    ('rank_pattern', {'q_proj': 2}),
    ('alpha_pattern', {'q_proj': 2}),
    ('modules_to_save', ['lm_head']),
    ('fan_in_fan_out', True),
    ('lora_bias', True),
    ('init_lora_weights', 'pissa'),
    ('use_qalora', True),
    ('layer_replication', [[0, 2]]),
    ('trainable_token_indices', [3]),
    ('target_parameters', ['mlp.experts']),
    ('of_next_year', 'something'),
  ],
)
def test_fields_that_change_the_function_are_refused(tmp_path, field, value):
  write(tmp_path, **{field: value})
  with pytest.raises(harness.UserError) as info:
    adapter_files.load(tmp_path, SMALL)
  message = str(info.value)
  assert message.startswith(f'{tmp_path}/adapter_config.json has {field}=')
  assert 'merge_and_unload' in message and '\n' not in message


def test_fields_that_disagree_with_the_tensors_are_refused(tmp_path):
  for number, (fields, match) in enumerate(
    [
      ({'layers_to_transform': [2]}, r'layers_to_transform=\[2\].*\[1, 2\]'),
      ({'target_modules': ['q_proj']}, r"target_modules=\['q_proj'\]"),
      ({'r': 8}, r'has the shape \(4, \d+\), expected \(8, .* and r=8'),
      ({'r': None}, "no field 'r'"),
      ({'r': 0}, 'r=0, expected an integer from 1'),
      ({'lora_alpha': 'big'}, "lora_alpha='big', expected a finite number"),
      ({'use_dora': True}, r'has no tensor .*lora_magnitude_vector'),
    ]
  ):
    folder = tmp_path / str(number)
    write(folder, **fields)
    with pytest.raises(harness.UserError, match=match):
      adapter_files.load(folder, SMALL)
  # Both ways to name targets and layers that agree are read.
  write(
    tmp_path / 'fine',
    layers_to_transform=[1, 2],
    target_modules=r'.*\.(q|down)_proj',
  )
  adapter_files.load(tmp_path / 'fine', SMALL)


def test_tensors_that_are_no_adapters_are_named(tmp_path):
  _, adapters = write(tmp_path)
  extra = f'{PREFIX}lm_head.lora_A.weight'
  adapters[extra] = np.zeros((RANK, SMALL.width), np.float32)
  safetensors.save_file(adapters, tmp_path / 'adapter_model.safetensors')
  with pytest.raises(harness.UserError, match=f'has the tensor {extra}'):
    adapter_files.load(tmp_path, SMALL)
  # Without its field, a magnitude would be left out.
  write(tmp_path, dora=True)
  path = tmp_path / 'adapter_config.json'
  path.write_text(path.read_text().replace('"use_dora": true', '"x": null'))
  with pytest.raises(harness.UserError, match='lora_magnitude_vector'):
    adapter_files.load(tmp_path, SMALL)


def test_adapters_keep_their_precision_beside_narrow_weights():
  """Bfloat16 weights that compute in float32 round no adapter."""
  params = decoder.init(SMALL, 0, jnp.bfloat16)
  wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
  adapters = lora.init(params, jax.random.key(0), rank=2)
  adapters = jax.tree.map(lambda w: w + 0.013, adapters)

  @jax.jit
  def run(params):
    attached = lora.attach(params, adapters, scale=0.5)
    return decoder.forward(SMALL, attached, TOKENS, dtype=jnp.float32)

  np.testing.assert_array_equal(run(params), run(wide))
