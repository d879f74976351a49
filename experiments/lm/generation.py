"""Answers of a model: sampled or greedy, with a cache of keys and values.

    made = generation.maker(model.config, new=64, end=words.end)
    texts = generation.answers(
      words, made, model.params, prompts, key=jax.random.key(0))

A prompt of any length is one of a few shapes, so that a run compiles one
program for each. The cache stays on the device, and a step computes one token a
row, whatever came before it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import batches, decoder
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib
from experiments.lm.config import Config


class Generated(NamedTuple):
  """Answers as tokens.

  Attributes:
    tokens: (rows, new), int32; what is behind the end is the end's number.
    lengths: tokens of each answer, (rows,), the end among them if it came.
    ended: whether it came, (rows,).
  """

  tokens: jax.Array
  lengths: jax.Array
  ended: jax.Array


class Cache(NamedTuple):
  """Turned keys and values of all layers, by position.

  Attributes:
    keys: (layers, rows, positions, kv_heads, head_width).
    values: likewise.
  """

  keys: jax.Array
  values: jax.Array


def prefill(
  config: Config,
  layers: decoder.Params,
  x: jax.Array,
  slots: int,
) -> tuple[jax.Array, Cache]:
  """Runs whole prompts.

  Args:
    config: of the model.
    layers: stacked, with adapters or without.
    x: what enters the first of them, (rows, length, width).
    slots: positions that the cache is to have, at least the length.

  Returns:
    What leaves the last layer, (rows, length, width), and a cache. What stands
    there behind the end of a prompt is to be written over, or masked.
  """
  length = x.shape[1]
  turned = decoder.rotations(config, length)
  attend = decoder.causal()

  def body(x, w):
    return decoder.layer(config, w, x, turned, attend)

  x, found = jax.lax.scan(body, x, dict(layers))
  room = [(0, 0), (0, 0), (0, slots - length), (0, 0), (0, 0)]
  return x, Cache(*(jnp.pad(one, room) for one in found))


def step(
  config: Config,
  layers: decoder.Params,
  x: jax.Array,
  cache: Cache,
  positions: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs one token a row.

  Args:
    config: of the model.
    layers: stacked, with adapters or without.
    x: what enters the first of them, (rows, 1, width).
    cache: what came before.
    positions: of the tokens, (rows,).

  Returns:
    What leaves the last layer, (rows, 1, width), and the cache with the token.
  """
  rows, slots = jnp.arange(x.shape[0]), cache.keys.shape[2]
  turned = decoder.rotations(config, slots, positions[:, None])
  seen = jnp.arange(slots) <= positions[:, None]

  def body(x, given):
    w, keys, values = given

    def attend(q, k, v):
      return decoder.attention(
        q,
        keys.at[rows, positions].set(k[:, 0]),
        values.at[rows, positions].set(v[:, 0]),
        mask=seen[:, None, None],
      )

    x, (k, v) = decoder.layer(config, w, x, turned, attend)
    return x, (k[:, 0], v[:, 0])

  x, new = jax.lax.scan(body, x, (dict(layers), *cache))
  # All layers at once, where the cache is: a scan would copy it.
  return x, Cache(
    *(old.at[:, rows, positions].set(one) for old, one in zip(cache, new))
  )


