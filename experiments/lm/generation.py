"""Generates answers, sampled or greedy, with a key-value cache.

    generate = generation.make_generator(model.config, new=64, end=tokens.end)
    texts = generation.answers(
      tokens, generate, model.params, prompts, key=jax.random.key(0))

Prompts are padded to a few lengths; each length compiles one program.
"""

from collections.abc import Callable, Container, Iterator, Sequence
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
    tokens: (rows, new), int32, filled with the end token.
    lengths: number of tokens with the end token, (rows,).
    ended: whether the answer has an end token, (rows,).
  """

  tokens: jax.Array
  lengths: jax.Array
  ended: jax.Array


class Cache(NamedTuple):
  """Rotated keys, and values, of all layers.

  Attributes:
    keys: (layers, rows, positions, kv_heads, head_width).
    values: array of the same shape.
  """

  keys: jax.Array
  values: jax.Array


def prefill(
  config: Config,
  layers: decoder.Params,
  x: jax.Array,
  slots: int,
) -> tuple[jax.Array, Cache]:
  """Runs prompts and fills the cache.

  Args:
    config: config of the model.
    layers: stacked layers, with or without adapters.
    x: input of the first layer, (rows, length, width).
    slots: number of positions of the cache, at least the length.

  Returns:
    Output of the last layer, (rows, length, width), and the cache. Its entries
    beyond the end of a prompt have to be overwritten or masked.
  """
  length = x.shape[1]
  rotation = decoder.rotations(config, length)
  attend = decoder.causal()

  def body(x, w):
    return decoder.layer(config, w, x, rotation, attend)

  x, keys_values = jax.lax.scan(body, x, decoder.with_rotated(config, layers))
  room = [(0, 0), (0, 0), (0, slots - length), (0, 0), (0, 0)]
  return x, Cache(*(jnp.pad(array, room) for array in keys_values))


def step(
  config: Config,
  layers: decoder.Params,
  x: jax.Array,
  cache: Cache,
  positions: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs one token per row.

  Args:
    config: config of the model.
    layers: stacked layers, with or without adapters.
    x: input of the first layer, (rows, 1, width).
    cache: cache of the previous tokens.
    positions: positions of the tokens, (rows,).

  Returns:
    Output of the last layer, (rows, 1, width), and the cache with the token.
  """
  rows, slots = jnp.arange(x.shape[0]), cache.keys.shape[2]
  rotation = decoder.rotations(config, slots, positions[:, None])
  visible = jnp.arange(slots) <= positions[:, None]

  def body(x, inputs):
    w, keys, values = inputs

    def attend(q, k, v):
      return decoder.attention(
        q,
        keys.at[rows, positions].set(k[:, 0]),
        values.at[rows, positions].set(v[:, 0]),
        mask=visible[:, None, None],
      )

    x, (k, v) = decoder.layer(config, w, x, rotation, attend)
    return x, (k[:, 0], v[:, 0])

  x, new = jax.lax.scan(body, x, (decoder.with_rotated(config, layers), *cache))
  # Updates all layers at once in place: a scan would copy the cache.
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
  """Chooses the next token of each row.

  Args:
    logits: (rows, vocabulary).
    keys: PRNG keys, (rows,).
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: number of likeliest tokens to sample from; None for all.
    top_p: samples from the smallest set of likeliest tokens with at least this
      probability, after `temperature` and `top_k`; None for all.

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
    count = min(top_k, logits.shape[-1])
    threshold = jax.lax.top_k(logits, count)[0][:, -1:]
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if top_p is not None:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    threshold = jnp.min(
      jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True
    )
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
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
  """Continues prompts until all answers have ended; a pure function.

  Args:
    config: config of the model.
    params: weights of the model, with or without adapters.
    tokens: prompts with any padding at the end, (rows, length).
    lengths: number of tokens of each prompt, (rows,), at least 1.
    keys: PRNG keys, (rows,); an answer depends on its own key alone.
    new: largest number of tokens of an answer.
    end: token that ends an answer; -1 for no such token.
    dtype: dtype of the arithmetic; None for that of the weights.
    **choice: `temperature`, `top_k` and `top_p` of `choose`.

  Returns:
    A `Generated`.

  Raises:
    SettingsError: if `new` is below 1, or as in `choose`.
  """
  if new < 1:
    raise harness.SettingsError(f'new={new} tokens, expected at least 1.')
  rows, length = tokens.shape

  def next_token(x, count):
    """Chooses the next token from the output of the last layer."""
    logits = decoder.logits(config, params, x)
    row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
    return choose(logits, row_keys, **choice)

  # The cache needs no slot for the last token of an answer.
  x = decoder.embed(params, tokens, dtype)
  x, cache = prefill(config, params['layers'], x, length + new - 1)
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
  first = next_token(last, 0)
  output = jnp.full((rows, new), end, jnp.int32).at[:, 0].set(first)

  def unfinished(carry):
    count, _, _, last = carry
    return (count < new) & jnp.any(last != end)

  def body(carry):
    count, output, cache, last = carry
    x = decoder.embed(params, last[:, None], dtype)
    x, cache = step(config, params['layers'], x, cache, lengths + count - 1)
    token = jnp.where(last == end, end, next_token(x[:, 0], count))
    return count + 1, output.at[:, count].set(token), cache, token

  _, output, _, _ = jax.lax.while_loop(
    unfinished, body, (jnp.int32(1), output, cache, first)
  )
  ended = jnp.any(output == end, axis=1)
  length_with_end = jnp.argmax(output == end, axis=1) + 1
  return Generated(output, jnp.where(ended, length_with_end, new), ended)


# (params, tokens, lengths, keys) -> answers.
Generator = Callable[[Any, Any, Any, Any], Generated]


def make_generator(
  config: Config,
  *,
  new: int,
  end: int,
  temperature: float = 0.0,
  **options: Any,
) -> Generator:
  """Makes a compiled `generate`, greedy by default.

  Args:
    config: config of the model.
    new: largest number of tokens of an answer.
    end: token that ends an answer; -1 for no such token.
    temperature: divides the logits; 0 takes the likeliest token.
    **options: further options of `generate`.

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
      **options,
    )

  return jax.jit(run)


