"""Rows of all kinds, what is wrong with others, and masks of answers."""

import gzip
import json
import os
import pathlib
import string

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.lm import batches, data, decoder, log_probs, tokenizer, weights
from experiments.lm import config as config_lib
from tests.experiments.lm import reference
from tests.experiments.lm.decoder_test import SMALL

USER = ({'role': 'user', 'content': 'Hi'},)
HH = '\n\nHuman: Hi\n\nAssistant: Hm: Human: you?\n\nHuman: So\n\nAssistant:'
GOOD = (
  (
    {'messages': [*USER, {'role': 'assistant', 'content': 'Yes'}], 'id': 3},
    (USER, 'Yes', None),
  ),
  ({'prompt': 'Hi', 'response': ' Yes'}, ('Hi', ' Yes', None)),
  ({'prompt': list(USER), 'completion': 'Yes'}, (USER, 'Yes', None)),
  ({'instruction': 'Hi', 'output': 'Yes'}, (USER, 'Yes', None)),
  (
    {'instruction': 'Add', 'input': '1 2', 'output': '3'},
    (({'role': 'user', 'content': 'Add\n\n1 2'},), '3', None),
  ),
  (
    {'instruction': 'Hi', 'context': ' ', 'response': 'Yes'},
    (USER, 'Yes', None),
  ),
  ({'prompt': 'Hi', 'chosen': 'a', 'rejected': 'b'}, ('Hi', 'a', 'b')),
  (
    {
      'prompt': list(USER),
      'chosen': [{'role': 'assistant', 'content': 'a'}],
      'rejected': [{'role': 'assistant', 'content': 'b'}],
    },
    (USER, 'a', 'b'),
  ),
  (
    {'chosen': f'{HH} a', 'rejected': f'{HH} b\n\nc '},
    (
      (
        *USER,
        {'role': 'assistant', 'content': 'Hm: Human: you?'},
        {'role': 'user', 'content': 'So'},
      ),
      'a',
      'b\n\nc',
    ),
  ),
)
BAD = (
  ({'text': 'x'}, r"keys are \['text'\]; expected messages"),
  ({'prompt': 'Hi', 'response': ' '}, "response is ' ', expected a text"),
  ({'prompt': 7, 'response': 'a'}, 'prompt is no list of messages'),
  ({'prompt': 'Hi', 'output': None}, 'output is NoneType'),
  ({'messages': list(USER)}, "is of 'user', expected an answer"),
  ({'messages': [{'role': 'user'}]}, 'message 0 of messages has no role and'),
  ({'messages': []}, 'messages is no list'),
  ({'chosen': 'a', 'rejected': 'b'}, 'chosen is no dialogue'),
  (
    {'chosen': f'{HH} a', 'rejected': HH.replace('So', 'No') + ' b'},
    'differ before their last turn',
  ),
  ({'chosen': f'{HH} a', 'rejected': HH}, 'the last message of rejected is'),
  ({'instruction': 'Hi', 'input': 3, 'output': 'a'}, 'input or context is int'),
  ({'instruction': 'Hi', 'instances': []}, 'instances is no list'),
  (
    {'instruction': 'Hi', 'instances': [{'input': ''}]},
    'instance 0 has no out',
  ),
  (
    {'instruction': 'Hi', 'instances': [{'output': 'a'}, {'output': ''}]},
    "instance 1: output is ''",
  ),
)


@pytest.mark.parametrize('name', ['rows.jsonl', 'rows.json', 'rows.jsonl.gz'])
def test_rows_of_all_kinds(tmp_path, name):
  rows = [row for row, _ in GOOD]
  text = json.dumps(rows)
  if 'jsonl' in name:
    text = '\n\n'.join(json.dumps(row) for row in rows) + '\n'
  raw = text.encode()
  path = tmp_path / name
  path.write_bytes(gzip.compress(raw) if name.endswith('.gz') else raw)
  found, left = data.read_examples(path)
  assert not left
  for number, (example, (_, expected)) in enumerate(zip(found, GOOD)):
    assert example == (number, *expected)


def test_instances_of_a_row_share_its_number(tmp_path):
  seed = {
    'id': 'seed_task_1',
    'name': 'adding',
    'instruction': 'Add',
    'instances': [
      {'input': '1 2', 'output': '3'},
      {'input': '', 'output': 'What?'},
    ],
    'is_classification': False,
  }
  path = tmp_path / 'tasks.jsonl'
  path.write_text(f'{json.dumps(GOOD[0][0])}\n{json.dumps(seed)}\n')
  found, _ = data.read_examples(path)
  user = lambda text: ({'role': 'user', 'content': text},)
  assert found[1:] == [
    (1, user('Add\n\n1 2'), '3', None),
    (1, user('Add'), 'What?', None),
  ]


