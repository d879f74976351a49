"""Loads GGUF files of llama.cpp: a model and its tokeniser, often quantised."""

import pathlib
from typing import Any

import jax.numpy as jnp

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm.model import Model, assemble

# Tensor name of each weight of a layer.
_LAYER = {
  'attention_norm': 'attn_norm.weight',
  'q': 'attn_q.weight',
  'k': 'attn_k.weight',
  'v': 'attn_v.weight',
  'o': 'attn_output.weight',
  'q_bias': 'attn_q.bias',
  'k_bias': 'attn_k.bias',
  'v_bias': 'attn_v.bias',
  'q_norm': 'attn_q_norm.weight',
  'k_norm': 'attn_k_norm.weight',
  'mlp_norm': 'ffn_norm.weight',
  'gate': 'ffn_gate.weight',
  'up': 'ffn_up.weight',
  'down': 'ffn_down.weight',
}
_TOP = {
  'embed': 'token_embd.weight',
  'norm': 'output_norm.weight',
  'head': 'output.weight',
}


def load(path: pathlib.Path, dtype: Any) -> Model:
  """Loads a file; see `weights.load`."""
  gguf = harness.load_extra('gguf', 'llm', 'reading .gguf files')
  reader = gguf.GGUFReader(path)
  fields = {name: field.contents for name, field in reader.fields.items()}
  value = lambda name, default=None: (
    fields[name]() if name in fields else default
  )
  family = value('general.architecture')
  tensors = {t.name: t for t in reader.tensors}
  if family not in config_lib.FAMILIES:
    raise harness.UserError(
      f'{path.name} has the architecture {family!r}; supported: '
      f'{", ".join(config_lib.FAMILIES)}.'
    )
  field = lambda name, default=None: value(f'{family}.{name}', default)
  if field('rope.scaling.type', 'none') not in ('none', None) or (
    'rope_freqs.weight' in tensors
  ):
    raise harness.UserError(
      f'{path.name} has scaled rotary positions, which are not supported in '
      'GGUF files: give the folder of Hugging Face.'
    )
  width = int(field('embedding_length'))
  heads = int(field('attention.head_count'))
  head_width = int(field('attention.key_length', width // heads))
  config = config_lib.Config(
    family=family,
    layers=int(field('block_count')),
    width=width,
    hidden=int(field('feed_forward_length')),
    heads=heads,
    kv_heads=int(field('attention.head_count_kv', heads)),
    head_width=head_width,
    vocabulary=int(tensors[_TOP['embed']].shape[1]),
    rope_base=float(field('rope.freq_base', 10_000.0)),
    norm_epsilon=float(field('attention.layer_norm_rms_epsilon')),
    tied=_TOP['head'] not in tensors,
    context=int(field('context_length', 0)),
    **config_lib.FAMILIES[family],
  )

  def read(name):
    if name not in tensors:
      raise harness.UserError(f'{path.name} has no tensor {name}.')
    tensor = tensors[name]
    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if family == 'llama' and name.endswith(('attn_q.weight', 'attn_k.weight')):
      # llama.cpp rotates neighbours; `decoder.rotate` rotates halves.
      rows = array.reshape(-1, head_width // 2, 2, array.shape[-1])
      array = rows.swapaxes(1, 2).reshape(array.shape)
    return array

  layer = lambda i, name: f'blk.{i}.{_LAYER[name]}'
  # Norms are float32 in all files.
  kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
  named = {'F16': jnp.float16, 'BF16': jnp.bfloat16}
  source = jnp.dtype(named[kinds.pop()] if {*named} > kinds else jnp.float32)
  params = assemble(config, read, layer, _TOP, dtype or source)
  vocabulary = {
    name.removeprefix('tokenizer.'): fields[name]
    for name in fields
    if name.startswith('tokenizer.')
  }
  numbers = {
    name: value(f'tokenizer.ggml.{name}_token_id')
    for name in ('eos', 'eot', 'eom', 'padding')
  }
  pad = numbers.pop('padding')
  ends = [int(number) for number in numbers.values() if number is not None]
  generation: dict[str, Any] = {'eos_token_id': list(dict.fromkeys(ends))}
  if pad is not None:
    generation['pad_token_id'] = int(pad)
  return Model(config, params, vocabulary, source, generation)
