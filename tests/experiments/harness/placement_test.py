"""Tests of where data goes, on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import checkpoints
from experiments.harness.train import placement

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
      harness.Task(
        lambda context: jax.random.uniform(context.key, (5,)),
        lambda context: context.data,
        data=rows,
        shard=shard,
      ),
      harness.Training(20, chunk=5, seeds=2, workdir=workdir),
      harness.Measure(select='loss/loss', stop_when=stop_when),
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


def rules(tree):
  """Each matrix: rows over fsdp, columns over tp; the rest is whole."""
  spec = lambda x: PartitionSpec(*('fsdp', 'tp')[: x.ndim - 1 and x.ndim])
  return jax.tree.map(spec, tree)


def layout_of(fsdp, tp, **more):
  mesh = jax.make_mesh((fsdp, tp), ('fsdp', 'tp'))
  return harness.Layout(mesh, rules, **more)


def train_layout(layout, workdir=None, stop_when=None, seeds=2):
  rows = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

  def loss(params, batch):
    frozen, rows = batch
    hidden = jnp.tanh(rows @ frozen) @ params.lower['w'] + params.lower['b']
    return jnp.mean((hidden - params.upper['w']) ** 2)

  def init(context):
    key = jax.random.split(context.key)
    return bj.BilevelParams(
      upper={'w': jnp.ones(4)},
      lower={'w': jax.random.uniform(key[0], (8, 4)), 'b': jnp.zeros(4)},
    )

  return harness.train(
    optax.chain(bj.gradient(loss), optax.adam(0.1)),
    harness.Task(
      init,
      lambda context: (context.frozen, context.streamed),
      frozen=np.eye(8, dtype=np.float32),
      stream=harness.Stream(rows, 8),
    ),
    harness.Training(
      steps=20,
      chunk=5,
      seeds=seeds,
      workdir=workdir,
      layout=layout,
      save_seconds=0,
    ),
    harness.Measure(select='loss/loss', stop_when=stop_when),
  )


@pytest.mark.slow
def test_params_go_over_a_mesh_and_on_over_another(tmp_path):
  one = train_layout(layout_of(1, 1))
  whole = train_layout(layout_of(4, 2))
  # The optimiser keeps its moments as the params lie, and best does.
  adam = whole.state[1][0]
  for tree in (whole.params, whole.best.params, adam.mu, adam.nu):
    assert parts(tree.lower) == {'w': 8, 'b': 1}
    assert parts(tree.upper) == {'w': 1}
  close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6)
  jax.tree.map(close, whole.params, one.params)

  first = lambda history: len(history['loss/loss']) == 2
  train_layout(layout_of(4, 2), tmp_path / 'same', first)
  same = train_layout(layout_of(4, 2), tmp_path / 'same')
  jax.tree.map(np.testing.assert_array_equal, same.params, whole.params)
  train_layout(layout_of(4, 2), tmp_path / 'other', first)
  other = train_layout(layout_of(2, 2, examples=('fsdp',)), tmp_path / 'other')
  assert parts(other.params.lower) == {'w': 4, 'b': 1}
  jax.tree.map(close, other.params, whole.params)


def test_frozen_weights_are_not_split_as_examples():
  """Large and divisible: as data they would be."""
  data, where = placement.place(LARGE)
  assert (parts(data), parts(where.frozen(LARGE))) == (8, 1)
  _, where = placement.place((), layout=layout_of(4, 2))
  assert parts(where.frozen({'w': LARGE, 'b': LARGE[0]})) == {'w': 8, 'b': 1}


def test_what_is_restored_can_be_donated(tmp_path):
  """Each part has a buffer of its own: jax shares those of numpy."""
  _, where = placement.place((), layout=layout_of(8, 1))
  split = NamedSharding(where.everywhere.mesh, PartitionSpec('fsdp'))
  saved = checkpoints.Checkpoints(tmp_path)
  tree = {'split': jnp.arange(2.0**15), 'whole': jnp.arange(2.0**15)}
  saved.save(1, tree, {})
  saved.wait()
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    for (name, x), at in zip(tree.items(), (split, where.everywhere))
  }
  found = saved.restore(like).tree
  saved.close()
  assert parts(found) == {'split': 8, 'whole': 1}
  for name, x in found.items():
    pointers = {s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    assert len(pointers) == 8
    np.testing.assert_array_equal(x, tree[name])
