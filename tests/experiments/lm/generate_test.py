"""The programs that generate and compare answers."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.lm import (
  batches,
  compare,
  decoder,
  generate,
  generation,
  hugging_face,
  judge,
  weights,
)
from experiments.lm import data as data_lib
from tests.experiments.lm import decoder_test
from tests.tiers import first


def options(binary, workdir, **fields):
  return harness.Options(
    *('lm', 'binary', 'user'),
    binary.Settings(**fields),
    *(str(workdir), None, (0,)),
  )


def write_rows(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def read_rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


PROMPTS = (
  {'prompt': 'Count: 1 2 3'},
  {'prompt': 'Human: Hello?\n\nAssistant: Yes?\n\nHuman: Nothing.'},
  {'instruction': 'Say it.', 'output': 'This is not read.'},
  {'prompt': 'A longer text'},
)


TEMPLATE = (
  '{% for m in messages %}{{ m.role[0] }}>{{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}a>{% endif %}'
)


def make(folder, seed=0, template=TEMPLATE):
  """Writes a small model with a chat template; returns it."""
  model, tokenizer = weights.make_random(seed=seed)
  tokenizer = tokenizer._replace(template=template)
  hugging_face.export(folder, model.config, model.params, tokenizer)
  return model, tokenizer


def run(tmp_path, name='a', **fields):
  if not (tmp_path / 'model').exists():
    make(tmp_path / 'model')
  fields = {
    'model': str(tmp_path / 'model'),
    'prompts': write_rows(tmp_path / 'prompts.jsonl', PROMPTS),
    'output': str(tmp_path / f'{name}.jsonl'),
    'answer_length': 4,
    'batch_size': 2,
    'max_prompt': 1_000,
    'bad_rows': 'skip',
  } | fields
  report = generate.main(options(generate, tmp_path / 'run', **fields))
  return report, tmp_path / f'{name}.jsonl'


def test_answers_are_those_of_the_generator(tmp_path):
  report, path = run(tmp_path)
  model, tokenizer = make(tmp_path / 'again')
  generator = generation.make_generator(model.config, new=4, end=tokenizer.end)
  for row in read_rows(path):
    prompt = data_lib.as_prompt(PROMPTS[row['row']])
    tokens = np.array([batches.encode_prompt(tokenizer, prompt)], np.int32)
    length = np.array([tokens.shape[1]], np.int32)
    keys = jax.random.split(jax.random.key(0), 1)
    out = generator(model.params, tokens, length, keys)
    size = int(out.lengths[0] - out.ended[0])
    assert row['response'] == tokenizer.decode(out.tokens[0, :size].tolist())
    assert (row['length'], row['ended']) == (size, bool(out.ended[0]))
  assert report.results.metrics()['answers'] == len(read_rows(path))


def test_dialogues_are_split_into_turns(tmp_path):
  _, path = run(tmp_path)
  by_row = {row['row']: row['prompt'] for row in read_rows(path)}
  assert by_row[0] == 'Count: 1 2 3'
  assert [turn['role'] for turn in by_row[1]] == ['user', 'assistant', 'user']


def test_answers_can_be_read_as_demonstrations(tmp_path):
  _, path = run(tmp_path)
  examples = data_lib.read(path, skip=True).examples
  assert {one.row for one in examples} <= {0, 1, 2, 3}


@pytest.mark.parametrize('cut', first([60, 0, 1, 10_000]))
def test_continues_after_a_kill_with_the_same_answers(tmp_path, cut):
  sampling = generate.Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=3)
  _, path = run(tmp_path, sampling=sampling)
  whole = path.read_text()
  stored = tmp_path / 'run/stored/answers.jsonl'
  stored.write_bytes(stored.read_bytes()[: -cut or None])
  run(tmp_path, sampling=sampling)
  assert path.read_text() == whole


def test_stored_answers_of_another_run_are_not_used(tmp_path):
  hot = generate.Sampling(temperature=5.0)
  _, first = run(tmp_path, 'a', sampling=hot)
  _, second = run(
    tmp_path, 'b', sampling=generate.Sampling(temperature=5.0, seed=1)
  )
  assert first.read_text() != second.read_text()
  _, third = run(tmp_path, 'c', sampling=hot)
  assert first.read_text() == third.read_text()


def test_names_prompts_that_do_not_fit(tmp_path):
  prompts = [*PROMPTS, {'prompt': 'x' * 500}]
  path = write_rows(tmp_path / 'long.jsonl', prompts)
  with pytest.raises(harness.UserError, match=r'long\.jsonl, row 4 .*tokens'):
    run(tmp_path, prompts=path, bad_rows='refuse')
  report, _ = run(tmp_path, prompts=path)
  assert report.results.metrics()['skipped'] == 1
  with pytest.raises(harness.SettingsError, match='leaves no room'):
    run(tmp_path, answer_length=64)


def test_prompts_of_1024_tokens_are_answered_as_by_the_whole_model(
  tmp_path, capsys
):
  model, tokenizer = weights.make_random()
  config = dataclasses.replace(model.config, context=1_028)
  folder = tmp_path / 'long'
  hugging_face.export(folder, config, model.params, tokenizer)
  texts = [(n * 'a b c de! ')[:n] for n in (1_024, 1_023, 9)]
  prompts = [{'prompt': text} for text in texts]
  encoded = [batches.encode_prompt(tokenizer, text) for text in texts]
  assert [len(one) for one in encoded] == [1_024, 1_023, 9]
  _, path = run(
    tmp_path,
    model=str(folder),
    prompts=write_rows(tmp_path / 'long.jsonl', prompts),
    max_prompt=1_024,
    bad_rows='refuse',
  )

  @jax.jit
  def predict(tokens):
    logits = decoder.logits(
      config, model.params, decoder.trunk(config, model.params, tokens)
    )
    return logits.argmax(axis=-1)

  for tokens, row in zip(encoded, read_rows(path), strict=True):
    answer = []
    for _ in range(4):
      padded = np.zeros((1, 1_028), np.int32)
      both = [*tokens, *answer]
      padded[0, : len(both)] = both
      answer.append(int(predict(padded)[0, len(both) - 1]))
      if answer[-1] == tokenizer.end:
        break
    size = row['length'] + row['ended']
    assert size == len(answer)
    assert row['response'] == tokenizer.decode(answer[: row['length']])
  assert re.search(
    r'new answers: \d+, [\d.e+]+ tokens/s', capsys.readouterr().out
  )


def test_needs_prompts(tmp_path):
  with pytest.raises(harness.MissingDataError, match='--prompts is missing'):
    generate.main(options(generate, tmp_path))


def test_needs_a_template_for_dialogues(tmp_path):
  make(tmp_path / 'model', template='')
  with pytest.raises(harness.UserError, match='no chat template'):
    run(tmp_path)
  report, _ = run(tmp_path, model='random')
  assert report.results.metrics()['answers'] == len(PROMPTS)


def comparisons(count, seed=0):
  """Comparisons whose chosen answers have more of the letter a."""
  rng = np.random.default_rng(seed)
  word = lambda share: ''.join(rng.choice(['a', 'z'], 12, p=[share, 1 - share]))
  return [
    {'prompt': f'{i}:', 'chosen': word(0.8), 'rejected': word(0.2)}
    for i in range(count)
  ]


def compared(tmp_path, a, b, **fields):
  paths = [
    write_rows(tmp_path / f'{name}.jsonl', rows)
    for name, rows in (('a', a), ('b', b))
  ]
  fields = {
    'judge': 'random',
    'judge_data': write_rows(tmp_path / 'pairs.jsonl', comparisons(100)),
    'max_length': 32,
  } | fields
  report = compare.main(options(compare, tmp_path / 'run', **fields), *paths)
  return report.results.metrics()


def answers(texts):
  return [
    {'row': i, 'prompt': f'{i}:', 'response': text}
    for i, text in enumerate(texts)
  ]


def test_the_judge_learns_what_is_preferred(tmp_path):
  metrics = compared(
    tmp_path,
    answers(['aaaaazaaaa'] * 6 + ['zzzzzzzz'] * 2),
    answers(['zzzazzzzz'] * 6 + ['aaazaaaaa'] * 2),
  )
  assert metrics['judge_accuracy'] > 0.9
  assert metrics['longer_is_better'] == 0.5
  assert metrics['win_rate'] == 0.75


def test_invalid_comparisons_are_named_or_skipped(tmp_path, capsys):
  rows = [*comparisons(60), {'prompt': '1:', 'chosen': 'a', 'rejected': ''}]
  path = write_rows(tmp_path / 'more.jsonl', rows)
  same = answers(['aaz', 'zza'])
  with pytest.raises(harness.UserError, match=r'more\.jsonl, line 61'):
    compared(tmp_path, same, same, judge_data=path)
  compared(tmp_path, same, same, judge_data=path, bad_rows='skip')
  assert 'line 61' in capsys.readouterr().out


def test_equal_answers_are_ties(tmp_path):
  same = answers(['aaz', 'zza', ''])
  metrics = compared(tmp_path, same, same)
  assert metrics['win_rate'] == 0.5
  assert metrics['length_controlled'] == pytest.approx(0.5)


@pytest.mark.slow
def test_exchanged_files_have_the_opposite_rate(tmp_path):
  a, b = answers(['aazaz', 'zzz', 'aaaa']), answers(['zz', 'aazaaaaaa', 'zaz'])
  first, second = (compared(tmp_path, *pair) for pair in ((a, b), (b, a)))
  for name in ('win_rate', 'length_controlled'):
    assert first[name] + second[name] == pytest.approx(1, abs=1e-6)


def test_the_length_controlled_rate_removes_length():
  rng = np.random.default_rng(0)
  lengths = rng.normal(50, 30, size=4_000)  # A is longer.
  z = np.tanh(lengths / lengths.std())
  expected = 1 / (1 + math.exp(-0.4))
  wins = (rng.uniform(size=4_000) < 1 / (1 + np.exp(-0.4 - 2 * z))).astype(
    float
  )
  assert wins.mean() > expected + 0.1
  # The deviation of the estimate is 0.02 for this number of answers.
  assert compare.at_equal_length(wins, lengths) == pytest.approx(
    expected, abs=0.06
  )


def test_features_do_not_depend_on_padding():
  model, tokenizer = weights.make_random()
  short = data_lib.Example(0, '1:', 'abc')
  long = data_lib.Example(1, '1:', 'abc' * 12)
  alone = judge.read_features(model, tokenizer, [short], max_length=64)
  beside = judge.read_features(model, tokenizer, [long, short], max_length=64)
  # Sums of 64 terms, rounded in another order.
  tolerance = 64 * float(np.finfo(np.float32).eps)
  np.testing.assert_allclose(
    alone[0], beside[1], rtol=tolerance, atol=10 * tolerance
  )


@pytest.mark.parametrize(
  ('b', 'message'),
  [
    ([{'row': 0, 'prompt': 'other:', 'response': 'a'}], 'other prompts in row'),
    ([{'row': 9, 'prompt': '0:', 'response': 'a'}], 'no row in common'),
    ([{'row': 0, 'prompt': '0:'}], 'no text under response'),
  ],
)
def test_refuses_answers_to_other_prompts(tmp_path, b, message):
  with pytest.raises(harness.UserError, match=message):
    compared(tmp_path, answers(['a']), b)


def test_log_probabilities_of_reference_answers(tmp_path):
  folders = []
  for seed in (0, 1):
    make(tmp_path / str(seed), seed)
    folders.append(str(tmp_path / str(seed)))
  reference = write_rows(
    tmp_path / 'reference.jsonl',
    [{'prompt': f'{i}:', 'completion': f'{i + 1} is next'} for i in range(3)],
  )
  metrics = compared(
    tmp_path,
    answers(['aaz']),
    answers(['zza']),
    models=tuple(folders),
    reference=reference,
  )
  values = [
    compare.reference_log_probs(folder, reference, 32) for folder in folders
  ]
  difference = np.mean(values[0] - values[1])
  assert metrics['log_prob_difference'] == pytest.approx(difference)
  text = '1 is next'
  model, tokenizer = weights.make_random(seed=0)
  tokens, mask = batches.encode_answer(tokenizer, '0:', text)
  log_probs = jax.nn.log_softmax(
    decoder_test.decoder.forward(model.config, model.params, tokens[None])[0]
  )
  own = [log_probs[i - 1, tokens[i]] for i in np.flatnonzero(mask)]
  # Float32 sums of about 250 terms.
  assert values[0][0] == pytest.approx(float(np.mean(own)), rel=1e-5)


def test_needs_both_models_and_a_reference():
  with pytest.raises(harness.SettingsError, match='two --models'):
    compare.check(compare.Settings(models=('a', 'b')))
