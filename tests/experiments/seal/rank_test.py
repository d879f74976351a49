"""Rankings of made-up rows and of a user's rows, without data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.seal import (
  inputs,
  order,
  rank,
  ranking,
  rows,
  selection,
  train,
  tuned_models,
)
from tests.experiments.changes import change

SMALL = rank.PRESETS['smoke']


def make_options(folder, settings, data_dir=None):
  return harness.Options(
    'seal', 'rank', 'test', settings, str(folder), data_dir, (0,)
  )


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_epochs_see_every_row_and_visits_are_counted():
  key = jax.random.key(0)
  assert order.steps_per_epoch(10, 4) == 3
  batches = np.stack([order.batch_at(key, k, 10, 4) for k in range(6)])
  for epoch in batches.reshape(2, 12):
    assert set(epoch.tolist()) == set(range(10))
  assert np.any(batches[:3] != batches[3:])

  solver = order.counted(
    optax.with_extra_args_support(optax.identity()), 10, lambda batch: batch
  )
  state = solver.init(jnp.zeros(2))
  for batch in batches:
    _, state = solver.update(batch, state, jnp.zeros(2))
  visits = np.bincount(batches.ravel(), minlength=10)
  np.testing.assert_array_equal(state.visits, visits)


@pytest.fixture(scope='module')
def ranked(tmp_path_factory):
  """A user's files with an invalid and a long row, ranked by all scores."""
  folder = tmp_path_factory.mktemp('seal')
  sets = rows.made_up(rows.Sizes(10, 0, 6, 6, 4))
  raw = [ranking.as_raw(one) for one in sets.finetune]
  raw[3]['response'] = 'long' * 9
  texts = list(map(json.dumps, raw))
  texts[5] = '{"prompt": "no answer"}'
  (folder / 'f.jsonl').write_text('\n'.join(texts))
  for name, part in (('s', sets.safe), ('u', sets.reference_rows)):
    text = '\n'.join(json.dumps(ranking.as_raw(one)) for one in part)
    (folder / f'{name}.jsonl').write_text(text)
  settings = change(
    SMALL,
    finetune_data=str(folder / 'f.jsonl'),
    safe_data=str(folder / 's.jsonl'),
    unsafe_data=str(folder / 'u.jsonl'),
    output=str(folder / 'out'),
    bad_rows='skip',
    keep=0.5,
    batch_size=4,
    tune_steps=2,
  )
  rank.check(settings)
  harness.execute(rank.main, make_options(folder / 'run', settings))
  return folder, raw, settings


def test_a_users_rows_keep_their_numbers(ranked):
  folder, raw, _ = ranked
  scores = lines(folder / 'out' / 'scores.jsonl')
  assert [row['row'] for row in scores] == list(range(16))
  for row in scores:
    for name in rank.TITLES:
      assert (row[name] is None) == (row['row'] in (3, 5)), (row, name)
  kept = [row['row'] for row in scores if row['kept']]
  assert len(kept) == 7 and not {3, 5} & set(kept)
  scored = [row for row in scores if row['seal'] is not None]
  best = sorted(scored, key=lambda row: -row['seal'])[:7]
  assert kept == sorted(row['row'] for row in best)
  assert lines(folder / 'out' / 'kept.jsonl') == [raw[i] for i in kept]


