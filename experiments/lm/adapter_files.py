"""Reads and writes low-rank adapters in the format of the package peft."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import decoder, hugging_face
from experiments.lm.hugging_face import LAYER
from experiments.lm.model import TRANSPOSED


def export(
  folder: str | pathlib.Path,
  config: config_lib.Config,
  adapters: Mapping[str, Any],
  *,
  alpha: float,
  base: str = '',
) -> pathlib.Path:
  """Writes adapters in the format of peft.

  Args:
    folder: a folder without adapters; created if missing.
    config: config of the model.
    adapters: adapters from `lora.init`, of all layers or of the last ones.
    alpha: scale of the adapters times their rank.
    base: path or name of the base model, for readers.

  Returns:
    The folder.

  Raises:
    UserError: if the folder already has adapters.
  """
  numpy_files = harness.load_extra(
    'safetensors.numpy', 'llm', 'writing *.safetensors'
  )
  folder = pathlib.Path(folder)
  path = folder / 'adapter_model.safetensors'
  if path.exists():
    raise harness.UserError(
      f'{folder} already has adapters: give a new folder.'
    )
  names = sorted({name.partition('.')[0] for name in adapters})
  count, _, rank = adapters[f'{names[0]}.a'].shape
  first = config.layers - count
  tensors = {}
  parts = {'a': 'lora_A.weight', 'b': 'lora_B.weight'}
  dora = any(name.endswith('.m') for name in adapters)
  if dora:
    parts['m'] = 'lora_magnitude_vector'
  for name in names:
    # peft stores (rank, in) and (out, rank) under the names of modules.
    module = LAYER[name].removesuffix('.weight')
    for i in range(count):
      where = f'base_model.model.model.layers.{first + i}.{module}'
      for suffix, part in parts.items():
        array = np.asarray(adapters[f'{name}.{suffix}'][i]).T
        tensors[f'{where}.{part}'] = np.ascontiguousarray(array)
  folder.mkdir(parents=True, exist_ok=True)
  hugging_face.save_tensors(numpy_files, tensors, path)
  fields = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': int(rank),
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'use_dora': dora,
    'inference_mode': True,
    'target_modules': [LAYER[name].split('.')[1] for name in names],
    'layers_to_transform': list(range(first, config.layers)),
  }
  hugging_face.write_json(folder / 'adapter_config.json', fields)
  return folder


# Fields of an adapter_config.json that are irrelevant here or checked.
_ADAPTER_FIELDS = {
  'auto_mapping', 'base_model_name_or_path', 'corda_config',
  'eva_config', 'exclude_modules', 'inference_mode', 'layers_pattern',
  'layers_to_transform', 'lora_alpha', 'lora_dropout', 'megatron_core',
  'peft_version', 'r', 'revision', 'runtime_config', 'target_modules',
  'task_type', 'use_dora', 'use_rslora', 'qalora_group_size',
}  # fmt: skip
# Supported values of further fields; all others have to be false or empty.
# Initialisations such as PiSSA and OLoRA change the base model.
_ADAPTER_NEUTRAL = {
  'peft_type': ('LORA',),
  'bias': ('none',),
  'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal'),
}


def _adapter_config(path: pathlib.Path) -> dict[str, Any]:
  """Reads an `adapter_config.json`.

  Raises:
    UserError: if a field is not supported, missing or invalid.
  """
  fields = json.loads(path.read_text(encoding='utf-8'))
  for name, value in fields.items():
    neutral = _ADAPTER_NEUTRAL.get(name)
    supported = not value if neutral is None else value in neutral
    if not supported and name not in _ADAPTER_FIELDS:
      raise harness.UserError(
        f'{path} has {name}={value!r}, which is not supported: merge these '
        'adapters into the model with peft (merge_and_unload), and give the '
        'merged model.'
      )
  for name, low in (('r', 1), ('lora_alpha', 0)):
    value = fields.get(name)
    types = (int,) if name == 'r' else (int, float)
    if type(value) not in types or not value >= low:
      raise harness.UserError(
        f'{path} has {name}={value!r}, expected a number of at least {low}.'
      )
  return fields


def load(
  folder: str | pathlib.Path, config: config_lib.Config
) -> tuple[dict[str, Any], float]:
  """Reads adapters in the format of peft.

  Args:
    folder: folder with `adapter_config.json` and `adapter_model.safetensors`.
    config: config of their model.

  Returns:
    Adapters for `lora`, of the last layers of the model; with `use_dora` also
    magnitudes `name.m`, (layers, out). And the scale of their products: alpha /
    rank, or with `use_rslora` alpha / sqrt(rank).

  Raises:
    UserError: if files or tensors are missing, belong to another model, or need
      a configuration that is not supported.
  """
  numpy_files = harness.load_extra(
    'safetensors.numpy', 'llm', 'reading *.safetensors'
  )
  folder = pathlib.Path(folder)
  path = folder / 'adapter_config.json'
  try:
    fields = _adapter_config(path)
    tensors = numpy_files.load_file(folder / 'adapter_model.safetensors')
  except (OSError, ValueError) as error:
    raise harness.UserError(f'{folder} has no adapters: {error}.') from error
  rank, dora = fields['r'], bool(fields.get('use_dora'))
  modules = {
    n: LAYER[n].removesuffix('.weight') for n in sorted(TRANSPOSED & {*LAYER})
  }
  parts = {'a': 'lora_A.weight', 'b': 'lora_B.weight'}
  if dora:
    parts['m'] = 'lora_magnitude_vector'
    # Some versions of peft append the name of the parameter.
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
      f'is not an adapter of {", ".join(sorted(modules.values()))} of a model '
      f'with {config.layers} layers.'
    )
  used = {known[name] for name in tensors}
  first = min(used, default=config.layers)
  if used != set(range(first, config.layers)) or not used:
    raise harness.UserError(
      f'{folder} has adapters of the layers {sorted(used)}, expected the last '
      f'layers of {config.layers}.'
    )
  _check_targets(path, fields, tensors, used)
  adapters: dict[str, Any] = {}
  shapes = decoder.shapes(config)['layers']
  for name, module in modules.items():
    _, into, out = shapes[name]
    expected = {'a': (rank, into), 'b': (out, rank), 'm': (out,)}
    if not any(f'.{module}.' in key for key in tensors):
      continue
    for suffix, part in parts.items():
      arrays = []
      for i in range(first, config.layers):
        key = f'{where}{i}.{module}.{part}'
        if key not in tensors:
          raise harness.UserError(f'{folder} has no tensor {key}.')
        if tensors[key].shape != expected[suffix]:
          raise harness.UserError(
            f'{folder}: {key} has the shape {tensors[key].shape}, expected '
            f'{expected[suffix]} for this model and r={rank}.'
          )
        arrays.append(jnp.asarray(tensors[key], jnp.float32).T)
      adapters[f'{name}.{suffix}'] = jnp.stack(arrays)
  divisor = rank**0.5 if fields.get('use_rslora') else rank
  return adapters, float(fields['lora_alpha']) / divisor


def _check_targets(
  path: pathlib.Path,
  fields: Mapping[str, Any],
  tensors: Iterable[str],
  used: set[int],
) -> None:
  """Raises UserError if tensors do not match the layers and modules."""
  layers = fields.get('layers_to_transform')
  if layers is not None:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    if wanted != used:
      raise harness.UserError(
        f'{path} has layers_to_transform={layers!r}, but the tensors are of '
        f'the layers {sorted(used)}: the files are not from one model.'
      )
  targets = fields.get('target_modules')
  if isinstance(targets, str) or targets is None:
    return  # A pattern, or the default of peft.
  modules = {name.split('.lora_')[0].rsplit('.', 1)[1] for name in tensors}
  if modules != {target.rsplit('.', 1)[-1] for target in targets}:
    raise harness.UserError(
      f'{path} has target_modules={sorted(targets)}, but the tensors are of '
      f'{sorted(modules)}: the files are not from one model.'
    )