def test_the_seed_tasks_of_alpaca():
  folder = pathlib.Path(os.environ.get('BILEVEL_JAX_DATA', ''), 'llm')
  path = folder / 'alpaca_seed_tasks.jsonl'
  if not path.exists():
    pytest.skip(
      'needs seed_tasks.jsonl of github.com/tatsu-lab/stanford_alpaca as '
      '$BILEVEL_JAX_DATA/llm/alpaca_seed_tasks.jsonl'
    )
  found, left = data.read_examples(path)
  assert (len(found), left) == (175, [])
  assert [one.row for one in found] == list(range(175))
  (message,) = found[1].prompt
  assert message['content'] == (
    'What is the relation between the given pairs?\n\n'
    'Night : Day :: Right : Left'
  )
  assert all(one.answer.strip() and one.rejected is None for one in found)


def test_what_is_wrong_is_said_with_the_row(tmp_path):
  path = tmp_path / 'rows.jsonl'
  for row, words in BAD:
    path.write_text(f'{json.dumps(GOOD[0][0])}\n\n{json.dumps(row)}\n')
    with pytest.raises(
      harness.UserError, match=rf'line 3 \(row 1 from 0\): .*{words}'
    ):
      data.read_examples(path)
    found, left = data.read_examples(path, skip=True)
    assert len(found) == len(left) == 1
  for text, words in (
    ('{"a": 1}\n{"a": ', r'line 2 \(row 1 from 0\): no JSON: .* at column 7'),
    ('\n[1]', r'line 2 \(row 0 from 0\): a list, no object'),
    ('\n', 'holds no rows'),
  ):
    path.write_text(text)
    with pytest.raises(harness.UserError, match=words):
      data.read_rows(path)
  good = json.dumps(GOOD[0][0])
  path.write_text(f'{good}\n[1]\n{good}\n{good[:9]}')
  with pytest.raises(harness.UserError, match=r'row 1 .*no object\. --skip '):
    data.read(path, flag='--skip')
  found, left = data.read_examples(path, skip=True)
  assert [example.row for example in found] == [0, 2]
  assert 'line 2 (row 1 from 0): a list, no object' in left[0]
  assert 'line 4 (row 3 from 0): no JSON' in left[1]
  found = data.read(path, skip=True)
  assert [raw is None for raw in found.raw] == [False, True, False, True]
  for name, raw, words in (
    ('a.json', b'{}', 'holds a dict, expected a list'),
    ('a.json', b'{', 'a.json: Expecting'),
    ('a.csv', b'a', 'called .jsonl or .json'),
    ('a.jsonl', b'{}\n\xff', 'line 2 is not UTF-8 .*save the file as UTF-8'),
    ('a.jsonl.gz', b'no', 'cannot be read'),
  ):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(harness.UserError, match=words):
      data.read_rows(tmp_path / name)
  # What some editors begin a file with is no part of the first row.
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
  assert data.read_rows(path) == [{'a': 1}, {'a': 2}]
  with pytest.raises(harness.UserError, match='there is no file'):
    data.read_rows(tmp_path / 'none.jsonl')
  with pytest.raises(harness.UserError, match='is a folder, expected a file'):
    data.read_rows(tmp_path)
  (tmp_path / 'a.json').write_text('[{"a": 1}, 7]')
  with pytest.raises(harness.UserError, match=r'row 1 \(from 0\): a int'):
    data.read_rows(tmp_path / 'a.json')


class Merging:
  """Letters, but every pair of equal ones is one token, across boundaries."""

  words = (*string.ascii_letters, *' \n', *(2 * c for c in 'abcl'), '</s>')

  class Found:
    """What the package `tokenizers` gives."""

    def __init__(self, ids):
      self.ids = ids

  def encode(self, text, add_special_tokens):
    ids = [self.words.index('\n')] if add_special_tokens else []
    while text:
      for size in (4, 2, 1):
        if (word := text[:size]) in self.words and len(word) == size:
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


def test_masks_are_of_the_answer_where_it_would_merge_with_the_prompt():
  words = merging()
  # Encoded at once, the third and the fourth letter were one token.
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
    ('{{ messages | length }}', 'otherwise than'),
    ('{{ raise_exception("no system") }}', 'template says: no system'),
    ('{{ messages[9].content.x }}', 'does not take these messages'),
  ):
    with pytest.raises(harness.UserError, match=match):
      batches.encode_answer(merging(template), USER, 'a')
  with pytest.raises(harness.UserError, match='no chat template'):
    batches.encode_answer(merging(), USER, 'a')


