"""Rows of all kinds, what is wrong with others, and masks of answers."""

import gzip
import json
import os
import pathlib
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
  row_files,
  tokenizer,
)
from experiments.lm import config as config_lib
from tests.experiments.lm import reference
from tests.experiments.lm.decoder_test import SMALL

USER = ({'role': 'user', 'content': 'Hi'},)
HH = '\n\nHuman: Hi\n\nAssistant: Hm: Human: you?\n\nHuman: So\n\nAssistant:'
SYSTEM = {'role': 'system', 'content': 'Be kind'}
TURNS = (
  *USER,
  {'role': 'assistant', 'content': 'So'},
  {'role': 'user', 'content': 'Hm'},
  {'role': 'assistant', 'content': 'Yes'},
)
GOOD = (
  (
    {'messages': [*USER, {'role': 'assistant', 'content': 'Yes'}], 'id': 3},
    (USER, 'Yes', None),
  ),
  # What repeats the dialogue, whole or in part, is no second reading.
  (
    {
      'messages': [*USER, {'role': 'assistant', 'content': 'Yes'}],
      'prompt': 'Be kind.\n\nHi ',
      'response': ' Yes',
      'answer': '3',
    },
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
  # ShareGPT, with empty fields that exports leave.
  (
    {
      'conversations': [
        {'from': 'system', 'value': ' '},
        {'from': 'human', 'value': 'Hi', 'weight': None},
        {'from': 'gpt', 'value': 'Yes'},
      ],
      'system': 'Be kind',
    },
    ((SYSTEM, *USER), 'Yes', None),
  ),
  # OpenOrca, GSM8K.
  (
    {'system_prompt': 'Be kind', 'question': 'Hi', 'response': 'Yes'},
    ((SYSTEM, *USER), 'Yes', None),
  ),
  ({'question': 'Hi', 'answer': 'Yes'}, (USER, 'Yes', None)),
  # KTO, a wanted answer.
  ({'prompt': 'Hi', 'completion': 'Yes', 'label': True}, ('Hi', 'Yes', None)),
  # UltraFeedback: the dialogues repeat the prompt.
  (
    {
      'prompt': 'Hi',
      'chosen': [*USER, {'role': 'assistant', 'content': 'a'}],
      'rejected': [*USER, {'role': 'assistant', 'content': 'b'}],
      'messages': [*USER, {'role': 'assistant', 'content': 'a'}],
      'score_chosen': 8.5,
    },
    (USER, 'a', 'b'),
  ),
  # A completion of several turns, of which the last is the answer.
  (
    {'prompt': list(USER), 'completion': [*TURNS[1:]]},
    (TURNS[:-1], 'Yes', None),
  ),
  ({'prompt': 'Hi', 'completion': [TURNS[-1]]}, (USER, 'Yes', None)),
  # Dialogues of ShareGPT with two answers.
  (
    {
      'conversations': [{'from': 'human', 'value': 'Hi'}],
      'chosen': {'from': 'gpt', 'value': 'a'},
      'rejected': {'from': 'gpt', 'value': 'b'},
    },
    (USER, 'a', 'b'),
  ),
  # A text that only speaks of turns stays one turn.
  (
    {'instruction': 'Continue:\n\nHuman: Hi\n\nAssistant:', 'output': 'Yes'},
    (
      (
        {
          'role': 'user',
          'content': 'Continue:\n\nHuman: Hi\n\nAssistant:',
        },
      ),
      'Yes',
      None,
    ),
  ),
  (
    {'instruction': 'Hi', 'output': 'Human: 46\nDog: 78'},
    (USER, 'Human: 46\nDog: 78', None),
  ),
)
BAD = (
  ({'text': 'x'}, r"keys are \['text'\]; expected messages"),
  ({'prompt': 'Hi', 'response': ' '}, "response is ' ', expected a text"),
  ({'prompt': 7, 'response': 'a'}, 'prompt is int, expected a text'),
  ({'prompt': 'Hi', 'output': None}, r"keys are \['prompt'\]"),
  ({'prompt': 'Hi', 'output': 7}, 'output is int, expected a text'),
  # Answers that are not to be learnt, or of unclear meaning.
  (
    {'prompt': 'Hi', 'completion': 'No', 'label': False},
    'label is false, so the answer is unwanted .*KTO.* remove the row, or pair',
  ),
  ({'messages': list(TURNS), 'kto_tag': False}, 'kto_tag is false'),
  ({'prompt': 'Hi', 'completion': 'No', 'label': 0}, 'label is 0, expected'),
  ({'prompt': 'Hi', 'completion': 'a', 'label': 'False'}, "label is 'False'"),
  # Roles, fields and contents that messages cannot have here.
  *(
    ({'messages': [*USER, {**TURNS[-1], **more}]}, match)
    for more, match in (
      ({'role': 'tool'}, "message 1 of messages has the role 'tool'"),
      ({'role': 'Assistant'}, "has the role 'Assistant', expected system"),
      ({'role': 'system'}, 'expected system .the first one only'),
      ({'tool_calls': [{'id': 1}]}, "field 'tool_calls', which is not supp"),
      ({'function_call': {'name': 'f'}}, "field 'function_call'"),
      ({'name': 'Bo'}, "field 'name'.* a message has role and content only"),
      ({'weight': 0}, "field 'weight'"),
      ({'thinking': 'Hm'}, "field 'thinking'"),
      ({'images': ['a.png']}, "field 'images'"),
      ({'content': [{'type': 'text', 'text': 'a'}]}, 'content that are texts'),
      ({'content': None, 'tool_calls': [{}]}, "field 'tool_calls'"),
    )
  ),
  ({'messages': list(TURNS), 'tools': [{'name': 'f'}]}, 'tools is not supp'),
  ({'prompt': 'Hi', 'response': 'a', 'images': ['b']}, 'images is not supp'),
  (
    {'instruction': 'Hi', 'output': 'a', 'history': [['b', 'c']]},
    'history is not supported',
  ),
  ({'messages': [TURNS[-1]]}, 'no turn of a user before the answer'),
  ({'messages': [SYSTEM, TURNS[-1]]}, 'no turn of a user before the answer'),
  (
    {'messages': [*USER, TURNS[-1], TURNS[-1]]},
    "turn before the answer is of 'assistant'",
  ),
  # Two readings.
  (
    {'prompt': 'a', 'response': 'b', 'output': 'c'},
    'several answers, response',
  ),
  ({'prompt': 'a', 'instruction': 'b', 'output': 'c'}, 'several prompts'),
  ({'messages': TURNS, 'prompt': 'Other'}, 'prompt is no turn of messages'),
  ({'messages': TURNS, 'response': 'No'}, 'response is no turn of messages'),
  (
    {'prompt': 'a', 'input': 'b', 'output': 'c'},
    'input is not supported with prompt',
  ),
  ({'prompt': 'a', 'system': 'b', 'output': 'c'}, 'system needs a prompt of'),
  ({'prompt': 'a', 'chosen': 'b'}, 'chosen stands alone'),
  (
    {'prompt': 'No', 'chosen': [*TURNS], 'rejected': [*TURNS]},
    'turns of chosen before its answer are not those of the prompt',
  ),
  (
    {'instruction': 'Human: a\n\nAssistant: b', 'output': 'c'},
    'instruction is a dialogue that ends with an answer',
  ),
  (
    {'instruction': HH, 'output': 'a\n\nHuman: b\n\nAssistant: c'},
    'output has further turns of Human:',
  ),
  (
    {'instruction': 'a', 'output': 'Human: b\n\nAssistant: c'},
    'turns of output before its answer are not those of the prompt',
  ),
  ({'prompt': 'a', 'response': '\ud800'}, 'half of a surrogate pair'),
  ({'messages': list(USER)}, "is of 'user', expected 'assistant', the answer"),
  ({'messages': [{'role': 'user'}]}, 'message 0 of messages has no role and'),
  ({'messages': []}, 'messages is no list'),
  ({'chosen': 'a', 'rejected': 'b'}, 'chosen is no dialogue'),
  (
    {'chosen': f'{HH} a', 'rejected': HH.replace('So', 'No') + ' b'},
    'differ before their last turn',
  ),
  ({'chosen': f'{HH} a', 'rejected': HH}, 'the last message of rejected is'),
  (
    {'instruction': 'Hi', 'input': 3, 'output': 'a'},
    'input is int, expected a text',
  ),
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


def test_skipped_rows_are_described_in_one_line(tmp_path):
  path = tmp_path / 'a: b.jsonl'
  bad = [f'{path}, line {n} (row {n} from 0): not: so.' for n in range(5)]
  other = f'{path}, line 7 (row 6 from 0): too long.'
  assert row_files.describe(path, [*bad[:2], other, *bad[2:]]) == (
    f'{path}: rows skipped: 6. line 0 (row 0 from 0), line 1 (row 1 from 0), '
    'line 2 (row 2 from 0) and 2 more: not: so; line 7 (row 6 from 0): too '
    'long.'
  )
  assert row_files.describe(path, []) == ''
  many = [f'{path}, row {n}: no {n}.' for n in range(12)]
  assert row_files.describe(path, many).endswith('4 more for other reasons.')


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
    (
      '{"a": 1}\n{"a": ',
      r'line 2 \(row 1 from 0\): invalid JSON: .* at column 7',
    ),
    ('{"a": "b', 'Unterminated string starting at column 7'),
    ('\n[1]', r'line 2 \(row 0 from 0\): the row is a list, expected an obj'),
    ('\n', 'holds no rows'),
  ):
    path.write_text(text)
    with pytest.raises(harness.UserError, match=words):
      row_files.read_rows(path)
  good = json.dumps(GOOD[0][0])
  path.write_text(f'{good}\n[1]\n{good}\n{good[:9]}')
  with pytest.raises(harness.UserError, match=r'row 1 .*an object\. --skip '):
    data.read(path, flag='--skip')
  found, left = data.read_examples(path, skip=True)
  assert [example.row for example in found] == [0, 2]
  assert 'line 2 (row 1 from 0): the row is a list' in left[0]
  assert 'line 4 (row 3 from 0): invalid JSON' in left[1]
  found = data.read(path, skip=True)
  assert [raw is None for raw in found.raw] == [False, True, False, True]
  for name, raw, words in (
    ('a.json', b'{}', 'holds one object, expected a list'),
    ('a.json', b'[', 'a.json: invalid JSON: Expecting'),
    ('a.json', b'[\n"\xff"]', 'line 2: not UTF-8 .*save the file as UTF-8'),
    ('a.json', b'[' * 99_999, 'too deeply nested'),
    ('a.parquet', b'a', r'are \.jsonl .* converted by `to_json` of'),
    ('a.jsonl', b'{}\n\xff', 'line 2 .*: not UTF-8 .*save the file as UTF-8'),
    ('a.jsonl', b'{"a": ' * 99_999, 'line 1 .* too deeply nested'),
    ('a.jsonl', b'{}\n{"a": 1, "a": 2}', "line 2 .*the key 'a' occurs more"),
    ('a.json', b'[{"a": 1, "a": 2}]', "a.json: .*the key 'a' occurs more"),
    ('a.jsonl', b'1' * 9_999, 'line 1 .*invalid JSON: Exceeds the limit'),
    ('a.jsonl.gz', b'no', 'cannot be read'),
    ('a.jsonl.gz', gzip.compress(b'{}')[:-9], 'cannot be read'),
    ('a.jsonl.gz', gzip.compress(b'{}')[:10] + b'no', 'cannot be read'),
  ):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(harness.UserError, match=words):
      row_files.read_rows(tmp_path / name)
  # What some editors begin a file with is no part of the first row.
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
  assert row_files.read_rows(path) == [{'a': 1}, {'a': 2}]
  # Files that were put behind one another; lines under the name of a list.
  (tmp_path / 'a.json').write_bytes(2 * path.read_bytes())
  assert row_files.read_rows(tmp_path / 'a.json') == 2 * [{'a': 1}, {'a': 2}]
  with pytest.raises(harness.UserError, match='there is no file'):
    row_files.read_rows(tmp_path / 'none.jsonl')
  with pytest.raises(harness.UserError, match='is a folder, expected a file'):
    row_files.read_rows(tmp_path)
  (tmp_path / 'a.json').write_text('[{"a": 1}, 7]')
  with pytest.raises(
    harness.UserError, match=r'row 1 \(from 0\): the row is a number'
  ):
    row_files.read_rows(tmp_path / 'a.json')


class Merging:
  """Letters, but every pair of equal ones is one token, across boundaries."""

  encode_special_tokens = False
  words = (*string.ascii_letters, *' \n', *(2 * c for c in 'abcl'), '</s>')

  class Found:
    """What the package `tokenizers` gives."""

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
  tensors = dict(hugging_face.tensors_of(config, params))

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
