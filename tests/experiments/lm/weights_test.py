"""Folders of Hugging Face, written and read back, and what can be wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import (
  adapter_files,
  decoder,
  hugging_face,
  lora,
  tokenizer,
  weights,
)
from tests.experiments.lm.decoder_test import CONFIGS, SMALL, TOKENS

_WHY = 'needs the extra llm: pip install -e ".[experiments,llm]"'
safetensors = pytest.importorskip('safetensors.numpy', reason=_WHY)
tokenizers = pytest.importorskip('tokenizers', reason=_WHY)
pytest.importorskip('jinja2', reason=_WHY)

TEMPLATE = (
  '{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}'
  '{% if add_generation_prompt %}<s>assistant\n{% endif %}'
)


def words():
  """A tokeniser of bytes, with one merge that crosses words."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate([*letters, 'th'])}
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocabulary, merges=[('t', 'h')])
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.add_special_tokens(['<s>', '</s>'])
  end = inner.token_to_id('</s>')
  return tokenizer.Tokenizer(inner, TEMPLATE, end, {'eos_token': '</s>'})


@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_exported_is_read_back(tmp_path, name):
  config = dataclasses.replace(CONFIGS[name], context=128)
  params = decoder.init(config, 0)
  adapters = lora.init(params, jax.random.key(1), rank=2)
  adapters = jax.tree.map(lambda w: w + 0.1, adapters)
  merged = lora.merge(params, adapters, scale=0.5)
  hugging_face.export(tmp_path / 'out', config, merged, words())
  result = weights.load(tmp_path / 'out')
  assert result.config == config
  assert jax.tree.structure(result.params) == jax.tree.structure(merged)
  jax.tree.map(np.testing.assert_array_equal, result.params, merged)
  assert np.any(result.params['layers']['q'] != params['layers']['q'])
  again = tokenizer.load(result.vocabulary)
  text = '<s>the th\u00e9</s>'
  assert again.encode(text) == words().encode(text)
  assert again.decode(again.encode(text)) == text
  assert (again.template, again.end) == (TEMPLATE, words().end)
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert fields['eos_token_id'] == words().end
  with pytest.raises(harness.UserError, match='already has weights'):
    hugging_face.export(tmp_path / 'out', config, merged)


def test_adapters_alone_are_read_back_under_the_names_of_others(tmp_path):
  params = decoder.init(SMALL, 0)
  last = {n: w[1:] for n, w in params['layers'].items()}
  adapters = lora.init(
    {'layers': last}, jax.random.key(1), rank=2, weights=('q', 'down')
  )
  adapters = jax.tree.map(lambda w: w + 0.1, adapters)
  out = adapter_files.export(tmp_path / 'out', SMALL, adapters, alpha=8.0)
  result, scale = adapter_files.load(out, SMALL)
  assert scale == 4.0
  jax.tree.map(np.testing.assert_array_equal, result, adapters)
  tensors = safetensors.load_file(out / 'adapter_model.safetensors')
  # What peft adds to a weight is scale B A, (out, in).
  where = 'base_model.model.model.layers.2.mlp.down_proj'
  product = (
    tensors[f'{where}.lora_B.weight'] @ tensors[f'{where}.lora_A.weight']
  )
  merged = lora.merge(params, adapters, scale=scale)['layers']['down'][2]
  np.testing.assert_allclose(
    merged - params['layers']['down'][2], scale * product.T, atol=1e-6
  )
  fields = json.loads((out / 'adapter_config.json').read_text())
  assert fields['target_modules'] == ['down_proj', 'q_proj']
  assert fields['layers_to_transform'] == [1, 2] and fields['r'] == 2
  with pytest.raises(harness.UserError, match='already has adapters: give a'):
    adapter_files.export(out, SMALL, adapters, alpha=8.0)
  for config, match in (
    (
      dataclasses.replace(SMALL, layers=4),
      r'layers \[1, 2\], expected the last',
    ),
    (dataclasses.replace(SMALL, hidden=41), 'down_proj.lora_A.* has the shape'),
  ):
    with pytest.raises(harness.UserError, match=match):
      adapter_files.load(out, config)
  with pytest.raises(harness.UserError, match=r'has no adapters: .* missing'):
    adapter_files.load(tmp_path, SMALL)


def test_a_tokeniser_has_no_token_that_the_model_has_not(tmp_path):
  count = words().inner.get_vocab_size()
  words().save(tmp_path)
  enough = dataclasses.replace(SMALL, vocabulary=count)
  assert tokenizer.load(tmp_path, enough).end == words().end
  # More rows than tokens are padding, which many models have.
  more = dataclasses.replace(SMALL, vocabulary=count + 9)
  assert tokenizer.load(tmp_path, more).end == words().end
  fewer = dataclasses.replace(SMALL, vocabulary=count - 1)
  match = (
    f"token '</s>' with the number {count - 1}, .* only {count - 1} embeddings"
  )
  with pytest.raises(harness.UserError, match=match):
    tokenizer.load(tmp_path, fewer)


