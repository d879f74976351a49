"""Rows keep their numbers; errors name lines; prompts are unique."""

import gzip
import json
import os

import numpy as np
import pytest

from experiments import harness
from experiments.seal import rows

GOOD = {'instruction': 'Add 1 and 2.', 'output': '3'}


def write_lines(path, lines):
  path.write_text(''.join(f'{line}\n' for line in lines))
  return path


def test_a_bad_row_is_named_by_its_line_and_skipped_if_asked(tmp_path):
  lines = [json.dumps(GOOD), '', '{"instruction": ', '[1]']
  lines += [json.dumps({'instruction': 'Hm?', 'output': ' '}), json.dumps(GOOD)]
  path = write_lines(tmp_path / 'f.jsonl', lines)
  with pytest.raises(
    harness.UserError, match=r'f.jsonl, line 3 \(row 1 .*bad_rows'
  ):
    rows.read(path)
  content = rows.read(path, skip=True)
  assert [one.row for one in content.examples] == [0, 4]
  assert content.raw == [GOOD, None, None, None, GOOD]
  for text, line in zip(content.wrong, (3, 4, 5)):
    assert f'line {line} (row ' in text
  # The same rows packed, and as a list.
  (tmp_path / 'g.jsonl.gz').write_bytes(gzip.compress(path.read_bytes()))
  assert rows.read(tmp_path / 'g.jsonl.gz', skip=True).raw == content.raw
  array = tmp_path / 'h.json'
  array.write_text(json.dumps([GOOD, {'a': 1}]))
  assert (
    rows.read(array, skip=True)
    .wrong[0]
    .startswith(f'{array}, row 1 (from 0): ')
  )
  with pytest.raises(harness.UserError, match='there is no file'):
    rows.read(tmp_path / 'none.jsonl')
  with pytest.raises(harness.UserError, match=r'has no valid row: .*line 1'):
    rows.read(write_lines(tmp_path / 'i.jsonl', ['{}']), skip=True)


@pytest.fixture
def folder(tmp_path):
  """Files with the names and the formats of the real ones."""
  ask = lambda n: {
    'instruction': f'Ask {n}.',
    'input': '',
    'output': f'Is {n}.',
  }
  (tmp_path / rows.ALPACA).write_text(json.dumps([ask(n) for n in range(20)]))
  (tmp_path / rows.SAFETY).write_text(
    json.dumps([ask(f'no {n}') for n in range(9)])
  )
  plain = {'instruction': 'Say.', 'context': '', 'response': 'Said.'}
  write_lines(tmp_path / rows.DOLLY, [json.dumps(plain)])
  seed = {'instruction': 'Do.', 'instances': [{'input': 'It', 'output': 'Ok'}]}
  write_lines(tmp_path / rows.SEEDS, [json.dumps(seed)])
  start = lambda n: f'\n\nHuman: How {n % 15}?\n\nAssistant: '
  compared = [
    {'chosen': f'{start(n)}No {n}.', 'rejected': f'{start(n)}Yes {n}.'}
    for n in range(18)
  ]
  two = {n: f'{start(1)}A.\n\nHuman: B\n\nAssistant: {n}.' for n in compared[0]}
  text = '\n'.join(map(json.dumps, [*compared, two]))
  (tmp_path / rows.HH).write_bytes(gzip.compress(text.encode()))
  return tmp_path


def prompts(examples):
  return [one.prompt[0]['content'] for one in examples]


def test_the_harmful_set_has_no_prompt_twice(folder):
  sizes = rows.Sizes(benign=6, chosen=4, unsafe=5, safe=3, reference_rows=2)
  fits = lambda one: not one.answer.endswith(' 3.')
  sets = rows.harmless(folder, sizes, fits, seed=1)
  assert [one.row for one in sets.finetune] == list(range(15))
  assert sets.unsafe.sum() == 5
  answers = {kind: [] for kind in ('benign', 'chosen', 'unsafe')}
  for kind, one in zip(sets.kinds, sets.finetune):
    answers[kind].append(one.answer)
    assert one.rejected is None and fits(one)
  assert all(a.startswith('No') for a in answers['chosen'])
  assert all(a.startswith('Yes') for a in answers['unsafe'])
  assert all(one.answer.startswith('Yes') for one in sets.reference_rows)
  compared = [one for k, one in zip(sets.kinds, sets.finetune) if k != 'benign']
  parts = compared, sets.safe, sets.reference_rows
  all_prompts = [prompt for part in parts for prompt in prompts(part)]
  assert len(all_prompts) == len(set(all_prompts)) == 14
  again = rows.harmless(folder, sizes, fits, seed=1)
  assert again.finetune == sets.finetune
  other = rows.harmless(folder, sizes, fits, safe_source='instructions')
  assert all('no' in p for p in prompts(other.safe))
  with pytest.raises(
    harness.SettingsError, match=r'16 rejected .* but 1[0-5] '
  ):
    rows.harmless(folder, sizes._replace(unsafe=16), fits)
  (folder / rows.HH).unlink()
  with pytest.raises(harness.MissingDataError, match='anthropics/hh-rlhf'):
    rows.harmless(folder, sizes, fits)


def test_shuffled_rows_have_answers_to_other_prompts(folder):
  ordinary = rows.benign(folder)
  assert [one.row for one in ordinary] == list(range(22))
  own = dict(zip(prompts(ordinary), (one.answer for one in ordinary)))
  assert own['Do.\n\nIt'] == 'Ok'
  sizes = rows.Sizes(benign=10, chosen=0, unsafe=6, safe=4, reference_rows=2)
  sets = rows.ordinary_and_shuffled(folder, sizes, lambda one: True)
  right = [one.answer == own[one.prompt[0]['content']] for one in sets.finetune]
  np.testing.assert_array_equal(right, ~sets.unsafe)
  assert len(set(prompts(sets.finetune))) == 16


def test_made_up_rows_follow_a_rule_or_do_not():
  sets = rows.made_up(rows.Sizes(20, 5, 8, 4, 2))
  for kind, one in zip(sets.kinds, sets.finetune):
    step = (int(one.answer[0]) - int(one.prompt[0])) % 10
    assert step == (5 if kind == 'unsafe' else 1)
  assert rows.as_text(sets.safe[0]).count('\n') == 1


def test_the_real_sets_have_the_kinds_that_are_asked_for():
  folder = os.path.join(os.environ.get('BILEVEL_JAX_DATA', ''), 'llm')
  if not os.path.exists(os.path.join(folder, rows.HH)):
    pytest.skip(f'BILEVEL_JAX_DATA has no folder llm with {rows.HH}')
  short = lambda one: len(rows.as_text(one)) < 350
  sets = rows.harmless(folder, rows.Sizes(384, 128, 128, 192, 32), short)
  assert len(sets.finetune) == 640 and sets.unsafe.sum() == 128
  assert sum(one.answer.startswith('I') for one in sets.safe) > 40
