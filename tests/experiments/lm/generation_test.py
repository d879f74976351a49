"""Generation with a cache against the whole model run anew for each token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import decoder, generation, lora
from tests.experiments.lm import batches_test
from tests.experiments.lm.decoder_test import CONFIGS, SMALL
from tests.tiers import first

NEW = 6
LENGTHS = (7, 3, 9, 1)


def prompts(seed=0):
  rng = np.random.default_rng(seed)
  # What stands behind a prompt is anything.
  return rng.integers(0, 50, size=(4, 9)).astype(np.int32)


def keys(seed=0):
  return jax.random.split(jax.random.key(seed), 4)


def uncached(config, params, tokens, lengths):
  """The likeliest token, by the whole model, one row and token at a time."""
  size = max(lengths) + NEW
  run = jax.jit(lambda p, t: decoder.forward(config, p, t[None])[0])
  result = []
  for row, length in zip(tokens, lengths):
    full = np.zeros(size, np.int32)
    full[:length] = row[:length]
    for at in range(length, length + NEW):
      full[at] = int(run(params, full)[at - 1].argmax())
    result.append(full[length : length + NEW])
  return np.array(result)


@pytest.mark.parametrize('name', first(CONFIGS))
def test_greedy_answers_are_those_of_the_whole_model(name):
  config = CONFIGS[name]
  params = decoder.init(config, 3)
  adapters = lora.init(params, jax.random.key(1), rank=2, weights=lora.WEIGHTS)
  adapters = jax.tree.map(
    lambda w: w + jnp.sin(jnp.arange(w.size)).reshape(w.shape) / 5, adapters
  )
  tuned = lora.attach(params, adapters, scale=0.5)
  generator = generation.make_generator(config, new=NEW, end=-1)
  tokens, lengths = prompts(), np.array(LENGTHS, np.int32)
  result = generator(tuned, tokens, lengths, keys())
  expected = uncached(config, tuned, tokens, LENGTHS)
  np.testing.assert_array_equal(result.tokens, expected)
  np.testing.assert_array_equal(result.lengths, [NEW] * 4)
  assert not result.ended.any()
  plain = uncached(config, tuned | {'layers': params['layers']}, tokens, [9])
  assert (plain[0] != expected[0]).any()  # The adapters do something.


def test_an_answer_ends_and_its_neighbours_go_on():
  params = decoder.init(SMALL, 3)
  tokens, lengths = prompts(), np.array(LENGTHS, np.int32)
  free = generation.make_generator(SMALL, new=NEW, end=-1)
  full = np.asarray(free(params, tokens, lengths, keys()).tokens)
  end = int(full[0, 2])
  generator = generation.make_generator(SMALL, new=NEW, end=end)
  result = generator(params, tokens, lengths, keys())
  for row, size, ended, all_of in zip(*result, full):
    at = list(all_of).index(end) if end in all_of else NEW
    assert size == min(at + 1, NEW) and ended == (at < NEW)
    np.testing.assert_array_equal(row[:at], all_of[:at])
    assert (row[at:] == end).all()
  assert result.ended[0] and not result.ended.all()
  # Other prompts of the same shape are run by the same program.
  generator(params, prompts(1), lengths[::-1].copy(), keys(1))
  assert generator._cache_size() == 1


def test_samples_follow_the_probabilities_of_what_is_kept():
  logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.05, 0.25]))
  count = 4_000
  many = jnp.tile(logits, (count, 1))
  each = jax.random.split(jax.random.key(0), count)

  def shares(**how):
    result = generation.choose(many, each, **how)
    return np.bincount(np.asarray(result), minlength=5) / count

  hot = np.array([0.1, 0.4, 0.2, 0.05, 0.25]) ** 0.5
  for how, expected in (
    ({}, [0.1, 0.4, 0.2, 0.05, 0.25]),
    ({'temperature': 2.0}, hot / hot.sum()),
    ({'top_k': 2}, np.array([0, 0.4, 0, 0, 0.25]) / 0.65),
    ({'top_k': 9}, [0.1, 0.4, 0.2, 0.05, 0.25]),
    # .4 and .25 are less than .7: it takes a third.
    ({'top_p': 0.7}, np.array([0, 0.4, 0.2, 0, 0.25]) / 0.85),
    ({'top_p': 1e-9}, [0, 1, 0, 0, 0]),
    ({'top_k': 3, 'top_p': 0.6}, np.array([0, 0.4, 0, 0, 0.25]) / 0.65),
    ({'temperature': 0.0}, [0, 1, 0, 0, 0]),
  ):
    result = shares(**how)
    assert not result[np.array(expected) == 0].any(), how
    np.testing.assert_allclose(result, expected, atol=0.03, err_msg=str(how))
  for how, words in (
    ({'temperature': -1.0}, 'temperature=-1.0'),
    ({'top_k': 0}, 'top_k=0'),
    ({'top_p': 0.0}, r'top_p=0\.0, expected in'),
  ):
    with pytest.raises(harness.SettingsError, match=words):
      generation.choose(many, each, **how)
  with pytest.raises(harness.SettingsError, match='new=0 tokens'):
    generation.make_generator(SMALL, new=0, end=-1)({}, many, None, None)


def test_a_sample_depends_on_its_own_row_and_key():
  params = decoder.init(SMALL, 3)
  generator = generation.make_generator(
    SMALL, new=NEW, end=-1, temperature=1.0, top_k=9
  )
  tokens, lengths = prompts(), np.array(LENGTHS, np.int32)
  one = generator(params, tokens, lengths, keys()).tokens
  order = np.array([2, 0, 3, 1])
  two = generator(params, tokens[order], lengths[order], keys()[order]).tokens
  np.testing.assert_array_equal(two, one[order])
  assert (generator(params, tokens, lengths, keys(1)).tokens != one).any()
  # In bfloat16 too: cache and steps are of one dtype, or the loop refuses.
  low = generation.make_generator(SMALL, new=NEW, end=-1, dtype=jnp.bfloat16)
  result = jax.eval_shape(low, params, tokens, lengths, keys())
  assert result.tokens.shape == (4, NEW)


def test_prompts_of_all_lengths_as_texts():
  words = batches_test.merging()
  config = dataclasses.replace(SMALL, vocabulary=len(words.inner.words))
  params = decoder.init(config, 0)
  texts = ['a', 'hello', 'abcdefg', 'ab\nc', 'xyzxyz', 'no']
  traces = []

  def counted(params, tokens, lengths, keys):
    traces.append(tokens.shape)
    return generation.generate(
      config,
      params,
      tokens,
      lengths,
      keys,
      new=4,
      end=words.end,
      temperature=0.0,
    )

  generator = jax.jit(counted)
  ask = lambda texts: generation.answers(
    words,
    generator,
    params,
    texts,
    key=jax.random.key(0),
    buckets=(5, 9),
    rows=2,
  )
  result = ask(texts)
  assert sorted(traces) == [(2, 5), (2, 9)]
  # In another order, with other neighbours, and without a program more.
  assert ask(texts[::-1]) == result[::-1]
  assert len(traces) == 2
  for text, answer in zip(texts, result):
    tokens = np.array([words.encode(text, first=True)])
    tokens = np.pad(tokens, ((0, 0), (0, 9 - tokens.shape[1])))
    length = len(words.encode(text, first=True))
    greedy = uncached(config, params, tokens, [length])[0][:4].tolist()
    if words.end in greedy:
      greedy = greedy[: greedy.index(words.end)]
    assert answer == words.decode(greedy)
  with pytest.raises(harness.UserError, match='prompt 1 has 11 tokens'):
    ask(['a', 'abcdefghij'])
