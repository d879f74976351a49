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
from experiments.pbrl import feedback, preferences


class Sampling(NamedTuple):
  """How pairs are drawn.

  Attributes:
    length: of a fragment.
    pairs: new ones in a reward epoch; 0 where labels come from a file.
    capacity: of the buffer.
    held: capacity of the pairs that are held out.
    steps: of the reward model in an epoch.
    batch: of those.
    temperature: of the labels.
    dtype: that observations are kept in.
  """

  length: int
  pairs: int
  capacity: int
  held: int
  steps: int
  batch: int
  temperature: float
  dtype: Any


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


class Learner(NamedTuple):
  """A method, without environments.

  Attributes:
    init: (params, key, start) -> state.
    second: state -> the second policy's actor and critic; None without one.
    step: (params, state, rollouts, reward_epoch=) -> (params, state): an update
      of the policies, and if asked for a reward epoch behind it.
    add: (state of nothing but pairs: a `Start`, key, rollout) -> `Start`.
    warm_up: (start, key, steps) -> `Start`, its reward model trained.
  """

  init: Callable[..., State]
  second: Callable[[State], Any]
  step: Callable[..., tuple[bj.BilevelParams, State]]
  add: Callable[..., Start]
  warm_up: Callable[..., Start]


def make_learner(
  method: feedback.Method,
  agent: Any,
  reward: Callable[[Any, Any], chex.Array],
  *,
  rates: feedback.Rates,
  weights: feedback.Weights,
  sampling: Sampling,
  advantages: bj.rl.Advantages,
) -> Learner:
  """Makes a method.

  Args:
    method: which.
    agent: networks of a policy and of its value.
    reward: (weights, observation) -> a reward for each action.
    rates: step sizes.
    weights: of the terms.
    sampling: of pairs.
    advantages: how rewards are used; their scale is 1.

  Returns:
    A `Learner` whose params are `bj.BilevelParams`: the reward model, and an
    actor with its critic.
  """
  length, batch = sampling.length, sampling.batch
  temperature = sampling.temperature if method.sense else jnp.inf
  scored = method.second and sampling.pairs > 0

  policies, rewards = feedback.make_solvers(
    method,
    agent,
    reward,
    rates=rates,
    weights=weights,
    steps=sampling.steps,
    advantages=advantages,
  )

  def init(params, key, start):
    names = ('steps/environment', 'labels')
    counts = jnp.stack([jnp.int32(0), start.labels])
    return State(
      key=key,
      policies=policies.init(params),
      rewards=rewards.init(params) if method.model else (),
      buffer=start.buffer,
      held=start.held,
      scale=jnp.zeros([]),
      measured=bj.oracles.OracleState(
        bj.types.named(('suboptimality', 'reward_scale'), jnp.zeros(2)),
        bj.types.named(names, counts),
      ),
    )

  def second(state):
    return bj.auxiliaries(state.policies)['value'] if method.second else None

  def relabelled(x, rollout):
    if not method.model:
      return rollout
    found = preferences.rewards_of(
      reward, x, rollout.observations, rollout.actions
    )
    return rollout._replace(rewards=found)

  def step(params, state, rollouts, *, reward_epoch):
    """Updates the policies on new rollouts, {'lower': ..., 'value': ...}."""
    key, *keys = jax.random.split(state.key, 5)
    found = {n: relabelled(params.upper, r) for n, r in rollouts.items()}
    now = jnp.mean(jnp.abs(found['lower'].rewards))
    scale = jnp.where(state.scale > 0, 0.9 * state.scale + 0.1 * now, now)
    unit = weights.reward_scale / jnp.maximum(scale, 1e-6)
    scaled = {n: r._replace(rewards=unit * r.rewards) for n, r in found.items()}
    given = dict(scaled)
    fresh = reward_epoch and method.model and sampling.pairs > 0
    if fresh:
      # The last environments are for the pairs that are held out.
      learnt, tested = split(rollouts['lower'])
      new = labelled(keys[:2], learnt, sampling.pairs)
      if scored:
        margin = preferences.margins(reward, params.upper, new)
        given['costs'] = preferences.bradley_terry(margin, new.labels)
        given['pairs'] = new
    updates, moved = policies.update(given, state.policies, params)
    params = bj.apply_updates(params, updates)
    state = state._replace(key=key, policies=moved, scale=scale)
    if reward_epoch and method.model:
      buffer, held = state.buffer, state.held
      if fresh:
        buffer = preferences.push(buffer, new)
        held = with_held(held, keys[2], tested)
      pairs = preferences.sample(keys[3], buffer, (sampling.steps, batch))
      parts = {'pairs': pairs}
      if method.second:
        parts |= {n: in_parts(r) for n, r in found.items()}
      updates, fitted = rewards.update(parts, state.rewards, params)
      params = bj.apply_updates(params, updates)
      state = state._replace(buffer=buffer, held=held, rewards=fitted)
    labels = sampling.pairs if fresh else 0
    spent = sum(r.rewards.size for r in rollouts.values())
    counts = state.measured.counts
    added = counts.array + jnp.array([spent, labels], jnp.int32)
    gap = jnp.zeros([])
    if method.second:
      outputs = bj.outputs(moved)
      worth = {
        n: scaled[n].rewards.mean() + weights.entropy * outputs[n]
        for n in scaled
      }
      gap = (worth['value'] - worth['lower']) / (1 - advantages.discount)
    measured = state.measured._replace(
      values=bj.types.named(state.measured.values.names, jnp.stack([gap, now])),
      counts=bj.types.named(counts.names, added),
    )
    return params, state._replace(measured=measured)

  def split(rollout):
    count = rollout.rewards.shape[1]
    kept = count - max(1, count // 4)
    return (
      jax.tree.map(lambda x: x[:, :kept], rollout),
      jax.tree.map(lambda x: x[:, kept:], rollout),
    )

  def labelled(keys, rollout, count):
    pair = preferences.draw(
      keys[0], rollout, (count, 2), length, sampling.dtype
    )
    return preferences.label(keys[1], pair, temperature)

  def with_held(held, key, rollout):
    count = min(max(sampling.pairs, 1), sampling.held)
    new = labelled(jax.random.split(key), rollout, count)
    return preferences.push(held, new, preferences.untied(new))

  def in_parts(rollout):
    """Observations and actions, another part for each step of the model."""
    size = rollout.rewards.size // sampling.steps

    def parts(x):
      flat = x.reshape(-1, *x.shape[2:])[: sampling.steps * size]
      return flat.reshape(sampling.steps, size, *flat.shape[1:])

    return parts(rollout.observations), parts(rollout.actions)

  def add(start, key, rollout):
    """Adds pairs of the first policy: labelled ones, and those held out."""
    keys = jax.random.split(key, 3)
    learnt, tested = split(rollout)
    held = with_held(start.held, keys[2], tested)
    if not sampling.pairs:
      return start._replace(held=held)
    new = labelled(keys[:2], learnt, sampling.pairs)
    return start._replace(
      buffer=preferences.push(start.buffer, new),
      held=held,
      labels=start.labels + sampling.pairs,
    )

  def warm_up(start, key, steps):
    """Steps of the reward model on the pairs at the start."""
    adam = optax.adam(rates.reward)

    def loss(x, pairs):
      margin = preferences.margins(reward, x, pairs)
      return preferences.bradley_terry(margin, pairs.labels).mean()

    def body(carry, key):
      x, moments = carry
      pairs = preferences.sample(key, start.buffer, (batch,))
      updates, moments = adam.update(jax.grad(loss)(x, pairs), moments)
      return (optax.apply_updates(x, updates), moments), None

    carry = (start.upper, adam.init(start.upper))
    keys = jax.random.split(key, steps)
    return start._replace(upper=jax.lax.scan(body, carry, keys)[0][0])

  return Learner(init, second, step, add, warm_up)


def nothing(upper: Any, sampling: Sampling, shape: tuple[int, ...]) -> Start:
  """A start without pairs."""
  empty = lambda capacity: preferences.empty(
    capacity, sampling.length, shape, sampling.dtype
  )
  return Start(
    upper, empty(sampling.capacity), empty(sampling.held), jnp.int32(0)
  )