class Answer(NamedTuple):
  """An answer to a prompt.

  Attributes:
    place: index of the prompt.
    text: the text, without the end token.
    length: number of tokens, without the end token.
    ended: whether the model ended the answer.
  """

  place: int
  text: str
  length: int
  ended: bool


def stream(
  tokenizer: tokenizer_lib.Tokenizer,
  generator: Generator,
  params: decoder.Params,
  prompts: Sequence[Sequence[int]],
  *,
  key: jax.Array,
  buckets: Sequence[int] = (64, 128, 256),
  rows: int = 8,
  skip: Container[int] = (),
) -> Iterator[list[Answer]]:
  """Answers prompts batch by batch, short prompts first.

  Args:
    tokenizer: tokeniser of the model.
    generator: a compiled generator from `make_generator`.
    params: weights of the model with attached adapters.
    prompts: tokens of each prompt, see `batches.encode_prompt`.
    key: PRNG key; an answer depends on it and on the prompt's index.
    buckets: ascending lengths to which prompts are padded; each compiles one
      program.
    rows: prompts per batch.
    skip: indices of prompts that need no answer. The others keep their batches,
      so that their answers stay the same to the bit.

  Yields:
    The answers of one batch, in the order of the prompts.

  Raises:
    UserError: if a prompt is longer than the last bucket, or has no tokens.
  """
  for i, one in enumerate(prompts):
    if not 0 < len(one) <= max(buckets):
      raise harness.UserError(
        f'prompt {i} has {len(one)} tokens, expected 1 to {max(buckets)}: '
        'remove it, or give a longer bucket.'
      )
  bucket = np.searchsorted(buckets, [len(one) for one in prompts])
  for number, length in enumerate(buckets):
    members = np.flatnonzero(bucket == number)
    for start in range(0, len(members), rows):
      batch = members[start : start + rows]
      if all(place in skip for place in batch):
        continue
      # Fills the batch with its first prompt: equal rows end together.
      filling = np.full(rows - len(batch), batch[0])
      places = np.concatenate([batch, filling])
      tokens = np.zeros((rows, length), np.int32)
      for row, place in zip(tokens, places):
        row[: len(prompts[place])] = prompts[place]
      lengths = np.array([len(prompts[place]) for place in places], np.int32)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(places))
      out = jax.device_get(generator(params, tokens, lengths, keys))
      sizes = (out.lengths - out.ended).tolist()
      yield [
        Answer(int(place), tokenizer.decode(row[:size].tolist()), size, ended)
        for place, row, size, ended in zip(
          batch, out.tokens, sizes, out.ended.tolist()
        )
      ]


def answers(
  tokenizer: tokenizer_lib.Tokenizer,
  generator: Generator,
  params: decoder.Params,
  prompts: Sequence[data_lib.Prompt],
  **options: Any,
) -> list[str]:
  """Answers prompts as texts, without the end token.

  Args:
    tokenizer: tokeniser of the model.
    generator: a compiled generator from `make_generator`.
    params: weights of the model with attached adapters.
    prompts: messages or texts.
    **options: options of `stream`; `key` is required.

  Returns:
    One text per prompt, in order.

  Raises:
    UserError: as `stream`.
  """
  encoded = [batches.encode_prompt(tokenizer, prompt) for prompt in prompts]
  texts = [''] * len(encoded)
  for batch in stream(tokenizer, generator, params, encoded, **options):
    for one in batch:
      texts[one.place] = one.text
  return texts
