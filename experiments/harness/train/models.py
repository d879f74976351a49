"""A flax model as pure functions of its weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import chex

if TYPE_CHECKING:
  from flax import nnx


class Network(NamedTuple):
  """A flax model as two pure functions.

  Attributes:
    init: PRNG key -> weights, dicts of arrays.
    apply: (weights, *what the model is called with) -> outputs.
  """

  init: Callable[[chex.PRNGKey], Any]
  apply: Callable[..., Any]


def pure(make: 'Callable[[nnx.Rngs], nnx.Module]') -> Network:
  """Splits a model without running statistics into functions of its weights."""
  # Imported here: a binary without a model need not wait for it.
  from flax import nnx

  graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def apply(weights, *args, **keywords):
    return nnx.merge(graph, nnx.State(weights))(*args, **keywords)

  return Network(
    lambda key: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1]), apply
  )
