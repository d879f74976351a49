"""A decoder of Llama's family: pure functions of a pytree of weights.

    params = {'embed': (vocabulary, width), 'norm': (width,),
              'layers': {name: (layers, in, out)}, 'head': (width, vocabulary)}

Layers are stacked and scanned, so that a deep model compiles as fast as a
shallow one. `head` is absent where it is the embedding. An adapter of the
weight `q` is two more entries of a layer, `q.a` and `q.b`, and of DoRA
`q.factor`: see `lora`.

Sequences are padded at their end, where a causal model needs no mask. Several
short ones may share a row: see `run_layers`.

What is computed has the dtype of what enters the first layer, `embed(dtype=)`:
weights and adapters are cast to it, one layer at a time. So on an accelerator
bfloat16 computes, while float32 weights stay the masters that an optimiser
moves, and their gradients are float32. Logits are float32 or wider.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.train import products
from experiments.lm.config import Config, frequencies

Params = Mapping[str, Any]
# From queries, keys and values, all turned, to what attention gives.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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


def rotations(
  config: Config, length: int, positions: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of positions.

  Args:
    config: of the model.
    length: positions are below it.
    positions: (rows, tokens); by default 0, 1, ... in each row.

  Returns:
    Two arrays, (length, 1, head_width / 2), or (rows, tokens, 1, ...).
  """
  # In float64 by numpy: late positions have large angles.
  angles = np.arange(length)[:, None, None] * frequencies(config)
  found = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
  if positions is None:
    return found
  return found[0][positions], found[1][positions]