def test_scores_are_losses_and_gradients_of_the_model(ranked):
  """The losses and gradients of all rows at once."""
  folder, _, settings = ranked
  model = inputs.load_tuned_model(settings)
  examples = rows.read(settings.files.finetune_data, skip=True).examples
  encoded = model.encode(examples, settings.max_length)
  start = model.tuning.init(model.frozen, jax.random.key(0))
  at = [examples[i].row for i in encoded.indices]
  safe = rows.read(settings.files.safe_data).examples
  safe = model.encode(safe, settings.max_length)
  losses_by = lambda t, part: tuned_models.row_losses(
    model, t, model.frozen, part.rows, part.max_length
  )
  safe_loss = lambda t: losses_by(t, safe).mean()
  row_losses = lambda t: losses_by(t, encoded)
  losses, safe_gradient, gradients = jax.jit(
    lambda t: (
      row_losses(t),
      jax.grad(safe_loss)(t),
      jax.jacobian(row_losses)(t),
    )
  )(start)
  scores = lines(folder / 'out' / 'scores.jsonl')
  initial = np.array([scores[i]['initial_loss'] for i in at])
  np.testing.assert_allclose(initial, -losses, rtol=1e-4)
  products = sum(
    np.tensordot(gradients[n], leaf, axes=leaf.ndim)
    for n, leaf in safe_gradient.items()
  )
  norm = np.sqrt(sum(np.sum(np.square(a)) for a in safe_gradient.values()))
  similarity = np.array([scores[i]['gradient'] for i in at])
  np.testing.assert_allclose(similarity, products / norm, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_same_command_again_gives_the_same_scores(ranked):
  folder, _, settings = ranked
  before = (folder / 'out' / 'scores.jsonl').read_text()
  again = change(settings, methods=('seal',))
  harness.execute(rank.main, make_options(folder / 'run', again))
  after = lines(folder / 'out' / 'scores.jsonl')
  for one, line in zip(after, before.splitlines(), strict=True):
    assert one['seal'] == json.loads(line)['seal']


@pytest.mark.slow
def test_both_losses_may_be_of_comparisons(tmp_path, monkeypatch):
  """A safe loss of comparisons, and rows to rank that are comparisons."""
  sets = rows.made_up(rows.Sizes(8, 0, 0, 4, 0))
  text = lambda examples: '\n'.join(
    json.dumps(ranking.as_raw(e)) for e in examples
  )
  pairs = [one._replace(rejected=f'{one.answer}no') for one in sets.finetune]
  pairs[2] = pairs[2]._replace(rejected='too long for it')
  files = {'finetune_data': pairs, 'safe_data': sets.safe}
  for name, examples in files.items():
    (tmp_path / f'{name}.jsonl').write_text(text(examples))
  settings = change(
    SMALL,
    **{name: f'{tmp_path}/{name}.jsonl' for name in files},
    safe_loss='dpo',
    finetune_loss='uft_pairs',
    beta=0.5,
    epochs=4,
    batch_size=4,
    mixing_ratio=0.5,
    adapters__rate=0.03,
    methods=('seal', 'initial_loss'),
    output=str(tmp_path / 'out'),
  )
  rank.check(settings)
  history, original = {}, selection.learn_scores

  def watched(*args, **kwargs):
    selected = original(*args, **kwargs)
    history.update(selected.history)
    return selected

  monkeypatch.setattr(selection, 'learn_scores', watched)
  harness.execute(rank.main, make_options(tmp_path / 'run', settings))
  # At its reference, a model has the losses log(2) and 1/4.
  assert 0.2 < history['loss/upper'][-1] < np.log(2) - 0.01
  assert 0.2 < history['loss/lower'][-1] < 0.3
  for row in lines(tmp_path / 'out' / 'scores.jsonl'):
    assert (row['seal'] is None) == (row['row'] == 2)
    assert row['initial_loss'] is not None
  (tmp_path / 'safe_data.jsonl').write_text(text(sets.finetune))
  with pytest.raises(
    harness.UserError, match=r'safe_data.jsonl, line 1 .*one answer'
  ):
    rank.main(make_options(tmp_path / 'other', settings))


def test_rows_are_checked_before_the_model_is_loaded(tmp_path):
  """The model does not exist: only a later error would say so."""
  good = {'prompt': 'a', 'response': 'b'}
  pair = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}
  for name, raw in (
    ('good', [good] * 9),
    ('bad', [good, {'prompt': 'a', 'completion': 'b', 'label': False}]),
    ('pairs', [pair, good]),
    ('scores', [{'row': 0, 'seal': 1.0}]),
  ):
    path = tmp_path / f'{name}.jsonl'
    path.write_text('\n'.join(map(json.dumps, raw)))
  file = lambda name: str(tmp_path / f'{name}.jsonl')
  user = change(
    SMALL, model='nowhere', finetune_data=file('good'), safe_data=file('good')
  )
  dpo = {'safe_data': file('pairs'), 'safe_loss': 'dpo'}
  loaded = 'nowhere is neither a folder'
  for more, match in (
    ({}, loaded),
    ({'finetune_data': file('bad')}, r'bad.jsonl, line 2 .*label is false'),
    ({'safe_data': file('bad'), 'bad_rows': 'skip'}, loaded),
    (dpo, r'pairs.jsonl, line 2 .*one answer, expected two.*--bad_rows=skip'),
    ({**dpo, 'bad_rows': 'skip'}, loaded),
    ({'finetune_data': '', 'safe_data': '', 'sets': ('harmless',)}, '--data_d'),
  ):
    settings = change(user, **more)
    with pytest.raises(harness.UserError, match=match):
      rank.main(make_options(tmp_path / 'run', settings))
  training = change(
    train.Settings(),
    model='nowhere',
    finetune_data=file('good'),
    safe_data=file('good'),
    selection_methods=('all',),
  )
  for more, match in (
    ({}, loaded),
    ({'prompts': file('bad')}, loaded),
    ({'prompts': file('scores')}, r'scores.jsonl, line 1 .*keys are'),
    ({'finetune_data': file('bad')}, r'bad.jsonl, line 2 .*label is false'),
    ({'scores': file('scores')}, 'has 1 rows, but the file has 9'),
    ({'finetune_data': '', 'safe_data': ''}, '--data_dir'),
  ):
    settings = change(training, **more)
    with pytest.raises(harness.UserError, match=match):
      train.main(make_options(tmp_path / 'run', settings))


