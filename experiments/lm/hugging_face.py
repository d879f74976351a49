"""Loads and exports Hugging Face folders: config, weights and tokeniser."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import checked_files, decoder
from experiments.lm import config as config_lib
from experiments.lm.model import TRANSPOSED, Model, Tensors, assemble

# Tensor name of each weight of a layer.
LAYER = {
  'attention_norm': 'input_layernorm.weight',
  'q': 'self_attn.q_proj.weight',
  'k': 'self_attn.k_proj.weight',
  'v': 'self_attn.v_proj.weight',
  'o': 'self_attn.o_proj.weight',
  'q_bias': 'self_attn.q_proj.bias',
  'k_bias': 'self_attn.k_proj.bias',
  'v_bias': 'self_attn.v_proj.bias',
  'q_norm': 'self_attn.q_norm.weight',
  'k_norm': 'self_attn.k_norm.weight',
  'mlp_norm': 'post_attention_layernorm.weight',
  'gate': 'mlp.gate_proj.weight',
  'up': 'mlp.up_proj.weight',
  'down': 'mlp.down_proj.weight',
}
_TOP = {
  'embed': 'model.embed_tokens.weight',
  'norm': 'model.norm.weight',
  'head': 'lm_head.weight',
}
# Dtypes of tensors in files; others are quantised.
_KINDS = {
  'F16': jnp.float16,
  'BF16': jnp.bfloat16,
  'F32': jnp.float32,
  'F64': jnp.float32,
}
INDEX, _SUFFIX = 'model.safetensors.index.json', '.safetensors'
# Largest size of a file of weights, as in the package transformers.
SHARD_BYTES = 5 * 10**9


def load(folder: pathlib.Path, dtype: Any) -> Model:
  """Loads a folder; see `weights.load`."""
  path = folder / 'config.json'
  if not checked_files.exists(path):
    raise harness.UserError(f'{folder} has no config.json.')
  raw = checked_files.read_json(path, folder)
  config = config_lib.from_hugging_face(raw, path)
  opened, where = _open_weights(folder)
  for name, file in where.items():
    match = re.match(r'model\.layers\.(\d+)\.', name)
    if match and int(match[1]) >= config.layers:
      raise harness.DamagedDataError(
        f'{file} has the tensor {name}, but config.json has '
        f'num_hidden_layers={config.layers}: the files are of two models.'
      )
  if config.tied is False and _TOP['head'] not in where:
    raise harness.UserError(
      f'{folder}: config.json has tie_word_embeddings=false, but the tensor '
      f'{_TOP["head"]} is missing.'
    )

  def place(name):
    if name not in where:
      raise harness.UserError(f'{folder} has no tensor {name}.')
    return where[name]

  def read(name):
    handle, file = opened[place(name)], place(name)
    kind = handle.get_slice(name).get_dtype()
    if kind not in _KINDS:
      raise harness.DamagedDataError(
        f'{file}: the tensor {name} is {kind}: quantised weights are not '
        f'supported; supported: {", ".join(_KINDS)}.'
      )
    with (
      harness.parsing(file, 'safetensors file'),
      np.errstate(over='ignore'),
    ):
      # The framework is flax, since numpy has no bfloat16.
      return np.asarray(handle.get_tensor(name))

  shape = lambda name: opened[place(name)].get_slice(name).get_shape()
  tensors = Tensors(place, lambda name: tuple(shape(name)), read)
  layer = lambda i, name: f'model.layers.{i}.{LAYER[name]}'
  source = _source_dtype(opened)
  params = assemble(config, tensors, layer, _TOP, dtype or source)
  return Model(config, params, folder, source, _generation(folder, raw))


def open_tensors(path: pathlib.Path, folder: pathlib.Path) -> Any:
  """Opens a file of tensors; the package checks its header.

  Raises:
    UserError: if the file is missing, damaged, or not in the folder.
  """
  safetensors = harness.load_extra(
    'safetensors', 'llm', 'reading *.safetensors'
  )
  checked_files.require_regular(path, folder)
  with harness.parsing(path, 'safetensors file'):
    return safetensors.safe_open(path, framework='flax')


def _open_weights(
  folder: pathlib.Path,
) -> tuple[dict[pathlib.Path, Any], dict[str, pathlib.Path]]:
  """Opens the files of weights, and finds the file of each tensor."""
  index = folder / INDEX
  places: dict[str, Any] = {}
  if checked_files.exists(index):
    fields = checked_files.read_json(index, folder)
    places = checked_files.typed(index, fields, 'weight_map', dict)
    if not places:
      raise harness.DamagedDataError(f'{index} has an empty weight_map.')
  for name, file in places.items():
    plain = isinstance(file, str) and file.isprintable()
    if not plain or pathlib.Path(file).name != file or file[-12:] != _SUFFIX:
      raise harness.DamagedDataError(
        f'{index} puts the tensor {name} into {file!r}, expected a file '
        f'*{_SUFFIX} of the same folder.'
      )
  files = {folder / file for file in places.values()}
  opened = {
    f: open_tensors(f, folder)
    for f in sorted(files or folder.glob(f'*{_SUFFIX}'))
  }
  where: dict[str, pathlib.Path] = {}
  for file, handle in opened.items():
    for name in handle.keys():  # noqa: SIM118
      if name in where:
        raise harness.DamagedDataError(
          f'{file}: the tensor {name} is in more than one file, also in '
          f'{where[name].name}: remove one of the files.'
        )
      where[name] = file
  for name, file in places.items():
    if where.get(name) != folder / file:
      raise harness.DamagedDataError(
        f'{index} puts the tensor {name} into {file}, which lacks it.'
      )
  if not where:
    raise harness.UserError(
      f'{folder} has no *{_SUFFIX} with tensors: convert other formats (*.bin) '
      'first.'
    )
  return opened, where


def _source_dtype(opened: Mapping[pathlib.Path, Any]) -> np.dtype:
  """Returns the narrowest dtype that represents all tensors exactly."""
  stored = {
    handle.get_slice(name).get_dtype()
    for handle in opened.values()
    for name in handle.keys()  # noqa: SIM118
  }
  kinds = [_KINDS.get(kind, jnp.float32) for kind in stored]
  return jnp.dtype(functools.reduce(jnp.promote_types, kinds))


def _generation(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads the generation settings of a model from its two files."""
  fields: dict[str, Any] = {}
  path = folder / 'generation_config.json'
  if checked_files.exists(path):
    fields = checked_files.read_json(path, folder)
  fields.pop('transformers_version', None)
  read = checked_files.token_numbers
  name = 'eos_token_id'
  ends = [
    *read(path, fields, name),
    *read(folder / 'config.json', config, name),
  ]
  if ends:
    fields[name] = list(dict.fromkeys(ends))
  name = 'pad_token_id'
  for place, values in ((path, fields), (folder / 'config.json', config)):
    if values.get(name) is not None:
      checked_files.integer(place, values, name, low=-1)
  if fields.get(name) is None and name in config:
    fields[name] = config[name]
  return fields


