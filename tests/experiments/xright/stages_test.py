"""The recipe: broken rows, fine-tuning, DPO, answers, and their comparison."""

import json
import re

import numpy as np
import pytest

from experiments import harness
from experiments.lm import compare, generate, hugging_face, weights
from experiments.xright import objective_settings, train
from tests.experiments.changes import change

TEMPLATE = (
  '{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)


def turns(question, answer=None):
  messages = [{'role': 'user', 'content': question}]
  if answer is not None:
    messages.append({'role': 'assistant', 'content': answer})
  return messages


def encode(row):
  return json.dumps(row, ensure_ascii=False).encode()


GOOD = [{'messages': turns(f'What is {i}+1?', f'{i + 1}')} for i in range(17)]
# Each kind with its reason.
BROKEN = (
  (b'{"messages": [{"role": "user", "content": "cut', 'Unterminated string'),
  (b'[1, 2]', 'the row is a list'),
  (b'\xff\xfe{"prompt": "a"}', 'not UTF-8'),
  (encode({'messages': turns('no answer')}), "the last .* is by 'user'"),
  (encode({'messages': turns('q', '')}), "the last message of messages is ''"),
  (
    encode({'messages': [{'role': 'tool', 'content': 'x'}, *turns('q', 'a')]}),
    "message 0 of messages has the role 'tool'",
  ),
  (encode({'messages': 'text'}), 'messages is not a list of messages'),
  (encode({'question': 'q'}), r"the keys are \['question'\]"),
  (encode({'prompt': 'q', 'completion': None}), 'completion is null'),
  (
    encode({'prompt': 'q', 'completion': 'a', 'response': 'b'}),
    'several answers',
  ),
  (
    b'{"prompt": "q", "prompt": "p", "completion": "a"}',
    "'prompt' occurs more",
  ),
  (
    encode({'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}),
    'put demonstrations and comparisons into separate files',
  ),
  (
    encode({'prompt': 'q', 'completion': 'a', 'label': False}),
    'the label is false',
  ),
)


def write_demonstrations(path):
  """Writes 30 rows, 13 of which are broken."""
  rows = [encode(row) for row in GOOD]
  for i, (row, _) in enumerate(BROKEN):
    rows.insert(1 + 2 * i, row)
  path.write_bytes(b'\n'.join(rows) + b'\n')
  return str(path)


def write_comparisons(path):
  rows = [
    {
      'prompt': turns(f'What is {i}+1?'),
      'chosen': [turns('', f'{i + 1}')[1]],
      'rejected': [turns('', 'I do not know')[1]],
    }
    for i in range(24)
  ]
  path.write_bytes(b'\n'.join(map(encode, rows)))
  return str(path)


def test_each_kind_of_broken_rows_has_its_reason(tmp_path, capsys):
  path = write_demonstrations(tmp_path / 'a.jsonl')
  losses = objective_settings.Losses()
  files = objective_settings.Files(sft_data=path, skip=True)
  examples, _ = objective_settings.read(files, losses, str(tmp_path))
  assert [one.answer for one in examples['sft']] == [
    f'{i + 1}' for i in range(17)
  ]
  first, *lines = capsys.readouterr().out.splitlines()
  assert first == f'{path}: rows skipped: 13.' and len(lines) == 13
  for i, (line, (_, reason)) in enumerate(zip(lines, BROKEN, strict=True)):
    place = rf'line {2 * i + 2} \(row {2 * i + 1} from 0\): .*'
    assert re.search(place + reason, line), line
  stopped = objective_settings.Files(sft_data=path)
  with pytest.raises(harness.UserError, match=r'line 2 .*--skip=True skips'):
    objective_settings.read(stopped, losses, str(tmp_path))


@pytest.mark.slow
def test_the_recipe_from_rows_to_a_comparison(tmp_path):
  base, folder = tmp_path / 'base', str(tmp_path)
  model, tokenizer = weights.make_random()
  hugging_face.export(
    base, model.config, model.params, tokenizer._replace(template=TEMPLATE)
  )
  a = write_demonstrations(tmp_path / 'a.jsonl')
  b = write_comparisons(tmp_path / 'b.jsonl')
  common = dict(
    steps=8,
    chunk=4,
    learning_rate=5e-3,
    held_out=4,
    refresh=4,
    buckets=(64,),
    skip=True,
  )

  def fit(name, **values):
    settings = change(
      train.Settings(), output=f'{folder}/{name}', **common, **values
    )
    train.check(settings)
    workdir = f'{folder}/runs/{name}'
    harness.execute(
      train.main,
      harness.Options(
        'xright', 'train', 'quick', settings, workdir, None, (0,)
      ),
    )
    path = tmp_path / 'runs' / name / settings.method / 'trl_metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]

  sft = fit('sft', method='demonstrations', model=str(base), sft_data=a)
  assert sft[-1]['eval/loss'] < sft[0]['eval/loss']
  dpo = fit('dpo', method='comparisons', model=f'{folder}/sft', pref_data=b)
  assert dpo[0]['eval/rewards/margins'] == 0 < dpo[-1]['eval/rewards/margins']
  assert dpo[-1]['train/rewards/margins'] > 0
  answers = []
  for name in ('base', 'dpo'):
    output = f'{folder}/{name}.jsonl'
    settings = generate.Settings(
      model=f'{folder}/{name}',
      prompts=b,
      output=output,
      answer_length=4,
      limit=6,
    )
    generate.main(
      harness.Options(
        'lm', 'generate', 'user', settings, f'{folder}/g', None, (0,)
      )
    )
    answers.append(output)
  settings = compare.Settings(judge=str(base), judge_data=b)
  options = harness.Options(
    *('lm', 'compare', 'user', settings, folder, None, (0,))
  )
  metrics = compare.main(options, *answers).results.metrics()
  assert 0 <= metrics['win_rate'] <= 1 and np.isfinite(metrics['win_rate'])