def test_known_rows_are_judged():
  kinds = np.array(['benign'] * 4 + ['chosen'] * 2 + ['unsafe'] * 2)
  sets = rows.Sets([], kinds, [], [])
  scores = np.array([5.0, 4.0, 3.0, 2.0, -1.0, 6.0, 0.0, 1.0])
  ranked = ranking.Ranking({'seal': scores}, {'seal': 1.0})
  results = harness.Results()
  for name in ('harmless', 'shuffled'):
    ranking.judge(results, name, sets, ranked, 0.75)
  metrics = results.metrics()
  assert metrics['auroc_style_matched/seal/harmless'] == 0.5
  assert metrics['auroc_ordinary/seal/harmless'] == 1
  assert metrics['unsafe_drop/seal/harmless'] == 0.5
  assert metrics['clean_drop/seal/harmless'] == pytest.approx(1 / 6)
  low, high = (metrics[f'auroc/seal/shuffled/{end}'] for end in ('low', 'high'))
  assert low < metrics['auroc/seal/shuffled'] == 10 / 12 < high


@pytest.mark.parametrize(
  ('wrong', 'match'),
  [
    ({'methods': ('seal', 'magic')}, '--methods=magic: methods knows seal,'),
    ({'sets': ('others',)}, '--sets=others'),
    ({'safe_data': 's.jsonl'}, 'two files'),
    ({'methods': ('random',)}, 'score=seal is not among'),
    ({'rank': 0}, 'rank must be at least 1'),
    ({'safe_loss': 'rlhf'}, 'safe_loss=rlhf: .* knows sft, chord'),
    ({'finetune_loss': 'kto'}, 'finetune_loss=kto: .* knows sft'),
    ({'safe_loss': 'distillation'}, '--teacher=DIR go together'),
    ({'teacher': 'DIR'}, '--teacher=DIR go together'),
  ],
)
def test_settings_that_do_not_go_together(wrong, match):
  with pytest.raises(harness.SettingsError, match=match):
    settings = change(SMALL, **wrong)
    settings_lib.check(settings)
    rank.check(settings)


def test_a_run_without_rows_is_refused(tmp_path):
  empty = change(SMALL, sets=())
  with pytest.raises(harness.SettingsError, match='no rows to rank'):
    rank.main(make_options(tmp_path, empty))
  known = change(SMALL, sets=('harmless',))
  with pytest.raises(harness.MissingDataError, match='--finetune_data'):
    rank.main(make_options(tmp_path, known))


def test_a_cache_that_is_too_large_is_refused(monkeypatch):
  model = inputs.load_tuned_model(SMALL)
  sets = rows.made_up(rows.Sizes(4, 0, 0, 1, 0))
  monkeypatch.setattr(tuned_models, 'CACHE_BYTES', 100)
  with pytest.raises(harness.UserError, match='--layers=0'):
    model.encode(sets.finetune, SMALL.max_length)
  # With adapters in all layers nothing is cached.
  model = inputs.load_tuned_model(change(SMALL, layers=0))
  assert 'tokens_x' not in model.encode(sets.finetune, SMALL.max_length).rows
