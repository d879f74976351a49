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


def assemble(
  config: config_lib.Config,
  read: Callable[[str], np.ndarray],
  layer: Callable[[int, str], str],
  top: Mapping[str, str],
  dtype: Any,
) -> dict[str, Any]:
  """Converts the tensors of a checkpoint to weights of the decoder.

  Args:
    config: config of the model.
    read: tensor name -> tensor.
    layer: (layer, weight) -> tensor name.
    top: tensor names of the other weights.
    dtype: dtype of the weights.

  Returns:
    Params for `decoder`.

  Raises:
    UserError: if a tensor has the wrong shape or is quantised; names it.
  """

  def convert(name, tensor, shape):
    array = read(tensor)
    if array.dtype not in _FLOATS:
      raise harness.UserError(
        f'the tensor {tensor} is {array.dtype}: quantised weights are not '
        f'supported; supported: {", ".join(_FLOATS)}.'
      )
    if name in TRANSPOSED:
      array = array.T
    if array.shape != shape:
      raise harness.UserError(
        f'the tensor {tensor} has the shape {array.shape}, expected {shape} by '
        'the config of the model.'
      )
    return array.astype(dtype)

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