def choose(
  logits: jax.Array,
  keys: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> jax.Array:
  """The next token of each row.

  Args:
    logits: (rows, vocabulary).
    keys: PRNG keys, (rows,).
    temperature: what logits are divided by; 0 for the likeliest token.
    top_k: only so many of the likeliest tokens; None for all.
    top_p: only the likeliest tokens, the fewest that have this probability
      together, after the other two; None for all.

  Returns:
    (rows,), int32.

  Raises:
    SettingsError: if a number is out of its range.
  """
  if temperature < 0 or (top_k is not None and top_k < 1):
    raise harness.SettingsError(
      f'temperature={temperature} and top_k={top_k}, expected at least 0 and 1.'
    )
  if top_p is not None and not 0 < top_p <= 1:
    raise harness.SettingsError(f'top_p={top_p}, expected in (0, 1].')
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k is not None:
    kept = min(top_k, logits.shape[-1])
    least = jax.lax.top_k(logits, kept)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    share = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    least = jnp.min(
      jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True
    )
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def generate(
  config: Config,
  params: decoder.Params,
  tokens: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  new: int,
  end: int,
  dtype: Any = None,
  **choice: Any,
) -> Generated:
  """Continues prompts; a pure function, to be compiled.

  Args:
    config: of the model.
    params: of the model, with adapters or without.
    tokens: prompts, padded at their end with anything, (rows, length).
    lengths: tokens of each prompt, (rows,), at least 1.
    keys: PRNG keys, (rows,): a row's answer depends on its own alone, and not
      on what is beside it.
    new: most tokens of an answer.
    end: the token that ends an answer; -1 for none.
    dtype: what is computed in; None for the dtype of the weights.
    **choice: `temperature`, `top_k` and `top_p` of `choose`.

  Returns:
    A `Generated`. It ends early once all answers have.

  Raises:
    SettingsError: if `new` is below 1, or as in `choose`.
  """
  if new < 1:
    raise harness.SettingsError(f'new={new} tokens, expected at least 1.')
  rows, length = tokens.shape

  def following(x, taken):
    """The next token, from what left the last layer."""
    found = decoder.logits(config, params, x)
    at = jax.vmap(jax.random.fold_in, (0, None))(keys, taken)
    return choose(found, at, **choice)

  # The last token that is chosen is not run any more.
  x = decoder.embed(params, tokens, dtype)
  x, cache = prefill(config, params['layers'], x, length + new - 1)
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
  first = following(last, 0)
  made = jnp.full((rows, new), end, jnp.int32).at[:, 0].set(first)

  def going(carry):
    taken, _, _, last = carry
    return (taken < new) & jnp.any(last != end)

  def body(carry):
    taken, made, cache, last = carry
    x = decoder.embed(params, last[:, None], dtype)
    x, cache = step(config, params['layers'], x, cache, lengths + taken - 1)
    found = jnp.where(last == end, end, following(x[:, 0], taken))
    return taken + 1, made.at[:, taken].set(found), cache, found

  _, made, _, _ = jax.lax.while_loop(
    going, body, (jnp.int32(1), made, cache, first)
  )
  ended = jnp.any(made == end, axis=1)
  whole = jnp.argmax(made == end, axis=1) + 1
  return Generated(made, jnp.where(ended, whole, new), ended)


# From weights, prompts, their lengths and keys.
Maker = Callable[[Any, Any, Any, Any], Generated]


def maker(
  config: Config, *, new: int, end: int, temperature: float = 0.0, **how: Any
) -> Maker:
  """`generate`, compiled once for each shape of prompts.

  Args:
    config: of the model.
    new: as in `generate`.
    end: likewise.
    temperature: likewise; greedy by default.
    **how: the other options of `generate`.

  Returns:
    A function of (params, tokens, lengths, keys).

  Raises:
    SettingsError: as `generate`, at the call.
  """

  def run(params, tokens, lengths, keys):
    return generate(
      config,
      params,
      tokens,
      lengths,
      keys,
      new=new,
      end=end,
      temperature=temperature,
      **how,
    )

  return jax.jit(run)


def answers(
  tokenizer: tokenizer_lib.Tokenizer,
  made: Maker,
  params: decoder.Params,
  prompts: Sequence[data_lib.Prompt],
  *,
  key: jax.Array,
  buckets: Sequence[int] = (64, 128, 256),
  rows: int = 8,
) -> list[str]:
  """Answers to prompts as texts, without the token that ends them.

  Args:
    tokenizer: of the model.
    made: of `maker`.
    params: of the model, adapters attached.
    prompts: messages or texts.
    key: PRNG key; an answer depends on it and on its prompt's place alone.
    buckets: rising lengths to which prompts are padded: as many programs.
    rows: prompts in a batch; the last one is filled up.

  Returns:
    One text a prompt, in order.

  Raises:
    UserError: if a prompt is longer than the last bucket, or has no tokens.
  """
  encoded = [batches.encode_prompt(tokenizer, prompt) for prompt in prompts]
  for i, one in enumerate(encoded):
    if not 0 < len(one) <= max(buckets):
      raise harness.UserError(
        f'prompt {i} has {len(one)} tokens, expected 1 to {max(buckets)}: '
        'leave it out, or give a longer bucket.'
      )
  of = np.searchsorted(buckets, [len(one) for one in encoded])
  found = [''] * len(encoded)
  for number, length in enumerate(buckets):
    members = np.flatnonzero(of == number)
    for start in range(0, len(members), rows):
      some = members[start : start + rows]
      # Filled up with the first: equal rows end together.
      filling = np.full(rows - len(some), some[0])
      places = np.concatenate([some, filling])
      tokens = np.zeros((rows, length), np.int32)
      for row, place in zip(tokens, places):
        row[: len(encoded[place])] = encoded[place]
      lengths = np.array([len(encoded[place]) for place in places], np.int32)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(places))
      out = jax.device_get(made(params, tokens, lengths, keys))
      for row, place in enumerate(some):
        size = out.lengths[row] - out.ended[row]
        found[place] = tokenizer.decode(out.tokens[row, :size].tolist())
  return found
