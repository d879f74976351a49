"""One of several streams a step: shares, places, resumption."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness


def streams(weights=(0.7, 0.3), seed=3):
  """Whole numbers; those of the second stream are negative."""
  return harness.OneOf(
    {
      'up': harness.Stream([np.float32(i) for i in range(12)], 2),
      'down': harness.Stream([-np.float32(i) for i in range(1, 7)], 3),
    },
    weights,
    seed=seed,
  )


def test_only_the_stream_that_is_drawn_moves_on():
  made = [dict(b) for b in itertools.islice(streams().batches(0), 20)]
  names = [name for (name,) in made]
  assert abs(names.count('down') - 6) <= 1
  for name, size, epoch in (('up', 2, 12), ('down', 3, 6)):
    seen = np.concatenate([b[name] for b in made if name in b])
    assert all(b[name].shape == (size,) for b in made if name in b)
    # The first epoch is complete and without repetition.
    assert len(set(seen[:epoch].tolist())) == epoch
  for first in (1, 7, 19):
    (later,) = itertools.islice(streams().batches(first), 1)
    assert list(later) == [names[first]]
    np.testing.assert_array_equal(
      later[names[first]], made[first][names[first]]
    )
  far = streams(weights=(1.0, 3.0)).drawn(2**40, 1_000)
  assert abs(np.sum(far == 1) - 750) <= 4
  assert streams().batch_sizes == (2, 3)
  assert streams().description() != streams(seed=4).description()
  read = harness.Stream([np.float32(1.0)], 1, files=['a', 'b'])
  held = harness.Stream([np.float32(1.0)], 1)
  assert harness.OneOf({'x': read, 'y': held}, (1, 1)).files == ('a', 'b')


def test_a_run_of_two_objectives_goes_on_as_if_it_had_not_ended(tmp_path):
  loss = lambda x, batch: jnp.mean((x - batch) ** 2)
  given = {n: bj.gradient(loss, name=n) for n in ('up', 'down')}
  oracle = bj.evaluation.select(given, bj.evaluation.as_given())
  solver = optax.chain(oracle, optax.sgd(0.05))

  def run(folder, steps):
    return harness.train(
      solver,
      lambda context: jnp.float32(0.0),
      stream=streams(),
      steps=steps,
      chunk=5,
      seeds=2,
      workdir=folder,
    )

  run(tmp_path / 'a', 10)
  once, twice = run(tmp_path / 'b', 20), run(tmp_path / 'a', 20)
  np.testing.assert_array_equal(once.params, twice.params)
  counts = [once.history[f'count/gradients/{n}'][-1, 0] for n in given]
  assert sum(counts) == 20 and min(counts) >= 5


def test_wrong_weights():
  for weights in ((1.0,), (0.0, 1.0), (np.nan, 1.0)):
    with pytest.raises(harness.SettingsError, match='2 streams take one'):
      streams(weights)


def test_batches_of_one_shape_and_several_structures_have_their_programs():
  """The sum of what was added is that of either kind, told by its name."""
  one = lambda: harness.Stream([np.float32(1.0)] * 4, 2)
  stream = harness.OneOf({'more': one(), 'less': one()}, (0.5, 0.5))

  def update(batch, state, params=None):
    ((name, found),) = batch.items()
    step = jnp.sum(found) * (1.0 if name == 'more' else -10.0)
    return jnp.where(params < jnp.inf, step, 0.0), state

  trained = harness.train(
    optax.GradientTransformation(lambda params: (), update),
    lambda context: jnp.float32(0.0),
    stream=stream,
    steps=6,
    chunk=6,
    seeds=1,
    workdir=None,
  )
  less = int(np.sum(stream.drawn(0, 6) == 1))
  assert 0 < less < 6
  assert float(trained.params[0]) == 2 * (6 - less) - 20 * less
