"""Reads and writes low-rank adapters in the format of the package peft."""

import json
import pathlib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.harness.data import json_values
from experiments.lm import checked_files, decoder, hugging_face
from experiments.lm import config as config_lib
from experiments.lm.hugging_face import LAYER
from experiments.lm.model import TRANSPOSED

# Key of the base model's sample in the metadata of the tensors, which peft does
# not read, and the largest distance of samples relative to their norm. A cast
# to bfloat16 changes at most half of it.
_SAMPLE, _MOST_CHANGE = 'base_weights', 2**-8


def _sample(params: decoder.Params) -> dict[str, list[float]]:
  """Takes one number of each layer from each kind of weight."""
  sample = {}
  for name, weight in params['layers'].items():
    middle = tuple(size // 2 for size in weight.shape[1:])
    numbers = np.asarray(weight[:, *middle], np.float32)
    sample[name] = [float(f'{number:.5g}') for number in numbers]
  return sample


def _check_base(
  path: pathlib.Path, sample: Mapping[str, Any], params: decoder.Params
) -> None:
  """Raises UserError if adapters were trained on other weights."""
  changed_weights = []
  with harness.parsing(path, 'safetensors file'):
    for name, numbers in _sample(params).items():
      before = np.array(sample[name], np.float64)
      distance = np.linalg.norm(before - np.array(numbers))
      if not distance <= _MOST_CHANGE * np.linalg.norm(before):
        changed_weights.append(name)
  if changed_weights:
    raise harness.UserError(
      f'{path}: these adapters were trained on a model with other weights '
      f'({", ".join(changed_weights)}), or they are merged into this model '
      'already: give the model from which their training started.'
    )


def export(
  folder: str | pathlib.Path,
  config: config_lib.Config,
  adapters: Mapping[str, Any],
  *,
  alpha: float,
  base: str = '',
  base_params: decoder.Params | None = None,
) -> pathlib.Path:
  """Writes adapters in the format of peft.

  Args:
    folder: a folder without adapters; created if missing.
    config: config of the model.
    adapters: adapters from `lora.init`, of all layers or of the last ones.
    alpha: scale of the adapters times their rank.
    base: path or name of the base model, for readers.
    base_params: weights of the base model, to recognise it in `load`; or None.

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
  metadata = {}
  if base_params is not None:
    metadata[_SAMPLE] = json.dumps(_sample(base_params))
  hugging_face.save_tensors(numpy_files, tensors, path, **metadata)
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
  fields = checked_files.read_json(path, path.parent)
  for name, value in fields.items():
    neutral = _ADAPTER_NEUTRAL.get(name)
    supported = not value if neutral is None else value in neutral
    if not supported and name not in _ADAPTER_FIELDS:
      raise harness.UserError(
        f'{path} has {name}={value!r}, which is not supported: merge these '
        'adapters into the model with peft (merge_and_unload), and give the '
        'merged model.'
      )
  checked_files.integer(path, fields, 'r', 1, config_lib.WIDTH)
  checked_files.number(path, fields, 'lora_alpha')
  for name in ('use_dora', 'use_rslora'):
    checked_files.typed(path, fields, name, bool, False)
  return fields


def load(
  folder: str | pathlib.Path,
  config: config_lib.Config,
  params: decoder.Params | None = None,
) -> tuple[dict[str, Any], float]:
  """Reads adapters in the format of peft.

  Args:
    folder: folder with `adapter_config.json` and `adapter_model.safetensors`.
    config: config of their model.
    params: weights of the model, which are compared with those on which the
      adapters were trained, if these are recorded; None compares nothing.

  Returns:
    Adapters for `lora`, of the last layers of the model; with `use_dora` also
    magnitudes `name.m`, (layers, out). And the scale of their products: alpha /
    rank, or with `use_rslora` alpha / sqrt(rank).

  Raises:
    UserError: if files or tensors are missing, belong to another model, or need
      a configuration that is not supported.
  """
  folder = pathlib.Path(folder)
  path = folder / 'adapter_config.json'
  file = folder / 'adapter_model.safetensors'
  if not (checked_files.exists(path) and checked_files.exists(file)):
    why = f'{path.name} or {file.name} is missing'
    if not checked_files.exists(folder):
      why = 'the folder does not exist'
    elif checked_files.exists(folder / 'adapters' / path.name):
      why += f', but {folder / "adapters"} has them'
    raise harness.UserError(f'{folder} has no adapters: {why}.')
  fields = _adapter_config(path)
  tensors, sample = _read_tensors(file)
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
      f'{file} has the tensor {foreign[0]}, which '
      f'is not an adapter of {", ".join(sorted(modules.values()))} of a model '
      f'with {config.layers} layers.'
    )
  used = {known[name] for name in tensors}
  first = min(used, default=config.layers)
  if used != set(range(first, config.layers)) or not used:
    raise harness.UserError(
      f'{file} has adapters of the layers {sorted(used)}, expected the last '
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
          raise harness.UserError(f'{file} has no tensor {key}.')
        if tensors[key].shape != expected[suffix]:
          raise harness.UserError(
            f'{file}: {key} has the shape {tensors[key].shape}, expected '
            f'{expected[suffix]} for this model and r={rank}.'
          )
        arrays.append(jnp.asarray(tensors[key], jnp.float32).T)
      adapters[f'{name}.{suffix}'] = jnp.stack(arrays)
  if sample and params is not None:
    _check_base(file, sample, params)
  divisor = rank**0.5 if fields.get('use_rslora') else rank
  return adapters, float(fields['lora_alpha']) / divisor


def _read_tensors(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads tensors of adapters and the base's sample; raises UserError."""
  handle = hugging_face.open_tensors(path, path.parent)
  with harness.parsing(path, 'safetensors file'):
    tensors = {
      name: np.asarray(handle.get_tensor(name))
      for name in handle.keys()  # noqa: SIM118
    }
    sample = json_values.parse_json(
      (handle.metadata() or {}).get(_SAMPLE, '{}')
    )
  for name, array in tensors.items():
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if not floating or not np.isfinite(array).all():
      raise harness.DamagedDataError(
        f'{path}: the tensor {name} is {array.dtype}, or has NaN or infinity; '
        'expected finite floating-point numbers.'
      )
  return tensors, sample


def _check_targets(
  path: pathlib.Path,
  fields: Mapping[str, Any],
  tensors: Iterable[str],
  used: set[int],
) -> None:
  """Raises UserError if tensors do not match the layers and modules."""
  layers = fields.get('layers_to_transform')
  if layers is not None:
    listed = layers if isinstance(layers, list) else [layers]
    if any(type(i) is not int for i in listed) or {*listed} != used:
      raise harness.UserError(
        f'{path} has layers_to_transform={layers!r}, but the tensors are of '
        f'the layers {sorted(used)}: the files are not from one model.'
      )
  targets = fields.get('target_modules')
  if isinstance(targets, str) or targets is None:
    return  # A pattern, or the default of peft.
  if not isinstance(targets, list) or any(type(t) is not str for t in targets):
    raise harness.DamagedDataError(
      f'{path} has target_modules={reprlib.repr(targets)}, expected names of '
      'modules.'
    )
  modules = {name.split('.lora_')[0].rsplit('.', 1)[1] for name in tensors}
  if modules != {target.rsplit('.', 1)[-1] for target in targets}:
    raise harness.UserError(
      f'{path} has target_modules={sorted(targets)}, but the tensors are of '
      f'{sorted(modules)}: the files are not from one model.'
    )
