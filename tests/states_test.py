"""Changes to states: what an evaluation that ends no update leaves."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


@bj.states.counts_updates
class RampState(NamedTuple):
  count: Any


def ramp(gradients, state, params=None, **extra_args):
  """A user's link: gradients times the number of updates so far."""
  del params, extra_args
  scaled = jax.tree.map(lambda g: g * (1 + state.count), gradients)
  return scaled, RampState(state.count + 1)


RAMP = optax.GradientTransformationExtraArgs(
  lambda params: RampState(jnp.int32(0)), ramp
)


@pytest.mark.parametrize('parts', [1, 4])
def test_a_marked_count_is_of_updates_in_inner_steps_and_micro_batches(parts):
  oracle = bj.gradient(lambda p, batch: p.z * batch.mean(), of='z')
  oracle = bj.oracles.aggregated(oracle, RAMP)
  record = bj.Sequence(optax.chain(optax.sgd(1.0), RAMP), steps=3)
  solver = bj.evaluation.wrapped(
    bj.descend(oracle, z=record),
    lambda oracle: bj.evaluation.accumulate(oracle, parts),
  )
  params = bj.sequences(z=jnp.float32(0.0))
  state, moved = solver.init(params), []
  for _ in range(3):
    updates, state = solver.update(jnp.ones(4), state, params)
    moved.append(updates.z)
  # Three steps an update; the oracle's and the optimiser's count are alike.
  np.testing.assert_array_equal(moved, [-3.0, -12.0, -27.0])


def test_only_counts_of_updates_are_held():
  adam = optax.adam(optax.constant_schedule(0.1))
  before = adam.init(jnp.zeros(2))
  _, after = adam.update(jnp.ones(2), before)
  held = bj.states.hold_updates(after, before)
  assert [s.count for s in after[:2]] == [1, 1]
  assert [s.count for s in held[:2]] == [1, 0]
  assert [s.count for s in bj.states.next_update(held)[:2]] == [1, 1]
  assert [s.count for s in bj.states.at_update(held, 7)[:2]] == [1, 7]
  chex.assert_trees_all_equal(held[0].mu, after[0].mu)


def test_counts_within_marked_states_are_held():
  """A schedule for a rate that is itself one of `inject_hyperparams`."""
  decayed = lambda rate: optax.chain(
    optax.scale_by_schedule(lambda count: rate / (1 + count)), RAMP
  )
  link = optax.inject_hyperparams(decayed)(rate=lambda count: 1.0 + count)
  before = link.init(jnp.zeros(2))
  _, after = link.update(jnp.ones(2), before)
  counts = lambda state: [
    int(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if 'count' in jax.tree_util.keystr(path)
  ]
  held = bj.states.hold_updates(after, before)
  assert len(counts(before)) == 4
  assert set(counts(after)) == {1} and set(counts(held)) == {0}


def test_losses_are_taken_out_put_back_and_left_alone():
  oracle = bj.gradient(lambda z, batch: z * batch, name='pull')
  first = oracle.init(jnp.float32(2.0))
  _, then = oracle.update(jnp.float32(3.0), first, jnp.float32(2.0))
  assert bj.values(bj.states.hold_measured(then, first)) == {'pull': 0.0}
  (seen,) = bj.states.measured(then)
  replaced = bj.states.replace_measured(first, [seen])
  assert bj.values(replaced) == {'pull': 6.0}
  # A second evaluation from the first state is counted, its losses are not.
  both = bj.states.also_spent(then, first, then)
  assert bj.counts(both) == {'gradients/pull': 2}
  bare = bj.states.drop_numbers(then)
  assert not jax.tree.leaves(bare)
  zeros = bj.states.fill_numbers(bare, jax.eval_shape(lambda: then))
  assert bj.counts(zeros) == {'gradients/pull': 0}


def test_what_an_oracle_keeps_is_mapped_and_its_counts_are_not():
  problem = bj.BilevelProblem(
    lambda x, y, batch: y**2, lambda x, y, batch: (y - x) ** 2
  )
  oracle = bj.implicit(problem)
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(1.0))
  _, state = oracle.update(None, oracle.init(params), params)
  mapped = bj.states.map_inner(
    lambda inner: jax.tree.map(jnp.zeros_like, inner), state
  )
  assert state.inner.linear != 0 and mapped.inner.linear == 0
  chex.assert_trees_all_equal(mapped.counts, state.counts)
