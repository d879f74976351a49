"""Tests what a run is given: which rows, which parts, which fixed arrays."""

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
def made(tmp_path_factory):
  """The problem of the settings."""
  return problem.prepare(SETTINGS, None, tmp_path_factory.mktemp('run'), 0.5)


@pytest.fixture
def given(made, monkeypatch):
  """What `harness.train` is called with."""
  calls = []
  monkeypatch.setattr(
    harness, 'train', lambda solver, *given: calls.append(given)
  )
  options = harness.Options('p', 'b', 'smoke', SETTINGS, None, None, SEEDS)
  job = comparison.Job('bl_just', False, {}, SEEDS, 'bl_just', {}, options)
  train.run(SETTINGS, made, job)
  return calls[0]


def test_transcripts_are_those_kept_and_audio_is_all(made, given):
  stream = given[0].stream
  train_part = made.examples['train']
  kept = [row for row, text in enumerate(train_part.texts) if text is not None]
  assert len(kept) == 12 and made.labelled.tolist() == kept
  for loss, wanted in (('ctc', kept), ('ssl', range(24))):
    for member in range(len(SEEDS)):
      rows = np.concatenate([of[member] for of in stream._rows[loss]])
      assert sorted(rows) == list(wanted)


def test_no_utterance_is_in_two_parts(made):
  names = [set(part.names) for part in made.examples.values()]
  assert sum(map(len, names)) == len(set.union(*names)) == 40


def test_codes_are_of_a_seed_and_the_same_in_every_step(made, given):
  task, *_ = given
  assert jax.tree.leaves(task.own['fixed'])[0].shape[0] == len(SEEDS)
  streamed = task.stream.batch(0)
  found = []
  for member, step in ((0, 0), (0, 1), (1, 0)):
    own = jax.tree.map(lambda leaf, m=member: leaf[m], task.own)
    context = types.SimpleNamespace(
      streamed=streamed, own=own, key=jax.random.key(step)
    )
    found.append(task.batch(context)['ssl'])
    expected = recogniser.quantiser(
      made.training, made.network, jax.random.key(SEEDS[member])
    )
    jax.tree.map(np.testing.assert_array_equal, found[-1]['fixed'], expected)
  codes = [one['fixed']['codes'] for one in found]
  assert np.any(codes[0] != codes[2])
  assert np.any(
    jax.random.key_data(found[0]['key']) != jax.random.key_data(found[1]['key'])
  )


def test_one_chooses_by_the_validation_part(made, given, monkeypatch):
  *_, measure = given
  looked = []

  def errors(made, params, part, rows=None):
    looked.append((part, rows))
    one = scoring.Errors(*np.array([[1], [0], [0], [4]]))
    return {'words': [one], 'characters': [one]}

  monkeypatch.setattr(problem, 'errors', errors)
  found = measure.evaluate_host(None, 1, None)
  assert found['validation'].tolist() == [0.25]
  assert looked == [('validation', None)]
  # What is called converged is measured on rows with a text.
  trained = types.SimpleNamespace(params=np.zeros((2, 1)))
  outcome = types.SimpleNamespace(trained=trained, members=np.array([0, 1]))
  looked.clear()
  assert set(speech_report.measure(made, outcome)) == {
    'training',
    'validation',
    'test',
  }
  rows = {part: rows for part, rows in looked}
  assert rows.keys() == {'train', 'validation', 'test'}
  assert rows['train'].tolist() == made.labelled.tolist()
  assert rows['test'] is None


def test_stripes_are_hidden_from_the_loss_of_transcripts_alone():
  shape = recogniser.Shape(
    'conv', 8, 0, (2,), 3, 2, False, 4, front_end.FrontEnd(None, 3)
  )
  network = recogniser.Recogniser(shape)
  task = objectives.Task(codes=4, size=4)
  weights = network.init(jax.random.key(0), task)
  audio = np.random.default_rng(0).normal(size=(1, 20, 3)).astype(np.float32)
  batch = {
    'audio': audio,
    'length': np.array([20]),
    'labels': np.array([[1, 2]]),
    'label_length': np.array([2]),
    'key': jax.random.key(1),
  }
  values = {}
  for stripes in (0, 8):
    training = recogniser.Training(
      task, front_end.Augmentation(stripes, 4, stripes, 1), 0.0
    )
    fixed = recogniser.quantiser(training, network, jax.random.key(2))
    values[stripes] = (
      float(network.ctc(training, weights, batch)),
      float(network.ssl(training, weights, batch | {'fixed': fixed})),
    )
  assert abs(values[0][0] - values[8][0]) > 1e-4
  assert values[0][1] == values[8][1]
