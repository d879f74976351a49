"""Streams: batches as a function of the step, buckets, parts of processes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevel_jax as bj
from experiments import harness
from experiments.harness.train import stream as stream_lib

LENGTHS = np.array([2, 5, 3, 8, 7, 1, 4, 6, 2, 8])
TEXTS = [
  {'tokens': np.full(n, 10 * i + 1, np.int32), 'id': np.int32(i)}
  for i, n in enumerate(LENGTHS)
]


BUCKETS = {'lengths': LENGTHS, 'buckets': (4, 8), 'pad': {'tokens': 0}}


def texts(batch_size=(2, 1), **changes):
  return harness.Stream(TEXTS, batch_size, **(BUCKETS | changes))


def take(stream, first, last, sharding=None):
  batches = stream.batches(first, sharding)
  return [jax.device_get(next(batches)) for _ in range(first, last)]


def test_batches_are_a_function_of_the_step():
  stream = texts()
  whole = take(stream, 0, 23)
  for first in (1, 9, 20):
    jax.tree.map(
      np.testing.assert_array_equal, take(texts(), first, 23), whole[first:]
    )
  other = take(texts(seed=9), 0, 23)
  assert [b['id'].tolist() for b in other] != [b['id'].tolist() for b in whole]


def test_each_example_comes_once_an_epoch_in_its_bucket():
  stream = texts()
  # Five short ones in pairs, five long ones alone.
  assert stream.steps_per_epoch == 2.5 + 5
  batches = take(stream, 0, 15)
  for batch in batches:
    size = len(batch['id'])
    assert batch['tokens'].shape == (size, {2: 4, 1: 8}[size])
    for tokens, i in zip(batch['tokens'], batch['id']):
      np.testing.assert_array_equal(tokens[: LENGTHS[i]], 10 * i + 1)
      assert not tokens[LENGTHS[i] :].any()
  ids = np.concatenate([batch['id'] for batch in batches])
  assert np.bincount(ids).tolist() == [2] * 10
  first, second = np.split(ids[LENGTHS[ids] > 4], 2)
  assert sorted(first) == sorted(second)
  assert first.tolist() != second.tolist()  # Shuffled anew.


class Counted:
  """64 examples, and which of them were read."""

  def __init__(self):
    self.read = []

  def __len__(self):
    return 64

  def __getitem__(self, i):
    self.read.append(i)
    return np.full(3, i)


def test_a_process_reads_its_part_of_a_batch_only():
  class Part:
    """The sharding of 16 rows, as the second of four processes sees it."""

    def addressable_devices_indices_map(self, shape):
      assert shape == (16,)
      return {'one': (slice(4, 6),), 'other': (slice(6, 8),)}

  whole, source = Counted(), Counted()
  batch = take(harness.Stream(whole, 16), 0, 1)[0]
  made = harness.Stream(source, 16)._bucket(0, Part())
  (part, about) = made[0]
  np.testing.assert_array_equal(part, batch[4:8])
  assert source.read == batch[4:8, 0].tolist()
  assert about == (16, 4)


def test_a_device_gets_its_part():
  stream = harness.Stream(Counted(), 16)
  mesh = jax.make_mesh((8,), ('examples',), axis_types=(AxisType.Auto,))
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('examples'))
  for sharding in (whole, split):
    placed = next(stream.batches(3, sharding))
    np.testing.assert_array_equal(placed, take(stream, 3, 4)[0])
    assert placed.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'buckets': (4, 7)}, 'the largest 8: one each is needed, at most 7'),
    ({'batch_size': (6, 1)}, 'batches of 6 cannot be made of 5 examples'),
    ({'batch_size': (1, 1, 1)}, 'one for each bucket'),
    ({'pad': None}, 'together'),
    ({'lengths': LENGTHS[:3]}, '10 examples, 3 lengths'),
  ],
)
def test_wrong_arguments(arguments, message):
  with pytest.raises(harness.SettingsError, match=message):
    texts(**arguments)


def test_a_run_compiles_once_a_bucket_and_resumes_with_equal_bits(tmp_path):
  traces = []

  def loss(params, batch):
    traces.append(batch['tokens'].shape)
    picked = params[batch['tokens']] * (batch['tokens'] > 0)
    return jnp.mean((picked - 1) ** 2)

  def train(workdir, stop_when=None, seeds=2, **arguments):
    return harness.train(
      optax.chain(bj.gradient(loss), optax.adam(0.1)),
      harness.Task(
        lambda context: jax.random.uniform(context.key, (100,)),
        stream=texts(**arguments),
      ),
      harness.Training(
        30, chunk=8, seeds=seeds, workdir=workdir, save_seconds=0
      ),
      harness.Measure(stop_when=stop_when),
    )

  whole = train(None)
  assert whole.steps.tolist() == [8, 16, 24, 30]
  assert sorted(set(traces)) == [(1, 8), (2, 4)]
  assert len(traces) == len(set(traces)) * traces.count((1, 8))
  train(tmp_path, lambda history: len(history['loss/loss']) == 2)
  resumed = train(tmp_path)
  np.testing.assert_array_equal(resumed.params, whole.params)
  np.testing.assert_array_equal(
    resumed.history['loss/loss'], whole.history['loss/loss']
  )
  with pytest.raises(harness.OtherRunError, match=r'stream\.seed: 0 -> 1'):
    train(tmp_path, seed=1)
  other = [*TEXTS[:-1], {'tokens': np.full(8, 5, np.int32), 'id': np.int32(9)}]
  ours = texts().description()
  theirs = harness.Stream(other, (2, 1), **BUCKETS).description()
  assert {k for k in ours if ours[k] != theirs[k]} == {'digest'}


def test_batch_sees_what_is_streamed():
  rows = np.arange(40.0).reshape(20, 2).astype(np.float32)

  def batch(context):
    return context.streamed + jax.random.uniform(context.key)

  trained = harness.train(
    optax.chain(bj.gradient(lambda p, b: jnp.sum(p * b)), optax.sgd(1.0)),
    harness.Task(
      lambda context: jnp.zeros(2), batch, stream=harness.Stream(rows, 20)
    ),
    harness.Training(3, chunk=3, seeds=2, workdir=None),
  )
  sums = rows.sum(0)
  noise = -trained.params - 3 * sums
  assert (noise > 0).all() and (noise < 60).all()
  assert noise[0, 0] != noise[1, 0]


def test_draws_have_their_shares_late_and_early():
  drawn = stream_lib.spread([0.25], seed=3)
  for first in (0, 2**40):
    places = drawn(np.arange(first, first + 1_000))
    assert set(places.tolist()) == {0, 1}
    assert abs(np.sum(places == 1) - 750) <= 4
  np.testing.assert_array_equal(
    drawn(np.array([7, 3])), drawn(np.arange(8))[[7, 3]]
  )
