"""Trains, resumes, saves, transcribes: on tones, end to end."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.bl_just import problem, speech_report, train
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import comparison
from experiments.speech import (
  corpora,
  front_end,
  objectives,
  recogniser,
  scoring,
  transcribe,
)
from tests.experiments.changes import change

pytest.importorskip('jiwer')
pytest.importorskip('soundfile')

SETTINGS = change(
  train.PRESETS['smoke'],
  methods=('bl_just',),
  time_masks=0,
  freq_masks=0,
  width=8,
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with a run of all kinds of steps, and its metrics."""
  folder = tmp_path_factory.mktemp('run')
  settings = change(SETTINGS, rounds=2)
  train.check(settings)
  options = harness.Options(
    'bl_just', 'train', 'test', settings, str(folder), None, (0, 1)
  )
  harness.execute(train.main, options)
  return folder, options, metrics_of(folder)


def metrics_of(folder):
  return json.loads((folder / 'results.json').read_text())['metrics']


@pytest.mark.slow
def test_a_run_writes_a_report_and_a_recogniser(trained):
  folder, _, metrics = trained
  assert {'wer/bl_just', 'cer/bl_just', 'training_error/bl_just'} <= set(
    metrics
  )
  results = json.loads((folder / 'results.json').read_text())
  assert results['substituted']  # Tones are not LibriSpeech.
  table = (folder / 'table.md').read_text()
  assert 'not converged' in table and '18, 18' in table
  for name in ('errors.png', recogniser.NAME):
    assert (folder / name).stat().st_size > 1_000


def test_the_same_command_reuses_its_result(trained, capsys):
  folder, options, metrics = trained
  harness.execute(train.main, options)
  again = metrics_of(folder)
  assert 'finished before' in capsys.readouterr().err
  same = {n: v for n, v in metrics.items() if 'seconds' not in n}
  for name, value in same.items():
    np.testing.assert_equal(again[name], value, err_msg=name)


