"""Pure functions of flax models."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import chex

if TYPE_CHECKING:
  from flax import nnx


class Network(NamedTuple):
  """A flax model as two pure functions.

  Attributes:
    init: PRNG key -> weights, dicts of arrays.
    apply: (weights, *arguments of the model) -> outputs.
  """

  init: Callable[[chex.PRNGKey], Any]
  apply: Callable[..., Any]


def pure(make: 'Callable[[nnx.Rngs], nnx.Module]') -> Network:
  """Converts a model without running statistics to functions of its weights."""
  # Imported here: it takes time, and not every binary has a model.
  from flax import nnx

  graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def apply(weights, *args, **keywords):
    return nnx.merge(graph, nnx.State(weights))(*args, **keywords)

  return Network(
    lambda key: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1]), apply
  )
