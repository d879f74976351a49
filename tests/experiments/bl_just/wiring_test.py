"""Tests the rows, sets and fixed arrays of a run."""

import types

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.bl_just import problem, speech_report, train
from experiments.harness.study import comparison
from experiments.speech import front_end, objectives, recogniser, scoring
from tests.experiments.changes import change

pytest.importorskip('soundfile')

SETTINGS = change(
  train.PRESETS['smoke'], width=8, depth=0, strides=(2, 2), steps=4
)
SEEDS = (3, 4)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The problem of the settings."""
  return problem.prepare(SETTINGS, None, tmp_path_factory.mktemp('run'), 0.5)


@pytest.fixture
def train_args(prepared, monkeypatch):
  """The arguments of `harness.train`."""
  calls = []
  monkeypatch.setattr(
    harness, 'train', lambda solver, *args: calls.append(args)
  )
  options = harness.Options('p', 'b', 'smoke', SETTINGS, None, None, SEEDS)
  job = comparison.Job('bl_just', False, {}, SEEDS, 'bl_just', {}, options)
  train.run(SETTINGS, prepared, job)
  return calls[0]


def test_ctc_has_labelled_rows_and_ssl_all_rows(prepared, train_args):
  stream = train_args[0].stream
  train_part = prepared.examples['train']
  labelled = [
    row for row, text in enumerate(train_part.texts) if text is not None
  ]
  assert len(labelled) == 12 and prepared.labelled.tolist() == labelled
  for loss, wanted in (('ctc', labelled), ('ssl', range(24))):
    for member in range(len(SEEDS)):
      rows = np.concatenate([bucket[member] for bucket in stream._rows[loss]])
      assert sorted(rows) == list(wanted)


def test_no_utterance_is_in_two_parts(prepared):
  names = [set(part.names) for part in prepared.examples.values()]
  assert sum(map(len, names)) == len(set.union(*names)) == 40


def test_codes_depend_on_the_seed_alone(prepared, train_args):
  task, *_ = train_args
  assert jax.tree.leaves(task.own['fixed'])[0].shape[0] == len(SEEDS)
  streamed = task.stream.batch(0)
  result = []
  for member, step in ((0, 0), (0, 1), (1, 0)):
    own = jax.tree.map(lambda leaf, m=member: leaf[m], task.own)
    context = types.SimpleNamespace(
      streamed=streamed, own=own, key=jax.random.key(step)
    )
    result.append(task.batch(context)['ssl'])
    expected = recogniser.quantiser(
      prepared.training, prepared.network, jax.random.key(SEEDS[member])
    )
    jax.tree.map(np.testing.assert_array_equal, result[-1]['fixed'], expected)
  codes = [one['fixed']['codes'] for one in result]
  assert np.any(codes[0] != codes[2])
  assert np.any(
    jax.random.key_data(result[0]['key'])
    != jax.random.key_data(result[1]['key'])
  )


def test_selection_uses_the_validation_set(prepared, train_args, monkeypatch):
  *_, measure = train_args
  evaluated = []

  def errors(prepared, params, part, rows=None):
    evaluated.append((part, rows))
    one = scoring.Errors(*np.array([[1], [0], [0], [4]]))
    return {'words': [one], 'characters': [one]}

  monkeypatch.setattr(problem, 'errors', errors)
  result = measure.evaluate_host(None, 1, None)
  assert result['validation'].tolist() == [0.25]
  assert evaluated == [('validation', None)]
  # The training error is measured on rows with a text.
  trained = types.SimpleNamespace(params=np.zeros((2, 1)))
  outcome = types.SimpleNamespace(trained=trained, members=np.array([0, 1]))
  evaluated.clear()
  assert set(speech_report.measure(prepared, outcome)) == {
    'training',
    'validation',
    'test',
  }
  rows = {part: rows for part, rows in evaluated}
  assert rows.keys() == {'train', 'validation', 'test'}
  assert rows['train'].tolist() == prepared.labelled.tolist()
  assert rows['test'] is None


def test_masks_change_the_loss_of_transcripts_alone():
  shape = recogniser.Shape(
    'conv', 8, 0, (2,), 3, 2, False, 4, front_end.FrontEnd(None, 3)
  )
  network = recogniser.Recogniser(shape)
  ssl = objectives.Ssl(codebook_size=4)
  weights = network.init(jax.random.key(0), ssl)
  audio = np.random.default_rng(0).normal(size=(1, 20, 3)).astype(np.float32)
  batch = {
    'audio': audio,
    'length': np.array([20]),
    'labels': np.array([[1, 2]]),
    'label_length': np.array([2]),
    'key': jax.random.key(1),
  }
  values = {}
  for masks in (0, 8):
    training = recogniser.Training(
      ssl, front_end.Masks(masks, 4, masks, 1), 0.0
    )
    fixed = recogniser.quantiser(training, network, jax.random.key(2))
    values[masks] = (
      float(network.ctc(training, weights, batch)),
      float(network.ssl(training, weights, batch | {'fixed': fixed})),
    )
  assert abs(values[0][0] - values[8][0]) > 1e-4
  assert values[0][1] == values[8][1]
