"""A row of the contract, built, compiled and run once for all promises."""

import functools

import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, evaluation
from bilevel_jax.testing import _compare, _problem

STEPS = 3


def identity(oracle):
  return oracle


def mean_over_data(oracle):
  return evaluation.mean_over(oracle, 'data')


def build(row, wrap=identity, **hyper):
  return row.make(wrap, **(dict(row.hyper) | hyper))


def make_step(solver, **extra_args):
  def step(params, state, batch):
    updates, state = solver.update(batch, state, params, **extra_args)
    return _sequences.apply_updates(params, updates), state

  return step


@functools.cache
def cached_batch(step):
  return _problem.random_batch(step)


def stacked(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def require_own_buffers(case):
  """Raises Broken if a leaf is no array or two leaves share a buffer."""
  params, state = case.begin()
  places: dict[int, str] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
    name = jax.tree_util.keystr(path)
    _compare.require(
      isinstance(leaf, jax.Array),
      f'{name} is {type(leaf).__name__} {leaf}, not an array: make it an array '
      'with a dtype, jnp.zeros([], jnp.int32) for instance.',
    )
    if _compare.is_key(leaf) or not leaf.size:
      continue
    where = leaf.unsafe_buffer_pointer()
    _compare.require(
      where not in places,
      f'{places.get(where)} and {name} share a buffer, so neither can be '
      'donated: copy it in init by jnp.array(x, copy=True).',
    )
    places[where] = name


class Case:
  """A row with its compiled step and the points of a short run."""

  def __init__(self, row, restore=None, others=None):
    """Compiles the step and makes three updates.

    Args:
      row: the method's row.
      restore: maps (state, a state of the same structure) to the state that a
        checkpoint restores.
      others: further rows by name, for `same_as`.
    """
    self.row, self.restore, self.others = row, restore, others or {}
    self.halved = {}  # Second updates with one hyperparameter halved, by name.
    self.solver = build(row)
    require_own_buffers(self)
    # Every method must accept extra arguments that it does not know.
    extra = {'unknown_argument': jnp.ones(3), 'names': 'any'}
    step = make_step(self.solver, **extra)
    self.step = jax.jit(step, donate_argnums=(0, 1))
    now = self.begin()
    self.start, self.types = _compare.data(now), _compare.leaf_types(now)
    self.points = []
    for t in range(STEPS):
      now = self.step(*now, cached_batch(t))
      self.points.append(_compare.data(jax.block_until_ready(now)))
    self.end = now

  def begin(self, seed=0):
    """New parameters and state, since the step donates their buffers."""
    params = self.row.params(seed)
    return params, self.solver.init(params)

  def run(self, step, start, last):
    """Runs another step for `last` updates; returns its points as NumPy."""
    now, points = start, []
    for t in range(last):
      now = jax.block_until_ready(step(*now, cached_batch(t)))
      points.append(_compare.data(now))
    return points

  def make(self, wrap=identity, **hyper):
    """Builds the row again; returns its step and (params, state)."""
    solver = build(self.row, wrap, **hyper)
    params = self.row.params(0)
    return make_step(solver), (params, solver.init(params))