@pytest.mark.slow  # Compiles all programs twice.
def test_a_killed_run_continues_bit_for_bit(trained, tmp_path, monkeypatch):
  """The run is killed in exploration, with prefetched batches."""
  folder, options, _ = trained
  original, calls = problem.errors, []

  def stop(*args, **keywords):
    calls.append(args)
    raise KeyboardInterrupt

  monkeypatch.setattr(problem, 'errors', stop)
  ended = options._replace(
    workdir=str(tmp_path),
    save_seconds=0.0,
    settings=change(options.settings, check_every=10),
  )
  with pytest.raises(KeyboardInterrupt):
    train.main(ended)
  monkeypatch.setattr(problem, 'errors', original)
  train.main(ended)
  one, other = (
    harness.load(where, name='bl_just').params for where in (folder, tmp_path)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_each_fraction_of_texts_is_a_run(tmp_path, monkeypatch):
  """Each has a folder; metrics, rows and the plot have the fraction."""
  corpus = SETTINGS.data.read(None, 0.5)
  calls = []

  def train_methods(options, labelled):
    calls.append((options.workdir, labelled))
    one = lambda rate: scoring.Errors(
      *np.array([[100 * rate], [0], [0], [100]])
    )
    kinds = {
      n: [one(0.5), one(0.7 - labelled / 4)] for n in ('words', 'characters')
    }
    errors = {part: kinds for part in ('training', 'validation', 'test')}
    names = ('bl_just', 'joint') if labelled < 1 else ('bl_just',)
    trained = types.SimpleNamespace(
      seconds=4.0, steps=[4], history={'validation': np.ones((1, 2))}
    )
    outcomes = {
      name: comparison.Outcome(name, {}, trained=trained, members=np.arange(2))
      for name in names
    }
    return train.Comparison(outcomes, dict.fromkeys(names, errors), corpus)

  monkeypatch.setattr(train, 'train_methods', train_methods)
  settings = change(SETTINGS, labelled=(1.0, 0.25), steps=8)
  train.check(settings)
  options = harness.Options(
    'bl_just', 'train', 'test', settings, str(tmp_path), None, (0, 1)
  )
  for share in ('1', '0.25'):
    (tmp_path / f'labelled-{share}').mkdir()
  harness.execute(train.main, options)
  assert calls == [
    (str(tmp_path / 'labelled-1'), 1.0),
    (str(tmp_path / 'labelled-0.25'), 0.25),
  ]
  metrics = metrics_of(tmp_path)
  assert metrics['wer/bl_just/labelled=1'] == pytest.approx(0.475)
  assert metrics['wer/joint/labelled=0.25'] == pytest.approx(0.56875)
  table = (tmp_path / 'table.md').read_text().splitlines()
  assert [line.split()[1] for line in table[2:]] == ['1', '0.25', '0.25']
  for name in ('shares.png', 'labelled-1/errors.png'):
    assert (tmp_path / name).stat().st_size > 1_000
  # In ascending order, without methods that failed with a fraction.
  errors = [train_methods(options, share).errors for share in (1.0, 0.25)]
  curves = speech_report.share_curves((1.0, 0.25), errors)
  ((label, (shares, values)),) = curves.items()
  assert label == 'BL-JUST' and shares.tolist() == [0.25, 1.0]
  np.testing.assert_allclose(values, [[0.56875], [0.475]])


@pytest.mark.slow
def test_a_saved_recogniser_has_the_same_outputs(trained):
  folder, options, _ = trained
  prepared = problem.prepare(options.settings, None, folder, 0.5)
  network, weights, units, seconds = recogniser.load(folder)
  assert network.shape == prepared.network.shape
  assert units == (folder / 'units.json').read_text()
  train = prepared.examples['train']
  lengths = train.lengths[prepared.labelled] / network.shape.front.rate
  assert np.median(lengths) <= seconds <= np.max(lengths)
  params = harness.load(folder, name='bl_just').params
  first = jax.tree.map(lambda leaf: leaf[0], params)
  np.testing.assert_array_equal(weights.encoder, first['encoder'])
  examples = prepared.examples['test']
  expected = dict(
    recogniser.log_probabilities(
      network, weights, examples, np.arange(3), edges=prepared.edges
    )
  )
  transcriber = transcribe.Transcriber(folder)
  for row in range(3):
    result = transcriber.hear(examples.load(row))
    # Padded to another length.
    np.testing.assert_allclose(result.log_probs, expected[row], atol=1e-4)


def test_files_are_transcribed_and_broken_ones_reported(
  trained, tmp_path, capsys
):
  import soundfile

  folder, options, _ = trained
  prepared = problem.prepare(options.settings, None, folder, 0.5)
  network, weights, units, seconds = recogniser.load(folder)
  # Weights whose bias always outputs one unit.
  bias = jnp.zeros_like(weights.recogniser).at[2].set(9.0)
  loud = weights._replace(recogniser=bias)
  checkpoint = tmp_path / 'loud.npz'
  recogniser.save(checkpoint, network, loud, units, seconds)
  audio = prepared.examples['test'].load(0)
  soundfile.write(tmp_path / 'a.wav', np.repeat(audio, 2), 16_000)
  (tmp_path / 'b.wav').write_bytes(b'RIFF of nothing')
  status = transcribe.main(
    [
      f'--checkpoint={checkpoint}',
      f'--picture={tmp_path / "a.png"}',
      str(tmp_path / 'b.wav'),
      str(tmp_path / 'a.wav'),
    ]
  )
  out, err = capsys.readouterr()
  assert status == 1 and 'b.wav' in err and err.count('\n') == 1
  name, text = out.strip().split('\t')
  assert name.endswith('a.wav') and text == prepared.units.symbols[2]
  assert (tmp_path / 'a.png').stat().st_size > 1_000
  assert transcribe.main([f'--checkpoint={tmp_path / "no"}', 'a.wav']) == 1
  assert 'when all methods are done' in capsys.readouterr().err
  for wrong in ('--beam=0', '--beam=-2'):
    assert transcribe.main([f'--checkpoint={checkpoint}', wrong, 'a.wav']) == 1
    assert 'the beam is at least 1' in capsys.readouterr().err
  assert (
    transcribe.main(
      [f'--checkpoint={checkpoint}', '--language=x.arpa', 'a.wav']
    )
    == 1
  )
  assert '--beam=16' in capsys.readouterr().err
  table = tmp_path / 'texts.tsv'
  table.write_text('a.wav\ta text')
  assert transcribe.main([f'--checkpoint={table}', 'a.wav']) == 1
  assert 'no recogniser' in capsys.readouterr().err
  recogniser.save(checkpoint, network, loud, units, float('nan'))
  assert transcribe.main([f'--checkpoint={checkpoint}', 'a.wav']) == 1
  assert 'its utterances last nan seconds' in capsys.readouterr().err
  checkpoint.write_bytes(checkpoint.read_bytes()[:900])
  assert transcribe.main([f'--checkpoint={checkpoint}', 'a.wav']) == 1
  assert 'loud.npz' in capsys.readouterr().err


def test_a_loss_of_a_batch_is_that_of_its_utterances():
  """Padding and other utterances do not affect the loss of transcripts."""
  shape = recogniser.Shape(
    'conv', 8, 0, (2,), 3, 2, False, 4, front_end.FrontEnd(None, 3)
  )
  network = recogniser.Recogniser(shape)
  training = recogniser.Training(
    objectives.Ssl(), front_end.Masks(0, 1, 0, 1), 0.0
  )
  weights = network.init(jax.random.key(0), training.ssl)
  rng = np.random.default_rng(0)
  lengths, counts = np.array([9, 14]), np.array([2, 3])
  audio = np.zeros((2, 20, 3), np.float32)
  labels = np.zeros((2, 5), np.int32)
  for i in range(2):
    audio[i, : lengths[i]] = rng.normal(size=(lengths[i], 3))
    labels[i, : counts[i]] = rng.integers(1, 4, counts[i])

  def loss(rows, size, max_labels):
    batch = {
      'audio': audio[rows, :size],
      'length': lengths[rows],
      'labels': labels[rows, :max_labels],
      'label_length': counts[rows],
      'key': jax.random.key(1),
    }
    return jax.jit(network.ctc, static_argnums=0)(training, weights, batch)

  both = loss([0, 1], 20, 5)
  separate = [loss([0], 9, 2), loss([1], 14, 3)]
  np.testing.assert_allclose(both, np.mean(separate), rtol=1e-5)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'methods': ('sgd',)}, '--methods=sgd'),
    ({'methods': ('joint', 'joint')}, 'has a duplicate'),
    ({'sampling': 8_000}, 'remove the flag'),
    ({'test_part': 'test-other'}, '--test_part'),
    (
      {'dataset': 'tedlium', 'unlabelled_part': 'x'},
      '--unlabelled_part',
    ),
    ({'penalties': (0.1, 0.2)}, 'equal size'),
    ({'labelled': (0.5, 0.5)}, 'labelled=0.5,0.5 has a duplicate'),
    ({'labelled': ()}, 'labelled needs at least one'),
    ({'exploring': 0.5, 'tuning': 0.5}, 'have to be below 1'),
  ],
)
def test_invalid_settings_raise(changes, message):
  settings = change(SETTINGS, **changes)
  with pytest.raises(harness.SettingsError, match=message):
    settings_lib.check(settings)
    train.check(settings)


def test_no_text_raises(tmp_path):
  with pytest.raises(harness.SettingsError, match='labelled=0 leaves no'):
    problem.prepare(SETTINGS, None, tmp_path, 0.0)


def test_part_flags_select_parts(monkeypatch):
  parts_read = {}
  monkeypatch.setattr(
    corpora.librispeech,
    'read',
    lambda folder, **parts: parts_read.update(parts),
  )
  monkeypatch.setattr(
    corpora.utterances, 'hide_texts', lambda corpus, fraction, seed: corpus
  )
  settings = change(
    train.PRESETS['paper'],
    train_part='train-clean-100,train-clean-360',
    test_part='test-other',
  )
  train.check(settings)
  settings.data.read('folder', 1.0)
  assert parts_read == {
    'train': 'train-clean-100,train-clean-360',
    'test': 'test-other',
  }
