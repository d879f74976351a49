"""Tests of where data goes, on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bilevel_jax as bj
from experiments import harness
from experiments.harness import placement

LARGE = np.ones((16, 2**16), np.float32)
SMALL = np.ones((16, 2), np.float32)
ODD = np.ones((9, 2**17), np.float32)
DATA = {'large': LARGE, 'odd': ODD, 'small': SMALL, 'pair': (LARGE, LARGE)}


def parts(tree):
  """How many devices hold different parts of each leaf."""
  distinct = lambda x: {str(s.index) for s in x.addressable_shards}
  return jax.tree.map(lambda x: len(distinct(x)), tree)


def test_by_itself_what_is_large_and_divisible():
  placed, where = placement.place(DATA)
  assert parts(placed) == {'large': 8, 'odd': 1, 'small': 1, 'pair': (8, 8)}
  assert len(where.everywhere.device_set) == 8
  jax.tree.map(np.testing.assert_array_equal, placed, DATA)


def test_a_prefix_says_what_to_split():
  shard = {'large': False, 'odd': None, 'small': True, 'pair': False}
  placed, _ = placement.place(DATA, shard)
  assert parts(placed) == {'large': 1, 'odd': 1, 'small': 8, 'pair': (1, 1)}


@pytest.mark.parametrize('data', [(), SMALL, {'odd': ODD}, jnp.float32(3)])
def test_nothing_to_split_stays_on_one_device(data):
  placed, where = placement.place(data)
  assert where == placement.Placement()
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(placed))
  assert placement.place(LARGE, False)[1] == placement.Placement()


def test_what_the_caller_placed_stays():
  mesh = jax.make_mesh((2,), ('mine',), devices=jax.devices()[:2])
  mine = jax.device_put(SMALL, NamedSharding(mesh, PartitionSpec('mine')))
  placed, where = placement.place({'mine': mine, 'large': LARGE})
  assert where == placement.Placement()
  assert placed['mine'].sharding == mine.sharding


def test_what_cannot_be_split_is_named():
  with pytest.raises(
    ValueError, match=r"data\['odd'\] .* 8 devices, .*\(9, 131072\)"
  ):
    placement.place({'odd': ODD}, True)
  with pytest.raises(ValueError, match='leading axis'):
    placement.place(jnp.float32(1), True)


def test_a_run_equals_that_of_one_device_and_its_result_is_ordinary(tmp_path):
  rows = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
  traces = []

  def loss(params, batch):
    traces.append(())
    return jnp.mean((batch @ params - 1) ** 2)

  def train(shard, workdir=None, stop_when=None):
    return harness.train(
      optax.chain(bj.gradient(loss), optax.adam(0.1)),
      lambda context: jax.random.uniform(context.key, (5,)),
      lambda context: context.data,
      steps=20,
      chunk=5,
      seeds=2,
      data=rows,
      shard=shard,
      workdir=workdir,
      stop_when=stop_when,
      select='loss/loss',
    )

  one = train(False)
  once = len(traces)
  eight = train(True)
  assert len(traces) == 2 * once  # Four chunks, one compilation.
  np.testing.assert_allclose(eight.params, one.params, 1e-5, 1e-6)
  np.testing.assert_array_equal(eight.best.step, one.best.step)
  for leaf in jax.tree.leaves((eight.params, eight.state, eight.best)):
    assert len(leaf.sharding.device_set) == 1

  train(True, tmp_path, lambda history: True)
  np.testing.assert_array_equal(train(True, tmp_path).params, eight.params)