def _named(
  config: config_lib.Config, params: decoder.Params
) -> Iterable[tuple[str, int, Callable[[], np.ndarray]]]:
  """Yields tensor names, sizes, and functions that make the tensors."""

  def array(name, stacked, *layer):
    tensor = np.asarray(stacked[layer] if layer else stacked)
    return np.ascontiguousarray(tensor.T if name in TRANSPOSED else tensor)

  for name, tensor in _TOP.items():
    if name in params:
      weight = params[name]
      yield tensor, weight.size, functools.partial(array, name, weight)
  for name, stacked in params['layers'].items():
    if name not in LAYER:
      raise harness.UserError(
        f'the layers have {name!r}, which is not a weight of a checkpoint: '
        'merge the adapters first, by lora.merge.'
      )
    size = stacked.size // config.layers
    for i in range(config.layers):
      tensor = f'model.layers.{i}.{LAYER[name]}'
      yield tensor, size, functools.partial(array, name, stacked, i)


def named_tensors(
  config: config_lib.Config, params: decoder.Params
) -> Iterable[tuple[str, np.ndarray]]:
  """Yields all tensors with the names and layout of Hugging Face."""
  for name, _, make in _named(config, params):
    yield name, make()


def export(
  folder: str | pathlib.Path,
  config: config_lib.Config,
  params: decoder.Params,
  tokenizer: Any = None,
  *,
  dtype: Any = None,
  generation: Mapping[str, Any] | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
  """Writes a folder of Hugging Face.

  Args:
    folder: a folder without weights; created if missing.
    config: config of the model.
    params: weights of the model, with merged adapters.
    tokenizer: a `tokenizer.Tokenizer` to write, or None.
    dtype: dtype of the weights in the files; None for that of the embedding.
    generation: generation settings of the original `Model`.
    shard_bytes: largest size of a file; larger models have several files.

  Returns:
    The folder.

  Raises:
    UserError: if the folder already has weights, adapters are not merged, or a
      weight overflows the dtype.
  """
  numpy_files = harness.load_extra(
    'safetensors.numpy', 'llm', 'writing *.safetensors'
  )
  folder = pathlib.Path(folder)
  if list(folder.glob('*.safetensors')):
    raise harness.UserError(f'{folder} already has weights: give a new folder.')
  dtype = jnp.dtype(params['embed'].dtype if dtype is None else dtype)
  shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = []
  total, room = 0, 0
  for name, size, make in _named(config, params):
    size *= dtype.itemsize
    if not shards or size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append((name, make))
    total, room = total + size, room - size
  folder.mkdir(parents=True, exist_ok=True)
  places: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    tensors = {name: _cast(name, make(), dtype) for name, make in shard}
    save_tensors(numpy_files, tensors, folder / file)
    places |= dict.fromkeys(tensors, file)
  if len(shards) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': places}
    write_json(folder / INDEX, index)
  fields = config_lib.to_hugging_face(config, dtype.name)
  if tokenizer is not None:
    tokenizer, tokens = _special_tokens(config, tokenizer, generation or {})
    ends = tokens['eos_token_id']
    # The package transformers reads it here; its default is token 2. It would
    # not train the embedding of a pad_token_id.
    fields['eos_token_id'] = ends[0] if len(ends) == 1 else ends
    if 'bos_token_id' in tokens:
      fields['bos_token_id'] = tokens['bos_token_id']
    write_json(
      folder / 'generation_config.json', {**(generation or {}), **tokens}
    )
    tokenizer.save(folder)
  write_json(folder / 'config.json', fields)
  return folder


def _special_tokens(
  config: config_lib.Config, tokenizer: Any, generation: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
  """Returns a tokeniser with a padding token, and its special numbers."""
  numbers = tokenizer.numbers()
  number = lambda name: numbers.get(tokenizer.tokens.get(name))
  others = checked_files.token_numbers('generation', generation, 'eos_token_id')
  others = [end for end in others if end < config.vocabulary]
  ends = list(dict.fromkeys([int(tokenizer.end), *others]))
  texts = {n: text for text, n in numbers.items()}
  pad = number('pad_token')
  if pad is None:
    pad = generation.get('pad_token_id')
  if pad not in texts:
    pad = int(tokenizer.end)
  fields: dict[str, Any] = {'eos_token_id': ends, 'pad_token_id': pad}
  if (first := number('bos_token')) is not None:
    fields['bos_token_id'] = first
  named = {**tokenizer.tokens, 'pad_token': texts[pad]}
  return tokenizer._replace(tokens=named), fields


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Casts an array; raises UserError if a number overflows."""
  if array.dtype == dtype:
    return array
  with np.errstate(over='ignore'):
    narrow = array.astype(dtype)
  if not np.isfinite(narrow).all() and np.isfinite(array).all():
    raise harness.UserError(
      f'{name} has numbers up to {np.abs(array).max():.3g}, too large for '
      f'{dtype.name}: export as bfloat16 or float32 (--dtype).'
    )
  return narrow


def save_tensors(
  numpy_files: Any,
  tensors: dict[str, np.ndarray],
  path: pathlib.Path,
  **metadata: str,
) -> None:
  """Writes a file of tensors with the permissions of the umask."""
  # The package replaces the file by one that only its owner can read.
  path.touch()
  mode = path.stat().st_mode
  numpy_files.save_file(tensors, path, metadata={'format': 'pt', **metadata})
  path.chmod(mode)


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
