"""Metrics of the host, and state of the host in checkpoints."""

import base64
import json
import pathlib
import pickle
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.harness.store import files
from experiments.harness.train import host


class Game:
  """What is no pytree, and plays on with each call."""

  def __init__(self):
    self._draw = np.random.default_rng(0)

  def play(self):
    return self._draw.uniform()

  def get_state(self):
    return self._draw.bit_generator.state

  def set_state(self, state):
    self._draw.bit_generator.state = state


def test_is_recorded_at_its_steps_and_selects(train, tmp_path):
  called = []

  def evaluate_host(params, step, state):
    called.append(step)
    assert params.upper.shape == (2, 3) and state
    return {'words': [step % 20, -step], 'calls': len(called)}

  arguments = {'evaluate_host': evaluate_host, 'select': 'words'}
  trained = train(**arguments)
  assert called == [10, 20, 30, 40]
  np.testing.assert_array_equal(
    trained.history['words'], [[10, -10], [0, -20], [10, -30], [0, -40]]
  )
  assert trained.history['calls'].tolist() == [[i, i] for i in range(1, 5)]
  assert trained.best.step.tolist() == [10, 10]
  assert trained.best.score.tolist() == [10, -10]
  np.testing.assert_array_equal(
    trained.best.params.upper, train(steps=10, workdir=None).params.upper
  )

  called.clear()
  some = train(**arguments, host_every=15, workdir=None, steps=50)
  assert called == [20, 30, 50]
  missing = np.isnan(some.history['words'][:, 0])
  assert missing.tolist() == [True, False, False, True, False]
  assert not np.isnan(some.history['score']).any()
  line = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[0]
  assert json.loads(line)['words'] == [10, -10]


def test_state_of_the_host_is_kept_in_the_checkpoint(train, tmp_path):
  def run(workdir, stop_when=None):
    game, state = Game(), {'count': 0}
    state['game'] = game

    def evaluate_host(params, step, _):
      state['count'] += 1
      return {'luck': game.play(), 'count': state['count']}

    return train(
      evaluate_host=evaluate_host,
      host_state=state,
      workdir=workdir,
      stop_when=stop_when,
    ).history

  whole = run(None)
  run(tmp_path, lambda history: len(history['luck']) == 2)
  resumed = run(tmp_path)
  assert len(np.unique(whole['luck'])) == 4
  for name in ('luck', 'count'):
    np.testing.assert_array_equal(resumed[name], whole[name])


class Payload:
  """A pickle of it writes a file."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self._path,)


def crafted(folder, host_state):
  """Replaces the host's state in the checkpoints, with digests that fit."""
  places = list(folder.glob('run/checkpoints/*/about/metadata'))
  for place in places:
    about = files.unseal(place.read_bytes())
    about['extra']['host_state'] = host_state
    place.write_text(files.seal(about))
  assert places


def test_a_crafted_or_pickled_checkpoint_is_refused_and_runs_no_code(
  train, tmp_path
):
  run = lambda steps: train(host_state={'count': 0}, steps=steps)
  run(20)
  content = pickle.dumps({'count': Payload(tmp_path / 'attacked')})
  crafted(tmp_path, base64.b64encode(content).decode())
  with pytest.raises(
    harness.OtherRunError, match=r'pickled.* not read\. .* another --workdir'
  ):
    run(40)
  array = lambda dtype: {
    'array': [dtype, [1], base64.b64encode(bytes(8)).decode()]
  }
  for wrong, reason in [
    ({'count': {'call': ['os.system', 'true']}}, "no kind 'call'"),
    ({'count': {'array': ['O', [1], '']}}, ''),
    ({'count': array('O')}, 'OBJECT'),
    ({'count': array('no_dtype')}, 'no_dtype'),
    ({'count': {'array': ['<f8', [9], '']}}, 'reshape'),
    ({'count': {'generator': {'dict': [['bit_generator', 'eval']]}}}, 'eval'),
    ({'count': {'random': [3, [], None]}}, ''),
    ({'count': {}}, 'unpack'),
    ([1], 'items'),
    (None, 'items'),
  ]:
    crafted(tmp_path, wrong)
    with pytest.raises(
      harness.OtherRunError, match=rf'invalid \(.*{reason}.*another --workdir'
    ):
      run(40)
  assert not (tmp_path / 'attacked').exists()
  pickle.loads(content)  # noqa: S301 - The payload works.
  assert (tmp_path / 'attacked').exists()


