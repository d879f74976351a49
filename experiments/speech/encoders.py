"""Encoders: from features to fewer and richer frames.

An encoder is called with features (batch, frames, numbers), their lengths, a
key for dropout (None for none) and its rate, and gives (batch, out, width) with
lengths. Out frames are `ceil(frames / shrink)`. What lies beyond a length
changes nothing before it, however far a batch is padded.
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
  """Frames after strided layers: rounded up at each."""
  for stride in strides:
    length = -(-length // stride)
  return length


def _dropped(key, rate, count, rows, width):
  """Factors (rows, 1, width) that drop numbers for a whole utterance.

  Those of all layers are one draw: to compile many draws takes seconds.
  """
  if key is None or not rate:
    return [1.0] * count
  kept = jax.random.bernoulli(key, 1 - rate, (count, rows, 1, width))
  return list(kept / (1 - rate))


def _masked(x, lengths):
  return x * front_end.mask_of(lengths, x.shape[1])[..., None]


class TimeConvolution(nnx.Module):
  """A convolution over time that sees no frame beyond an utterance.

  As one product with the frames that it sees: on a CPU, a convolution in a loop
  over members takes ten times as long.
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
    """Initial weights, for `size` frames; causal sees none that come."""
    # The padding does not depend on how far a batch is padded.
    left = size - 1 if causal else size // 2
    self.size, self.stride, self.left = size, stride, left
    # Of silence, features are zeros: with a bias of zeros every normalisation
    # would multiply its slope by a thousand.
    start = nnx.initializers.normal(0.1)
    self.inner = nnx.Linear(size * inputs, outputs, bias_init=start, rngs=rngs)

  def __call__(self, x: chex.Array, lengths: chex.Array) -> Any:
    """Output and its lengths."""
    frames = _seen(_masked(x, lengths), self.size, self.stride, self.left)
    found = self.inner(jnp.concatenate(frames, axis=-1))
    return found, shrunk(lengths, [self.stride])


class Depthwise(nnx.Module):
  """A convolution over time of each number by itself."""

  def __init__(self, width: int, size: int, causal: bool, rngs: nnx.Rngs):
    """Initial weights, for `size` frames."""
    self.size, self.left = size, size - 1 if causal else size // 2
    start = nnx.initializers.normal(size**-0.5)
    self.kernel = nnx.Param(start(rngs.params(), (size, width)))

  def __call__(self, x: chex.Array, lengths: chex.Array) -> chex.Array:
    """Output of the same shape."""
    frames = _seen(_masked(x, lengths), self.size, 1, self.left)
    return sum(frame * tap for frame, tap in zip(frames, self.kernel[...]))


