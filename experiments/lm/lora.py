"""Low-rank adapters: a few more columns beside frozen weights.

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


def names_of(weights: Sequence[str]) -> tuple[str, ...]:
  """Names of weights, from these or those of Hugging Face, `q_proj` and so on.

  Args:
    weights: as a user gives them.

  Returns:
    Names of `WEIGHTS`, each once.

  Raises:
    SettingsError: if there are none, or one is unknown.
  """
  found = [name.removesuffix('_proj') for name in weights]
  unknown = [w for w, name in zip(weights, found) if name not in WEIGHTS]
  if unknown or not found:
    raise harness.SettingsError(
      f'weights that get adapters: {", ".join(WEIGHTS)}, also with _proj '
      f'behind, one or more of them; got {", ".join(unknown) or "none"}.'
    )
  return tuple(dict.fromkeys(found))


def init(
  params: decoder.Params,
  key: jax.Array,
  *,
  rank: int,
  weights: Sequence[str] = ('q', 'v'),
) -> dict[str, jax.Array]:
  """Adapters that change nothing yet: a is random, b is zero.

  Args:
    params: of the model, or of its upper part.
    key: PRNG key.
    rank: of each adapter.
    weights: which weights of each layer get one.

  Returns:
    By `name.a`, (layers, in, rank), and `name.b`, (layers, rank, out); float32.

  Raises:
    UserError: if a weight has no such name, or the rank is below 1.
  """
  unknown = sorted(set(weights) - set(WEIGHTS))
  if unknown or not weights or rank < 1:
    raise harness.UserError(
      f'adapters are of a rank >= 1 and of one or more of {", ".join(WEIGHTS)};'
      f' got rank {rank} of {list(weights)}.'
    )
  found = {}
  for name, at in zip(weights, jax.random.split(key, len(weights))):
    layers, width, out = params['layers'][name].shape
    bound = width**-0.5
    found[f'{name}.a'] = jax.random.uniform(
      at, (layers, width, rank), jnp.float32, -bound, bound
    )
    found[f'{name}.b'] = jnp.zeros((layers, rank, out), jnp.float32)
  return found


def attach(
  params: decoder.Params, adapters: dict[str, jax.Array], *, scale: float = 1.0
) -> dict[str, Any]:
  """The model with its adapters; no product is formed.

  Args:
    params: of the model.
    adapters: of all of its layers.
    scale: what their products are multiplied by, alpha / rank.

  Returns:
    Params for `decoder`. With magnitudes, as `adapter_files.load` reads them
    of DoRA, one product is formed of each weight, for its norms.
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
  """Weights, (layers, in, out), with the products of their adapters."""
  change = scale * jnp.einsum('lir,lro->lio', a, b)
  return weight.astype(jnp.promote_types(weight.dtype, change.dtype)) + change


def _factors(
  weight: jax.Array, adapters: dict[str, jax.Array], name: str, scale: float
) -> jax.Array:
  """Magnitudes over norms of changed weights, (layers, out).

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
  """The model with its adapters in its weights, as it is exported.

  Args:
    params: of the whole model; adapters of its last layers may be given.
    adapters: with as many layers, or fewer: they are those of the last ones.
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
