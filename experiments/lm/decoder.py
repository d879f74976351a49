"""A decoder of Llama's family: pure functions of a pytree of weights.

    params = {'embed': (vocabulary, width), 'norm': (width,),
              'layers': {name: (layers, in, out)}, 'head': (width, vocabulary)}

Layers are stacked and scanned, so that a deep model compiles as fast as a
shallow one. `head` is absent where it is the embedding. An adapter of the
weight `q` is two more entries of a layer, `q.a` and `q.b`: see `lora`.

Sequences are padded at their end, where a causal model needs no mask.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lm.config import Config, frequencies

Params = Mapping[str, Any]


def shapes(config: Config) -> dict[str, Any]:
  """The shapes of all weights, by name, as a pytree of tuples."""
  queries = config.heads * config.head_width
  keys = config.kv_heads * config.head_width
  layer: dict[str, tuple[int, ...]] = {
    'attention_norm': (config.width,),
    'q': (config.width, queries),
    'k': (config.width, keys),
    'v': (config.width, keys),
    'o': (queries, config.width),
    'mlp_norm': (config.width,),
    'gate': (config.width, config.hidden),
    'up': (config.width, config.hidden),
    'down': (config.hidden, config.width),
  }
  if config.qkv_bias:
    layer |= {'q_bias': (queries,), 'k_bias': (keys,), 'v_bias': (keys,)}
  if config.qk_norm:
    layer |= {'q_norm': (config.head_width,), 'k_norm': (config.head_width,)}
  found: dict[str, Any] = {
    'embed': (config.vocabulary, config.width),
    'layers': {n: (config.layers, *shape) for n, shape in layer.items()},
    'norm': (config.width,),
  }
  if not config.tied:
    found['head'] = (config.width, config.vocabulary)
  return found


def init(config: Config, seed: int, dtype: Any = jnp.float32) -> Params:
  """Random weights, of a model for tests: norms of about 1, the rest small."""
  rng = np.random.default_rng(seed)

  def one(path, shape):
    drawn = rng.normal(size=shape)
    if 'norm' in jax.tree_util.keystr(path):
      return jnp.asarray(1 + drawn / 10, dtype)
    inputs = shape[-2] if len(shape) > 1 else shape[-1]
    return jnp.asarray(drawn / inputs**0.5, dtype)

  is_shape = lambda node: isinstance(node, tuple)
  return jax.tree_util.tree_map_with_path(one, shapes(config), is_leaf=is_shape)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
  """Divides by the root mean square along the last axis, in float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.mean(wide**2, axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(square + epsilon)).astype(x.dtype) * weight


def rotations(config: Config, length: int) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of all positions, (length, 1, head_width / 2)."""
  # In float64 by numpy: late positions have large angles.
  angles = np.arange(length)[:, None, None] * frequencies(config)
  return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def rotate(x: jax.Array, turned: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary positions of (rows, length, heads, width), in halves."""
  cos, sin = turned
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  both = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(both, axis=-1).astype(x.dtype)


def _linear(w: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  out = x @ w[name]
  if f'{name}.a' in w:
    out = out + (x @ w[f'{name}.a']) @ w[f'{name}.b']
  if f'{name}_bias' in w:
    out = out + w[f'{name}_bias']
  return out


def _layer(config, w, x, turned):
  """One layer, of its own weights."""
  rows, length, _ = x.shape
  epsilon = config.norm_epsilon
  normed = rms_norm(x, w['attention_norm'], epsilon)

  def heads(name):
    return _linear(w, name, normed).reshape(rows, length, -1, config.head_width)

  q, k, v = heads('q'), heads('k'), heads('v')
  if config.qk_norm:
    q = rms_norm(q, w['q_norm'], epsilon)
    k = rms_norm(k, w['k_norm'], epsilon)
  found = jax.nn.dot_product_attention(
    rotate(q, turned), rotate(k, turned), v, is_causal=True
  )
  x = x + _linear(w, 'o', found.reshape(rows, length, -1))
  normed = rms_norm(x, w['mlp_norm'], epsilon)
  gate = jax.nn.silu(_linear(w, 'gate', normed))
  return x + _linear(w, 'down', gate * _linear(w, 'up', normed))


def run_layers(
  config: Config,
  layers: Mapping[str, jax.Array],
  x: jax.Array,
  *,
  remat: bool = False,
) -> jax.Array:
  """Layers in order.

  Args:
    config: of the model.
    layers: any number of stacked layers: all of them, or a part.
    x: what enters the first of them, (rows, length, width).
    remat: whether the backward pass computes each layer anew, for the memory of
      one layer instead of all.

  Returns:
    What leaves the last of them, of the same shape.
  """
  turned = rotations(config, x.shape[1])

  def body(x, w):
    return _layer(config, w, x, turned), None

  if remat:
    body = jax.checkpoint(body, prevent_cse=False)
  return jax.lax.scan(body, x, dict(layers))[0]


def embed(params: Params, tokens: jax.Array) -> jax.Array:
  """What enters the first layer, (rows, length, width)."""
  return jnp.asarray(params['embed'])[tokens]


def logits(config: Config, params: Params, x: jax.Array) -> jax.Array:
  """Logits of what left the last layer, (..., vocabulary).

  The head of a small model is a good part of its cost: give it the positions
  that are needed only.
  """
  normed = rms_norm(x, params['norm'], config.norm_epsilon)
  return normed @ (params['embed'].T if config.tied else params['head'])


def forward(
  config: Config, params: Params, tokens: jax.Array, *, remat: bool = False
) -> jax.Array:
  """Logits at all positions, (rows, length, vocabulary)."""
  x = run_layers(config, params['layers'], embed(params, tokens), remat=remat)
  return logits(config, params, x)


def split_layers(params: Params, first: int) -> tuple[Params, Params]:
  """A model in two: the embedding and the first layers, and all the rest.

  Args:
    params: of the whole model.
    first: how many layers the lower part has.

  Returns:
    The lower part, for `trunk`, and the upper one, whose `layers` go on from
    what that gives. Call it outside of a compiled step: it copies.
  """
  cut = lambda part: {n: w[part] for n, w in params['layers'].items()}
  lower = {'embed': params['embed'], 'layers': cut(slice(None, first))}
  return lower, {**params, 'layers': cut(slice(first, None))}


def trunk(config: Config, lower: Params, tokens: jax.Array) -> jax.Array:
  """What leaves the lower part: of frozen layers, computed once a row."""
  return run_layers(config, lower['layers'], embed(lower, tokens))
