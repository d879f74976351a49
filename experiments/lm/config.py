"""What a decoder is: sizes and conventions, from a `config.json` and back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import harness

# What a model type of Hugging Face adds to Llama's layer.
FAMILIES: dict[str, dict[str, bool]] = {
  'llama': {'qkv_bias': False, 'qk_norm': False},
  'qwen2': {'qkv_bias': True, 'qk_norm': False},
  'qwen3': {'qkv_bias': False, 'qk_norm': True},
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How frequencies of a longer context are slowed down.

  Attributes:
    factor: by how much the longest waves are stretched.
    low: waves longer than `context / low` are stretched by the factor.
    high: waves shorter than `context / high` stay; between, interpolated.
    context: the context of the first training, tokens. 0 stretches all waves
      alike, whatever low and high.
  """

  factor: float
  low: float = 1.0
  high: float = 1.0
  context: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and conventions of a decoder of Llama's family.

  Attributes:
    family: 'llama' (also SmolLM2), 'qwen2' or 'qwen3'.
    layers: how many.
    width: of the residual stream.
    hidden: width of the feed-forward layers.
    heads: of the queries.
    kv_heads: of keys and values.
    head_width: of each head.
    vocabulary: rows of the embedding.
    rope_base: of the rotary positions.
    norm_epsilon: of the root mean squares.
    tied: whether the head is the embedding.
    rope_scaling: for longer contexts; None for none.
    context: the longest sequence, tokens.
    qkv_bias: whether queries, keys and values have a bias.
    qk_norm: whether queries and keys are normalised in each head.
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
          f'the model says {name}={getattr(self, name)}, expected at least 1.'
        )
    if self.heads % self.kv_heads or self.head_width % 2:
      raise harness.UserError(
        f'{self.heads} heads are not shared by {self.kv_heads} of keys, or '
        f'their width {self.head_width} is odd.'
      )

  @property
  def flops_a_token(self) -> int:
    """Of the products with weights in a forward pass, without attention."""
    of_heads = self.head_width * (2 * self.heads + 2 * self.kv_heads)
    layer = self.width * (of_heads + 3 * self.hidden)
    return 2 * (self.layers * layer + self.width * self.vocabulary)


def tiny(width: int = 32, vocabulary: int = 260) -> Config:
  """Sizes of a model of two layers, for first tries without any weights.

  Args:
    width: of the residual stream, a multiple of 8.
    vocabulary: by default enough for `byte_tokenizer`.

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
  return f'supported: {", ".join(FAMILIES)} (Llama 3, SmolLM2, Qwen 2 and 3)'


def from_hugging_face(given: Mapping[str, Any]) -> Config:
  """Reads a `config.json`.

  Args:
    given: its fields.

  Returns:
    A `Config`.

  Raises:
    UserError: if the model is of another family, has a convention that is not
      supported, or a field is missing.
  """
  family = given.get('model_type', '')
  if family not in FAMILIES:
    raise harness.UserError(
      f'config.json says model_type={family!r}, which is not supported; '
      f'{_supported()}.'
    )

  def need(name):
    if given.get(name) is None:
      raise harness.UserError(f'config.json has no field {name!r}.')
    return given[name]

  for name, fine in (
    ('hidden_act', 'silu'),
    ('use_sliding_window', False),
    ('mlp_bias', False),
    ('attention_bias', False),
  ):
    if (found := given.get(name, fine)) not in (fine, None):
      raise harness.UserError(
        f'config.json says {name}={found!r}; only {fine!r} is supported.'
      )
  # Newer files hold all that is of rotary positions in one field.
  rope = dict(given.get('rope_parameters') or {})
  scaling = dict(given.get('rope_scaling') or rope)
  base = rope.get('rope_theta', given.get('rope_theta', 10_000.0))
  heads = int(need('num_attention_heads'))
  return Config(
    family=family,
    layers=int(need('num_hidden_layers')),
    width=int(need('hidden_size')),
    hidden=int(need('intermediate_size')),
    heads=heads,
    kv_heads=int(given.get('num_key_value_heads') or heads),
    head_width=int(given.get('head_dim') or need('hidden_size') // heads),
    vocabulary=int(need('vocab_size')),
    rope_base=float(base),
    norm_epsilon=float(given.get('rms_norm_eps', 1e-6)),
    tied=bool(given.get('tie_word_embeddings', False)),
    rope_scaling=_scaling(scaling),
    context=int(given.get('max_position_embeddings') or 0),
    **FAMILIES[family],
  )


def _scaling(given: Mapping[str, Any]) -> RopeScaling | None:
  kind = given.get('rope_type', given.get('type', 'default'))
  if kind == 'default':
    return None
  if kind == 'linear':
    return RopeScaling(float(given['factor']))
  if kind == 'llama3':
    return RopeScaling(
      float(given['factor']),
      float(given['low_freq_factor']),
      float(given['high_freq_factor']),
      int(given['original_max_position_embeddings']),
    )
  raise harness.UserError(
    f'config.json says rope_scaling of type {kind!r}; supported: default, '
    'linear, llama3.'
  )


def to_hugging_face(config: Config, dtype: str = 'float32') -> dict[str, Any]:
  """The fields of a `config.json`, which `from_hugging_face` reads back."""
  names = {
    'llama': 'LlamaForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
  }
  scaling = config.rope_scaling
  told: dict[str, Any] | None = None
  if scaling is not None and scaling.context:
    told = {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low,
      'high_freq_factor': scaling.high,
      'original_max_position_embeddings': scaling.context,
    }
  elif scaling is not None:
    told = {'rope_type': 'linear', 'factor': scaling.factor}
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
    'rope_scaling': told,
    'rms_norm_eps': config.norm_epsilon,
    'tie_word_embeddings': config.tied,
    'max_position_embeddings': config.context or 2048,
    # By the name that others had until 2025, and by the one since.
    'torch_dtype': dtype,
    'dtype': dtype,
  }


def frequencies(config: Config) -> np.ndarray:
  """Angles a token, (head_width / 2,), radians; float64."""
  half = config.head_width // 2
  found = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return found
  if not scaling.context:
    return found / scaling.factor
  # 0 where waves are long, 1 where they are short.
  turns = scaling.context * found / (2 * math.pi)
  kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
  return kept * found + (1 - kept) * found / scaling.factor
