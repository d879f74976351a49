"""Networks for images: a ResNet-18 trunk, a SegNet trunk, heads for pixels.

Group normalisation in groups of 16 channels stands in for batch normalisation:
it has no running statistics, so that a network is a pure function of weights.
"""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx


def _conv(inputs, outputs, size, rngs, stride=1, bias=False):
  return nnx.Conv(
    inputs,
    outputs,
    (size, size),
    strides=stride,
    use_bias=bias,
    kernel_init=nnx.initializers.he_normal(),
    rngs=rngs,
  )


def _norm(channels, rngs):
  groups = max(1, channels // 16)
  return nnx.GroupNorm(channels, num_groups=groups, rngs=rngs)


class Block(nnx.Module):
  """Two convolutions beside a shortcut."""

  def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
    self.first = _conv(inputs, outputs, 3, rngs, stride)
    self.first_norm = _norm(outputs, rngs)
    self.second = _conv(outputs, outputs, 3, rngs)
    self.second_norm = _norm(outputs, rngs)
    self.narrows = stride != 1 or inputs != outputs
    if self.narrows:
      self.shortcut = _conv(inputs, outputs, 1, rngs, stride)
      self.shortcut_norm = _norm(outputs, rngs)

  def __call__(self, x):
    y = jax.nn.relu(self.first_norm(self.first(x)))
    y = self.second_norm(self.second(y))
    if self.narrows:
      x = self.shortcut_norm(self.shortcut(x))
    return jax.nn.relu(x + y)


class ResNet18(nnx.Module):
  """ResNet-18 up to the mean over positions: 8 * width features.

  Args:
    width: channels of the first stage; 64 in ResNet-18.
    stem: `large` as in ResNet-18, a convolution of 7 x 7 and a pooling that
      leave a sixteenth of the positions; `small`, one of 3 x 3 that leaves all,
      for small images.
    rngs: of the first weights.
  """

  def __init__(self, width: int, stem: str, rngs: nnx.Rngs):
    self.large = stem == 'large'
    size, stride = (7, 2) if self.large else (3, 1)
    self.stem = _conv(3, width, size, rngs, stride)
    self.stem_norm = _norm(width, rngs)
    channels = [width, width, 2 * width, 4 * width, 8 * width]
    self.blocks = nnx.List()
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
      stride = 1 if stage == 0 else 2
      self.blocks.append(Block(inputs, outputs, stride, rngs))
      self.blocks.append(Block(outputs, outputs, 1, rngs))

  def __call__(self, images):
    x = jax.nn.relu(self.stem_norm(self.stem(images)))
    if self.large:
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
    for block in self.blocks:
      x = block(x)
    return x.mean((1, 2))


class Layers(nnx.Module):
  """Convolutions of 3 x 3, each with normalisation and ReLU."""

  def __init__(self, channels: tuple[int, ...], rngs: nnx.Rngs):
    pairs = list(itertools.pairwise(channels))
    self.convolutions = nnx.List([_conv(i, o, 3, rngs) for i, o in pairs])
    self.norms = nnx.List([_norm(o, rngs) for _, o in pairs])

  def __call__(self, x):
    for convolution, norm in zip(self.convolutions, self.norms):
      x = jax.nn.relu(norm(convolution(x)))
    return x


def unpool(pooled: chex.Array, before: chex.Array, values: Any) -> chex.Array:
  """Puts values where the maxima of a pooling by 2 x 2 were, zero elsewhere.

  Args:
    pooled: the maxima, (n, h, w, channels).
    before: what was pooled, (n, 2 h, 2 w, channels).
    values: (n, h, w, channels).

  Returns:
    (n, 2 h, 2 w, channels).
  """
  larger = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  return jnp.where(before == larger(pooled), larger(values), 0)


class SegNet(nnx.Module):
  """An encoder that pools, and a decoder that unpools at the same places.

  Args:
    widths: channels of the stages; 64, 128, 256, 512, 512 in SegNet. Sides of
      images are multiples of 2 ** stages.
    rngs: of the first weights.
  """

  def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
    layers = [2 if stage < 2 else 3 for stage in range(len(widths))]
    inputs = (3, *widths)
    self.encoder = nnx.List()
    self.decoder = nnx.List()
    for i, (width, depth) in enumerate(zip(widths, layers)):
      self.encoder.append(Layers((inputs[i], *[width] * depth), rngs))
      last = inputs[i] if i else width
      self.decoder.append(Layers((*[width] * depth, last), rngs))

  def __call__(self, images):
    x, pools = images, []
    for stage in self.encoder:
      before = stage(x)
      x = nnx.max_pool(before, (2, 2), strides=(2, 2))
      pools.append((x, before))
    for stage, (pooled, before) in zip(reversed(self.decoder), reversed(pools)):
      x = stage(unpool(pooled, before, x))
    return x


class PixelHead(nnx.Module):
  """A convolution of 3 x 3 and one of 1 x 1: outputs for each pixel."""

  def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
    self.hidden = _conv(inputs, inputs, 3, rngs, bias=True)
    self.out = _conv(inputs, outputs, 1, rngs, bias=True)

  def __call__(self, features):
    return self.out(self.hidden(features))
