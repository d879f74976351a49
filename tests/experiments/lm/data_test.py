"""Tests rows in all formats, and messages of invalid rows."""

import gzip
import json
import os
import pathlib

import pytest

from experiments import harness
from experiments.lm import data, row_files

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
  # Fields that repeat the dialogue or a turn are allowed.
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
  # A text that only mentions turns stays one turn.
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
  # Texts to continue training on, and one that is a dialogue.
  ({'text': ' Once. '}, ('', ' Once. ', None)),
  (
    {'text': 'Human: Hi\n\nAssistant: So\n\nHuman: Hm\n\nAssistant: Yes'},
    (TURNS[:3], 'Yes', None),
  ),
)
BAD = (
  ({'texts': 'x'}, r"keys are \['texts'\]; expected messages"),
  ({'text': ' '}, "text is ' ', expected a text"),
  ({'prompt': 'Hi', 'response': ' '}, "response is ' ', expected a text"),
  ({'prompt': 7, 'response': 'a'}, 'prompt is int, expected a text'),
  ({'prompt': 'Hi', 'id': None}, r"keys are \['prompt'\]"),
  ({'prompt': 'Hi', 'output': None, 'id': None}, 'output is null, expected a'),
  ({'prompt': None, 'completion': 'a', 'label': True}, 'prompt is null'),
  ({'messages': None, 'id': 3}, 'messages is null, expected a text or mess'),
  ({'prompt': 'Hi', 'chosen': 'a', 'rejected': None}, 'rejected is null'),
  ({'prompt': 'Hi', 'output': 7}, 'output is int, expected a text'),
  # Unwanted answers, or labels of unclear meaning.
  (
    {'prompt': 'Hi', 'completion': 'No', 'label': False},
    'label is false: the answer is unwanted .*KTO.* remove the .*row, or pair',
  ),
  ({'messages': list(TURNS), 'kto_tag': False}, 'the label is false'),
  ({'prompt': 'Hi', 'completion': 'No', 'label': 0}, 'label is 0, expected'),
  (
    {'prompt': 'Hi', 'completion': 'a', 'label': 'False'},
    "label is the text 'False', expected true or false without quotes .*rename",
  ),
  # Unsupported roles, fields and contents of messages.
  *(
    ({'messages': [*USER, {**TURNS[-1], **more}]}, match)
    for more, match in (
      ({'role': 'tool'}, "message 1 of messages has the role 'tool'"),
      ({'role': 'Assistant'}, "has the role 'Assistant', expected system"),
      ({'role': 'system'}, 'expected system .only the first one'),
      ({'tool_calls': [{'id': 1}]}, "field 'tool_calls', which is not supp"),
      ({'function_call': {'name': 'f'}}, "field 'function_call'"),
      ({'name': 'Bo'}, "field 'name'.* give only role and content"),
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
  ({'messages': [TURNS[-1]]}, 'no user turn before the answer'),
  ({'messages': [SYSTEM, TURNS[-1]]}, 'no user turn before the answer'),
  (
    {'messages': [*USER, TURNS[-1], TURNS[-1]]},
    "turn before the answer is by 'assistant'",
  ),
  # Ambiguous rows.
  (
    {'prompt': 'a', 'response': 'b', 'output': 'c'},
    'several answers, response',
  ),
  ({'prompt': 'a', 'instruction': 'b', 'output': 'c'}, 'several prompts'),
  ({'messages': TURNS, 'prompt': 'Other'}, 'prompt is not a turn of messages'),
  ({'messages': TURNS, 'response': 'No'}, 'response is not a turn of messages'),
  (
    {'prompt': 'a', 'input': 'b', 'output': 'c'},
    'input is not supported with prompt',
  ),
  ({'prompt': 'a', 'system': 'b', 'output': 'c'}, 'system needs a prompt of'),
  ({'prompt': 'a', 'chosen': 'b'}, 'the row has only chosen'),
  (
    {'prompt': 'No', 'chosen': [*TURNS], 'rejected': [*TURNS]},
    'turns of chosen before its answer differ from the prompt',
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
    'turns of output before its answer differ from the prompt',
  ),
  ({'prompt': 'a', 'response': '\ud800'}, 'an unpaired surrogate'),
  ({'messages': list(USER)}, "is by 'user', expected 'assistant', the answer"),
  ({'messages': [{'role': 'user'}]}, 'message 0 of messages needs role and'),
  ({'messages': []}, 'messages is not a list'),
  ({'chosen': 'a', 'rejected': 'b'}, 'chosen is not a dialogue'),
  (
    {'chosen': f'{HH} a', 'rejected': HH.replace('So', 'No') + ' b'},
    'differ before their last turn',
  ),
  ({'chosen': f'{HH} a', 'rejected': HH}, 'the last message of rejected is'),
  (
    {'instruction': 'Hi', 'input': 3, 'output': 'a'},
    'input is int, expected a text',
  ),
  ({'instruction': 'Hi', 'instances': []}, 'instances is not a list'),
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
def test_valid_rows(tmp_path, name):
  rows = [row for row, _ in GOOD]
  text = json.dumps(rows)
  if 'jsonl' in name:
    text = '\n\n'.join(json.dumps(row) for row in rows) + '\n'
  raw = text.encode()
  path = tmp_path / name
  path.write_bytes(gzip.compress(raw) if name.endswith('.gz') else raw)
  examples, skipped = data.read_examples(path)
  assert not skipped
  for number, (example, (_, expected)) in enumerate(zip(examples, GOOD)):
    assert example[:4] == (number, *expected)


def test_skipped_rows_are_counted_by_reason(tmp_path):
  path = tmp_path / 'a: b.jsonl'
  bad = [f'{path}, line {n} (row {n} from 0): not: so.' for n in range(5)]
  other = f'{path}, line 7 (row 6 from 0): too long.'
  assert row_files.describe(path, [other, *bad]) == (
    f'{path}: rows skipped: 6.\n'
    '  5 in line 0 (row 0 from 0), line 1 (row 1 from 0), line 2 (row 2 from '
    '0) and 2 more: not: so.\n'
    '  1 in line 7 (row 6 from 0): too long.'
  )
  assert row_files.describe(path, []) == ''
  many = [f'{path}, row {n}: no {chr(97 + n)}.' for n in range(20)]
  assert row_files.describe(path, many).endswith('\n  4 for other reasons.')
  # Columns of invalid JSON are one reason.
  alike = [f'{path}, row {n}: column {n}.' for n in range(12)]
  assert '  12 in row 0, row 1, row 2 and 9 more: column 0.' in (
    row_files.describe(path, alike)
  )


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
  examples, _ = data.read_examples(path)
  user = lambda text: ({'role': 'user', 'content': text},)
  assert examples[1:] == [
    (1, user('Add\n\n1 2'), '3', None, None),
    (1, user('Add'), 'What?', None, None),
  ]


def test_labelled_answers_need_their_objective(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [{'prompt': 'Hi', 'completion': 'a', 'label': True}]
  rows.append({'messages': list(TURNS), 'kto_tag': False})
  path.write_text('\n'.join(map(json.dumps, rows)))
  examples = data.read(path, kind='labelled').examples
  assert [one.wanted for one in examples] == [True, False]
  assert examples[0][:4] == (0, 'Hi', 'a', None)
  for kind in ('demonstrations', None):
    with pytest.raises(harness.UserError, match=r'line 2 .*kto_labelled'):
      data.read(path, kind=kind)
  for row, match in (
    ({'prompt': 'Hi', 'completion': 'a'}, 'the row has no label, expected tru'),
    *(
      ({'prompt': 'Hi', 'completion': 'a', 'label': label}, match)
      for label, match in (
        ('true', r"line 1 .*: label is the text 'true', .* without quotes"),
        ('good', "label is the text 'good', expected true or false without"),
        (None, 'label is null, expected true or false'),
        (1, 'label is 1, expected true or false'),
        ([True], r'label is \[True\], expected true or false'),
      )
    ),
    (
      {'prompt': 'Hi', 'completion': None, 'label': True},
      r'rows.jsonl, line 1 .*: completion is null, expected a text',
    ),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, 'expected one answer'),
  ):
    path.write_text(json.dumps(row))
    with pytest.raises(harness.UserError, match=match):
      data.read(path, kind='labelled')


def test_the_seed_tasks_of_alpaca():
  folder = pathlib.Path(os.environ.get('BILEVEL_JAX_DATA', ''), 'llm')
  path = folder / 'alpaca_seed_tasks.jsonl'
  if not path.exists():
    pytest.skip(
      'needs seed_tasks.jsonl of github.com/tatsu-lab/stanford_alpaca as '
      '$BILEVEL_JAX_DATA/llm/alpaca_seed_tasks.jsonl'
    )
  examples, skipped = data.read_examples(path)
  assert (len(examples), skipped) == (175, [])
  assert [one.row for one in examples] == list(range(175))
  (message,) = examples[1].prompt
  assert message['content'] == (
    'What is the relation between the given pairs?\n\n'
    'Night : Day :: Right : Left'
  )
  assert all(one.answer.strip() and one.rejected is None for one in examples)


def test_invalid_rows_are_reported(tmp_path):
  path = tmp_path / 'rows.jsonl'
  for row, words in BAD:
    path.write_text(f'{json.dumps(GOOD[0][0])}\n\n{json.dumps(row)}\n')
    with pytest.raises(
      harness.UserError, match=rf'line 3 \(row 1 from 0\): .*{words}'
    ):
      data.read_examples(path)
    examples, skipped = data.read_examples(path, skip=True)
    assert len(examples) == len(skipped) == 1
  for text, words in (
    (
      '{"a": 1}\n{"a": ',
      r'line 2 \(row 1 from 0\): invalid JSON: .* at column 7',
    ),
    ('{"a": "b', 'Unterminated string starting at column 7'),
    ('\n[1]', r'line 2 \(row 0 from 0\): the row is a list, expected an obj'),
    ('\n', 'has no rows'),
  ):
    path.write_text(text)
    with pytest.raises(harness.UserError, match=words):
      row_files.read_rows(path)
  good = json.dumps(GOOD[0][0])
  path.write_text(f'{good}\n[1]\n{good}\n{good[:9]}')
  with pytest.raises(harness.UserError, match=r'row 1 .*an object\. --skip '):
    data.read(path, flag='--skip')
  examples, skipped = data.read_examples(path, skip=True)
  assert [example.row for example in examples] == [0, 2]
  assert 'line 2 (row 1 from 0): the row is a list' in skipped[0]
  assert 'line 4 (row 3 from 0): invalid JSON' in skipped[1]
  examples = data.read(path, skip=True)
  assert [raw is None for raw in examples.raw] == [False, True, False, True]
  for name, raw, words in (
    ('a.json', b'{}', 'has one object, expected a list'),
    ('a.json', b'[', 'a.json: invalid JSON: Expecting'),
    ('a.json', b'[\n"\xff"]', 'line 2: not UTF-8 .*save the file as UTF-8'),
    ('a.json', b'[' * 99_999, 'too deeply nested'),
    ('a.parquet', b'a', r'are \.jsonl .* by `to_json` of'),
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
  # A byte order mark is not part of the first row.
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
  assert row_files.read_rows(path) == [{'a': 1}, {'a': 2}]
  # Concatenated files; lines in a file that is named as a list.
  (tmp_path / 'a.json').write_bytes(2 * path.read_bytes())
  assert row_files.read_rows(tmp_path / 'a.json') == 2 * [{'a': 1}, {'a': 2}]
  with pytest.raises(harness.UserError, match='there is no file'):
    row_files.read_rows(tmp_path / 'none.jsonl')
  with pytest.raises(harness.UserError, match='is a folder, expected a'):
    row_files.read_rows(tmp_path)
  (tmp_path / 'a.json').write_text('[{"a": 1}, 7]')
  with pytest.raises(
    harness.UserError, match=r'row 1 \(from 0\): the row is a number'
  ):
    row_files.read_rows(tmp_path / 'a.json')
