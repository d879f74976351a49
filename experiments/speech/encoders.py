"""Encoders: strided convolutions, then convolutions, LSTMs or a Conformer.

An encoder maps features (batch, frames, numbers), lengths, a dropout key (or
None) and a dropout rate to (batch, out, width) and output lengths, with
`out = ceil(frames / shrink)`. Padding does not affect the outputs within the
lengths.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import harness
from experiments.lm import decoder
from experiments.speech import front_end

KINDS = ('conv', 'conv_lstm', 'conformer')


def shrunk(length: Any, strides: Sequence[int]) -> Any:
  """Number of frames after strided layers, rounded up at each."""
  for stride in strides:
    length = -(-length // stride)
  return length


def _dropped(key, rate, count, rows, width):
  """Dropout factors (rows, 1, width), one draw per channel and utterance.

  All layers share one call: compiling many random draws takes seconds.
  """
  if key is None or not rate:
    return [1.0] * count
  mask = jax.random.bernoulli(key, 1 - rate, (count, rows, 1, width))
  return list(mask / (1 - rate))


def _masked(x, lengths):
  return x * front_end.length_mask(lengths, x.shape[1])[..., None]


class TimeConvolution(nnx.Module):
  """A convolution over time that masks padding.

  It is one matrix product with stacked frames: on a CPU, a convolution in a
  loop over members takes ten times as long.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: int,
    stride: int,
    causal: bool,
    rngs: nnx.Rngs,
  ):
    """Initialises a kernel of `size` frames; a causal one ends at its frame."""
    left = size - 1 if causal else size // 2
    self.size, self.stride, self.left = size, stride, left
    # The features of silence are zeros: with a zero bias, each normalisation
    # would multiply the gradient by a thousand.
    start = nnx.initializers.normal(0.1)
    self.inner = nnx.Linear(size * inputs, outputs, bias_init=start, rngs=rngs)

  def __call__(self, x: chex.Array, lengths: chex.Array) -> Any:
    """Returns the output and its lengths."""
    frames = _taps(_masked(x, lengths), self.size, self.stride, self.left)
    output = self.inner(jnp.concatenate(frames, axis=-1))
    return output, shrunk(lengths, [self.stride])


class Depthwise(nnx.Module):
  """A depthwise convolution over time."""

  def __init__(self, width: int, size: int, causal: bool, rngs: nnx.Rngs):
    """Initialises a kernel of `size` frames."""
    self.size, self.left = size, size - 1 if causal else size // 2
    start = nnx.initializers.normal(size**-0.5)
    self.kernel = nnx.Param(start(rngs.params(), (size, width)))

  def __call__(self, x: chex.Array, lengths: chex.Array) -> chex.Array:
    """Returns an output of the same shape."""
    frames = _taps(_masked(x, lengths), self.size, 1, self.left)
    return sum(frame * tap for frame, tap in zip(frames, self.kernel[...]))