def rotate(x: jax.Array, turned: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary positions of (rows, length, heads, width), in halves."""
  cos, sin = turned
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  both = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(both, axis=-1).astype(x.dtype)


def _linear(w: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  out = x @ w[name]
  if f'{name}.a' in w:
    low = products.thin_product(x, w[f'{name}.a'])
    out = out + products.thin_product(low, w[f'{name}.b'])
  if f'{name}.factor' in w:
    out = out * w[f'{name}.factor']
  if f'{name}_bias' in w:
    out = out + w[f'{name}_bias']
  return out


def layer(
  config: Config,
  weights: Mapping[str, jax.Array],
  x: jax.Array,
  turned: tuple[jax.Array, jax.Array],
  attend: Attend,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """One layer.

  Args:
    config: of the model.
    weights: of this layer, adapters with them.
    x: what enters, (rows, length, width).
    turned: of `rotations`.
    attend: attention over what the caller wants to be seen.

  Returns:
    What leaves, and keys and values, (rows, length, kv_heads, head_width).
  """
  w = {name: array.astype(x.dtype) for name, array in weights.items()}
  rows, length, _ = x.shape
  epsilon = config.norm_epsilon
  normed = rms_norm(x, w['attention_norm'], epsilon)

  def heads(name):
    return _linear(w, name, normed).reshape(rows, length, -1, config.head_width)

  q, k, v = heads('q'), heads('k'), heads('v')
  if config.qk_norm:
    q = rms_norm(q, w['q_norm'], epsilon)
    k = rms_norm(k, w['k_norm'], epsilon)
  q, k = rotate(q, turned), rotate(k, turned)
  x = x + _linear(w, 'o', attend(q, k, v).reshape(rows, length, -1))
  normed = rms_norm(x, w['mlp_norm'], epsilon)
  gate = jax.nn.silu(_linear(w, 'gate', normed))
  x = x + _linear(w, 'down', gate * _linear(w, 'up', normed))
  return x, (k, v)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  is_causal: bool = False,
) -> jax.Array:
  """As `jax.nn.dot_product_attention`, whose softmax is of float32 always.

  Args:
    q: (rows, length, heads, head_width).
    k: (rows, seen, kv_heads, head_width).
    v: likewise.
    mask: what is seen, broadcast to (rows, heads, length, seen).
    is_causal: whether a token sees itself and those before it only.

  Returns:
    Of the shape of `q`. In float64, all of it is computed in float64.
  """
  if q.dtype != jnp.float64:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
  shared = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(one, shared, axis=2) for one in (k, v))
  scores = jnp.einsum('rqhw,rkhw->rhqk', q, k) / q.shape[-1] ** 0.5
  seen = jnp.ones(scores.shape[-2:], bool)
  seen = jnp.tril(seen) if is_causal else seen
  seen = seen if mask is None else seen & mask
  shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  return jnp.einsum('rhqk,rkhw->rqhw', shares, v)


def causal(segments: jax.Array | None = None) -> Attend:
  """Attention of each token to itself and those before it.

  Args:
    segments: (rows, length): only to those of the same number.
  """
  mask = None
  if segments is not None:
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
  return lambda q, k, v: attention(q, k, v, mask=mask, is_causal=True)


def positions_of(segments: jax.Array) -> jax.Array:
  """Positions that start at 0 in each segment, (rows, length)."""
  at = jnp.arange(segments.shape[1])
  new = segments[:, 1:] != segments[:, :-1]
  first = jnp.pad(jnp.where(new, at[1:], 0), ((0, 0), (1, 0)))
  return at - jax.lax.cummax(first, axis=1)


def run_layers(
  config: Config,
  layers: Mapping[str, jax.Array],
  x: jax.Array,
  *,
  segments: jax.Array | None = None,
  positions: jax.Array | None = None,
  remat: bool = False,
) -> jax.Array:
  """Layers in order.

  Args:
    config: of the model.
    layers: any number of stacked layers: all of them, or a part.
    x: what enters the first of them, (rows, length, width).
    segments: which of the sequences of its row a token is of, (rows, length),
      each a stretch with a number of its own: none sees another. None for one
      sequence a row.
    positions: (rows, length), below the length; by default they start at 0 in
      each row or segment.
    remat: whether the backward pass computes each layer anew, for the memory of
      one layer instead of all.

  Returns:
    What leaves the last of them, of the same shape.
  """
  if positions is None and segments is not None:
    positions = positions_of(segments)
  turned = rotations(config, x.shape[1], positions)
  attend = causal(segments)

  def body(x, w):
    return layer(config, w, x, turned, attend)[0], None

  if remat:
    body = jax.checkpoint(body, prevent_cse=False)
  return jax.lax.scan(body, x, dict(layers))[0]


def embed(params: Params, tokens: jax.Array, dtype: Any = None) -> jax.Array:
  """What enters the first layer, (rows, length, width).

  Args:
    params: with `embed`.
    tokens: (rows, length).
    dtype: of all that is computed from it; None for that of the weights.
  """
  found = jnp.asarray(params['embed'])[tokens]
  return found if dtype is None else found.astype(dtype)


def logits(config: Config, params: Params, x: jax.Array) -> jax.Array:
  """Logits of what left the last layer, (..., vocabulary), float32 or wider.

  The head of a small model is a good part of its cost: give it the positions
  that are needed only.
  """
  norm = jnp.asarray(params['norm']).astype(x.dtype)
  normed = rms_norm(x, norm, config.norm_epsilon)
  head = params['embed'].T if config.tied else params['head']
  return jnp.matmul(
    normed,
    head.astype(x.dtype),
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )


def forward(
  config: Config,
  params: Params,
  tokens: jax.Array,
  *,
  remat: bool = False,
  dtype: Any = None,
) -> jax.Array:
  """Logits at all positions, (rows, length, vocabulary)."""
  x = embed(params, tokens, dtype)
  x = run_layers(config, params['layers'], x, remat=remat)
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


def trunk(
  config: Config,
  lower: Params,
  tokens: jax.Array,
  dtype: Any = None,
  *,
  segments: jax.Array | None = None,
  positions: jax.Array | None = None,
) -> jax.Array:
  """What leaves the lower part: of frozen layers, computed once a row."""
  return run_layers(
    config,
    lower['layers'],
    embed(lower, tokens, dtype),
    segments=segments,
    positions=positions,
  )