VALUES = {
  'plain': [None, True, -3, 2**200, 0.1, -0.0, float('inf'), 'text', b'\0\xff'],
  'nested': {'a': (1, [2, ()]), 3: {(4, 'b'): {}}},
  'arrays': [
    np.arange(6, dtype='>i2').reshape(2, 3),
    np.array(0.1),
    np.zeros((0, 4), np.float32),
    np.array(['a', 'bcd']),
    np.array([True]),
    np.array([1 + 2j]),
    np.array([1.5], jnp.bfloat16),
    np.array(['2026-01-01'], 'M8[D]'),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
  ],
  'scalars': [np.float64(0.1), np.int8(-1), np.bool_(True)],
  'jax': [jnp.arange(3), jnp.ones((), jnp.bfloat16)],
}


def test_values_come_back_with_their_types():
  restored = {}
  host.unpack(restored, json.loads(json.dumps(host.pack(VALUES))), 'folder')

  def compare(found, given):
    assert type(found) is type(given)
    if isinstance(given, dict):
      assert list(found) == list(given)
      found, given = list(found.values()), list(given.values())
    if isinstance(given, list | tuple):
      assert len(found) == len(given)
      for pair in zip(found, given):
        compare(*pair)
    elif hasattr(given, 'dtype'):
      assert found.dtype == given.dtype and found.shape == given.shape
      assert np.asarray(found).tobytes() == np.asarray(given).tobytes()
    else:
      assert repr(found) == repr(given)

  compare(restored, VALUES)
  restored['arrays'][0][0, 0] = 7  # May be written to.


def test_generators_go_on_bit_for_bit():
  numpy = np.random
  made = lambda: {
    **{
      kind.__name__: numpy.Generator(kind(3))
      for kind in (
        *(numpy.MT19937, numpy.PCG64, numpy.PCG64DXSM),
        *(numpy.Philox, numpy.SFC64),
      )
    },
    'legacy': numpy.RandomState(3),
    'python': random.Random(3),
    'key': jax.random.key(3),
    'rbg': jax.random.key(3, impl='rbg'),
  }

  def draw(states):
    drawn = []
    for state in states.values():
      if isinstance(state, random.Random):
        drawn.append([state.gauss(0, 1), state.random()])
      elif isinstance(state, jax.Array):
        drawn.append(jax.random.uniform(state, (2,)).tolist())
      else:
        # Half a word is left over by numbers of 32 bits.
        numbers = (
          state.integers(9, size=3, dtype=np.int32)
          if hasattr(state, 'integers')
          else state.randint(9, size=3)
        )
        drawn.append([*numbers.tolist(), *state.normal(size=3).tolist()])
    return drawn

  before, restored = made(), made()
  draw(before)
  packed = json.loads(json.dumps(host.pack(before)))
  host.unpack(restored, packed, 'folder')
  assert draw(restored) == draw(before)


def test_what_a_checkpoint_cannot_hold_is_told_before_the_run(train, tmp_path):
  for value, where in [
    (object(), r"host_state\['a'\] is a builtins\.object"),
    ({'b': [0, {1}]}, r"host_state\['a'\]\['b'\]\[1\] is a builtins\.set"),
    (np.array([None]), 'ndarray'),
    (np.zeros(2, [('x', 'f4')]), 'ndarray'),
    (lambda: 0, 'function'),
  ]:
    with pytest.raises(TypeError, match=rf'{where}.* get_state\(\) and set_'):
      train(host_state={'a': value})
  assert not list(tmp_path.glob('run/checkpoints/*'))


@pytest.mark.parametrize(
  ('found', 'kind', 'message'),
  [
    ([1], TypeError, 'a dict'),
    ({'a': np.zeros(3)}, ValueError, r"'a' .* each of 2 seeds, .*\(3,\)"),
    ({'score': 1.0}, ValueError, 'score'),
  ],
)
def test_wrong_metrics(train, found, kind, message):
  with pytest.raises(kind, match=message):
    train(evaluate_host=lambda params, step, state: found, workdir=None)


def test_a_stopped_seed_has_no_metrics_of_the_host(train):
  poison = lambda context: jnp.where(context.own > 0, jnp.nan, 1.0)
  with pytest.warns(RuntimeWarning, match='seed 1'):
    trained = train(
      batch=poison,
      own=jnp.array([0.0, 1.0]),
      evaluate_host=lambda params, step, state: {'one': 1.0},
      select='one',
      workdir=None,
    )
  assert trained.history['one'][-1, 0] == 1
  assert np.isnan(trained.history['one'][:, 1]).all()
  assert trained.best.step.tolist() == [10, 0]


def test_unknown_select_names_the_metrics(train):
  with pytest.raises(ValueError, match=r"'w' is none of the metrics.*words"):
    train(
      evaluate_host=lambda params, step, state: {'words': 1.0},
      select='w',
      workdir=None,
    )
