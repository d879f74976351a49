"""Networks of policies and values, as pure functions of weights."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

import bilevel_jax as bj
from experiments import harness


def _dense(inputs, outputs, scale, rngs):
  return nnx.Linear(
    inputs, outputs, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs
  )


class Perceptron(nnx.Module):
  """Hidden layers of tanh units."""

  def __init__(
    self,
    shape: tuple[int, ...],
    hidden: Sequence[int],
    outputs: int,
    last: float,
    rngs: nnx.Rngs,
  ):
    """Initialises weights; the scale of the last layer is `last`."""
    sizes = [math.prod(shape), *hidden]
    self.layers = nnx.List(
      [_dense(i, o, 2**0.5, rngs) for i, o in itertools.pairwise(sizes)]
    )
    self.head = _dense(sizes[-1], outputs, last, rngs) if outputs else None

  def __call__(self, x: chex.Array) -> chex.Array:
    """Outputs for one observation, or its last hidden layer without any."""
    x = jnp.ravel(x)
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return x if self.head is None else self.head(x)


class Convolution(nnx.Module):
  """A convolution without padding, as one product with all patches.

  Mapped over weights it stays a product. A mapped convolution would become a
  grouped one, which takes 100 times as long on a CPU.
  """

  def __init__(
    self, inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs
  ):
    """Initialises weights for patches of `size` x `size`."""
    self.size, self.stride = size, stride
    self.dense = _dense(size * size * inputs, outputs, 2**0.5, rngs)

  def __call__(self, x: chex.Array) -> chex.Array:
    """(height, width, inputs) -> (height', width', outputs)."""
    high, wide = ((n - self.size) // self.stride + 1 for n in x.shape[:2])
    rows = [
      x[i : i + self.stride * (high - 1) + 1 : self.stride]
      for i in range(self.size)
    ]
    columns = [
      row[:, j : j + self.stride * (wide - 1) + 1 : self.stride]
      for row in rows
      for j in range(self.size)
    ]
    return self.dense(jnp.concatenate(columns, axis=-1))


class Convolutions(nnx.Module):
  """Convolutions with ReLU, a dense layer with ReLU, and a linear one."""

  def __init__(
    self,
    shape: tuple[int, ...],
    layers: Sequence[tuple[int, int, int]],
    hidden: int,
    outputs: int,
    last: float,
    rngs: nnx.Rngs,
  ):
    """Layers are (channels, size, stride), without padding."""
    height, width, inputs = shape
    convolutions = []
    for channels, size, stride in layers:
      convolutions.append(Convolution(inputs, channels, size, stride, rngs))
      height, width = ((n - size) // stride + 1 for n in (height, width))
      inputs = channels
    self.convolutions = nnx.List(convolutions)
    self.hidden = _dense(height * width * inputs, hidden, 2**0.5, rngs)
    self.head = _dense(hidden, outputs, last, rngs) if outputs else None

  def __call__(self, x: chex.Array) -> chex.Array:
    """Outputs for one observation, or its hidden layer without any."""
    if jnp.issubdtype(x.dtype, jnp.uint8):
      x = x.astype(jnp.float32) / 255
    for layer in self.convolutions:
      x = jax.nn.relu(layer(x))
    x = jax.nn.relu(self.hidden(jnp.ravel(x)))
    return x if self.head is None else self.head(x)


# Layers for games of 10 x 10 cells, and those of Mnih et al., 2016.
MINATAR = ((16, 3, 1),)
ATARI = ((16, 8, 4), (32, 4, 2))


def body(shape: tuple[int, ...]) -> dict[str, Any]:
  """Chooses layers by the shape of an observation.

  Args:
    shape: of one observation: pixels, cells with channels, or a vector.

  Returns:
    Arguments of `network`: `layers` and `hidden`.
  """
  if len(shape) < 3:
    return {'layers': (), 'hidden': (64, 64)}
  if shape[0] >= 64:
    return {'layers': ATARI, 'hidden': (256,)}
  return {'layers': MINATAR, 'hidden': (128,)}


def network(
  shape: tuple[int, ...],
  outputs: int,
  *,
  layers: Sequence[tuple[int, int, int]],
  hidden: Sequence[int],
  last: float = 1.0,
) -> harness.Network:
  """Makes a network for observations of a shape.

  Args:
    shape: of one observation.
    outputs: number of outputs; 0 for the last hidden layer.
    layers: convolutions, (channels, size, stride); () for none.
    hidden: units of the dense layers; one layer after convolutions.
    last: scale of the last layer's initial weights.

  Returns:
    A `Network`.
  """
  if not layers:
    return harness.pure(
      lambda rngs: Perceptron(shape, hidden, outputs, last, rngs)
    )
  (units,) = hidden
  return harness.pure(
    lambda rngs: Convolutions(shape, layers, units, outputs, last, rngs)
  )


class Agent(NamedTuple):
  """A policy and a value with separate networks.

  Attributes:
    init: PRNG key -> `bj.rl.ActorCriticParams`.
    policy: (actor, observation) -> logits, or (mean, log deviation).
    value: (critic, observation) -> scalar.
  """

  init: Callable[[chex.PRNGKey], Any]
  policy: Callable[[Any, Any], Any]
  value: Callable[[Any, Any], chex.Array]


def agent(shape: tuple[int, ...], actions: int | tuple[int, ...]) -> Agent:
  """Makes networks for an environment.

  Args:
    shape: of one observation.
    actions: of a `bj.rl.Environment`.

  Returns:
    An `Agent`, whose first actions are nearly uniform.
  """
  normal = isinstance(actions, tuple)
  outputs = actions[0] if isinstance(actions, tuple) else actions
  actor = network(shape, outputs, last=0.01, **body(shape))
  critic = network(shape, 1, **body(shape))

  def policy(weights, observation):
    outputs = actor.apply(weights['network'], observation)
    return (outputs, weights['log_deviation']) if normal else outputs

  value = lambda weights, observation: critic.apply(weights, observation)[0]
  return Agent(make_init(actor, critic, actions), policy, value)


def make_init(
  actor: harness.Network,
  critic: harness.Network,
  actions: int | tuple[int, ...],
) -> Callable[[chex.PRNGKey], bj.rl.ActorCriticParams]:
  """Makes the function from a key to the weights of both networks.

  Args:
    actor: network of the policy.
    critic: network of the value.
    actions: of a `bj.rl.Environment`; real ones add the logs of deviations.
  """

  def init(key):
    one, two = jax.random.split(key)
    weights = {'network': actor.init(one)}
    if isinstance(actions, tuple):
      weights['log_deviation'] = jnp.full(actions[0], -0.5)
    return bj.rl.ActorCriticParams(weights, critic.init(two))

  return init
