"""Preferences between fragments of trajectories, and their model.

A fragment has a fixed number of steps of one environment. Steps after a
termination are masked. Fragments with a truncation are not used.
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
    actions: integers (..., steps).
    mask: which steps count, bool (..., steps); none for an empty fragment.
    returns: sums of the true rewards, (...,).
  """

  observations: chex.Array
  actions: chex.Array
  mask: chex.Array
  returns: chex.Array


class Pairs(NamedTuple):
  """Pairs of fragments with labels.

  Attributes:
    first: first fragments.
    second: second fragments.
    labels: 1 if the second one is preferred, 0 if the first one is, 0.5 for
      neither; float32.
  """

  first: Fragments
  second: Fragments
  labels: chex.Array


class Buffer(NamedTuple):
  """Ring buffer of the last pairs.

  Attributes:
    pairs: (capacity, ...).
    count: number of pairs so far, int32.
  """

  pairs: Pairs
  count: chex.Array


def cut(
  rollout: bj.rl.Rollout, length: int
) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Cuts a rollout into all its fragments.

  Args:
    rollout: (steps, environments).
    length: of a fragment.

  Returns:
    Valid starts, bool (starts, environments); steps that count, bool (starts,
    length, environments); and sums of their rewards, (starts, environments).
  """
  starts = len(rollout.rewards) - length + 1
  at = jnp.arange(starts)[:, None] + jnp.arange(length)
  ends = rollout.terminated[at].astype(jnp.int32)
  mask = jnp.cumsum(ends, axis=1) - ends == 0
  cuts = rollout.truncated & ~rollout.terminated
  valid = ~jnp.any(cuts[at] & mask, axis=1)
  sums = jnp.sum(jnp.where(mask, rollout.rewards[at], 0), axis=1)
  return valid, mask, sums.astype(jnp.float32)


def draw(
  key: chex.PRNGKey,
  rollout: bj.rl.Rollout,
  shape: tuple[int, ...],
  length: int,
  dtype: Any = None,
) -> Fragments:
  """Draws fragments of a rollout uniformly.

  Args:
    key: of the draw.
    rollout: (steps, environments), with the true rewards.
    shape: leading axes of the result.
    length: of a fragment.
    dtype: of the observations; None for that of the rollout.

  Returns:
    `Fragments`, empty if the rollout has no valid ones.
  """
  valid, mask, sums = cut(rollout, length)
  logits = jnp.where(valid, 0.0, -jnp.inf).ravel()
  nonempty = valid.any()
  logits = jnp.where(nonempty, logits, 0.0)
  index = jax.random.categorical(key, logits, shape=shape)
  start, env = jnp.unravel_index(index, valid.shape)
  at = start[..., None] + jnp.arange(length), env[..., None]
  observations = rollout.observations[at]
  return Fragments(
    observations if dtype is None else observations.astype(dtype),
    rollout.actions[at],
    mask[start, :, env] & nonempty,
    jnp.where(nonempty, sums[start, env], 0.0),
  )


def as_sides(pair: Fragments) -> tuple[Fragments, Fragments]:
  """Splits fragments (pairs, 2, ...) into first and second ones."""
  first, second = (jax.tree.map(lambda x, i=i: x[:, i], pair) for i in (0, 1))
  return first, second


def label(
  key: chex.PRNGKey,
  pair: Fragments,
  temperature: chex.Numeric,
  *,
  half_ties: bool = False,
) -> Pairs:
  r"""Labels pairs by a Boltzmann model of preferences.

  .. math::
    P(\text{second preferred}) = \sigma((R_2 - R_1) / \text{temperature})

  Args:
    key: of the labels.
    pair: fragments (pairs, 2, ...).
    temperature: in units of reward; infinite for random labels.
    half_ties: whether pairs with equal returns have the label 0.5.

  Returns:
    `Pairs`.
  """
  first, second = as_sides(pair)
  chance = jax.nn.sigmoid((second.returns - first.returns) / temperature)
  labels = jax.random.bernoulli(key, chance).astype(jnp.float32)
  if half_ties:
    labels = jnp.where(second.returns == first.returns, 0.5, labels)
  return Pairs(first, second, labels)


def untied(pairs: Pairs) -> chex.Array:
  """Which pairs have unequal true returns, bool (pairs,)."""
  return pairs.first.returns != pairs.second.returns


def count_informative(pairs: Pairs) -> chex.Array:
  """Counts what the labels of pairs can teach.

  Args:
    pairs: (pairs, ...), with true returns.

  Returns:
    Numbers of pairs, of untied ones, and of untied ones that a reward of 1 per
    step orders and that are labelled like the true returns; int32 (4,).
  """
  ahead = pairs.second.returns - pairs.first.returns
  longer = pairs.second.mask.sum(-1) - pairs.first.mask.sum(-1)
  kinds = (ahead != 0, longer * ahead > 0, (pairs.labels - 0.5) * ahead > 0)
  counts = [
    jnp.int32(len(ahead)),
    *(jnp.sum(x, dtype=jnp.int32) for x in kinds),
  ]
  return jnp.stack(counts)


def model_rewards(
  reward: Callable[[Any, Any], chex.Array],
  weights: Any,
  observations: chex.Array,
  actions: chex.Array,
) -> chex.Array:
  """Rewards by a model for observations and actions.

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
  rewards = jax.vmap(reward, (None, 0))(weights, flat)
  chosen = jnp.take_along_axis(rewards, actions.reshape(-1, 1), axis=1)
  return chosen.reshape(lead)


