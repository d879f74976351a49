"""A decoder of Llama's family: pure functions of a pytree of weights.

    params = {'embed': (vocabulary, width), 'norm': (width,),
              'layers': {name: (layers, in, out)}, 'head': (width, vocabulary)}

Layers are stacked and scanned, so that a deep model compiles as fast as a
shallow one. A tied model has no `head`. An adapter of the weight `q` is two
further entries of a layer, `q.a` and `q.b`, and for DoRA `q.factor`, see
`lora`.

Sequences are padded at their end, where a causal model needs no mask. Several
short sequences may share a row, see `run_layers`.

The arithmetic has the dtype of `embed(dtype=)`: weights and adapters are cast
to it, layer by layer. On an accelerator it may be bfloat16, while the optimiser
updates float32 weights with float32 gradients. Logits are float32 or wider.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.train import products
from experiments.lm.config import Config, frequencies

Params = Mapping[str, Any]
# Rotated queries and keys, and values -> output of the attention.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def shapes(config: Config) -> dict[str, Any]:
  """Shapes of all weights by name, as a pytree of tuples."""
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
  model: dict[str, Any] = {
    'embed': (config.vocabulary, config.width),
    'layers': {n: (config.layers, *shape) for n, shape in layer.items()},
    'norm': (config.width,),
  }
  if not config.tied:
    model['head'] = (config.width, config.vocabulary)
  return model


def init(config: Config, seed: int, dtype: Any = jnp.float32) -> Params:
  """Draws random weights for tests."""
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    noise = rng.normal(size=shape)
    if 'norm' in jax.tree_util.keystr(path):
      return jnp.asarray(1 + noise / 10, dtype)
    inputs = shape[-2] if len(shape) > 1 else shape[-1]
    return jnp.asarray(noise / inputs**0.5, dtype)

  is_shape = lambda node: isinstance(node, tuple)
  return jax.tree_util.tree_map_with_path(
    draw, shapes(config), is_leaf=is_shape
  )


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
  """Divides by the root mean square along the last axis, in float32."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.mean(wide**2, axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(square + epsilon)).astype(x.dtype) * weight


