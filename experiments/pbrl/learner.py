"""A method of learning from preferences: pairs, labels and updates in turn.

It knows no environments: it is given rollouts, from a compiled suite or from
games that are stepped in Python.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.pbrl import feedback, preferences, rlhf_settings


class Start(NamedTuple):
  """What there is before the policy learns.

  Attributes:
    upper: the weights of the reward model.
    buffer: labelled pairs.
    held: those that are held out.
    labels: used so far, int32.
  """

  upper: Any
  buffer: preferences.Buffer
  held: preferences.Buffer
  labels: chex.Array


class State(NamedTuple):
  """State of a `Learner`.

  Attributes:
    key: of what is drawn next.
    policies: of the solver of the policies; the second one is in it.
    rewards: of the solver of the reward model.
    buffer: of labelled pairs.
    held: pairs that are held out.
    scale: the running mean absolute reward; 0 before the first.
    measured: what was measured and counted.
  """

  key: chex.PRNGKey
  policies: Any
  rewards: Any
  buffer: preferences.Buffer
  held: preferences.Buffer
  scale: chex.Array
  measured: bj.oracles.OracleState


class Learner:
  """A method, without environments.

  Its params are `bj.BilevelParams`: the reward model, and an actor with its
  critic.

  Args:
    method: which.
    agent: networks of a policy and of its value.
    reward: (weights, observation) -> a reward for each action.
    settings: resolved.
    rate: of the actors' Adam.
    dtype: that observations are kept in.
  """

  def __init__(
    self,
    method: rlhf_settings.Method,
    agent: Any,
    reward: Callable[[Any, Any], chex.Array],
    settings: rlhf_settings.Settings,
    rate: chex.Numeric,
    dtype: Any,
  ):
    """Makes the solvers."""
    self._method, self._reward, self._settings = method, reward, settings
    # Labels from a file are all that there is.
    self._pairs = 0 if settings.labels else settings.preferences.pairs
    self._dtype = dtype
    self._policies, self._rewards = feedback.make_solvers(
      method, agent, reward, settings, rate
    )

  def nothing(self, upper: Any, shape: tuple[int, ...]) -> Start:
    """A start without pairs, of a reward model, for observations of a shape."""
    pairs = self._settings.preferences
    # The true rewards need no pairs: room for one in their place.
    rooms = (pairs.buffer, pairs.held_out) if self._method.model else (1, 1)
    buffer, held = (
      preferences.empty(room, pairs.fragment, shape, self._dtype)
      for room in rooms
    )
    return Start(upper, buffer, held, jnp.int32(0))

  def init(self, params: bj.BilevelParams, key: Any, start: Start) -> State:
    """The state before the policy learns."""
    names = ('steps/environment', 'labels')
    counts = jnp.stack([jnp.int32(0), start.labels])
    return State(
      key=key,
      policies=self._policies.init(params),
      rewards=self._rewards.init(params) if self._method.model else (),
      buffer=start.buffer,
      held=start.held,
      scale=jnp.zeros([]),
      measured=bj.oracles.OracleState(
        bj.types.named(('suboptimality', 'reward_scale'), jnp.zeros(2)),
        bj.types.named(names, counts),
      ),
    )

  def second(self, state: State) -> Any:
    """The second policy's actor and critic; None without one."""
    if not self._method.second:
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
    """Updates the policies on new rollouts, and perhaps the reward model.

    Args:
      params: before.
      state: that of the method, before.
      rollouts: under the policy, `lower`, and under the second one, `value`.
      reward_epoch: whether a reward epoch follows.
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
    given = dict(scaled)
    fresh = reward_epoch and method.model and self._pairs > 0
    if fresh:
      # The last environments are for the pairs that are held out.
      learnt, tested = _split(rollouts['lower'])
      new = self._labelled(keys[:2], learnt, self._pairs)
      if method.second:
        margin = preferences.margins(self._reward, params.upper, new)
        given['costs'] = preferences.bradley_terry(margin, new.labels)
        given['pairs'] = new
    updates, moved = self._policies.update(given, state.policies, params)
    params = bj.apply_updates(params, updates)
    state = state._replace(key=key, policies=moved, scale=scale)
    if reward_epoch and method.model:
      buffer, held = state.buffer, state.held
      if fresh:
        buffer = preferences.push(buffer, new)
        held = self._with_held(held, keys[2], tested)
      shape = (model.steps, model.batch)
      parts = {'pairs': preferences.sample(keys[3], buffer, shape)}
      if method.second:
        parts |= {n: self._in_parts(r) for n, r in relabelled.items()}
      updates, fitted = self._rewards.update(parts, state.rewards, params)
      params = bj.apply_updates(params, updates)
      state = state._replace(buffer=buffer, held=held, rewards=fitted)
    labels = self._pairs if fresh else 0
    spent = sum(r.rewards.size for r in rollouts.values())
    values, counts = state.measured.values, state.measured.counts
    added = counts.array + jnp.array([spent, labels], jnp.int32)
    gap = self._suboptimality(scaled, bj.outputs(moved))
    measured = state.measured._replace(
      values=bj.types.named(values.names, jnp.stack([gap, now])),
      counts=bj.types.named(counts.names, added),
    )
    return params, state._replace(measured=measured)

  def add(self, start: Start, key: Any, rollout: bj.rl.Rollout) -> Start:
    """Adds pairs of the first policy: labelled ones, and those held out."""
    keys, pairs = jax.random.split(key, 3), self._pairs
    learnt, tested = _split(rollout)
    held = self._with_held(start.held, keys[2], tested)
    if not pairs:
      return start._replace(held=held)
    new = self._labelled(keys[:2], learnt, pairs)
    return start._replace(
      buffer=preferences.push(start.buffer, new),
      held=held,
      labels=start.labels + pairs,
    )

  def warm_up(self, start: Start, key: Any) -> Start:
    """Steps of the reward model on the pairs at the start."""
    model = self._settings.reward
    adam = optax.adam(model.rate)

    def loss(x, pairs):
      margin = preferences.margins(self._reward, x, pairs)
      return preferences.bradley_terry(margin, pairs.labels).mean()

    def body(carry, key):
      x, moments = carry
      pairs = preferences.sample(key, start.buffer, (model.batch,))
      updates, moments = adam.update(jax.grad(loss)(x, pairs), moments)
      return (optax.apply_updates(x, updates), moments), None

    carry = (start.upper, adam.init(start.upper))
    keys = jax.random.split(key, model.warm_up)
    return start._replace(upper=jax.lax.scan(body, carry, keys)[0][0])

  def _relabelled(self, x, rollout):
    if not self._method.model:
      return rollout
    rewards = preferences.rewards_of(
      self._reward, x, rollout.observations, rollout.actions
    )
    return rollout._replace(rewards=rewards)

  def _suboptimality(self, scaled, entropies):
    if not self._method.second:
      return jnp.zeros([])
    returns = {
      n: r.rewards.mean() + self._settings.tau * entropies[n]
      for n, r in scaled.items()
    }
    return (returns['value'] - returns['lower']) / (1 - self._settings.discount)

  def _labelled(self, keys, rollout, count):
    pairs = self._settings.preferences
    pair = preferences.draw(
      keys[0], rollout, (count, 2), pairs.fragment, self._dtype
    )
    heat = pairs.temperature if self._method.sense else jnp.inf
    return preferences.label(keys[1], pair, heat)

  def _with_held(self, held, key, rollout):
    most = self._settings.preferences.held_out
    count = min(max(self._pairs, 1), most)
    new = self._labelled(jax.random.split(key), rollout, count)
    return preferences.push(held, new, preferences.untied(new))

  def _in_parts(self, rollout):
    """Observations and actions, another part for each step of the model."""
    steps = self._settings.reward.steps
    size = rollout.rewards.size // steps

    def parts(x):
      flat = x.reshape(-1, *x.shape[2:])[: steps * size]
      return flat.reshape(steps, size, *flat.shape[1:])

    return parts(rollout.observations), parts(rollout.actions)


def _split(rollout):
  """The first environments, and a quarter that is held out."""
  count = rollout.rewards.shape[1]
  learnt = count - max(1, count // 4)
  return (
    jax.tree.map(lambda x: x[:, :learnt], rollout),
    jax.tree.map(lambda x: x[:, learnt:], rollout),
  )
