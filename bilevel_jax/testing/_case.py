"""A row, built and run once: what all promises are about."""

import functools

import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, evaluation
from bilevel_jax.testing import _compare, _problem

STEPS = 3


def same(oracle):
  return oracle


def mean_over_data(oracle):
  return evaluation.mean_over(oracle, 'data')


def build(row, wrap=same, **hyper):
  return row.make(wrap, **(dict(row.hyper) | hyper))


def step_of(solver, **extra_args):
  def step(params, state, batch):
    updates, state = solver.update(batch, state, params, **extra_args)
    return _sequences.apply_updates(params, updates), state

  return step


@functools.cache
def batch_of(step):
  return _problem.random_batch(step)


def stacked(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def shares_no_buffer(case):
  """Before the step below takes them."""
  params, state = case.begin()
  places: dict[int, str] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
    name = jax.tree_util.keystr(path)
    _compare.require(
      isinstance(leaf, jax.Array),
      f'{name} is {type(leaf).__name__} {leaf}, no array: make it one of a '
      'dtype, jnp.zeros([], jnp.int32) for instance.',
    )
    if _compare.is_key(leaf) or not leaf.size:
      continue
    where = leaf.unsafe_buffer_pointer()
    _compare.require(
      where not in places,
      f'{places.get(where)} and {name} are one buffer, so that neither can be '
      'donated: copy it in init, jnp.array(x, copy=True).',
    )
    places[where] = name


class Case:
  """A row with its compiled step and a run of it."""

  def __init__(self, row, restore=None, others=None):
    """Compiles the step and makes three updates.

    Args:
      row: of the method.
      restore: from a state and one like it to the state from a checkpoint.
      others: further rows by name, for `same_as`.
    """
    self.row, self.restore, self.others = row, restore, others or {}
    self.halved = {}  # Second updates, with half of each number.
    self.solver = build(row)
    shares_no_buffer(self)
    # Extra arguments, which only methods that name them may know.
    extra = {'never_heard_of': jnp.ones(3), 'names': 'any'}
    step = step_of(self.solver, **extra)
    self.step = jax.jit(step, donate_argnums=(0, 1))
    now = self.begin()
    self.start, self.types = _compare.data(now), _compare.types_of(now)
    self.points = []
    for t in range(STEPS):
      now = self.step(*now, batch_of(t))
      self.points.append(_compare.data(jax.block_until_ready(now)))
    self.end = now

  def begin(self, seed=0):
    """Parameters and state of their own buffers: the step takes them."""
    params = self.row.params(seed)
    return params, self.solver.init(params)

  def run(self, step, start, last):
    """Updates of another step than the one here, as numpy arrays."""
    now, points = start, []
    for t in range(last):
      now = jax.block_until_ready(step(*now, batch_of(t)))
      points.append(_compare.data(now))
    return points

  def make(self, wrap=same, **hyper):
    """Another build of the row, its step, and its start."""
    solver = build(self.row, wrap, **hyper)
    params = self.row.params(0)
    return step_of(solver), (params, solver.init(params))
