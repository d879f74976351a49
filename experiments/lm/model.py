"""A model as it is loaded, and its tensors in the shapes of the decoder."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import decoder

# Weights that a checkpoint holds transposed, (out, in).
TRANSPOSED = {'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'head'}
# Dtypes of weights in files.
_FLOATS = ('float16', 'bfloat16', 'float32', 'float64')


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


def assemble(
  config: config_lib.Config,
  read: Callable[[str], np.ndarray],
  layer: Callable[[int, str], str],
  top: Mapping[str, str],
  dtype: Any,
) -> dict[str, Any]:
  """Arranges tensors of a checkpoint as the weights of the decoder.

  Args:
    config: of the model.
    read: gives a tensor by its name in the checkpoint.
    layer: number and weight of a layer -> the name of the tensor.
    top: from the other weights to names of tensors.
    dtype: of the weights here.

  Returns:
    Params for `decoder`.

  Raises:
    UserError: if a tensor has another shape, or is quantised; names it.
  """

  def one(name, tensor, shape):
    array = read(tensor)
    if array.dtype not in _FLOATS:
      raise harness.UserError(
        f'the tensor {tensor} is {array.dtype}: quantised weights are not '
        f'read; supported: {", ".join(_FLOATS)}.'
      )
    if name in TRANSPOSED:
      array = array.T
    if array.shape != shape:
      raise harness.UserError(
        f'the tensor {tensor} has the shape {array.shape}, but by its '
        f'configuration the model has {shape}.'
      )
    return array.astype(dtype)

  shapes = decoder.shapes(config)
  params: dict[str, Any] = {
    name: jnp.asarray(one(name, top[name], shape))
    for name, shape in shapes.items()
    if name != 'layers'
  }
  params['layers'] = {
    name: jnp.asarray(
      np.stack(
        [one(name, layer(i, name), shape[1:]) for i in range(config.layers)]
      )
    )
    for name, shape in shapes['layers'].items()
  }
  return params