def pairs():
  letters = 'abcdefghij'
  return [
    data.Example(
      3 * i, letters[: 2 + i % 5], letters[i], 2 * letters[i : i + 2]
    )
    for i in range(9)
  ]


def test_rows_keep_their_numbers_and_batches_one_length():
  words = merging()
  encoded = batches.encode(words, pairs(), longest=11)
  assert encoded.left == sum(
    2 + i % 5 + len(words.encode(2 * 'abcdefghij'[i : i + 2])) + 2 > 11
    for i in range(9)
  )
  assert 0 < encoded.left < 9
  assert set(encoded.rows) <= {3 * i for i in range(9)}
  whole = batches.stacked(encoded)
  for place, item in enumerate(encoded.items):
    for name in ('chosen', 'chosen_mask', 'rejected', 'rejected_mask'):
      row = whole[name][place]
      np.testing.assert_array_equal(row[: len(item[name])], item[name])
      assert not row[len(item[name]) :].any()
  made = batches.stream(encoded, 1, (9, 10, 11, 64), seed=1)
  seen = set()
  for _, batch in zip(range(int(made.steps_per_epoch)), made.batches(0)):
    index = int(batch['index'][0])
    seen.add(index)
    length = batch['chosen'].shape[1]
    assert length == next(b for b in (9, 10, 11) if b >= encoded.lengths[index])
    np.testing.assert_array_equal(
      batch['rejected'][0], whole['rejected'][index][:length]
    )
  assert seen == set(range(len(encoded.items)))
  with pytest.raises(harness.SettingsError, match='the largest bucket'):
    batches.stream(encoded, 1, (9,))
  with pytest.raises(harness.UserError, match='either demonstrations or'):
    batches.encode(words, [*pairs(), data.Example(0, 'a', 'b')], longest=9)
  with pytest.raises(harness.UserError, match='9 do not fit into 2 tokens'):
    batches.encode(words, pairs(), longest=2)


def test_what_teaches_nothing_is_counted_and_left_out():
  words = merging()
  examples = [
    data.Example(0, 'ab', 'xy', 'yx'),
    data.Example(1, 'ab', '', 'yx'),
    data.Example(2, 'ab', 'xy', ''),
    data.Example(3, 'ab', 'xy', 'xy'),
    data.Example(4, 'ab', 9 * 'xy', 'yx'),
    data.Example(5, 'ab', 'yx', 'xy'),
  ]
  found = batches.encode(words, examples, longest=9)
  assert (found.left, found.empty, found.equal) == (1, 2, 1)
  np.testing.assert_array_equal(found.rows, [0, 5])
  shown = [one._replace(rejected=None) for one in examples]
  found = batches.encode(words, shown, longest=9)
  assert (found.left, found.empty, found.equal) == (1, 1, 0)
  assert batches.stacked(found)['mask'].sum(axis=1).min() >= 2
  match = '1 do not fit into 9 tokens, 2 have an empty answer, 1 two answers'
  with pytest.raises(harness.UserError, match=match):
    batches.encode(words, examples[1:5], longest=9)
  # A template that strips, and an answer that was white space to it.
  pytest.importorskip('jinja2', reason='templates need the extra llm')
  words = merging(TEMPLATE.replace('m.content', 'm.content | trim'))
  examples = [data.Example(0, USER, ' '), data.Example(1, USER, 'a')]
  assert batches.encode(words, examples, longest=40).empty == 1


def test_log_probabilities_of_answers_are_those_of_plain_numpy():
  config = SMALL
  params = decoder.init(config, 0)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 50, size=(3, 12)).astype(np.int32)
  spans = [(4, 7), (10, 12), (1, 6)]
  mask = np.zeros((3, 12), np.int32)
  for row, (low, high) in zip(mask, spans):
    row[low:high] = 1
  told = config_lib.to_hugging_face(config)
  tensors = dict(weights.tensors_of(config, params))

  def both(params, tokens, mask):
    every = log_probs.of_model(config, params, tokens, mask)
    few = log_probs.of_model(config, params, tokens, mask, longest=5)
    return every, few

  every, few = jax.jit(both)(params, tokens, mask)
  assert few.log_probs.shape == (3, 5)
  for i, (low, high) in enumerate(spans):
    logits = reference.forward(told, tensors, tokens[i])
    total = np.log(np.exp(logits).sum(-1))
    expected = [
      logits[t - 1, tokens[i, t]] - total[t - 1] for t in range(low, high)
    ]
    for found in (every, few):
      ours = found.log_probs[i][found.mask[i] > 0]
      np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(found.total[i], sum(expected), rtol=1e-4)
      np.testing.assert_allclose(found.mean[i], np.mean(expected), rtol=1e-4)
