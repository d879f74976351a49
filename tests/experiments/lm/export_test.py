"""Exported folders: dtype, files, end tokens, modes; the same logits."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import (
  adapter_files,
  decoder,
  hugging_face,
  output_folders,
  tokenizer,
  weights,
)
from tests.experiments.lm.decoder_test import CONFIGS, SMALL, TOKENS
from tests.experiments.lm.weights_test import words
from tests.tiers import first

safetensors = pytest.importorskip('safetensors.numpy')


@functools.cache
def forward(config):
  return jax.jit(
    lambda params: decoder.forward(config, params, TOKENS, dtype=jnp.float32)
  )


def logits(model):
  return np.asarray(forward(model.config)(model.params))


def read_json(path):
  return json.loads(path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('dtype', first(['bfloat16', 'float32', 'float16']))
@pytest.mark.parametrize('name', ['llama, untied, llama3 positions', 'qwen3'])
def test_logits_are_the_same_bit_for_bit(tmp_path, name, dtype):
  """In the dtype of the source, in one file and in several."""
  config = dataclasses.replace(CONFIGS[name], context=128)
  params = dict(decoder.init(config, 0, jnp.dtype(dtype)))
  before = logits(weights.Model(config, params, None))
  for shard_bytes in (10**9, 9_000):
    first = tmp_path / f'{shard_bytes}'
    hugging_face.export(first, config, params, shard_bytes=shard_bytes)
    model = weights.load(first, None)
    assert model.dtype == model.params['embed'].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(logits(model), before)
    # In float32, and from there in the dtype of the source: nothing is lost.
    wide = weights.load(first)
    assert wide.params['embed'].dtype == jnp.float32
    second = tmp_path / f'{shard_bytes} again'
    hugging_face.export(second, config, wide.params, dtype=wide.dtype)
    again = weights.load(second, None)
    np.testing.assert_array_equal(logits(again), before)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    fields = read_json(second / 'config.json')
    assert fields['torch_dtype'] == fields['dtype'] == dtype
    assert fields['tie_word_embeddings'] is config.tied
    assert ('lm_head.weight' in names(second)) is not config.tied


def names(folder):
  return {
    n for f in folder.glob('*.safetensors') for n in safetensors.load_file(f)
  }


def test_a_large_model_is_in_several_files_with_an_index(tmp_path):
  params = decoder.init(SMALL, 0)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(params)))
  limit = size // 3
  hugging_face.export(tmp_path / 'a', SMALL, params, shard_bytes=limit)
  index = read_json(tmp_path / 'a' / 'model.safetensors.index.json')
  assert index['metadata']['total_size'] == size
  files = sorted(f.name for f in (tmp_path / 'a').glob('*.safetensors'))
  count = len(files)
  assert count in (4, 5)
  assert files == [
    f'model-{i + 1:05}-of-{count:05}.safetensors' for i in range(count)
  ]
  for file in files:
    tensors = safetensors.load_file(tmp_path / 'a' / file)
    assert sum(array.nbytes for array in tensors.values()) <= limit
    assert set(tensors) == {
      n for n, there in index['weight_map'].items() if there == file
    }
  assert set(index['weight_map']) == names(tmp_path / 'a')
  hugging_face.export(tmp_path / 'b', SMALL, params)
  assert not (tmp_path / 'b' / 'model.safetensors.index.json').exists()


def test_a_run_replaces_its_own_files_only(tmp_path):
  """Several files by one, and one by several."""
  params, folder = decoder.init(SMALL, 0), tmp_path / 'out'
  for stamp, limit in (('1', 9_000), ('2', 10**9), ('3', 9_000)):
    output_folders.write(
      tmp_path / 'run',
      folder,
      stamp,
      lambda out, limit=limit: hugging_face.export(
        out, SMALL, params, shard_bytes=limit
      ),
    )
    np.testing.assert_array_equal(
      logits(weights.load(folder)), logits(weights.Model(SMALL, params, None))
    )
    index = (folder / 'model.safetensors.index.json').exists()
    assert index == (limit < 10**9)
  file = next(folder.glob('model-00002*'))
  file.write_bytes(b'of another')
  with pytest.raises(harness.UserError, match='this run has not written'):
    output_folders.require_own(tmp_path / 'run', folder)


def test_all_end_tokens_and_one_that_pads(tmp_path):
  config = dataclasses.replace(SMALL, vocabulary=300)
  params = decoder.init(config, 0)
  numbers = words().numbers()
  start, end = numbers['<s>'], numbers['</s>']
  source = {
    'eos_token_id': [7, end, 10**6],
    'temperature': 0.6,
    'transformers_version': '4.0',
  }
  first = hugging_face.export(tmp_path / 'a', config, params, words())
  (first / 'generation_config.json').write_text(json.dumps(source))
  fields = read_json(first / 'config.json') | {'eos_token_id': 9}
  (first / 'config.json').write_text(json.dumps(fields))
  model = weights.load(first)
  out = hugging_face.export(
    tmp_path / 'b', config, model.params, words(), generation=model.generation
  )
  assert read_json(out / 'generation_config.json') == {
    'eos_token_id': [end, 7, 9],
    'pad_token_id': end,
    'temperature': 0.6,
  }
  assert read_json(out / 'config.json')['eos_token_id'] == [end, 7, 9]
  fields = read_json(out / 'tokenizer_config.json')
  assert fields['pad_token'] == fields['eos_token'] == '</s>'
  assert weights.load(out).generation == read_json(
    out / 'generation_config.json'
  )
  # A token of the tokeniser's own pads where it has one.
  with_pad = words()
  with_pad = with_pad._replace(tokens={**with_pad.tokens, 'pad_token': '<s>'})
  out = hugging_face.export(tmp_path / 'c', config, params, with_pad)
  fields = read_json(out / 'generation_config.json')
  assert fields == {'eos_token_id': [end], 'pad_token_id': start}
  assert tokenizer.load(out).tokens['pad_token'] == '<s>'


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
  params = decoder.init(SMALL, 0)
  adapters = {
    'q.a': jnp.ones((3, SMALL.width, 2)),
    'q.b': jnp.ones((3, 2, SMALL.heads * SMALL.head_width)),
  }
  before = os.umask(mask)
  try:
    out = hugging_face.export(
      tmp_path / 'a', SMALL, params, words(), shard_bytes=9_000
    )
    adapter_files.export(out / 'adapters', SMALL, adapters, alpha=1.0)
  finally:
    os.umask(before)
  files = [path for path in out.rglob('*') if path.is_file()]
  assert len(files) > 8
  modes = {path.name: path.stat().st_mode & 0o777 for path in files}
  assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path):
  params = dict(decoder.init(SMALL, 0))
  params['norm'] = params['norm'].at[0].set(1e5)
  with pytest.raises(harness.UserError, match=r'norm.weight .* 1e\+05, too'):
    hugging_face.export(tmp_path / 'a', SMALL, params, dtype=jnp.float16)
  full = {'model.embed_tokens.weight': np.zeros((50, 24), np.int8)}
  hugging_face.export(tmp_path / 'b', SMALL, decoder.init(SMALL, 0))
  path = tmp_path / 'b' / 'model.safetensors'
  safetensors.save_file(safetensors.load_file(path) | full, path)
  with pytest.raises(harness.UserError, match='I8: quantised weights'):
    weights.load(tmp_path / 'b')
