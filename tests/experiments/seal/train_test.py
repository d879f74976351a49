"""Training on rows that scores keep, and what scores are worth at any share."""

import json

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.lm import byte_tokenizer, decoder, weights
from experiments.seal import (
  evaluate,
  inputs,
  rank,
  rows,
  selection,
  subjects,
  train,
)
from tests.experiments.changes import change


def options_of(folder, binary, settings):
  return harness.Options(
    'seal', binary, 'test', settings, str(folder), None, (0,)
  )


def written(path, objects):
  path.write_text('\n'.join(map(json.dumps, objects)))
  return str(path)


def test_it_trains_on_the_rows_that_are_kept(tmp_path, monkeypatch):
  sets = rows.made_up(rows.Sizes(14, 0, 10, 9, 0))
  raw = [rank.raw_of(one) for one in sets.finetune]
  raw[2]['response'] = 'long' * 9
  # Every second row is kept.
  scores = [{'row': i, 'kept': False, 'seal': i % 2} for i in range(24)]
  scores[4]['seal'] = None
  files = {
    'finetune_data': written(tmp_path / 'f.jsonl', raw),
    'safe_data': written(
      tmp_path / 's.jsonl', [rank.raw_of(one) for one in sets.safe]
    ),
    'scores': written(tmp_path / 'scores.jsonl', scores),
  }
  files['prompts'] = files['safe_data']
  settings = change(
    train.PRESETS['smoke'],
    **files,
    keep=12 / 23,
    steps=30,
    adapters__rate=0.03,
    answer_length=2,
    ways=('kept', 'kept_mixture'),
  )
  train.check(settings)
  seen, original = {}, selection.fine_tuned

  def watched(run, subject, made, **how):
    seen[run.folder] = made.rows['tokens']
    how['steps'] = how['steps'] if run.folder == 'kept' else 1
    return original(run, subject, made, **how)

  monkeypatch.setattr(selection, 'fine_tuned', watched)
  harness.execute(train.main, options_of(tmp_path / 'run', 'train', settings))
  # Odd rows without those that are held out, by their numbers, whatever is too
  # long before them.
  subject = inputs.load_subject(settings)
  examples = rows.read(settings.files.finetune_data).examples
  wanted = [i for i in range(1, 24, 2) if i % 8 != 7]
  made = subject.make([examples[i] for i in wanted], settings.max_length)
  np.testing.assert_array_equal(seen['kept'], made.rows['tokens'])
  assert len(seen['kept_mixture']) == len(wanted) + 8
  found = json.loads((tmp_path / 'run' / 'results.json').read_text())['metrics']
  assert found['loss/kept/rows'] < found['loss/start/rows']
  assert found['refusals/kept'] == 0
  texts = json.loads((tmp_path / 'run' / 'answers.json').read_text())
  assert {len(answers) for answers in texts.values()} == {9}


@pytest.mark.slow
def test_a_model_is_written_and_scores_carry_over_to_it(tmp_path, monkeypatch):
  """Two tiny models: one as it is drawn, and what it is fine-tuned to."""
  pytest.importorskip('safetensors', reason='needs the extra llm')
  pytest.importorskip('tokenizers', reason='needs the extra llm')
  trained, original = [], selection.fine_tuned
  monkeypatch.setattr(
    selection,
    'fine_tuned',
    lambda *given, **how: trained.append(original(*given, **how)) or trained[0],
  )
  folder = tmp_path / 'model'
  settings = change(
    train.PRESETS['smoke'],
    ways=('all',),
    steps=6,
    adapters__rate=0.03,
    output=str(folder),
  )
  for _ in range(2):  # The same command again writes the same anew.
    harness.execute(
      train.main, options_of(tmp_path / 'train', 'train', settings)
    )
  with pytest.raises(harness.UserError, match='give another --output'):
    train.main(options_of(tmp_path / 'foreign', 'train', settings))
  subject = inputs.load_subject(settings)
  first = inputs.load_model(rank.PRESETS['smoke'])[0]
  merged = subject.tuning.merged(trained[0], first.params)
  found = weights.load(folder)
  tokens = np.array([byte_tokenizer.make().encode('123:234')])
  logits = jax.jit(lambda p: decoder.forward(first.config, p, tokens))
  np.testing.assert_array_equal(logits(found.params), logits(merged))
  assert np.abs(logits(found.params) - logits(first.params)).max() > 0.01
  paths = {}
  for name, model in (('one', 'random'), ('two', str(folder))):
    given = change(
      rank.PRESETS['smoke'],
      model=model,
      methods=('initial_loss',),
      score='initial_loss',
    )
    harness.execute(rank.main, options_of(tmp_path / name, 'rank', given))
    paths[name] = tmp_path / name / 'rows' / 'made_up' / 'scores.jsonl'
  both = [evaluate.read(path)['initial_loss'] for path in paths.values()]
  order = [np.argsort(np.argsort(scores)) for scores in both]
  given = evaluate.Settings(
    scores=str(paths['one']), other=str(paths['two']), keep=(0.8,)
  )
  harness.execute(
    evaluate.main, options_of(tmp_path / 'evaluate', 'evaluate', given)
  )
  results = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())
  told = results['metrics']['transfer/initial_loss']
  assert told < 0.999
  np.testing.assert_allclose(told, np.corrcoef(order)[0, 1], atol=5e-3)
  # A model is its own teacher without loss, and another's with some.
  rows_ = rows.made_up(rows.Sizes(4, 0, 0, 1, 0)).finetune
  for model, low, high in ((folder, -1e-6, 1e-6), ('random', 1e-4, 9)):
    given = change(rank.PRESETS['smoke'], model=str(model))
    subject = inputs.load_subject(given, teacher=str(folder))
    made = subject.make(rows_, 12, loss='distillation')
    start = subject.tuning.init(subject.frozen, jax.random.key(0))
    losses = jax.jit(
      lambda t, subject=subject, made=made: subjects.losses_of(
        'distillation', subject, t, subject.frozen, made.rows, made.longest
      )
    )(start)
    assert losses.shape == (4,)
    assert np.all((losses > low) & (losses < high))