def test_names_and_layout_are_those_of_others(tmp_path):
  """What is read by others: names, (out, in), and no tied head."""
  params = decoder.init(SMALL, 0)
  hugging_face.export(tmp_path / 'out', SMALL, params)
  tensors = safetensors.load_file(tmp_path / 'out' / 'model.safetensors')
  assert len(tensors) == 9 * SMALL.layers + 2
  assert 'lm_head.weight' not in tensors
  name = 'model.layers.2.mlp.down_proj.weight'
  assert tensors[name].shape == (SMALL.width, SMALL.hidden)
  np.testing.assert_array_equal(tensors[name].T, params['layers']['down'][2])
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert fields['architectures'] == ['LlamaForCausalLM']


def test_several_files_and_other_numbers(tmp_path):
  params = decoder.init(SMALL, 0)
  tensors = dict(hugging_face.named_tensors(SMALL, params))
  hugging_face.export(tmp_path / 'one', SMALL, params)
  folder = tmp_path / 'two'
  folder.mkdir()
  (folder / 'config.json').write_bytes(
    (tmp_path / 'one' / 'config.json').read_bytes()
  )
  low = {n: np.asarray(jnp.bfloat16(t)) for n, t in tensors.items()}
  names = sorted(low)
  for i, part in enumerate((names[:10], names[10:])):
    safetensors.save_file(
      {n: low[n] for n in part}, folder / f'model-{i + 1}-of-2.safetensors'
    )
  result = weights.load(folder, jnp.bfloat16)
  assert result.params['embed'].dtype == jnp.bfloat16
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, jnp.bfloat16(b)),
    result.params,
    dict(params),
  )
  run = jax.jit(lambda p: decoder.forward(SMALL, p, TOKENS))
  actual = run(result.params)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, run(dict(params)), atol=0.15)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
  with pytest.raises(harness.UserError, match=r'`hf download a/b --local-dir'):
    weights.load('a/b')
  with pytest.raises(harness.UserError, match='neither a folder'):
    weights.load(tmp_path / 'none')
  folder = tmp_path / 'out'
  folder.mkdir()
  with pytest.raises(harness.UserError, match=r'has no config\.json'):
    weights.load(folder)
  params = decoder.init(SMALL, 0)
  hugging_face.export(folder, SMALL, params)
  with pytest.raises(harness.UserError, match=r'no tokenizer\.json'):
    tokenizer.load(folder)
  path = folder / 'model.safetensors'
  tensors = safetensors.load_file(path)
  gone = 'model.layers.1.self_attn.k_proj.weight'
  tensor = tensors.pop(gone)
  safetensors.save_file(tensors, path)
  with pytest.raises(harness.UserError, match=f'has no tensor {gone}'):
    weights.load(folder)
  safetensors.save_file(tensors | {gone: tensor[:8]}, path)
  with pytest.raises(harness.UserError, match=r'k_proj.*\(8, 24\).*\(16, 24\)'):
    weights.load(folder)
  fields = json.loads((folder / 'config.json').read_text())
  text = json.dumps(fields | {'tie_word_embeddings': False})
  (folder / 'config.json').write_text(text)
  with pytest.raises(harness.UserError, match=r'lm_head\.weight is missing'):
    weights.load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(harness.UserError, match=r'config\.json: Expecting'):
    weights.load(folder)
  (folder / 'config.json').write_text(json.dumps(fields))
  path.unlink()
  (folder / 'model.bin').write_bytes(b'')
  with pytest.raises(harness.UserError, match='other formats'):
    weights.load(folder)


def test_adapters_recognise_their_base_model_by_its_weights(tmp_path):
  """Also in another folder or dtype."""
  model, _ = weights.make_random()
  adapters = lora.init(model.params, jax.random.key(1), rank=2)
  adapters = jax.tree.map(lambda w: w + 0.1, adapters)
  adapter_files.export(
    tmp_path / 'out',
    model.config,
    adapters,
    alpha=2.0,
    base_params=model.params,
  )
  (tmp_path / 'out').rename(tmp_path / 'moved')
  merge = lambda model: weights.merge_adapters(model, tmp_path / 'moved')
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    cast = jax.tree.map(lambda w, d=dtype: w.astype(d), model.params)
    merge(model._replace(params=cast))
  merged = merge(model)
  with pytest.raises(harness.UserError, match=r'other weights \(q, v\), or th'):
    merge(merged)
  other, _ = weights.make_random(seed=1)
  with pytest.raises(harness.UserError, match='give the model from which'):
    merge(other)
  # Adapters of other tools have no record.
  tensors = safetensors.load_file(tmp_path / 'moved/adapter_model.safetensors')
  safetensors.save_file(tensors, tmp_path / 'moved/adapter_model.safetensors')
  merge(other)
