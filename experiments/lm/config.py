"""Sizes and conventions of a decoder, from and to a `config.json`."""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness
from experiments.lm import checked_files

# Limits of layers, heads and widths, far above those of any model.
LAYERS, HEADS, WIDTH = 10_000, 2**16, 2**24

# Differences of Hugging Face's model types from Llama's layer.
FAMILIES: dict[str, dict[str, bool]] = {
  'llama': {'qkv_bias': False, 'qk_norm': False},
  'mistral': {'qkv_bias': False, 'qk_norm': False},
  'qwen2': {'qkv_bias': True, 'qk_norm': False},
  'qwen3': {'qkv_bias': False, 'qk_norm': True},
  'smollm3': {'qkv_bias': False, 'qk_norm': False},
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies for a longer context.

  Attributes:
    factor: factor by which long wavelengths are stretched.
    low: wavelengths above `context / low` are stretched by the factor.
    high: wavelengths below `context / high` stay; the rest is interpolated.
    context: context of the first training, tokens; 0 stretches all wavelengths
      by the factor.
  """

  factor: float
  low: float = 1.0
  high: float = 1.0
  context: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and conventions of a decoder of Llama's family.

  Attributes:
    family: one of `FAMILIES`; SmolLM2 is 'llama'.
    layers: number of layers.
    width: width of the residual stream.
    hidden: width of the feed-forward layers.
    heads: number of query heads.
    kv_heads: number of key and value heads.
    head_width: width of a head.
    vocabulary: number of rows of the embedding.
    rope_base: base of the rotary frequencies.
    norm_epsilon: constant of the root mean square normalisation.
    tied: whether the output head shares the embedding.
    rope_scaling: scaling for longer contexts, or None.
    context: longest sequence, tokens.
    qkv_bias: whether queries, keys and values have a bias.
    qk_norm: whether queries and keys are normalised in each head.
    unrotated: numbers of the layers without rotary positions, as in SmolLM3.
  """

  family: str
  layers: int
  width: int
  hidden: int
  heads: int
  kv_heads: int
  head_width: int
  vocabulary: int
  rope_base: float
  norm_epsilon: float
  tied: bool
  rope_scaling: RopeScaling | None = None
  context: int = 0
  qkv_bias: bool = False
  qk_norm: bool = False
  unrotated: tuple[int, ...] = ()

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise harness.UserError(
        f'models of type {self.family!r} are not supported; {_supported()}.'
      )
    for name in (
      'layers',
      'width',
      'hidden',
      'heads',
      'kv_heads',
      'vocabulary',
    ):
      if getattr(self, name) < 1:
        raise harness.UserError(
          f'the model has {name}={getattr(self, name)}, expected at least 1.'
        )
    if self.heads % self.kv_heads or self.head_width % 2 or self.head_width < 2:
      raise harness.UserError(
        f'{self.heads} heads are not a multiple of {self.kv_heads} key heads, '
        f'or the width {self.head_width} of a head is odd or not positive.'
      )
    for name in ('rope_base', 'norm_epsilon'):
      if not 0 < getattr(self, name) < math.inf:
        raise harness.UserError(
          f'the model has {name}={getattr(self, name)}, expected a positive '
          'number.'
        )

  @property
  def flops_per_token(self) -> int:
    """Operations of a forward pass per token, without attention scores."""
    projections = self.head_width * (2 * self.heads + 2 * self.kv_heads)
    layer = self.width * (projections + 3 * self.hidden)
    return 2 * (self.layers * layer + self.width * self.vocabulary)

  def stored_per_token(self, length: int) -> int:
    """Numbers per token of a layer that are stored for the backward pass.

    These are the outputs of its matrix products, see `decoder.run_layers`.

    Args:
      length: tokens of a row, since each has a score for each other one.
    """
    attention = self.head_width * (2 * self.heads + 2 * self.kv_heads)
    return attention + self.heads * length + 2 * self.hidden + 2 * self.width


def tiny(width: int = 32, vocabulary: int = 260) -> Config:
  """Makes the config of a small model with two layers.

  Args:
    width: width of the residual stream, a multiple of 8.
    vocabulary: rows of the embedding; the default fits `byte_tokenizer`.

  Returns:
    A `Config`.
  """
  return Config(
    family='llama',
    layers=2,
    width=width,
    hidden=2 * width,
    heads=4,
    kv_heads=2,
    head_width=width // 4,
    vocabulary=vocabulary,
    rope_base=1e4,
    norm_epsilon=1e-5,
    tied=True,
    context=64,
  )


def _supported() -> str:
  return (
    f'supported: {", ".join(FAMILIES)} (Llama 3, SmolLM2 and 3, Mistral '
    'without a sliding window, Qwen 2 and 3)'
  )


def from_hugging_face(
  fields: Mapping[str, Any], source: str | pathlib.Path = 'config.json'
) -> Config:
  """Converts the fields of a `config.json`.

  Args:
    fields: its fields.
    source: its path, for messages.

  Returns:
    A `Config`.

  Raises:
    UserError: if the family or a convention is not supported, or a field is
      missing, has another type or is out of range.
  """
  family = fields.get('model_type', '')
  if not isinstance(family, str) or family not in FAMILIES:
    raise harness.UserError(
      f'{source} has model_type={family!r}, which is not supported; '
      f'{_supported()}.'
    )
  for name, supported in (
    ('hidden_act', 'silu'),
    ('use_sliding_window', False),
    ('mlp_bias', False),
    ('attention_bias', False),
  ):
    if (value := fields.get(name, supported)) not in (supported, None):
      raise harness.UserError(
        f'{source} has {name}={value!r}; only {supported!r} is supported.'
      )
  integer = lambda name, high, default=None: checked_files.integer(
    source, fields, name, 1, high, default
  )
  # Without this field, transformers assumes a window of 4,096 tokens.
  window = fields.get('sliding_window', 4096) if family == 'mistral' else None
  if window is not None:
    raise harness.UserError(
      f'{source} has sliding_window={window!r} (4096 if missing), which is not '
      'supported; Mistral 7B has none from version 0.2 on. Set it to null if '
      'your rows are shorter than the window.'
    )
  width, heads = (
    integer('hidden_size', WIDTH),
    integer('num_attention_heads', HEADS),
  )
  layers, unrotated = integer('num_hidden_layers', LAYERS), ()
  if family == 'smollm3':
    unrotated = _unrotated(source, fields, layers)
  # Newer files have all settings of rotary positions in one field.
  rope = checked_files.typed(source, fields, 'rope_parameters', dict, {})
  scaling = checked_files.typed(source, fields, 'rope_scaling', dict, rope)
  base = {'rope_theta': rope.get('rope_theta', fields.get('rope_theta'))}
  return make(
    source,
    family=family,
    layers=layers,
    width=width,
    hidden=integer('intermediate_size', WIDTH),
    heads=heads,
    kv_heads=integer('num_key_value_heads', HEADS, heads),
    head_width=integer('head_dim', WIDTH, width // heads),
    vocabulary=integer('vocab_size', WIDTH),
    rope_base=checked_files.number(
      source,
      base,
      'rope_theta',
      default=2_000_000.0 if family == 'smollm3' else 10_000.0,
    ),
    norm_epsilon=checked_files.number(
      source, fields, 'rms_norm_eps', default=1e-6
    ),
    tied=checked_files.typed(
      source, fields, 'tie_word_embeddings', bool, family == 'smollm3'
    ),
    rope_scaling=_scaling(source, scaling),
    context=checked_files.integer(
      source, fields, 'max_position_embeddings', 0, default=0
    ),
    unrotated=unrotated,
  )


def _unrotated(source, fields, layers):
  """Numbers of SmolLM3's layers without rotary positions."""
  every = checked_files.integer(
    source, fields, 'no_rope_layer_interval', 1, LAYERS, 4
  )
  usual = [int((i + 1) % every != 0) for i in range(layers)]
  rotated = checked_files.typed(source, fields, 'no_rope_layers', list, usual)
  if len(rotated) != layers or any(x not in (0, 1) for x in rotated):
    raise harness.DamagedDataError(
      f'{source} has no_rope_layers={reprlib.repr(rotated)}, expected {layers} '
      'numbers, 0 for a layer without rotary positions and 1 for others.'
    )
  return tuple(i for i, x in enumerate(rotated) if not x)


def make(source: str | pathlib.Path, *, family: str, **fields: Any) -> Config:
  """Makes a config from a file; errors name the file."""
  try:
    return Config(family=family, **fields, **FAMILIES[family])
  except harness.UserError as error:
    raise harness.DamagedDataError(f'{source}: {error}') from error


def _scaling(
  source: str | pathlib.Path, fields: Mapping[str, Any]
) -> RopeScaling | None:
  kind = fields.get('rope_type', fields.get('type', 'default'))
  if kind == 'default':
    return None
  place = f'{source}: rope_scaling'
  number = lambda name: checked_files.number(place, fields, name)
  if kind == 'linear':
    return RopeScaling(number('factor'))
  if kind != 'llama3':
    raise harness.UserError(
      f'{source} has rope_scaling of type {kind!r}; supported: default, '
      'linear, llama3.'
    )
  low, high = number('low_freq_factor'), number('high_freq_factor')
  if low >= high:
    raise harness.DamagedDataError(
      f'{place} has low_freq_factor={low:g}, expected less than '
      f'high_freq_factor={high:g}.'
    )
  context = checked_files.integer(
    place, fields, 'original_max_position_embeddings'
  )
  return RopeScaling(number('factor'), low, high, context)


def to_hugging_face(config: Config, dtype: str = 'float32') -> dict[str, Any]:
  """Converts to the fields of a `config.json`."""
  names = {
    'llama': 'LlamaForCausalLM',
    'mistral': 'MistralForCausalLM',
    'smollm3': 'SmolLM3ForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
  }
  scaling = config.rope_scaling
  rope: dict[str, Any] | None = None
  if scaling is not None and scaling.context:
    rope = {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low,
      'high_freq_factor': scaling.high,
      'original_max_position_embeddings': scaling.context,
    }
  elif scaling is not None:
    rope = {'rope_type': 'linear', 'factor': scaling.factor}
  return {
    'architectures': [names[config.family]],
    'model_type': config.family,
    'hidden_act': 'silu',
    'num_hidden_layers': config.layers,
    'hidden_size': config.width,
    'intermediate_size': config.hidden,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_width,
    'vocab_size': config.vocabulary,
    'rope_theta': config.rope_base,
    'rope_scaling': rope,
    'rms_norm_eps': config.norm_epsilon,
    'tie_word_embeddings': config.tied,
    'max_position_embeddings': config.context or 2048,
    'sliding_window': None,
    'no_rope_layers': [
      int(i not in config.unrotated) for i in range(config.layers)
    ],
    # The name until 2025, and the name since.
    'torch_dtype': dtype,
    'dtype': dtype,
  }


def frequencies(config: Config) -> np.ndarray:
  """Rotary angles per token, (head_width / 2,), radians; float64."""
  half = config.head_width // 2
  angles = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return angles
  if not scaling.context:
    return angles / scaling.factor
  # 0 for long wavelengths, 1 for short ones.
  turns = scaling.context * angles / (2 * math.pi)
  short = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
  return short * angles + (1 - short) * angles / scaling.factor
