"""Loads GGUF files of llama.cpp: a model and its tokeniser, often quantised."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import checked_files
from experiments.lm import config as config_lib
from experiments.lm.model import Model, Tensors, assemble

# Limits of the metadata: entries of an array, and values in all. Llama 3 has
# 280,000 merges; its tokens and merges are 820,000 values.
_MOST_ENTRIES, _MOST_VALUES = 2**20, 2**20
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


# Architectures; llama.cpp files Mistral's models under llama.
FAMILIES = ('llama', 'qwen2', 'qwen3')


def load(path: pathlib.Path, dtype: Any) -> Model:
  """Loads a file; see `weights.load`."""
  gguf = harness.load_extra('gguf', 'llm', 'reading .gguf files')
  checked_files.require_regular(path)
  with harness.parsing(path, 'GGUF file'):
    reader = _make_reader(gguf, path)
    fields = {name: field.contents for name, field in reader.fields.items()}
    # Lists of tokens are read by the tokeniser.
    values = {
      name: field()
      for name, field in fields.items()
      if not name.startswith('tokenizer.') or name.endswith('_token_id')
    }
  family = values.get('general.architecture')
  tensors = {t.name: t for t in reader.tensors}
  if not isinstance(family, str) or family not in FAMILIES:
    raise harness.UserError(
      f'{path} has the architecture {family!r}; supported: '
      f'{", ".join(FAMILIES)}.'
    )
  scaling = values.get(f'{family}.rope.scaling.type', 'none')
  if scaling not in ('none', None) or 'rope_freqs.weight' in tensors:
    raise harness.UserError(
      f'{path} has scaled rotary positions, which are not supported in '
      'GGUF files: give the folder of Hugging Face.'
    )
  _check_layers(path, values, family, tensors)
  integer = lambda name, default=None: checked_files.integer(
    path, values, f'{family}.{name}', 1, config_lib.WIDTH, default
  )
  number = lambda name, default=None: checked_files.number(
    path, values, f'{family}.{name}', default=default
  )
  width = integer('embedding_length')
  heads = integer('attention.head_count')
  head_width = integer('attention.key_length', width // heads)
  if _TOP['embed'] not in tensors or len(tensors[_TOP['embed']].shape) != 2:
    raise harness.DamagedDataError(
      f'{path} has no tensor {_TOP["embed"]} of two axes.'
    )
  config = config_lib.make(
    path,
    family=family,
    layers=integer('block_count'),
    width=width,
    hidden=integer('feed_forward_length'),
    heads=heads,
    kv_heads=integer('attention.head_count_kv', heads),
    head_width=head_width,
    vocabulary=int(tensors[_TOP['embed']].shape[1]),
    rope_base=number('rope.freq_base', 10_000.0),
    norm_epsilon=number('attention.layer_norm_rms_epsilon'),
    tied=_TOP['head'] not in tensors,
    context=checked_files.integer(
      path, values, f'{family}.context_length', 0, default=0
    ),
  )

  def place(name):
    if name not in tensors:
      raise harness.UserError(f'{path} has no tensor {name}.')
    return path

  def read(name):
    tensor = tensors[name]
    with harness.parsing(path, 'GGUF file'):
      array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if family == 'llama' and name.endswith(('attn_q.weight', 'attn_k.weight')):
      # llama.cpp rotates neighbours; `decoder.rotate` rotates halves.
      rows = array.reshape(-1, head_width // 2, 2, array.shape[-1])
      array = rows.swapaxes(1, 2).reshape(array.shape)
    return array

  shape = lambda name: tuple(int(n) for n in reversed(tensors[name].shape))
  layer = lambda i, name: f'blk.{i}.{_LAYER[name]}'
  # Norms are float32 in all files.
  kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
  named = {'F16': jnp.float16, 'BF16': jnp.bfloat16}
  source = jnp.dtype(named[kinds.pop()] if {*named} > kinds else jnp.float32)
  params = assemble(
    config,
    Tensors(place, lambda name: shape(name) if place(name) else (), read),
    layer,
    _TOP,
    dtype or source,
  )
  vocabulary = {
    name.removeprefix('tokenizer.'): fields[name]
    for name in fields
    if name.startswith('tokenizer.')
  }
  vocabulary['file'] = lambda: path
  prefix = 'tokenizer.ggml.'
  numbers = checked_files.token_numbers
  ends = [
    number
    for name in ('eos', 'eot', 'eom')
    for number in numbers(path, values, f'{prefix}{name}_token_id')
  ]
  generation: dict[str, Any] = {'eos_token_id': list(dict.fromkeys(ends))}
  if pad := numbers(path, values, f'{prefix}padding_token_id'):
    generation['pad_token_id'] = pad[0]
  return Model(config, params, vocabulary, source, generation)


def _check_layers(
  path: pathlib.Path,
  values: Mapping[str, Any],
  family: str,
  tensors: Mapping[str, Any],
) -> None:
  """Raises UserError for tensors that overlap, or of layers beyond the last."""
  name = f'{family}.block_count'
  layers = checked_files.integer(path, values, name, 1, config_lib.LAYERS)
  end, before = 0, ''
  for tensor in sorted(tensors.values(), key=lambda t: int(t.data_offset)):
    match = re.match(r'blk\.(\d+)\.', tensor.name)
    if match and int(match[1]) >= layers:
      raise harness.DamagedDataError(
        f'{path} has the tensor {tensor.name}, but {name}={layers}.'
      )
    if int(tensor.data_offset) < end:
      raise harness.DamagedDataError(
        f'{path} is damaged: the tensors {before} and {tensor.name} overlap.'
      )
    end, before = int(tensor.data_offset) + int(tensor.n_bytes), tensor.name


def _make_reader(gguf: Any, path: pathlib.Path) -> Any:
  """Opens a file; the reader of the package has no limits."""

  class Reader(gguf.GGUFReader):
    """A reader that ends at the end of the file, and at `_MOST_VALUES`."""

    count = 0

    def _get(self, offset, dtype, count=1, override_order=None):
      # Views of a plain array take less memory than those of a memory map.
      if self.count == 0:
        self.data = np.asarray(self.data)
      self.count += 1
      end = int(offset) + np.dtype(dtype).itemsize * int(count)
      if end > len(self.data):
        raise ValueError(
          f'it announces data up to byte {end:,}, but has {len(self.data):,}'
        )
      if self.count > _MOST_VALUES:
        raise ValueError(f'it has more than {_MOST_VALUES:,} values')
      return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
      if raw_type != gguf.GGUFValueType.ARRAY:
        return super()._get_field_parts(orig_offs, raw_type)
      kind = self._get(orig_offs, np.uint32)
      count = self._get(orig_offs + 4, np.uint64)
      if count[0] > _MOST_ENTRIES:
        raise ValueError(f'it announces an array of {count[0]:,} entries')
      types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(int(kind[0]))]
      dtype = self.gguf_scalar_to_np.get(types[1])
      if dtype is None:
        return super()._get_field_parts(orig_offs, raw_type)
      # One view of all numbers; the package makes one per number.
      numbers = self._get(orig_offs + 12, dtype, count[0])
      return 12 + numbers.nbytes, [kind, count, numbers], [2], types

  return Reader(path)
