"""Preferences between fragments of trajectories: drawn, labelled, modelled.

A fragment is so many steps of one environment. Where an episode terminates
within it, the steps after that are masked. None holds a step at which a time
limit cut the episode: what follows there is another episode, and the cut says
nothing about what came before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


class Fragments(NamedTuple):
  """Fragments; leaves have leading axes of fragments.

  Attributes:
    observations: (..., steps, *shape).
    actions: (..., steps), whole numbers.
    mask: which steps count, bool (..., steps): none where there was no fragment
      without a time limit in it.
    returns: sums of the true rewards over them, (...,).
  """

  observations: chex.Array
  actions: chex.Array
  mask: chex.Array
  returns: chex.Array


class Pairs(NamedTuple):
  """Pairs of fragments with labels.

  Attributes:
    first: fragments.
    second: likewise.
    labels: 1 where the second is preferred, 0 where the first is, 0.5 where
      neither; float32.
  """

  first: Fragments
  second: Fragments
  labels: chex.Array


class Buffer(NamedTuple):
  """The last pairs, in a ring.

  Attributes:
    pairs: (capacity, ...).
    count: pairs so far, int32.
  """

  pairs: Pairs
  count: chex.Array


def cut(
  rollout: bj.rl.Rollout, length: int
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """What each fragment of a rollout would hold.

  Args:
    rollout: (steps, environments).
    length: of a fragment.

  Returns:
    Whether a fragment may begin there, bool (starts, environments); which of
    its steps count, bool (starts, length, environments); and the sums of their
    rewards, (starts, environments).
  """
  starts = len(rollout.rewards) - length + 1
  at = jnp.arange(starts)[:, None] + jnp.arange(length)
  ends = rollout.terminated[at].astype(jnp.int32)
  mask = jnp.cumsum(ends, axis=1) - ends == 0
  cuts = rollout.truncated & ~rollout.terminated
  allowed = ~jnp.any(cuts[at] & mask, axis=1)
  sums = jnp.sum(jnp.where(mask, rollout.rewards[at], 0), axis=1)
  return allowed, mask, sums.astype(jnp.float32)


def draw(
  key: chex.PRNGKey,
  rollout: bj.rl.Rollout,
  shape: tuple[int, ...],
  length: int,
  dtype: Any = None,
) -> Fragments:
  """Draws fragments of a rollout, each that may be as likely as any other.

  Args:
    key: of the draw.
    rollout: (steps, environments), with the true rewards.
    shape: leading axes of what is drawn.
    length: of a fragment.
    dtype: that observations are kept in.

  Returns:
    `Fragments`.
  """
  allowed, mask, sums = cut(rollout, length)
  logits = jnp.where(allowed, 0.0, -jnp.inf).ravel()
  some = allowed.any()
  index = jax.random.categorical(key, jnp.where(some, logits, 0.0), shape=shape)
  start, one = jnp.unravel_index(index, allowed.shape)
  at, of = start[..., None] + jnp.arange(length), one[..., None]
  observations = rollout.observations[at, of]
  return Fragments(
    observations if dtype is None else observations.astype(dtype),
    rollout.actions[at, of],
    mask[start, :, one] & some,
    jnp.where(some, sums[start, one], 0.0),
  )


def label(
  key: chex.PRNGKey, pair: Fragments, temperature: chex.Numeric
) -> Pairs:
  r"""Labels pairs as a person would who is noisily rational.

  .. math::
    P(\text{second preferred}) = \sigma((R_2 - R_1) / \text{temperature})

  Args:
    key: of the labels.
    pair: fragments (pairs, 2, ...).
    temperature: in units of reward; infinite for labels without sense.

  Returns:
    `Pairs`.
  """
  first, second = (jax.tree.map(lambda x, i=i: x[:, i], pair) for i in (0, 1))
  chance = jax.nn.sigmoid((second.returns - first.returns) / temperature)
  labels = jax.random.bernoulli(key, chance)
  return Pairs(first, second, labels.astype(jnp.float32))


def untied(pairs: Pairs) -> chex.Array:
  """Which pairs have unequal true returns, bool (pairs,)."""
  return pairs.first.returns != pairs.second.returns


def rewards_of(
  reward: Callable[[Any, Any], chex.Array],
  weights: Any,
  observations: chex.Array,
  actions: chex.Array,
) -> chex.Array:
  """A model's rewards of observations and actions, both with leading axes.

  Args:
    reward: (weights, observation) -> a reward for each action.
    weights: of the model.
    observations: (..., *shape).
    actions: (...,).

  Returns:
    Rewards (...,).
  """
  lead = actions.shape
  flat = observations.reshape(-1, *observations.shape[len(lead) :])
  found = jax.vmap(reward, (None, 0))(weights, flat)
  one = jnp.take_along_axis(found, actions.reshape(-1, 1), axis=1)
  return one.reshape(lead)


def margins(reward: Any, weights: Any, pairs: Pairs) -> chex.Array:
  """How much more reward a model gives the second fragments, (...,)."""

  def total(one):
    found = rewards_of(reward, weights, one.observations, one.actions)
    return jnp.sum(jnp.where(one.mask, found, 0), axis=-1)

  return total(pairs.second) - total(pairs.first)


def bradley_terry(margin: chex.Array, labels: chex.Array) -> chex.Array:
  r"""The cross-entropy of labels, of each pair.

  .. math::
    - \mu \log \sigma(m) - (1 - \mu) \log \sigma(- m)

  Args:
    margin: m, by which the second is ahead.
    labels: :math:`\mu`, the share of votes for the second.

  Returns:
    Losses, of the shape of the labels.
  """
  return optax.losses.sigmoid_binary_cross_entropy(margin, labels)


def accuracy(reward: Any, weights: Any, held: Buffer) -> chex.Array:
  """The share of pairs that a model orders as the true rewards do.

  Args:
    reward: as in `rewards_of`.
    weights: of the model.
    held: pairs without ties.

  Returns:
    A share; NaN of no pairs. Equal rewards count as wrong.
  """
  pairs = held.pairs
  true = pairs.second.returns - pairs.first.returns
  right = margins(reward, weights, pairs) * true > 0
  known = jnp.arange(len(true)) < held.count
  count = jnp.sum(known)
  return jnp.where(
    count > 0, jnp.sum(right & known) / jnp.maximum(count, 1), jnp.nan
  )


def empty(
  capacity: int, length: int, shape: tuple[int, ...], dtype: Any
) -> Buffer:
  """A buffer without pairs.

  Args:
    capacity: how many pairs it holds.
    length: of a fragment.
    shape: of an observation.
    dtype: of what is kept of it.

  Returns:
    A `Buffer`.
  """

  def fragments():  # Each an array of its own, that may be donated.
    return Fragments(
      jnp.zeros((capacity, length, *shape), dtype),
      jnp.zeros((capacity, length), jnp.int32),
      jnp.zeros((capacity, length), bool),
      jnp.zeros(capacity, jnp.float32),
    )

  labels = jnp.zeros(capacity, jnp.float32)
  return Buffer(Pairs(fragments(), fragments(), labels), jnp.int32(0))


def push(buffer: Buffer, pairs: Pairs, keep: Any = None) -> Buffer:
  """Adds pairs in place of the oldest, all or those that are to be kept.

  Args:
    buffer: with room for as many.
    pairs: (pairs, ...).
    keep: bool (pairs,), or None for all.

  Returns:
    A new `Buffer`.
  """
  capacity = len(buffer.pairs.labels)
  if keep is None:
    keep = jnp.ones(len(pairs.labels), bool)
  place = jnp.cumsum(keep, dtype=jnp.int32)
  slot = jnp.where(keep, (buffer.count + place - 1) % capacity, capacity)
  put = lambda ring, new: ring.at[slot].set(new.astype(ring.dtype), mode='drop')
  return Buffer(
    jax.tree.map(put, buffer.pairs, pairs), buffer.count + place[-1]
  )


def sample(key: chex.PRNGKey, buffer: Buffer, shape: tuple[int, ...]) -> Pairs:
  """Draws pairs of a buffer, with replacement."""
  capacity = len(buffer.pairs.labels)
  known = jnp.clip(buffer.count, 1, capacity)
  index = jax.random.randint(key, shape, 0, known)
  return jax.tree.map(lambda ring: ring[index], buffer.pairs)
