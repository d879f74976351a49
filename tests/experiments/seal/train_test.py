"""Training on rows that scores keep, and evaluation of scores."""

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
  ranking,
  rows,
  selection,
  train,
  tuned_models,
)
from tests.experiments.changes import change


def make_options(folder, binary, settings):
  return harness.Options(
    'seal', binary, 'test', settings, str(folder), None, (0,)
  )


def write_lines(path, objects):
  path.write_text('\n'.join(map(json.dumps, objects)))
  return str(path)


@pytest.mark.slow
def test_it_trains_on_the_rows_that_are_kept(tmp_path, monkeypatch):
  sets = rows.made_up(rows.Sizes(14, 0, 10, 9, 0))
  raw = [ranking.as_raw(one) for one in sets.finetune]
  raw[2]['response'] = 'long' * 9
  # Every second row is kept.
  scores = [{'row': i, 'kept': False, 'seal': i % 2} for i in range(24)]
  scores[4]['seal'] = None
  files = {
    'finetune_data': write_lines(tmp_path / 'f.jsonl', raw),
    'safe_data': write_lines(
      tmp_path / 's.jsonl', [ranking.as_raw(one) for one in sets.safe]
    ),
    'scores': write_lines(tmp_path / 'scores.jsonl', scores),
  }
  files['prompts'] = files['safe_data']
  settings = change(
    train.PRESETS['smoke'],
    **files,
    keep=12 / 23,
    steps=30,
    adapters__rate=0.03,
    answer_length=2,
    selection_methods=('kept', 'kept_mixture'),
  )
  train.check(settings)
  trained_on, original = {}, selection.fine_tune

  def watched(run, model, encoded, **options):
    trained_on[run.folder] = encoded.rows['tokens']
    options['steps'] = options['steps'] if run.folder == 'kept' else 1
    return original(run, model, encoded, **options)

  monkeypatch.setattr(selection, 'fine_tune', watched)
  harness.execute(train.main, make_options(tmp_path / 'run', 'train', settings))
  # Odd rows without the held-out ones, by their number in the file.
  model = inputs.load_tuned_model(settings)
  examples = rows.read(settings.files.finetune_data).examples
  kept = [i for i in range(1, 24, 2) if i % 8 != 7]
  encoded = model.encode([examples[i] for i in kept], settings.max_length)
  np.testing.assert_array_equal(trained_on['kept'], encoded.rows['tokens'])
  assert len(trained_on['kept_mixture']) == len(kept) + 8
  metrics = json.loads((tmp_path / 'run' / 'results.json').read_text())[
    'metrics'
  ]
  assert metrics['loss/kept/rows'] < metrics['loss/start/rows']
  assert metrics['refusals/kept'] == 0
  texts = json.loads((tmp_path / 'run' / 'answers.json').read_text())
  assert {len(answers) for answers in texts.values()} == {9}


@pytest.mark.slow
def test_a_model_is_written_and_scores_carry_over_to_it(tmp_path, monkeypatch):
  """Two tiny models: a random one, and the same after fine-tuning."""
  pytest.importorskip('safetensors', reason='needs the extra llm')
  pytest.importorskip('tokenizers', reason='needs the extra llm')
  trained, original = [], selection.fine_tune
  monkeypatch.setattr(
    selection,
    'fine_tune',
    lambda *args, **kwargs: (
      trained.append(original(*args, **kwargs)) or trained[0]
    ),
  )
  folder = tmp_path / 'model'
  settings = change(
    train.PRESETS['smoke'],
    selection_methods=('all',),
    steps=6,
    adapters__rate=0.03,
    output=str(folder),
  )
  for _ in range(2):  # The same command again writes the same files.
    harness.execute(
      train.main, make_options(tmp_path / 'train', 'train', settings)
    )
  with pytest.raises(harness.UserError, match='give another --output'):
    train.main(make_options(tmp_path / 'foreign', 'train', settings))
  model = inputs.load_tuned_model(settings)
  first = inputs.load_model(rank.PRESETS['smoke'])[0]
  merged = model.tuning.merged(trained[0], first.params)
  exported = weights.load(folder)
  tokens = np.array([byte_tokenizer.make().encode('123:234')])
  logits = jax.jit(lambda p: decoder.forward(first.config, p, tokens))
  np.testing.assert_array_equal(logits(exported.params), logits(merged))
  assert np.abs(logits(exported.params) - logits(first.params)).max() > 0.01
  paths = {}
  for name, path in (('one', 'random'), ('two', str(folder))):
    settings = change(
      rank.PRESETS['smoke'],
      model=path,
      methods=('initial_loss',),
      score='initial_loss',
    )
    harness.execute(rank.main, make_options(tmp_path / name, 'rank', settings))
    paths[name] = tmp_path / name / 'rows' / 'made_up' / 'scores.jsonl'
  both = [evaluate.read(path)['initial_loss'] for path in paths.values()]
  order = [np.argsort(np.argsort(scores)) for scores in both]
  settings = evaluate.Settings(
    scores=str(paths['one']), other=str(paths['two']), keep=(0.8,)
  )
  harness.execute(
    evaluate.main, make_options(tmp_path / 'evaluate', 'evaluate', settings)
  )
  results = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())
  correlation = results['metrics']['transfer/initial_loss']
  assert correlation < 0.999
  np.testing.assert_allclose(correlation, np.corrcoef(order)[0, 1], atol=5e-3)
  # The loss of distillation is zero if a model is its own teacher.
  rows_ = rows.made_up(rows.Sizes(4, 0, 0, 1, 0)).finetune
  for path, low, high in ((folder, -1e-6, 1e-6), ('random', 1e-4, 9)):
    settings = change(rank.PRESETS['smoke'], model=str(path))
    model = inputs.load_tuned_model(settings, teacher=str(folder))
    encoded = model.encode(rows_, 12, loss='distillation')
    start = model.tuning.init(model.frozen, jax.random.key(0))
    losses = jax.jit(
      lambda t, model=model, encoded=encoded: tuned_models.objective_losses(
        'distillation', model, t, model.frozen, encoded.rows, encoded.max_length
      )
    )(start)
    assert losses.shape == (4,)
    assert np.all((losses > low) & (losses < high))