def test_scores_of_another_file_are_refused(tmp_path):
  some = written(tmp_path / 'a.jsonl', [{'row': 0, 'kept': True, 'seal': 1.0}])
  assert evaluate.kept_rows(some, 'seal', 0.9, 1).tolist() == [True]
  with pytest.raises(harness.UserError, match='has 1 rows, but the file has 2'):
    evaluate.kept_rows(some, 'seal', 0.8, 2)
  with pytest.raises(harness.UserError, match=r"no score 'excess'.*\['seal'\]"):
    evaluate.kept_rows(some, 'excess', 0.8, 1)


@pytest.mark.parametrize(
  ('wrong', 'said'),
  [
    ({'ways': ('all', 'magic')}, '--ways=magic: ways knows all,'),
    ({'safe_data': 's'}, 'two files'),
    ({'finetune_data': 'f', 'safe_data': 's', 'ways': ('clean',)}, 'clean'),
  ],
)
def test_settings_that_do_not_go_together(wrong, said):
  with pytest.raises(harness.SettingsError, match=said):
    settings = change(train.PRESETS['smoke'], **wrong)
    settings_lib.check(settings)
    train.check(settings)


def test_drop_rates_at_all_shares_and_how_scores_carry_over(tmp_path):
  kinds = ['unsafe'] * 5 + ['benign'] * 15
  line = lambda i, s: {'row': i, 'kept': True, 'kind': kinds[i], 'seal': s}
  one = [line(i, float(i)) for i in range(20)]
  two = [line(i, float(-i)) for i in range(20)]
  two[7]['seal'] = one[9]['seal'] = None
  settings = evaluate.Settings(
    scores=written(tmp_path / 'a.jsonl', one),
    other=written(tmp_path / 'b.jsonl', two),
    keep=(0.5, 0.8),
    unsafe_shares=(0.5,),
  )
  evaluate.check(settings)
  harness.execute(
    evaluate.main, options_of(tmp_path / 'run', 'evaluate', settings)
  )
  found = json.loads((tmp_path / 'run' / 'results.json').read_text())['metrics']
  assert found['auroc/seal'] == found['auprc/seal/unsafe=0.5'] == 1
  # Of 19 with a score, 15 are kept; the one without is not.
  assert found['unsafe_drop/seal/keep=0.8'] == 0.8
  np.testing.assert_allclose(found['clean_drop/seal/keep=0.8'], 1 / 15)
  np.testing.assert_allclose(found['transfer/seal'], -1)
  labelled = [{'prompt': 'a', 'response': 'b', 'bad': i < 5} for i in range(20)]
  other = change(
    settings, labels=written(tmp_path / 'f.jsonl', labelled), label='bad'
  )
  given = evaluate.read(settings.scores)
  np.testing.assert_array_equal(
    evaluate.unsafe_of(other, given), evaluate.unsafe_of(settings, given)
  )
  with pytest.raises(harness.UserError, match=r"no row .* field 'unsafe'"):
    evaluate.unsafe_of(change(other, label='unsafe'), given)
  with pytest.raises(harness.UserError, match='give --labels'):
    evaluate.unsafe_of(settings, {'seal': given['seal']})
  with pytest.raises(harness.SettingsError, match='between 0 and 1'):
    evaluate.check(evaluate.Settings(keep=(0.5, 1.0)))


def test_rows_are_thinned_to_a_share():
  unsafe = np.arange(100) < 20
  for share, total in ((0.05, 84), (0.2, 100), (0.5, 40)):
    at = evaluate.thinned(unsafe, share)
    assert len(set(at.tolist())) == len(at) == total
    np.testing.assert_allclose(unsafe[at].mean(), share, atol=0.01)


def test_kept_rows_are_asked_for():
  some = change(train.PRESETS['smoke'], ways=('kept',))
  options = harness.Options('seal', 'train', 'smoke', some, '', None, (0,))
  with pytest.raises(harness.SettingsError, match='--scores=OUT'):
    train.main(options)
