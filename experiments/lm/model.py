"""A loaded model, and the conversion of its tensors for the decoder."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import decoder

# Weights that a checkpoint stores transposed, (out, in).
TRANSPOSED = {'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'head'}
# Dtypes of weights in files.
_FLOATS = ('float16', 'bfloat16', 'float32', 'float64')


class Model(NamedTuple):
  """A loaded model.

  Attributes:
    config: sizes and conventions.
    params: weights for `decoder`.
    vocabulary: source for `tokenizer.load`: the folder, or the fields of a GGUF
      file.
    dtype: widest dtype of the weights in the files; float32 if quantised.
    generation: fields of `generation_config.json`, such as `eos_token_id` (the
      tokens that end an answer) and `pad_token_id`.
  """

  config: config_lib.Config
  params: dict[str, Any]
  vocabulary: Any
  dtype: Any = jnp.dtype(jnp.float32)
  generation: Mapping[str, Any] = types.MappingProxyType({})


class Tensors(NamedTuple):
  """The tensors of a checkpoint; all functions take a name.

  Attributes:
    place: file of a tensor, for messages; raises UserError if it is missing.
    shape: shape of a tensor, without reading it.
    read: the tensor.
  """

  place: Callable[[str], Any]
  shape: Callable[[str], tuple[int, ...]]
  read: Callable[[str], np.ndarray]


def assemble(
  config: config_lib.Config,
  tensors: Tensors,
  layer: Callable[[int, str], str],
  top: Mapping[str, str],
  dtype: Any,
) -> dict[str, Any]:
  """Converts the tensors of a checkpoint to weights of the decoder.

  Args:
    config: config of the model.
    tensors: the tensors.
    layer: (layer, weight) -> tensor name.
    top: tensor names of the other weights.
    dtype: dtype of the weights.

  Returns:
    Params for `decoder`.

  Raises:
    UserError: if a tensor has the wrong shape, is quantised, or has NaN or
      infinity; names it and its file.
  """

  def convert(name, tensor, shape):
    place = f'{tensors.place(tensor)}: the tensor {tensor}'
    stored = shape[::-1] if name in TRANSPOSED else shape
    # Checked first: a file may announce terabytes.
    if (actual := tuple(tensors.shape(tensor))) != stored:
      raise harness.DamagedDataError(
        f'{place} has the shape {actual}, expected {stored} by the config of '
        'the model.'
      )
    array = tensors.read(tensor)
    if array.dtype not in _FLOATS:
      raise harness.DamagedDataError(
        f'{place} is {array.dtype}: quantised weights are not supported; '
        f'supported: {", ".join(_FLOATS)}.'
      )
    with np.errstate(over='ignore'):
      array = array.astype(dtype)
    if not np.isfinite(array).all():
      raise harness.DamagedDataError(
        f'{place} has NaN, infinity or numbers too large for '
        f'{array.dtype.name}.'
      )
    return array.T if name in TRANSPOSED else array

  shapes = decoder.shapes(config)
  params: dict[str, Any] = {
    name: jnp.asarray(convert(name, top[name], shape))
    for name, shape in shapes.items()
    if name != 'layers'
  }
  params['layers'] = {
    name: jnp.asarray(
      np.stack(
        [convert(name, layer(i, name), shape[1:]) for i in range(config.layers)]
      )
    )
    for name, shape in shapes['layers'].items()
  }
  return params
