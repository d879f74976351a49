"""Learning from preferences: draws and labels pairs, and updates the models.

Rollouts come from outside: from a compiled suite, or from games that Python
steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.pbrl import feedback, preferences, queries, rlhf_settings


class Start(NamedTuple):
  """Reward model and pairs before the policy learns.

  Attributes:
    upper: weights of the reward model.
    buffer: labelled pairs.
    held_out: held-out pairs.
    labels: numbers of labels so far, as in `preferences.count_informative`.
  """

  upper: Any
  buffer: preferences.Buffer
  held_out: preferences.Buffer
  labels: chex.Array


# Counts of labels in the metrics.
LABEL_COUNTS = ('labels', 'untied', 'constant_orders', 'right_labels')


class State(NamedTuple):
  """State of a `Learner`.

  Attributes:
    key: of the next draws.
    policies: state of the solver of the policies, with the second one.
    rewards: state of the solver of the reward model.
    buffer: labelled pairs.
    held_out: held-out pairs.
    scale: running mean absolute reward; 0 before the first update.
    metrics: measured values and counts.
  """

  key: chex.PRNGKey
  policies: Any
  rewards: Any
  buffer: preferences.Buffer
  held_out: preferences.Buffer
  scale: chex.Array
  metrics: bj.oracles.OracleState


class Learner:
  """A method without environments.

  Its params are `bj.BilevelParams`: the reward model, and an actor with its
  critic.

  Args:
    method: the method.
    agent: networks of a policy and its value.
    reward: (weights, observation) -> a reward per action.
    settings: resolved.
    rate: step size of the actors' Adam.
    dtype: of stored observations.
    member: reward of one member of an ensemble; None without one.
  """

  def __init__(
    self,
    method: rlhf_settings.Method,
    agent: Any,
    reward: Callable[[Any, Any], chex.Array],
    settings: rlhf_settings.Settings,
    rate: chex.Numeric,
    dtype: Any,
    member: Callable[[Any, Any], chex.Array] | None = None,
  ):
    """Makes the solvers."""
    self._member = member if method.ensemble else None
    self._method, self._reward, self._settings = method, reward, settings
    # With a file of labels there are no new pairs.
    self._pairs = 0 if settings.labels else settings.preferences.pairs
    self._dtype = dtype
    self._policies, self._rewards = feedback.make_solvers(
      method, agent, reward, settings, rate, self._member
    )

  def empty_start(self, upper: Any, shape: tuple[int, ...]) -> Start:
    """Makes a start without pairs, for observations of a shape."""
    pairs = self._settings.preferences
    # The true rewards need no pairs: buffers of size 1 save memory.
    capacities = (1, 1)
    if self._method.learned_reward:
      capacities = (pairs.buffer, pairs.held_out)
    buffer, held_out = (
      preferences.empty(capacity, pairs.fragment, shape, self._dtype)
      for capacity in capacities
    )
    return Start(upper, buffer, held_out, jnp.zeros(4, jnp.int32))

  def init(self, params: bj.BilevelParams, key: Any, start: Start) -> State:
    """Makes the state before the policy learns."""
    names = ('steps/environment', *LABEL_COUNTS)
    counts = jnp.concatenate([jnp.zeros(1, jnp.int32), start.labels])
    values = ('suboptimality', 'reward_scale', 'entropy')
    return State(
      key=key,
      policies=self._policies.init(params),
      rewards=self._rewards.init(params) if self._method.learned_reward else (),
      buffer=start.buffer,
      held_out=start.held_out,
      scale=jnp.zeros([]),
      metrics=bj.oracles.OracleState(
        bj.types.named(values, jnp.zeros(3)),
        bj.types.named(names, counts),
      ),
    )

  def second_policy(self, state: State) -> Any:
    """Actor and critic of the second policy, or None."""
    if not self._method.second_policy:
      return None
    return bj.auxiliaries(state.policies)['value']

  def step(
    self,
    params: bj.BilevelParams,
    state: State,
    rollouts: dict[str, bj.rl.Rollout],
    *,
    reward_epoch: bool,
  ) -> tuple[bj.BilevelParams, State]:
    """Updates the policies on new rollouts, and the reward model if asked.

    Args:
      params: before the update.
      state: before the update.
      rollouts: of the policy, `lower`, and of the second policy, `value`.
      reward_epoch: whether to draw new pairs and update the reward model.
    """
    method, model = self._method, self._settings.reward
    key, *keys = jax.random.split(state.key, 5)
    relabelled = {
      n: self._relabelled(params.upper, r) for n, r in rollouts.items()
    }
    now = jnp.mean(jnp.abs(relabelled['lower'].rewards))
    scale = jnp.where(state.scale > 0, 0.9 * state.scale + 0.1 * now, now)
    unit = feedback.REWARD_SCALE / jnp.maximum(scale, 1e-6)
    scaled = {
      n: r._replace(rewards=unit * r.rewards) for n, r in relabelled.items()
    }
    batch = dict(scaled)
    draws_pairs = reward_epoch and method.learned_reward and self._pairs > 0
    if draws_pairs:
      # The last environments give held-out pairs.
      training, testing = _split(rollouts['lower'])
      new = self._labelled(keys[:2], training, self._pairs, params.upper)
      if method.second_policy:
        margin = preferences.margins(self._reward, params.upper, new)
        batch['costs'] = preferences.bradley_terry(margin, new.labels)
        batch['pairs'] = new
    updates, moved = self._policies.update(batch, state.policies, params)
    params = bj.apply_updates(params, updates)
    state = state._replace(key=key, policies=moved, scale=scale)
    entropies = bj.outputs(moved)
    gap = self._suboptimality(scaled, entropies)
    if reward_epoch and method.learned_reward:
      buffer, held_out = state.buffer, state.held_out
      if draws_pairs:
        buffer = preferences.push(buffer, new)
        held_out = self._add_held_out(held_out, keys[2], testing)
      shape = (model.steps, *self._batch_shape())
      parts = {'pairs': preferences.sample(keys[3], buffer, shape)}
      if method.second_policy:
        parts |= {n: self._in_parts(r) for n, r in relabelled.items()}
        weights, factor = self._settings.weights, jnp.ones([])
        if weights.multiplier:
          factor = unit
        if weights.nonnegative:
          # If the policy is better than the second one, it is the best known
          # policy itself, and its sub-optimality is 0. A negative penalty
          # would lower rewards without bound where no pair restrains them.
          factor = factor * (gap > 0)
        parts['factor'] = jnp.full(model.steps, factor)
      updates, fitted = self._rewards.update(parts, state.rewards, params)
      params = bj.apply_updates(params, updates)
      state = state._replace(buffer=buffer, held_out=held_out, rewards=fitted)
    labels = jnp.zeros(4, jnp.int32)
    if draws_pairs:
      labels = preferences.count_informative(new)
    steps = sum(r.rewards.size for r in rollouts.values())
    values, counts = state.metrics.values, state.metrics.counts
    added = counts.array + jnp.concatenate([jnp.int32(steps)[None], labels])
    measured = jnp.stack([gap, now, entropies['lower']])
    metrics = state.metrics._replace(
      values=bj.types.named(values.names, measured),
      counts=bj.types.named(counts.names, added),
    )
    return params, state._replace(metrics=metrics)

  def add(self, start: Start, key: Any, rollout: bj.rl.Rollout) -> Start:
    """Adds labelled and held-out pairs of the first policy."""
    keys, pairs = jax.random.split(key, 3), self._pairs
    training, testing = _split(rollout)
    held_out = self._add_held_out(start.held_out, keys[2], testing)
    if not pairs:
      return start._replace(held_out=held_out)
    new = self._labelled(keys[:2], training, pairs)
    return start._replace(
      buffer=preferences.push(start.buffer, new),
      held_out=held_out,
      labels=start.labels + preferences.count_informative(new),
    )

  def warm_up(self, start: Start, key: Any) -> Start:
    """Trains the reward model on the pairs at the start."""
    model = self._settings.reward
    adam = optax.adam(model.rate)

    def loss(x, pairs):
      return feedback.preference_loss(self._reward, x, pairs, self._member)

    def body(carry, key):
      x, moments = carry
      pairs = preferences.sample(key, start.buffer, self._batch_shape())
      updates, moments = adam.update(jax.grad(loss)(x, pairs), moments)
      return (optax.apply_updates(x, updates), moments), None

    carry = (start.upper, adam.init(start.upper))
    keys = jax.random.split(key, model.warm_up)
    return start._replace(upper=jax.lax.scan(body, carry, keys)[0][0])

  def _relabelled(self, x, rollout):
    if not self._method.learned_reward:
      return rollout
    rewards = preferences.model_rewards(
      self._reward, x, rollout.observations, rollout.actions
    )
    return rollout._replace(rewards=rewards)

  def _suboptimality(self, scaled, entropies):
    if not self._method.second_policy:
      return jnp.zeros([])
    returns = {
      n: r.rewards.mean() + self._settings.weights.tau * entropies[n]
      for n, r in scaled.items()
    }
    return (returns['value'] - returns['lower']) / (1 - self._settings.discount)

  def _batch_shape(self):
    """Leading axes of a batch of pairs; each member has its own pairs."""
    model = self._settings.reward
    return (model.batch,) if not self._member else (model.members, model.batch)

  def _labelled(self, keys, rollout, count, ensemble=None):
    """Labels random pairs, or those an ensemble disagrees on."""
    pairs = self._settings.preferences
    chooses = self._member is not None and ensemble is not None
    drawn = count * pairs.candidates if chooses else count
    pair = preferences.draw(
      keys[0], rollout, (drawn, 2), pairs.fragment, self._dtype
    )
    if chooses:
      pair = queries.select_disagreed(self._member, ensemble, pair, count)
    true = self._method.true_labels
    # A coin does not know which pairs are tied.
    return preferences.label(
      keys[1],
      pair,
      pairs.temperature if true else jnp.inf,
      half_ties=true and pairs.ties == 'half',
    )

  def _add_held_out(self, held_out, key, rollout):
    capacity = self._settings.preferences.held_out
    count = min(max(self._pairs, 1), capacity)
    new = self._labelled(jax.random.split(key), rollout, count)
    return preferences.push(held_out, new, preferences.untied(new))

  def _in_parts(self, rollout):
    """Splits observations and actions into one part per reward-model step."""
    steps = self._settings.reward.steps
    size = rollout.rewards.size // steps

    def parts(x):
      flat = x.reshape(-1, *x.shape[2:])[: steps * size]
      return flat.reshape(steps, size, *flat.shape[1:])

    return parts(rollout.observations), parts(rollout.actions)


def _split(rollout):
  """Splits off the last quarter of the environments."""
  count = rollout.rewards.shape[1]
  training = count - max(1, count // 4)
  return (
    jax.tree.map(lambda x: x[:, :training], rollout),
    jax.tree.map(lambda x: x[:, training:], rollout),
  )
