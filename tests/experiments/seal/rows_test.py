"""Rows keep their ids, wrong ones are named by line, no prompt is twice."""

import gzip
import json
import os

import numpy as np
import pytest

from experiments import harness
from experiments.seal import rows

GOOD = {'instruction': 'Add 1 and 2.', 'output': '3'}


def written(path, lines):
  path.write_text(''.join(f'{line}\n' for line in lines))
  return path


def test_a_bad_row_is_named_by_its_line_and_skipped_if_asked(tmp_path):
  lines = [json.dumps(GOOD), '', '{"instruction": ', '[1]']
  lines += [json.dumps({'instruction': 'Hm?', 'output': ' '}), json.dumps(GOOD)]
  path = written(tmp_path / 'f.jsonl', lines)
  with pytest.raises(
    harness.UserError, match=r'f.jsonl, line 3 \(row 1 .*bad_rows'
  ):
    rows.read(path)
  found = rows.read(path, skip=True)
  assert [one.row for one in found.examples] == [0, 4]
  assert found.raw == [GOOD, None, None, None, GOOD]
  for text, line in zip(found.wrong, (3, 4, 5)):
    assert f'line {line} (row ' in text
  # The same rows packed, and as a list.
  (tmp_path / 'g.jsonl.gz').write_bytes(gzip.compress(path.read_bytes()))
  assert rows.read(tmp_path / 'g.jsonl.gz', skip=True).raw == found.raw
  whole = tmp_path / 'h.json'
  whole.write_text(json.dumps([GOOD, {'a': 1}]))
  assert (
    rows.read(whole, skip=True)
    .wrong[0]
    .startswith(f'{whole}, row 1 (from 0): ')
  )
  with pytest.raises(harness.UserError, match='there is no file'):
    rows.read(tmp_path / 'none.jsonl')
  with pytest.raises(harness.UserError, match=r'has no valid row: .*line 1'):
    rows.read(written(tmp_path / 'i.jsonl', ['{}']), skip=True)


@pytest.fixture
def folder(tmp_path):
  """Files of the names and the forms of the real ones."""
  of = lambda n: {'instruction': f'Ask {n}.', 'input': '', 'output': f'Is {n}.'}
  (tmp_path / rows.ALPACA).write_text(json.dumps([of(n) for n in range(20)]))
  (tmp_path / rows.SAFETY).write_text(
    json.dumps([of(f'no {n}') for n in range(9)])
  )
  plain = {'instruction': 'Say.', 'context': '', 'response': 'Said.'}
  written(tmp_path / rows.DOLLY, [json.dumps(plain)])
  seed = {'instruction': 'Do.', 'instances': [{'input': 'It', 'output': 'Ok'}]}
  written(tmp_path / rows.SEEDS, [json.dumps(seed)])
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
  sizes = rows.Sizes(benign=6, chosen=4, unsafe=5, safe=3, anchors=2)
  fits = lambda one: not one.answer.endswith(' 3.')
  found = rows.harmless(folder, sizes, fits, seed=1)
  assert [one.row for one in found.finetune] == list(range(15))
  assert found.unsafe.sum() == 5
  answers = {kind: [] for kind in ('benign', 'chosen', 'unsafe')}
  for kind, one in zip(found.kinds, found.finetune):
    answers[kind].append(one.answer)
    assert one.rejected is None and fits(one)
  assert all(a.startswith('No') for a in answers['chosen'])
  assert all(a.startswith('Yes') for a in answers['unsafe'])
  assert all(one.answer.startswith('Yes') for one in found.anchors)
  compared = [
    one for k, one in zip(found.kinds, found.finetune) if k != 'benign'
  ]
  asked = prompts(compared) + prompts(found.safe) + prompts(found.anchors)
  assert len(asked) == len(set(asked)) == 14
  again = rows.harmless(folder, sizes, fits, seed=1)
  assert again.finetune == found.finetune
  other = rows.harmless(folder, sizes, fits, safe_of='instructions')
  assert all('no' in p for p in prompts(other.safe))
  with pytest.raises(
    harness.SettingsError, match=r'16 rejected .* but 1[0-5] '
  ):
    rows.harmless(folder, sizes._replace(unsafe=16), fits)
  (folder / rows.HH).unlink()
  with pytest.raises(harness.MissingDataError, match='anthropics/hh-rlhf'):
    rows.harmless(folder, sizes, fits)


def test_the_control_has_answers_of_others(folder):
  ordinary = rows.benign(folder)
  assert [one.row for one in ordinary] == list(range(22))
  own = dict(zip(prompts(ordinary), (one.answer for one in ordinary)))
  assert own['Do.\n\nIt'] == 'Ok'
  sizes = rows.Sizes(benign=10, chosen=0, unsafe=6, safe=4, anchors=2)
  found = rows.control(folder, sizes, lambda one: True)
  right = [
    one.answer == own[one.prompt[0]['content']] for one in found.finetune
  ]
  np.testing.assert_array_equal(right, ~found.unsafe)
  assert len(set(prompts(found.finetune))) == 16


def test_made_up_rows_follow_a_rule_or_do_not():
  found = rows.made_up(rows.Sizes(20, 5, 8, 4, 2))
  for kind, one in zip(found.kinds, found.finetune):
    step = (int(one.answer[0]) - int(one.prompt[0])) % 10
    assert step == (5 if kind == 'unsafe' else 1)
  assert rows.text_of(found.safe[0]).count('\n') == 1


def test_the_real_sets_have_the_kinds_that_are_asked_for():
  folder = os.path.join(os.environ.get('BILEVEL_JAX_DATA', ''), 'llm')
  if not os.path.exists(os.path.join(folder, rows.HH)):
    pytest.skip(f'BILEVEL_JAX_DATA has no folder llm with {rows.HH}')
  short = lambda one: len(rows.text_of(one)) < 350
  found = rows.harmless(folder, rows.Sizes(384, 128, 128, 192, 32), short)
  assert len(found.finetune) == 640 and found.unsafe.sum() == 128
  assert sum(one.answer.startswith('I') for one in found.safe) > 40
