"""Interface of multi-task problems, and layers of their networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import harness


class Problem(NamedTuple):
  """Several tasks with a shared trunk.

  Attributes:
    name: name of the problem in metrics.
    tasks: names of the tasks.
    metric: name of the metric of each task.
    higher_is_better: whether a higher metric is better.
    init: key -> sequences `trunk` and `heads`.
    oracle: makes the oracle.
    losses: (params, batch) -> all losses, for methods without a Jacobian.
    batch: (key, data, size) -> a training batch.
    split: (batch, parts) -> independent parts of the batch.
    score: (params, part of the data) -> the metric per task.
    data: the parts `train`, `validation` and `test`.
  """

  name: str
  tasks: tuple[str, ...]
  metric: str
  higher_is_better: bool
  init: Callable[[Any], Any]
  oracle: Callable[[], optax.GradientTransformationExtraArgs]
  losses: Callable[[Any, Any], Any]
  batch: Callable[[Any, Any, int], Any]
  split: Callable[[Any, int], Any]
  score: Callable[[Any, Any], Any]
  data: dict[str, Any]


def dense(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
  """Draws a dense layer with He initialisation."""
  scale = (2 / inputs) ** 0.5
  return {
    'w': scale * jax.random.normal(key, (inputs, outputs)),
    'b': jnp.zeros(outputs),
  }


def mlp_trunk(sizes: tuple[int, ...]) -> tuple[Any, Any]:
  """Makes a perceptron with ReLU after each layer: (init, apply)."""

  def init(key):
    keys = jax.random.split(key, len(sizes) - 1)
    return [dense(k, i, o) for k, i, o in zip(keys, sizes, sizes[1:])]

  def apply(layers, inputs):
    for layer in layers:
      inputs = jax.nn.relu(
        harness.thin_product(inputs, layer['w']) + layer['b']
      )
    return inputs

  return init, apply
