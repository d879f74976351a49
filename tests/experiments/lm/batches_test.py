"""Tests encoded examples: masks of answers, skipped examples, batches."""

import string
import types

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.lm import (
  batches,
  data,
  decoder,
  hugging_face,
  log_probs,
  tokenizer,
)
from experiments.lm import config as config_lib
from tests.experiments.lm import reference
from tests.experiments.lm.decoder_test import SMALL

USER = ({'role': 'user', 'content': 'Hi'},)


class Merging:
  """A tokeniser of letters that merges pairs of equal letters."""

  encode_special_tokens = False
  words = (*string.ascii_letters, *' \n', *(2 * c for c in 'abcl'), '</s>')

  class Found:
    """An encoding of the package `tokenizers`."""

    def __init__(self, ids):
      self.ids = ids

  def get_added_tokens_decoder(self):
    end = types.SimpleNamespace(content='</s>', special=True)
    return {len(self.words) - 1: end}

  def get_vocab(self, with_added_tokens):
    assert with_added_tokens
    return {word: i for i, word in enumerate(self.words)}

  def encode(self, text, add_special_tokens):
    ids = [self.words.index('\n')] if add_special_tokens else []
    while text:
      for size in (4, 2, 1):
        plain = size == 4 and self.encode_special_tokens
        if (
          (word := text[:size]) in self.words
          and not plain
          and len(word) == size
        ):
          ids.append(self.words.index(word))
          text = text[size:]
          break
      else:
        raise ValueError(f'no token for {text[0]!r}')
    return self.Found(ids)

  def decode(self, ids, skip_special_tokens):
    assert not skip_special_tokens
    return ''.join(self.words[i] for i in ids)


TEMPLATE = (
  '{% for m in messages %}{{ m.role }}\n{{ m.content }}'
  '{% if m.role == "assistant" %}</s>{% endif %}{{ "\n" }}{% endfor %}'
  '{% if add_generation_prompt %}assistant\n{% endif %}'
)


def merging(template=''):
  end = len(Merging.words) - 1
  return tokenizer.Tokenizer(Merging(), template, end, {})


def test_no_token_merges_across_prompt_and_answer():
  words = merging()
  # Encoded together, the third and the fourth letter are one token.
  assert len(words.encode('hel' + 'lo')) == 4
  tokens, mask = batches.encode_answer(words, 'hel', 'lo')
  assert words.decode(tokens[mask == 1]) == 'lo</s>'
  assert words.decode(tokens[mask == 0]) == '\nhel'  # With a first token.
  pytest.importorskip('jinja2', reason='templates need the extra llm')
  words = merging(TEMPLATE)
  tokens, mask = batches.encode_answer(words, USER, 'abb')
  assert words.decode(tokens[mask == 1]) == 'abb</s>'
  assert words.decode(tokens[mask == 0]) == 'user\nHi\nassistant\n'
  for template, match in (
    ('{{ messages | length }}', 'with and without an answer'),
    ('{{ raise_exception("no system") }}', 'template says: no system'),
    ('{{ messages[9].content.x }}', 'fails for these messages'),
  ):
    with pytest.raises(harness.UserError, match=match):
      batches.encode_answer(merging(template), USER, 'a')
  with pytest.raises(harness.UserError, match='no chat template'):
    batches.encode_answer(merging(), USER, 'a')


DIALOGUE = (
  *USER,
  {'role': 'assistant', 'content': 'abb'},
  {'role': 'user', 'content': 'So'},
)


def test_all_turns_of_the_assistant_are_marked():
  """The tokens are those of the whole dialogue."""
  pytest.importorskip('jinja2', reason='templates need the extra llm')
  words = merging(TEMPLATE)
  last, last_mask = batches.encode_answer(words, DIALOGUE, 'c')
  tokens, mask = batches.encode_answer(words, DIALOGUE, 'c', turns='all')
  assert words.decode(tokens) == words.decode(last)
  marked = ''.join(
    words.decode([token]) if one else '_' for token, one in zip(tokens, mask)
  )
  assert [part for part in marked.split('_') if part] == ['abb</s>', 'c</s>']
  assert words.decode(last[last_mask == 1]) == 'c</s>'
  # A template whose turns have no end token: only the last answer gets one.
  words = merging(TEMPLATE.replace('</s>', ''))
  tokens, mask = batches.encode_answer(words, DIALOGUE, 'c', turns='all')
  assert words.decode(tokens[mask == 1]) == 'abb\nc\n</s>'
  # A template that shows only the last answer, as some do with thoughts.
  hides = '{% if m.role == "assistant" and not loop.last %}{% else %}'
  words = merging(
    TEMPLATE.replace('{{ m.content }}', hides + '{{ m.content }}{% endif %}')
  )
  with pytest.raises(harness.UserError, match='or train on the last turn'):
    batches.encode_answer(words, DIALOGUE, 'c', turns='all')
  # Each turn gets the log-probability that it has as a last turn.
  words = merging(TEMPLATE)
  tokens, mask = batches.encode_answer(words, DIALOGUE, 'c', turns='all')
  first, first_mask = batches.encode_answer(words, DIALOGUE[:1], 'abb')
  np.testing.assert_array_equal(tokens[: len(first)], first)
  np.testing.assert_array_equal(mask[: len(first)], first_mask)