def margins(reward: Any, weights: Any, pairs: Pairs) -> chex.Array:
  """Model rewards of second fragments less those of first ones, (...,)."""

  def total(one):
    rewards = model_rewards(reward, weights, one.observations, one.actions)
    return jnp.sum(jnp.where(one.mask, rewards, 0), axis=-1)

  return total(pairs.second) - total(pairs.first)


def bradley_terry(margin: chex.Array, labels: chex.Array) -> chex.Array:
  r"""Cross-entropy of labels, per pair.

  .. math::
    - \mu \log \sigma(m) - (1 - \mu) \log \sigma(- m)

  Args:
    margin: m, the reward of the second fragment less that of the first.
    labels: :math:`\mu`, the fraction of votes for the second.

  Returns:
    Losses, of the shape of the labels.
  """
  return optax.losses.sigmoid_binary_cross_entropy(margin, labels)


def accuracy(reward: Any, weights: Any, held_out: Buffer) -> chex.Array:
  """Fraction of pairs that a model orders like the true rewards.

  Args:
    reward: as in `model_rewards`.
    weights: of the model.
    held_out: pairs without ties.

  Returns:
    A fraction; NaN without pairs. Equal model rewards count as wrong.
  """
  pairs = held_out.pairs
  true = pairs.second.returns - pairs.first.returns
  right = margins(reward, weights, pairs) * true > 0
  known = jnp.arange(len(true)) < held_out.count
  count = jnp.sum(known)
  return jnp.where(
    count > 0, jnp.sum(right & known) / jnp.maximum(count, 1), jnp.nan
  )


def empty(
  capacity: int, length: int, shape: tuple[int, ...], dtype: Any
) -> Buffer:
  """Makes an empty buffer.

  Args:
    capacity: maximum number of pairs.
    length: of a fragment.
    shape: of an observation.
    dtype: of the observations.

  Returns:
    A `Buffer`.
  """

  def fragments():  # Separate arrays, so that they can be donated.
    return Fragments(
      jnp.zeros((capacity, length, *shape), dtype),
      jnp.zeros((capacity, length), jnp.int32),
      jnp.zeros((capacity, length), bool),
      jnp.zeros(capacity, jnp.float32),
    )

  labels = jnp.zeros(capacity, jnp.float32)
  return Buffer(Pairs(fragments(), fragments(), labels), jnp.int32(0))


def push(buffer: Buffer, pairs: Pairs, keep: Any = None) -> Buffer:
  """Adds pairs, which replace the oldest ones.

  Args:
    buffer: whose capacity is at least the number of pairs.
    pairs: (pairs, ...).
    keep: which pairs are added, bool (pairs,); None for all.

  Returns:
    The new `Buffer`.
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
  """Draws pairs from a buffer, with replacement."""
  capacity = len(buffer.pairs.labels)
  known = jnp.clip(buffer.count, 1, capacity)
  index = jax.random.randint(key, shape, 0, known)
  return jax.tree.map(lambda ring: ring[index], buffer.pairs)