def _taps(x, size, stride, left):
  """Input frames at each of the `size` positions of a kernel."""
  out = -(-x.shape[1] // stride)
  right = max((out - 1) * stride + size - left - x.shape[1], 0)
  x = jnp.pad(x, [(0, 0), (left, right), (0, 0)])
  last = (out - 1) * stride + 1
  return [x[:, i : i + last : stride] for i in range(size)]


class Block(nnx.Module):
  """Convolution, layer normalisation and GELU, residual if the shapes allow."""

  def __init__(
    self,
    inputs: int,
    width: int,
    size: int,
    stride: int,
    causal: bool,
    rngs: nnx.Rngs,
  ):
    """Initialises the weights."""
    self.convolution = TimeConvolution(
      inputs, width, size, stride, causal, rngs
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.shortcut = stride == 1 and inputs == width

  def __call__(self, x, lengths, factor):
    """Returns the output and its lengths."""
    y, lengths = self.convolution(x, lengths)
    y = factor * nnx.gelu(self.norm(y))
    return (x + y if self.shortcut else y), lengths


class OneWay(nnx.Module):
  """A unidirectional LSTM with one input product for all frames.

  The LSTM of flax holds a random state and multiplies the input in each step.
  """

  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
    """Initialises the weights, with a bias of 1 for the forget gate."""
    self.inner = nnx.Linear(inputs, 4 * outputs, rngs=rngs)
    open_ = jnp.array([0, 1, 0, 0], self.inner.bias[...].dtype)
    self.inner.bias[...] = jnp.repeat(open_, outputs)
    start = nnx.initializers.orthogonal()
    self.recurrent = nnx.Param(start(rngs.params(), (outputs, 4 * outputs)))

  def __call__(self, x: chex.Array) -> chex.Array:
    """(batch, frames, inputs) -> (batch, frames, outputs)."""
    kernel = self.recurrent[...]

    def step(carry, read):
      cell, out = carry
      gates = jnp.split(read + out @ kernel, 4, axis=-1)
      write, keep, show = map(jax.nn.sigmoid, gates[:3])
      cell = keep * cell + write * jnp.tanh(gates[3])
      out = show * jnp.tanh(cell)
      return (cell, out), out

    start = jnp.zeros((len(x), len(kernel)), x.dtype)
    read = jnp.moveaxis(self.inner(x), 1, 0)
    _, outputs = jax.lax.scan(step, (start, start), read)
    return jnp.moveaxis(outputs, 0, 1)


class Lstm(nnx.Module):
  """A residual LSTM layer, bidirectional unless it is causal."""

  def __init__(self, width: int, causal: bool, rngs: nnx.Rngs):
    """Initialises the weights; the directions share the width."""
    ways = 1 if causal else 2
    self.ways = nnx.List(
      [OneWay(width, width // ways, rngs) for _ in range(ways)]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)

  def __call__(self, x, lengths, factor):
    """Returns an output of the same shape."""
    y = self.norm(x)
    outputs = [self.ways[0](y)]
    if len(self.ways) == 2:
      outputs.append(_reversed(self.ways[1](_reversed(y, lengths)), lengths))
    return x + factor * jnp.concatenate(outputs, axis=-1)


def _reversed(x, lengths):
  """Reverses the frames of each utterance; padding stays at the end."""
  place = jnp.arange(x.shape[1])
  turned = lengths[:, None] - 1 - place
  turned = jnp.where(turned >= 0, turned, place)
  return jnp.take_along_axis(x, turned[..., None], axis=1)


class Attention(nnx.Module):
  """Self-attention with rotary positions."""

  def __init__(self, width: int, heads: int, causal: bool, rngs: nnx.Rngs):
    """Initialises the weights."""
    self.heads, self.causal = heads, causal
    self.inner = nnx.Linear(width, 3 * width, rngs=rngs)
    self.outer = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, x, lengths):
    """Returns an output of the same shape."""
    rows, size, width = x.shape
    split = self.inner(x).reshape(rows, size, 3, self.heads, -1)
    query, key, value = jnp.moveaxis(split, 2, 0)
    angles = _rotary_angles(size, query.shape[-1])
    query, key = decoder.rotate(query, angles), decoder.rotate(key, angles)
    mask = front_end.length_mask(lengths, size)[:, None, None]
    if self.causal:
      mask = mask & jnp.tri(size, dtype=bool)
    attended = nnx.dot_product_attention(query, key, value, mask=mask)
    return self.outer(attended.reshape(rows, size, width))


def _rotary_angles(size: int, width: int) -> tuple[chex.Array, chex.Array]:
  """Cosines and sines of the rotary position embedding."""
  half = width // 2
  speed = 10_000.0 ** (-jnp.arange(half) / half)
  angle = (jnp.arange(size)[:, None] * speed)[:, None]
  return jnp.cos(angle), jnp.sin(angle)


class HalfStepMlp(nnx.Module):
  """A feed-forward layer with a residual connection of weight one half."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    """Initialises the weights."""
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.inner = nnx.Linear(width, 4 * width, rngs=rngs)
    self.outer = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, factor):
    """Returns an output of the same shape."""
    return x + 0.5 * factor * self.outer(nnx.swish(self.inner(self.norm(x))))


class ConformerBlock(nnx.Module):
  """Feed-forward layer, attention, convolution and feed-forward layer.

  The convolution has layer normalisation instead of batch normalisation, whose
  running statistics would be state outside the weights.
  """

  def __init__(
    self, width: int, heads: int, size: int, causal: bool, rngs: nnx.Rngs
  ):
    """Initialises the weights; the convolution kernel has `size` frames."""
    norm = lambda: nnx.LayerNorm(width, rngs=rngs)
    self.first, self.last = HalfStepMlp(width, rngs), HalfStepMlp(width, rngs)
    self.attention_norm = norm()
    self.attention = Attention(width, heads, causal, rngs)
    self.convolution_norm = norm()
    self.gate = nnx.Linear(width, 2 * width, rngs=rngs)
    self.depthwise = Depthwise(width, size, causal, rngs)
    self.inner_norm, self.point = norm(), nnx.Linear(width, width, rngs=rngs)
    self.norm = norm()

  def __call__(self, x, lengths, factors):
    """Returns an output of the same shape."""
    x = self.first(x, factors[0])
    y = self.attention(self.attention_norm(x), lengths)
    x = x + factors[1] * y
    y, gate = jnp.split(self.gate(self.convolution_norm(x)), 2, axis=-1)
    y = self.depthwise(y * jax.nn.sigmoid(gate), lengths)
    y = self.point(nnx.swish(self.inner_norm(y)))
    x = x + factors[2] * y
    return self.norm(self.last(x, factors[3]))


class Encoder(nnx.Module):
  """Strided convolutions, then layers of one kind, then a normalisation."""

  def __init__(
    self,
    shrinking: Sequence[Block],
    layers: Sequence[nnx.Module],
    norm: nnx.LayerNorm,
  ):
    """Combines the strided convolutions and the layers."""
    self.shrinking, self.layers = nnx.List(shrinking), nnx.List(layers)
    self.norm = norm

  def __call__(
    self,
    features: chex.Array,
    lengths: chex.Array,
    key: chex.PRNGKey | None = None,
    rate: float = 0.0,
  ) -> tuple[chex.Array, chex.Array]:
    """Returns encoded frames (batch, out, width) and their lengths."""
    counts = [
      4 if isinstance(layer, ConformerBlock) else 1
      for layer in (*self.shrinking, *self.layers)
    ]
    factors = _dropped(
      key, rate, sum(counts), len(features), self.norm.num_features
    )
    x = features
    for block in self.shrinking:
      x, lengths = block(x, lengths, factors.pop())
    for layer, count in zip(self.layers, counts[len(self.shrinking) :]):
      layer_factors = [factors.pop() for _ in range(count)]
      if isinstance(layer, ConformerBlock):
        x = layer(x, lengths, layer_factors)
      elif isinstance(layer, Lstm):
        x = layer(x, lengths, *layer_factors)
      else:
        x, _ = layer(x, lengths, *layer_factors)
    return self.norm(x), lengths


def make(
  kind: str,
  *,
  numbers: int,
  width: int,
  depth: int,
  strides: Sequence[int],
  size: int = 5,
  heads: int = 4,
  causal: bool = False,
) -> harness.Network:
  """Makes an encoder as pure functions of its weights.

  Args:
    kind: one of `KINDS`.
    numbers: features per input frame.
    width: width of all layers.
    depth: number of layers after the strided convolutions.
    strides: strides of the first convolutions.
    size: kernel size of a convolution, in frames; three times as large in
      Conformer blocks.
    heads: number of attention heads.
    causal: whether outputs ignore future frames.

  Returns:
    A network with all weights in one array.

  Raises:
    SettingsError: if the kind is unknown or the width is not divisible.

  Source: Gulati and others, Conformer: Convolution-augmented Transformer for
  Speech Recognition, 2020.
  """
  if kind not in KINDS:
    known = ', '.join(KINDS)
    raise harness.SettingsError(f'unknown encoder {kind!r}; known: {known}.')
  if width % 2 or (kind == 'conformer' and width % (2 * heads)):
    raise harness.SettingsError(
      f'a width of {width} is not divisible into two directions, or into '
      f'{heads} heads of even width: take {math.ceil(width / 64) * 64}.'
    )

  def build(rngs):
    inputs = [numbers] + [width] * len(strides)
    shrinking = [
      Block(n, width, size, s, causal, rngs) for n, s in zip(inputs, strides)
    ]
    make_layer: Callable[[], nnx.Module] = {
      'conv': lambda: Block(width, width, size, 1, causal, rngs),
      'conv_lstm': lambda: Lstm(width, causal, rngs),
      'conformer': lambda: ConformerBlock(width, heads, 3 * size, causal, rngs),
    }[kind]
    layers = [make_layer() for _ in range(depth)]
    return Encoder(shrinking, layers, nnx.LayerNorm(width, rngs=rngs))

  return flat(harness.pure(build))


def linear(inputs: int, outputs: int) -> harness.Network:
  """Makes a linear head."""
  return flat(harness.pure(lambda r: nnx.Linear(inputs, outputs, rngs=r)))


def flat(network: harness.Network) -> harness.Network:
  """Stores all weights of a network in one array.

  Fewer arrays per step compile several times as fast.
  """
  like = jax.eval_shape(network.init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
  _, unravel = jax.flatten_util.ravel_pytree(zeros)
  return harness.Network(
    lambda key: jax.flatten_util.ravel_pytree(network.init(key))[0],
    lambda weights, *args: network.apply(unravel(weights), *args),
  )