def rotations(
  config: Config, length: int, positions: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Computes cosines and sines of the rotary position embedding.

  Args:
    config: config of the model.
    length: upper bound of the positions, exclusive.
    positions: (rows, tokens); by default 0, 1, ... in each row.

  Returns:
    Two arrays, (length, 1, head_width / 2), or (rows, tokens, 1, ...).
  """
  # float64 of numpy, since late positions have large angles.
  angles = np.arange(length)[:, None, None] * frequencies(config)
  cos, sin = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
  if positions is None:
    return cos, sin
  return cos[positions], sin[positions]


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the two halves of (rows, length, heads, width)."""
  cos, sin = rotation
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
  rotation: tuple[jax.Array, jax.Array],
  attend: Attend,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Runs one layer.

  Args:
    config: config of the model.
    weights: weights and adapters of the layer.
    x: input, (rows, length, width).
    rotation: cosines and sines from `rotations`.
    attend: attention with the caller's mask.

  `weights` may have `rotated`, see `with_rotated`.

  Returns:
    The output, and keys and values, (rows, length, kv_heads, head_width).
  """
  w = {name: array.astype(x.dtype) for name, array in weights.items()}
  if 'rotated' in weights:
    cos, sin = rotation
    rotated = weights['rotated']
    rotation = jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
  rows, length, _ = x.shape
  epsilon = config.norm_epsilon
  normed = rms_norm(x, w['attention_norm'], epsilon)

  def heads(name):
    return _linear(w, name, normed).reshape(rows, length, -1, config.head_width)

  q, k, v = heads('q'), heads('k'), heads('v')
  if config.qk_norm:
    q = rms_norm(q, w['q_norm'], epsilon)
    k = rms_norm(k, w['k_norm'], epsilon)
  q, k = rotate(q, rotation), rotate(k, rotation)
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
  """Computes attention as `jax.nn.dot_product_attention`, also in float64.

  Args:
    q: queries, (rows, length, heads, head_width).
    k: keys, (rows, context, kv_heads, head_width).
    v: values, (rows, context, kv_heads, head_width).
    mask: visible tokens, broadcast to (rows, heads, length, context).
    is_causal: whether later tokens are invisible.

  Returns:
    An array of the shape of `q`. The softmax of `jax.nn` is always float32;
    here float64 inputs have a float64 softmax.
  """
  if q.dtype != jnp.float64:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(array, groups, axis=2) for array in (k, v))
  scores = jnp.einsum('rqhw,rkhw->rhqk', q, k) / q.shape[-1] ** 0.5
  visible = jnp.ones(scores.shape[-2:], bool)
  visible = jnp.tril(visible) if is_causal else visible
  visible = visible if mask is None else visible & mask
  weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
  return jnp.einsum('rhqk,rkhw->rqhw', weights, v)


def causal(segments: jax.Array | None = None) -> Attend:
  """Makes causal attention, optionally within segments.

  Args:
    segments: (rows, length); tokens see only their own segment.
  """
  mask = None
  if segments is not None:
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
  return lambda q, k, v: attention(q, k, v, mask=mask, is_causal=True)


def segment_positions(segments: jax.Array) -> jax.Array:
  """Computes positions that start at 0 in each segment, (rows, length)."""
  at = jnp.arange(segments.shape[1])
  new = segments[:, 1:] != segments[:, :-1]
  first = jnp.pad(jnp.where(new, at[1:], 0), ((0, 0), (1, 0)))
  return at - jax.lax.cummax(first, axis=1)


def with_rotated(
  config: Config, layers: Mapping[str, jax.Array], first: int | None = None
) -> dict[str, jax.Array]:
  """Adds to stacked layers which of them have rotary positions.

  Args:
    config: config of the model.
    layers: stacked layers, all or some.
    first: number of the first one; by default they are the last ones.

  Returns:
    The layers, with `rotated`, bool (layers,), if some layers have none.
  """
  layers = dict(layers)
  if not config.unrotated:
    return layers
  count = len(layers['attention_norm'])
  first = config.layers - count if first is None else first
  rotated = [i not in config.unrotated for i in range(first, first + count)]
  return layers | {'rotated': jnp.array(rotated)}


def run_layers(
  config: Config,
  layers: Mapping[str, jax.Array],
  x: jax.Array,
  *,
  segments: jax.Array | None = None,
  positions: jax.Array | None = None,
  remat: bool = False,
  first: int | None = None,
) -> jax.Array:
  """Runs layers in order.

  Args:
    config: config of the model.
    layers: stacked layers of the model, all or some.
    x: input of the first layer, (rows, length, width).
    segments: number of each token's sequence in its row, (rows, length);
      sequences do not see each other. None for one sequence per row.
    positions: (rows, length), below the length; by default they start at 0 in
      each row or segment.
    remat: whether the backward pass recomputes each layer, to save memory.
      Otherwise it stores the products and recomputes what lies between them.
    first: number of the first layer; by default they are the last ones.

  Returns:
    The output of the last layer, of the same shape.
  """
  if positions is None and segments is not None:
    positions = segment_positions(segments)
  rotation = rotations(config, x.shape[1], positions)
  attend = causal(segments)

  def body(x, w):
    return layer(config, w, x, rotation, attend)[0], None

  # Norms and activations cost more memory than time: storing them is slower.
  policy = None if remat else jax.checkpoint_policies.dots_saveable
  body = jax.checkpoint(body, prevent_cse=False, policy=policy)
  return jax.lax.scan(body, x, with_rotated(config, layers, first))[0]


def embed(params: Params, tokens: jax.Array, dtype: Any = None) -> jax.Array:
  """Computes the input of the first layer, (rows, length, width).

  Args:
    params: weights with `embed`.
    tokens: (rows, length).
    dtype: dtype of the arithmetic; None for that of the weights.
  """
  x = jnp.asarray(params['embed'])[tokens]
  return x if dtype is None else x.astype(dtype)


def logits(config: Config, params: Params, x: jax.Array) -> jax.Array:
  """Computes logits from the last layer, (..., vocabulary), float32 or wider.

  The head is a large part of the cost of a small model: pass only the positions
  that are needed.
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
  """Computes logits at all positions, (rows, length, vocabulary)."""
  x = embed(params, tokens, dtype)
  x = run_layers(config, params['layers'], x, remat=remat)
  return logits(config, params, x)


def split_layers(params: Params, first: int) -> tuple[Params, Params]:
  """Splits a model into its first layers with the embedding, and the rest.

  It copies weights: call it outside of a compiled step.

  Args:
    params: weights of the model.
    first: number of layers of the lower part.

  Returns:
    The lower part, for `trunk`, and the upper part with the other `layers`.
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
  """Runs the lower part of a split model."""
  return run_layers(
    config,
    lower['layers'],
    embed(lower, tokens, dtype),
    segments=segments,
    positions=positions,
    first=0,
  )