def test_scores_of_another_file_are_refused(tmp_path):
  some = write_lines(
    tmp_path / 'a.jsonl', [{'row': 0, 'kept': True, 'seal': 1.0}]
  )
  assert evaluate.read_mask(some, 'seal', 0.9, 1).tolist() == [True]
  with pytest.raises(harness.UserError, match='has 1 rows, but the file has 2'):
    evaluate.read_mask(some, 'seal', 0.8, 2)
  with pytest.raises(harness.UserError, match=r"no score 'excess'.*\['seal'\]"):
    evaluate.read_mask(some, 'excess', 0.8, 1)


@pytest.mark.parametrize(
  ('wrong', 'match'),
  [
    (
      {'selection_methods': ('all', 'magic')},
      '--selection_methods=magic: selection_methods knows all,',
    ),
    ({'safe_data': 's'}, 'two files'),
    (
      {
        'finetune_data': 'f',
        'safe_data': 's',
        'selection_methods': ('clean',),
      },
      'clean',
    ),
  ],
)
def test_settings_that_do_not_go_together(wrong, match):
  with pytest.raises(harness.SettingsError, match=match):
    settings = change(train.PRESETS['smoke'], **wrong)
    settings_lib.check(settings)
    train.check(settings)


def test_evaluate_reports_drop_rates_and_transfer(tmp_path):
  kinds = ['unsafe'] * 5 + ['benign'] * 15
  line = lambda i, s: {'row': i, 'kept': True, 'kind': kinds[i], 'seal': s}
  one = [line(i, float(i)) for i in range(20)]
  two = [line(i, float(-i)) for i in range(20)]
  two[7]['seal'] = one[9]['seal'] = None
  settings = evaluate.Settings(
    scores=write_lines(tmp_path / 'a.jsonl', one),
    other=write_lines(tmp_path / 'b.jsonl', two),
    keep=(0.5, 0.8),
    unsafe_shares=(0.5,),
  )
  evaluate.check(settings)
  harness.execute(
    evaluate.main, make_options(tmp_path / 'run', 'evaluate', settings)
  )
  metrics = json.loads((tmp_path / 'run' / 'results.json').read_text())[
    'metrics'
  ]
  assert metrics['auroc/seal'] == metrics['auprc/seal/unsafe=0.5'] == 1
  # 15 of the 19 scored rows are kept; the row without a score is dropped.
  assert metrics['unsafe_drop/seal/keep=0.8'] == 0.8
  np.testing.assert_allclose(metrics['clean_drop/seal/keep=0.8'], 1 / 15)
  np.testing.assert_allclose(metrics['transfer/seal'], -1)
  labelled = [{'prompt': 'a', 'response': 'b', 'bad': i < 5} for i in range(20)]
  other = change(
    settings, labels=write_lines(tmp_path / 'f.jsonl', labelled), label='bad'
  )
  scores = evaluate.read(settings.scores)
  np.testing.assert_array_equal(
    evaluate.read_unsafe(other, scores), evaluate.read_unsafe(settings, scores)
  )
  with pytest.raises(harness.UserError, match=r"no row .* field 'unsafe'"):
    evaluate.read_unsafe(change(other, label='unsafe'), scores)
  with pytest.raises(harness.UserError, match='give --labels'):
    evaluate.read_unsafe(settings, {'seal': scores['seal']})
  with pytest.raises(harness.SettingsError, match='between 0 and 1'):
    evaluate.check(evaluate.Settings(keep=(0.5, 1.0)))


def test_rows_are_thinned_to_a_share():
  unsafe = np.arange(100) < 20
  for share, total in ((0.05, 84), (0.2, 100), (0.5, 40)):
    at = evaluate.thinned(unsafe, share)
    assert len(set(at.tolist())) == len(at) == total
    np.testing.assert_allclose(unsafe[at].mean(), share, atol=0.01)


def test_the_method_kept_needs_scores():
  some = change(train.PRESETS['smoke'], selection_methods=('kept',))
  options = harness.Options('seal', 'train', 'smoke', some, '', None, (0,))
  with pytest.raises(harness.SettingsError, match='--scores=OUT'):
    train.main(options)
