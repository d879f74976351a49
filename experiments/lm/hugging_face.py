"""Folders of Hugging Face: `config.json`, `*.safetensors`, the tokeniser."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import decoder
from experiments.lm.model import TRANSPOSED, Model, assemble

# From a layer's weight to its name in a checkpoint.
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
# Bytes of a file of weights, beyond which there are several; as others have it.
SHARD_BYTES = 5 * 10**9


def load(folder: pathlib.Path, dtype: Any) -> Model:
  """Loads a folder; see `weights.load`."""
  safetensors = harness.load_extra(
    'safetensors', 'llm', 'reading *.safetensors'
  )
  try:
    raw = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise harness.UserError(f'{folder} has no config.json.') from error
  except ValueError as error:
    raise harness.UserError(f'{folder}/config.json: {error}.') from error
  config = config_lib.from_hugging_face(raw)
  files = sorted(folder.glob('*.safetensors'))
  if not files:
    raise harness.UserError(
      f'{folder} has no *.safetensors: weights in other formats (*.bin) have '
      'to be converted first.'
    )
  opened = {f: safetensors.safe_open(f, framework='flax') for f in files}
  where = {name: f for f, handle in opened.items() for name in handle.keys()}  # noqa: SIM118
  if config.tied is False and _TOP['head'] not in where:
    raise harness.UserError(
      f'{folder}: config.json says tie_word_embeddings=false, but there is no '
      f'tensor {_TOP["head"]}.'
    )

  def read(name):
    if name not in where:
      raise harness.UserError(f'{folder} has no tensor {name}.')
    # By JAX: numpy has no bfloat16.
    return np.asarray(opened[where[name]].get_tensor(name))

  layer = lambda i, name: f'model.layers.{i}.{LAYER[name]}'
  source = _source_dtype(opened)
  params = assemble(config, read, layer, _TOP, dtype or source)
  return Model(config, params, folder, source, _generation(folder, raw))


def _source_dtype(opened: Mapping[pathlib.Path, Any]) -> np.dtype:
  """The narrowest dtype in which all tensors of some files are exact."""
  named = {'F16': jnp.float16, 'BF16': jnp.bfloat16}
  stored = {
    handle.get_slice(name).get_dtype()
    for handle in opened.values()
    for name in handle.keys()  # noqa: SIM118
  }
  kinds = [named.get(kind, jnp.float32) for kind in stored]
  return jnp.dtype(functools.reduce(jnp.promote_types, kinds))


def _generation(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> dict[str, Any]:
  """How a model generates, by its two files."""
  fields: dict[str, Any] = {}
  path = folder / 'generation_config.json'
  if path.exists():
    try:
      fields = dict(json.loads(path.read_text(encoding='utf-8')))
    except (ValueError, TypeError) as error:
      raise harness.UserError(f'{path}: {error}.') from error
  fields.pop('transformers_version', None)
  ends = [*_ends(fields), *_ends(config)]
  if ends:
    fields['eos_token_id'] = list(dict.fromkeys(ends))
  if fields.get('pad_token_id') is None and 'pad_token_id' in config:
    fields['pad_token_id'] = config['pad_token_id']
  return fields


def _ends(fields: Mapping[str, Any]) -> list[int]:
  """The tokens that end an answer: one, several, or unset."""
  ends = fields.get('eos_token_id')
  several = ends if isinstance(ends, list) else [ends]
  return [int(end) for end in several if end is not None]


def _named(
  config: config_lib.Config, params: decoder.Params
) -> Iterable[tuple[str, int, Callable[[], np.ndarray]]]:
  """Names of Hugging Face, sizes, and functions to arrays in its layout."""

  def array(name, stacked, *at):
    one = np.asarray(stacked[at] if at else stacked)
    return np.ascontiguousarray(one.T if name in TRANSPOSED else one)

  for name, tensor in _TOP.items():
    if name in params:
      one = params[name]
      yield tensor, one.size, functools.partial(array, name, one)
  for name, stacked in params['layers'].items():
    if name not in LAYER:
      raise harness.UserError(
        f'the layers have {name!r}, which no checkpoint has: merge the '
        'adapters first, by lora.merge.'
      )
    size = stacked.size // config.layers
    for i in range(config.layers):
      tensor = f'model.layers.{i}.{LAYER[name]}'
      yield tensor, size, functools.partial(array, name, stacked, i)


def tensors_of(
  config: config_lib.Config, params: decoder.Params
) -> Iterable[tuple[str, np.ndarray]]:
  """All tensors under the names of Hugging Face, in its layout."""
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
  """Writes a folder that others, and `load` read.

  Args:
    folder: to be made; not one that has weights already.
    config: of the model.
    params: of the whole model, adapters merged.
    tokenizer: a `tokenizer.Tokenizer`, whose files are written too.
    dtype: of the weights in the files; None for that of the embedding.
    generation: of the `Model` from which this one was made.
    shard_bytes: the largest file of weights; a larger model is in several.

  Returns:
    The folder.

  Raises:
    UserError: if the folder has weights already, adapters are not merged, or a
      weight is too large for the dtype.
  """
  numpy_files = harness.load_extra(
    'safetensors.numpy', 'llm', 'writing *.safetensors'
  )
  folder = pathlib.Path(folder)
  if list(folder.glob('*.safetensors')):
    raise harness.UserError(f'{folder} has weights already: take a new folder.')
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
    write_json(folder / 'model.safetensors.index.json', index)
  fields = config_lib.to_hugging_face(config, dtype.name)
  if tokenizer is not None:
    tokenizer, tokens = _special_tokens(config, tokenizer, generation or {})
    ends = tokens['eos_token_id']
    # Others end an answer where this says, by default at the token 2. Here is
    # no pad_token_id: its row of the embedding would not be trained by others.
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
  """A tokeniser with a token that pads, and the numbers of its tokens."""
  numbers = tokenizer.numbers()
  number = lambda name: numbers.get(tokenizer.tokens.get(name))
  others = [end for end in _ends(generation) if 0 <= end < config.vocabulary]
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
  """An array in another dtype, or an error where that has no such numbers."""
  if array.dtype == dtype:
    return array
  with np.errstate(over='ignore'):
    narrow = array.astype(dtype)
  if not np.isfinite(narrow).all() and np.isfinite(array).all():
    raise harness.UserError(
      f'{name} has numbers up to {np.abs(array).max():.3g}, too large for '
      f'{dtype.name}: export in bfloat16 or float32 (--dtype).'
    )
  return narrow


def save_tensors(
  numpy_files: Any, tensors: dict[str, np.ndarray], path: pathlib.Path
) -> None:
  """Writes a file of tensors that others may read, as the umask says."""
  # The package replaces the file by one for its owner alone.
  path.touch()
  mode = path.stat().st_mode
  numpy_files.save_file(tensors, path, metadata={'format': 'pt'})
  path.chmod(mode)


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')