def _seen(x, size, stride, left):
  """What each output sees at each of its places, `size` arrays."""
  out = -(-x.shape[1] // stride)
  right = max((out - 1) * stride + size - left - x.shape[1], 0)
  x = jnp.pad(x, [(0, 0), (left, right), (0, 0)])
  last = (out - 1) * stride + 1
  return [x[:, i : i + last : stride] for i in range(size)]


class Block(nnx.Module):
  """A convolution, layer normalisation, GELU; a shortcut where it fits."""

  def __init__(
    self,
    inputs: int,
    width: int,
    size: int,
    stride: int,
    causal: bool,
    rngs: nnx.Rngs,
  ):
    """Initial weights."""
    self.convolution = TimeConvolution(
      inputs, width, size, stride, causal, rngs
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.shortcut = stride == 1 and inputs == width

  def __call__(self, x, lengths, factor):
    """Output and its lengths."""
    y, lengths = self.convolution(x, lengths)
    y = factor * nnx.gelu(self.norm(y))
    return (x + y if self.shortcut else y), lengths


class OneWay(nnx.Module):
  """A long short-term memory: what it reads is one product for all frames.

  The library's holds a random state, and multiplies in each step.
  """

  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
    """Initial weights; the forget gate begins open."""
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
    _, found = jax.lax.scan(step, (start, start), read)
    return jnp.moveaxis(found, 0, 1)


class Lstm(nnx.Module):
  """One layer, forward or both ways, beside a shortcut."""

  def __init__(self, width: int, causal: bool, rngs: nnx.Rngs):
    """Initial weights; either way has its share of the width."""
    ways = 1 if causal else 2
    self.ways = nnx.List(
      [OneWay(width, width // ways, rngs) for _ in range(ways)]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)

  def __call__(self, x, lengths, factor):
    """Output of the same shape."""
    y = self.norm(x)
    found = [self.ways[0](y)]
    if len(self.ways) == 2:
      found.append(_reversed(self.ways[1](_reversed(y, lengths)), lengths))
    return x + factor * jnp.concatenate(found, axis=-1)


def _reversed(x, lengths):
  """The frames of each utterance in turn; what lies beyond stays there."""
  place = jnp.arange(x.shape[1])
  turned = lengths[:, None] - 1 - place
  turned = jnp.where(turned >= 0, turned, place)
  return jnp.take_along_axis(x, turned[..., None], axis=1)


class Attention(nnx.Module):
  """Self-attention with rotary positions."""

  def __init__(self, width: int, heads: int, causal: bool, rngs: nnx.Rngs):
    """Initial weights."""
    self.heads, self.causal = heads, causal
    self.inner = nnx.Linear(width, 3 * width, rngs=rngs)
    self.outer = nnx.Linear(width, width, rngs=rngs)

  def __call__(self, x, lengths):
    """Output of the same shape."""
    rows, size, width = x.shape
    split = self.inner(x).reshape(rows, size, 3, self.heads, -1)
    query, key, value = jnp.moveaxis(split, 2, 0)
    turned = _angles(size, query.shape[-1])
    query, key = decoder.rotate(query, turned), decoder.rotate(key, turned)
    seen = front_end.mask_of(lengths, size)[:, None, None]
    if self.causal:
      seen = seen & jnp.tri(size, dtype=bool)
    found = nnx.dot_product_attention(query, key, value, mask=seen)
    return self.outer(found.reshape(rows, size, width))


def _angles(size: int, width: int) -> tuple[chex.Array, chex.Array]:
  """Cosines and sines by which pairs of numbers are turned at each frame."""
  half = width // 2
  speed = 10_000.0 ** (-jnp.arange(half) / half)
  angle = (jnp.arange(size)[:, None] * speed)[:, None]
  return jnp.cos(angle), jnp.sin(angle)


class Forward(nnx.Module):
  """Half a step of a perceptron of four times the width."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    """Initial weights."""
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.inner = nnx.Linear(width, 4 * width, rngs=rngs)
    self.outer = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, factor):
    """Output of the same shape."""
    return x + 0.5 * factor * self.outer(nnx.swish(self.inner(self.norm(x))))


class ConformerBlock(nnx.Module):
  """Perceptron, attention, convolution, perceptron.

  Layer normalisation stands for batch normalisation in the convolution: running
  statistics would not be weights.
  """

  def __init__(
    self, width: int, heads: int, size: int, causal: bool, rngs: nnx.Rngs
  ):
    """Initial weights; the convolution sees `size` frames."""
    norm = lambda: nnx.LayerNorm(width, rngs=rngs)
    self.first, self.last = Forward(width, rngs), Forward(width, rngs)
    self.attention_norm, self.attention = (
      norm(),
      Attention(width, heads, causal, rngs),
    )
    self.convolution_norm, self.gate = (
      norm(),
      nnx.Linear(width, 2 * width, rngs=rngs),
    )
    self.depthwise = Depthwise(width, size, causal, rngs)
    self.inner_norm, self.point = norm(), nnx.Linear(width, width, rngs=rngs)
    self.norm = norm()

  def __call__(self, x, lengths, factors):
    """Output of the same shape."""
    x = self.first(x, factors[0])
    y = self.attention(self.attention_norm(x), lengths)
    x = x + factors[1] * y
    y, gate = jnp.split(self.gate(self.convolution_norm(x)), 2, axis=-1)
    y = self.depthwise(y * jax.nn.sigmoid(gate), lengths)
    y = self.point(nnx.swish(self.inner_norm(y)))
    x = x + factors[2] * y
    return self.norm(self.last(x, factors[3]))


class Encoder(nnx.Module):
  """Strided convolutions, and then more, recurrent layers or Conformer blocks.

  Source: Gulati and others, Conformer: Convolution-augmented Transformer for
  Speech Recognition, 2020.
  """

  def __init__(
    self,
    kind: str,
    *,
    numbers: int,
    width: int,
    depth: int,
    strides: Sequence[int],
    size: int = 5,
    heads: int = 4,
    causal: bool = False,
    rngs: nnx.Rngs,
  ):
    """Initial weights.

    Args:
      kind: one of `KINDS`.
      numbers: of a frame.
      width: of all layers.
      depth: layers after the strided ones.
      strides: of the first convolutions.
      size: frames that a convolution sees; in a Conformer's blocks three times
        as many.
      heads: of the attention.
      causal: whether no frame that comes is seen.
      rngs: of the weights.
    """
    inputs = [numbers] + [width] * len(strides)
    self.shrinking = nnx.List(
      [Block(n, width, size, s, causal, rngs) for n, s in zip(inputs, strides)]
    )
    make: Callable[[], Any] = {
      'conv': lambda: Block(width, width, size, 1, causal, rngs),
      'conv_lstm': lambda: Lstm(width, causal, rngs),
      'conformer': lambda: ConformerBlock(width, heads, 3 * size, causal, rngs),
    }[kind]
    self.layers = nnx.List([make() for _ in range(depth)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)

  def __call__(
    self,
    features: chex.Array,
    lengths: chex.Array,
    key: chex.PRNGKey | None = None,
    rate: float = 0.0,
  ) -> tuple[chex.Array, chex.Array]:
    """Encoded frames (batch, out, width) and their lengths."""
    each = [
      4 if isinstance(layer, ConformerBlock) else 1
      for layer in (*self.shrinking, *self.layers)
    ]
    factors = _dropped(
      key, rate, sum(each), len(features), self.norm.num_features
    )
    x = features
    for block in self.shrinking:
      x, lengths = block(x, lengths, factors.pop())
    for layer, count in zip(self.layers, each[len(self.shrinking) :]):
      some = [factors.pop() for _ in range(count)]
      if isinstance(layer, ConformerBlock):
        x = layer(x, lengths, some)
      elif isinstance(layer, Lstm):
        x = layer(x, lengths, *some)
      else:
        x, _ = layer(x, lengths, *some)
    return self.norm(x), lengths


def make(kind: str, **sizes: Any) -> harness.Network:
  """An encoder as pure functions; see `Encoder` for the sizes."""
  if kind not in KINDS:
    known = ', '.join(KINDS)
    raise harness.SettingsError(f'unknown encoder {kind!r}; known: {known}.')
  width, heads = sizes['width'], sizes.get('heads', 4)
  if width % 2 or (kind == 'conformer' and width % (2 * heads)):
    raise harness.SettingsError(
      f'a width of {width} does not divide into both ways of a layer, or into '
      f'{heads} heads of an even width: take {math.ceil(width / 64) * 64}.'
    )
  return flat(harness.pure(lambda rngs: Encoder(kind, rngs=rngs, **sizes)))


def linear(inputs: int, outputs: int) -> harness.Network:
  """A linear head."""
  return flat(harness.pure(lambda r: nnx.Linear(inputs, outputs, rngs=r)))


def flat(network: harness.Network) -> harness.Network:
  """The network with all weights in one array.

  A step then has few arrays to move, which compiles several times as fast.
  """
  like = jax.eval_shape(network.init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
  _, whole = jax.flatten_util.ravel_pytree(zeros)
  return harness.Network(
    lambda key: jax.flatten_util.ravel_pytree(network.init(key))[0],
    lambda weights, *args: network.apply(whole(weights), *args),
  )
