"""Low-rank adapters of frozen weights.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, `LoRA: Low-Rank
Adaptation of Large Language Models <https://arxiv.org/abs/2106.09685>`_, 2021.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import harness
from experiments.lm import decoder

WEIGHTS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')


def weight_names(weights: Sequence[str]) -> tuple[str, ...]:
  """Normalises names of weights; accepts Hugging Face names such as `q_proj`.

  Args:
    weights: names from a user.

  Returns:
    Unique names of `WEIGHTS`.

  Raises:
    SettingsError: if there is no name, or an unknown one.
  """
  names = [name.removesuffix('_proj') for name in weights]
  unknown = [w for w, name in zip(weights, names) if name not in WEIGHTS]
  if unknown or not names:
    raise harness.SettingsError(
      f'adapters are for one or more of the weights {", ".join(WEIGHTS)}, with '
      f'or without the suffix _proj; got {", ".join(unknown) or "none"}.'
    )
  return tuple(dict.fromkeys(names))


def init(
  params: decoder.Params,
  key: jax.Array,
  *,
  rank: int,
  weights: Sequence[str] = ('q', 'v'),
) -> dict[str, jax.Array]:
  """Initialises adapters with random a and zero b.

  Args:
    params: weights of the model, or of its upper part.
    key: PRNG key.
    rank: rank of each adapter.
    weights: names of the adapted weights.

  Returns:
    float32 arrays `name.a`, (layers, in, rank), and `name.b`, (layers, rank,
    out).

  Raises:
    UserError: if a name is unknown, or the rank is below 1.
  """
  unknown = sorted(set(weights) - set(WEIGHTS))
  if unknown or not weights or rank < 1:
    raise harness.UserError(
      f'adapters need a rank >= 1 and one or more of {", ".join(WEIGHTS)}; got '
      f'rank {rank} of {list(weights)}.'
    )
  adapters = {}
  for name, subkey in zip(weights, jax.random.split(key, len(weights))):
    layers, width, out = params['layers'][name].shape
    bound = width**-0.5
    adapters[f'{name}.a'] = jax.random.uniform(
      subkey, (layers, width, rank), jnp.float32, -bound, bound
    )
    adapters[f'{name}.b'] = jnp.zeros((layers, rank, out), jnp.float32)
  return adapters


def attach(
  params: decoder.Params, adapters: dict[str, jax.Array], *, scale: float = 1.0
) -> dict[str, Any]:
  """Attaches adapters to a model without forming their products.

  Args:
    params: weights of the model.
    adapters: adapters of all its layers.
    scale: scale of their products, alpha / rank.

  Returns:
    Params for `decoder`. The magnitudes of DoRA need one product per weight,
    for its norms.
  """
  layers = dict(params['layers'])
  for n, w in adapters.items():
    if n.endswith('.m'):
      name = n.removesuffix('.m')
      layers[f'{name}.factor'] = _factors(layers[name], adapters, name, scale)
    else:
      layers[n] = w * scale if n.endswith('.b') else w
  return {**params, 'layers': layers}


def _changed(weight: jax.Array, a: Any, b: Any, scale: float) -> jax.Array:
  """Adds the products of adapters to weights, (layers, in, out)."""
  change = scale * jnp.einsum('lir,lro->lio', a, b)
  return weight.astype(jnp.promote_types(weight.dtype, change.dtype)) + change


def _factors(
  weight: jax.Array, adapters: dict[str, jax.Array], name: str, scale: float
) -> jax.Array:
  """Divides magnitudes by the norms of changed weights, (layers, out).

  Liu, Wang, Yin, Molchanov, Wang, Cheng and Chen, `DoRA: Weight-Decomposed
  Low-Rank Adaptation <https://arxiv.org/abs/2402.09353>`_, 2024.
  """

  def norms(layer):
    weight, a, b = (leaf[None] for leaf in layer)
    return jnp.linalg.norm(_changed(weight, a, b, scale)[0], axis=0)

  parts = jnp.asarray(weight), adapters[f'{name}.a'], adapters[f'{name}.b']
  return adapters[f'{name}.m'] / jax.lax.map(norms, parts)


def merge(
  params: decoder.Params, adapters: dict[str, jax.Array], *, scale: float = 1.0
) -> dict[str, Any]:
  """Merges adapters into the weights of a model.

  Args:
    params: weights of the model.
    adapters: adapters of all layers, or of the last ones.
    scale: as in `attach`.

  Returns:
    Params of the structure of `params`.
  """
  layers = dict(params['layers'])
  for name in [n.removesuffix('.a') for n in adapters if n.endswith('.a')]:
    a, b = adapters[f'{name}.a'], adapters[f'{name}.b']
    weight = jnp.asarray(layers[name])
    first = weight.shape[0] - a.shape[0]
    wide = _changed(weight[first:], a, b, scale)
    if f'{name}.m' in adapters:
      factors = _factors(weight[first:], adapters, name, scale)
      wide = wide * factors[:, None]
    layers[name] = weight.at[first:].set(wide.astype(weight.dtype))
  return {**params, 'layers': layers}