def test_long_examples_are_truncated():
  words = merging()
  examples = [
    data.Example(0, 'ab', 9 * 'xy', 'yx'),
    data.Example(1, 12 * 'ab', 'xy', 'yx'),  # No room for its answers.
    data.Example(2, 'ab', 'xy', 'yx'),
    data.Example(3, 'ab', 9 * 'xy', 9 * 'xy' + 'a'),  # Equal after the cut.
  ]
  result = batches.encode(words, examples, max_length=8, too_long='truncate')
  assert (result.truncated, result.too_long, result.equal) == (1, 2, 0)
  np.testing.assert_array_equal(result.rows, [0, 2])
  assert words.decode(result.items[0]['chosen']) == '\nabxyxyx'
  assert words.decode(result.items[0]['rejected']) == '\nabyx</s>'
  assert result.items[0]['chosen_mask'].tolist() == 3 * [0] + 5 * [1]
  assert result.lengths.tolist() == [8, 6]


def pairs():
  letters = 'abcdefghij'
  return [
    data.Example(
      3 * i, letters[: 2 + i % 5], letters[i], 2 * letters[i : i + 2]
    )
    for i in range(9)
  ]


def test_batches_have_one_length():
  words = merging()
  encoded = batches.encode(words, pairs(), max_length=11)
  assert encoded.too_long == sum(
    2 + i % 5 + len(words.encode(2 * 'abcdefghij'[i : i + 2])) + 2 > 11
    for i in range(9)
  )
  assert 0 < encoded.too_long < 9
  assert set(encoded.rows) <= {3 * i for i in range(9)}
  stacked = batches.stacked(encoded)
  for place, item in enumerate(encoded.items):
    for name in ('chosen', 'chosen_mask', 'rejected', 'rejected_mask'):
      row = stacked[name][place]
      np.testing.assert_array_equal(row[: len(item[name])], item[name])
      assert not row[len(item[name]) :].any()
  with pytest.raises(harness.UserError, match='got demonstrations and comp'):
    batches.encode(words, [*pairs(), data.Example(0, 'a', 'b')], max_length=9)
  with pytest.raises(harness.UserError, match='9 are longer than 2 tokens'):
    batches.encode(words, pairs(), max_length=2)


def test_unusable_examples_are_counted():
  words = merging()
  examples = [
    data.Example(0, 'ab', 'xy', 'yx'),
    data.Example(1, 'ab', '', 'yx'),
    data.Example(2, 'ab', 'xy', ''),
    data.Example(3, 'ab', 'xy', 'xy'),
    data.Example(4, 'ab', 9 * 'xy', 'yx'),
    data.Example(5, 'ab', 'yx', 'xy'),
  ]
  result = batches.encode(words, examples, max_length=9)
  assert (result.too_long, result.empty, result.equal) == (1, 2, 1)
  np.testing.assert_array_equal(result.rows, [0, 5])
  shown = [one._replace(rejected=None) for one in examples]
  result = batches.encode(words, shown, max_length=9)
  assert (result.too_long, result.empty, result.equal) == (1, 1, 0)
  assert batches.stacked(result)['mask'].sum(axis=1).min() >= 2
  match = '1 are longer than 9 tokens, 2 have an empty answer, 1 have two equal'
  with pytest.raises(harness.UserError, match=match):
    batches.encode(words, examples[1:5], max_length=9)
  # The template strips an answer of white space.
  pytest.importorskip('jinja2', reason='templates need the extra llm')
  words = merging(TEMPLATE.replace('m.content', 'm.content | trim'))
  examples = [data.Example(0, USER, ' '), data.Example(1, USER, 'a')]
  assert batches.encode(words, examples, max_length=40).empty == 1


def test_log_probs_equal_plain_numpy():
  config = SMALL
  params = decoder.init(config, 0)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 50, size=(3, 12)).astype(np.int32)
  spans = [(4, 7), (10, 12), (1, 6)]
  mask = np.zeros((3, 12), np.int32)
  for row, (low, high) in zip(mask, spans):
    row[low:high] = 1
  fields = config_lib.to_hugging_face(config)
  tensors = dict(hugging_face.named_tensors(config, params))

  def both(params, tokens, mask):
    full = log_probs.from_tokens(config, params, tokens, mask)
    few = log_probs.from_tokens(config, params, tokens, mask, max_answer=5)
    return full, few

  full, few = jax.jit(both)(params, tokens, mask)
  assert few.log_probs.shape == (3, 5)
  for i, (low, high) in enumerate(spans):
    logits = reference.forward(fields, tensors, tokens[i])
    total = np.log(np.exp(logits).sum(-1))
    expected = [
      logits[t - 1, tokens[i, t]] - total[t - 1] for t in range(low, high)
    ]
    for result in (full, few):
      answer_log_probs = result.log_probs[i][result.mask[i] > 0]
      np.testing.assert_allclose(
        answer_log_probs, expected, rtol=1e-4, atol=1e-5
      )
      np.testing.assert_allclose(result.total[i], sum(expected), rtol=1e-4)
      np.testing.assert_allclose(result.mean[i], np.mean(expected), rtol=1e-4)
