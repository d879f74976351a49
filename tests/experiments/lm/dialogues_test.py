"""Dialogues in a text become turns, under whatever key they stand."""

import json
import os
import pathlib

import pytest

from experiments import harness
from experiments.lm import data, dialogues, row_files

U, A = 'user', 'assistant'


def messages(*turns):
  return tuple({'role': role, 'content': text} for role, text in turns)


PROMPT = messages((U, 'Hi'), (A, 'Yes?\n\nGo on'), (U, 'Why Human: and me?'))
TEXT = (
  '\n\nHuman: Hi\n\nAssistant: Yes?\n\nGo on\n\nHuman: Why Human: and me?\n\n'
  'Assistant:'
)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (TEXT, (*PROMPT, *messages((A, '')))),
    (f'{TEXT.strip()} x ', (*PROMPT, *messages((A, 'x')))),
    ('Human: a\nAssistant: ', messages((U, 'a'), (A, ''))),
    (
      'Human: a\nAssistant: b\nHuman: c\nAssistant:',
      messages((U, 'a'), (A, 'b'), (U, 'c'), (A, '')),
    ),
    # A line break within a turn, where blank lines separate turns.
    (
      'Human: a\n\nAssistant: b\nHuman: c',
      messages((U, 'a'), (A, 'b\nHuman: c')),
    ),
    (
      'Human: a\n\nAssistant: b\n\nHuman: c\nAssistant: ',
      messages((U, 'a'), (A, 'b'), (U, 'c'), (A, '')),
    ),
    ('Human: a', messages((U, 'a'))),
    ('Of this: Human: a\n\nAssistant: b', ()),
    ('Humans: a\n\nAssistant: b', ()),
    ('', ()),
  ],
)
def test_turns_of_a_text(text, expected):
  assert dialogues.parse_turns(text) == expected


def test_one_dialogue_is_one_example_under_all_keys():
  answer = {'role': A, 'content': 'So'}
  pair = {'chosen': 'So', 'rejected': ' No'}
  for row in (
    {'messages': [*PROMPT, answer]},
    {'instruction': TEXT, 'output': 'So'},
    {'instruction': TEXT, 'input': '', 'output': 'So'},
    {'instruction': TEXT.removesuffix('\n\nAssistant:'), 'output': 'So'},
    {'instruction': TEXT, 'output': '\n\nAssistant: So'},
    {'prompt': TEXT, 'completion': 'So'},
    {'question': TEXT, 'answer': 'So'},
    {'prompt': TEXT, 'response': f'{TEXT} So'},
  ):
    assert data.as_example(row)[:4] == (0, PROMPT, 'So', None), row
  for row in (
    {'prompt': TEXT, **pair},
    {'instruction': TEXT, **pair},
    {'prompt': list(PROMPT), **pair},
  ):
    assert data.as_example(row)[:4] == (0, PROMPT, 'So', ' No'), row
  with_both = {key: f'{TEXT} {text}' for key, text in pair.items()}
  for row in (with_both, {**with_both, 'prompt': TEXT}):
    assert data.as_example(row)[:4] == (0, PROMPT, 'So', 'No'), row


def test_prompts_need_no_answers(tmp_path):
  last = {'role': A, 'content': 'So'}
  rows = (
    {'instruction': TEXT, 'input': '', 'output': ''},
    {'instruction': TEXT, 'output': 'So'},
    {'prompt': TEXT},
    {'messages': list(PROMPT)},
    {'messages': [*PROMPT, last]},
    {'prompt': list(PROMPT), 'completion': [last], 'label': False},
    {'prompt': TEXT, 'chosen': 'a', 'rejected': 'b'},
    {'chosen': f'{TEXT} a', 'rejected': f'{TEXT} b'},
  )
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  content = data.read(path, prompts_only=True)
  for number, example in enumerate(content.examples):
    assert example[:4] == (number, PROMPT, '', None), rows[number]
  for row, match in (
    ({'output': 'a'}, 'keys are'),
    ({'instruction': ' '}, "instruction is ' '"),
    ({'messages': [last]}, 'no user turn'),
    ({'prompt': 'a', 'tools': ['b']}, 'tools is not supported'),
  ):
    with pytest.raises(harness.UserError, match=match):
      data.as_prompt(row)


def test_dialogues_of_hh_are_the_same_in_the_form_of_instructions():
  """As prompts whose answers are judged are published."""
  folder = pathlib.Path(os.environ.get('BILEVEL_JAX_DATA', ''), 'llm')
  path = folder / 'hh_harmless_base_test.jsonl.gz'
  if not path.exists():
    pytest.skip(
      'needs harmless-base/test.jsonl.gz of github.com/anthropics/hh-rlhf as '
      f'$BILEVEL_JAX_DATA/llm/{path.name}'
    )
  raw = row_files.read_rows(path)
  count = 0
  for row in raw:
    try:
      expected = data.as_example(row)
    except harness.UserError:
      continue
    prompt, mark, _ = row['chosen'].rpartition('\n\nAssistant:')
    # `rpartition` finds the last mark, which begins the last turn.
    shared = {'instruction': prompt + mark, 'input': ''}
    assert data.as_prompt({**shared, 'output': ''}) == expected.prompt
    one = data.as_example({**shared, 'output': expected.answer})
    assert one[:4] == (0, expected.prompt, expected.answer, None)
    texts = [m['content'] for m in one.prompt]
    assert not any('\n\nHuman:' in t or '\n\nAssistant:' in t for t in texts)
    assert [m['role'] for m in one.prompt][-1] == U
    pair = {'chosen': expected.answer, 'rejected': expected.rejected}
    assert data.as_example({'prompt': prompt + mark, **pair}) == expected
    count += 1
  assert count > 2_000
