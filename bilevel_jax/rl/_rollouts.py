"""Environments in an oracle's state, stepped under a policy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys
from bilevel_jax.oracles import base


class Timestep(NamedTuple):
  """The result of an environment's step.

  Attributes:
    observation: observation of the next state; after an episode's end, that of
      the reset state.
    state: the next state; after an episode's end, the reset state.
    reward: the reward of the step.
    terminated: whether the episode reached a terminal state, bool.
    truncated: whether a time limit ended the episode, bool.
    final_observation: observation of the state after the step, before any
      reset.
  """

  observation: Any
  state: Any
  reward: chex.Array
  terminated: chex.Array
  truncated: chex.Array
  final_observation: Any


class Environment(NamedTuple):
  """One environment as pure functions, with automatic resets.

  Attributes:
    reset: key -> (observation, state).
    step: (key, state, action) -> a `Timestep`, or a tuple of its fields.
    actions: the number of discrete actions, or the shape of a continuous
      action.
  """

  reset: Callable[[chex.PRNGKey], tuple[Any, Any]]
  step: Callable[[chex.PRNGKey, Any, chex.Array], Any]
  actions: int | tuple[int, ...]


class Rollout(NamedTuple):
  """Steps of several environments; all leaves are (steps, environments, ...).

  Attributes:
    observations: the policy's inputs.
    actions: the policy's actions.
    rewards: the rewards of the steps.
    terminated: whether a step reached a terminal state, bool.
    truncated: whether a time limit ended the episode, bool.
    next_observations: observations after each step, before any reset.
  """

  observations: Any
  actions: chex.Array
  rewards: chex.Array
  terminated: chex.Array
  truncated: chex.Array
  next_observations: Any


class Episodes(NamedTuple):
  """A ring buffer of the latest finished episodes.

  Attributes:
    returns: undiscounted sums of rewards, float32 (window,).
    lengths: lengths in steps, int32 (window,).
    finished: steps per environment at the end of the episode, int32 (window,);
      -1 in an empty slot.
    count: finished episodes so far, int32.
  """

  returns: chex.Array
  lengths: chex.Array
  finished: chex.Array
  count: chex.Array


class EnvironmentsState(NamedTuple):
  """The state of several environments.

  Attributes:
    key: PRNG key of the next draws.
    observation: current observations, (environments, ...).
    state: current states, (environments, ...).
    returns: returns of the current episodes, float32 (environments,).
    lengths: lengths of the current episodes, int32 (environments,).
    steps: steps per environment so far, int32.
    episodes: the finished episodes.
  """

  key: chex.PRNGKey
  observation: Any
  state: Any
  returns: chex.Array
  lengths: chex.Array
  steps: chex.Array
  episodes: Episodes


class Collector(NamedTuple):
  """Collects the batches of an on-policy oracle.

  Attributes:
    init: key -> state.
    collect: (params, state) -> (batch, state).
    episodes: state -> the value of `episodes` in `bj.outputs`.
    steps: environment steps per batch.
  """

  init: Callable[[chex.PRNGKey], Any]
  collect: Callable[[Any, Any], tuple[Any, Any]]
  episodes: Callable[[Any], Any]
  steps: int


class Collection(NamedTuple):
  """The size of the rollouts of an update.

  Attributes:
    environments: the number of environments, which are stepped in parallel.
    steps: the number of steps of each environment.
    window: the number of finished episodes whose returns are in the state.
  """

  environments: int
  steps: int
  window: int = 100


def rollouts(
  environment: Environment,
  act: Callable[[Any, chex.PRNGKey, Any], chex.Array],
  *,
  environments: int,
  steps: int,
  window: int = 100,
) -> Collector:
  """Steps several environments in parallel under a policy.

  The environments continue from rollout to rollout, so an episode may span
  several.

  Args:
    environment: one environment.
    act: `(params, key, observations) -> actions`, for all environments.
    environments: the number of environments.
    steps: steps of each environment per rollout.
    window: number of finished episodes in the ring buffer.

  Returns:
    A `Collector` of `Rollout`.

  Raises:
    ValueError: if a number is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> def step(key, state, action):  # Resets after four steps to the right.
    ...   state, end = state + action, state + action >= 4
    ...   after = jnp.where(end, 0, state)
    ...   return after, after, -1.0, end, jnp.array(False), state
    >>> walk = bj.rl.Environment(lambda key: (0, 0), step, actions=2)
    >>> right = lambda params, key, observations: jnp.ones_like(observations)
    >>> collector = bj.rl.rollouts(walk, right, environments=2, steps=6)
    >>> state = collector.init(jax.random.key(0))
    >>> rollout, state = jax.jit(collector.collect)(None, state)
    >>> print(rollout.next_observations[:, 0], state.episodes.count)
    [1 2 3 4 1 2] 2
    >>> print(bj.rl.mean_return(state.episodes))
    -4.0
  """
  for name, number in (
    ('environments', environments),
    ('steps', steps),
    ('episodes in the window', window),
  ):
    _checks.whole_number('rollouts', name, number)

  def step_all(keys, state, actions):
    return Timestep(*jax.vmap(environment.step)(keys, state, actions))

  def init(key):
    own, start = jax.random.split(_keys.as_key(key, 'rollouts'))
    keys = jax.random.split(start, environments)
    observation, state = jax.vmap(environment.reset)(keys)
    # Casts to the dtypes of a step, which may differ from those of a reset.
    action = jnp.zeros((), int)
    if isinstance(environment.actions, tuple):
      action = jnp.zeros(environment.actions)
    actions = jnp.broadcast_to(action, (environments, *action.shape))
    after = jax.eval_shape(step_all, keys, state, actions)
    cast = lambda x, like: jax.lax.convert_element_type(x, like.dtype)
    return EnvironmentsState(
      key=own,
      observation=jax.tree.map(cast, observation, after.observation),
      state=jax.tree.map(cast, state, after.state),
      returns=jnp.zeros(environments, jnp.float32),
      lengths=jnp.zeros(environments, jnp.int32),
      steps=jnp.zeros([], jnp.int32),
      episodes=Episodes(
        returns=jnp.zeros(window, jnp.float32),
        lengths=jnp.zeros(window, jnp.int32),
        finished=jnp.full(window, -1, jnp.int32),
        count=jnp.zeros([], jnp.int32),
      ),
    )

  def collect(params, before):
    # Draws all keys in one call of the generator.
    key, drawn = jax.random.split(before.key)
    keys = jax.random.split(drawn, (steps, environments + 1))

    def step(carry, keys):
      observation, state, returns, lengths = carry
      actions = act(params, keys[0], observation)
      after = step_all(keys[1:], state, actions)
      ends = jnp.logical_or(after.terminated, after.truncated)
      returns = returns + after.reward.astype(returns.dtype)
      lengths = lengths + 1
      transition = Rollout(
        observation,
        actions,
        after.reward,
        after.terminated,
        after.truncated,
        after.final_observation,
      )
      current = (jnp.where(ends, 0, returns), jnp.where(ends, 0, lengths))
      carry = (after.observation, after.state, *current)
      return carry, (transition, ends, returns, lengths)

    carry = (before.observation, before.state, before.returns, before.lengths)
    carry, (rollout, *ended) = jax.lax.scan(step, carry, keys)
    observation, state, returns, lengths = carry
    return rollout, EnvironmentsState(
      key=key,
      observation=observation,
      state=state,
      returns=returns,
      lengths=lengths,
      steps=before.steps + steps,
      episodes=_add_episodes(before.episodes, before.steps, *ended),
    )

  return Collector(
    init, collect, lambda state: state.episodes, steps * environments
  )


def _add_episodes(
  ring: Episodes,
  before: chex.Array,
  ends: chex.Array,
  returns: chex.Array,
  lengths: chex.Array,
) -> Episodes:
  """Adds the latest episodes of a rollout to the ring buffer."""
  window = len(ring.returns)
  steps, environments = ends.shape
  times = before + 1 + jnp.repeat(jnp.arange(steps), environments)
  number = jnp.cumsum(ends.ravel(), dtype=jnp.int32)
  total = number[-1]
  fits = ends.ravel() & (number > total - window)
  slot = jnp.where(fits, (ring.count + number - 1) % window, window)
  put = lambda old, new: old.at[slot].set(
    new.ravel().astype(old.dtype), mode='drop'
  )
  return Episodes(
    put(ring.returns, returns),
    put(ring.lengths, lengths),
    put(ring.finished, times),
    ring.count + total,
  )


def mean_return(episodes: Episodes, last: int = 100) -> chex.Array:
  """The mean return of the latest finished episodes.

  Args:
    episodes: `bj.outputs(state)['episodes']`; leading axes, of workers for
      instance, are merged.
    last: the number of episodes.

  Returns:
    The mean return, over fewer episodes if fewer are finished; NaN if none is.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> three = jnp.arange(3)
    >>> episodes = bj.rl.Episodes(jnp.array([1.0, 2.0, 4.0]), three, three, 3)
    >>> print(bj.rl.mean_return(episodes, last=2))
    3.0
  """
  finished, returns = episodes.finished.ravel(), episodes.returns.ravel()
  latest, at = jax.lax.top_k(finished, min(last, finished.size))
  valid = latest >= 0
  total = jnp.sum(jnp.where(valid, returns[at], 0))
  return total / jnp.where(valid.any(), valid.sum(), jnp.nan)


def on_policy(
  oracle: base.Oracle, collector: Collector, *, key: Any
) -> base.Oracle:
  """An oracle that collects its own batches from environments in its state.

  Environments are checkpointed, mapped over seeds and sharded like any other
  state. The solver's batch is ignored. Wrappers that average over parts of a
  batch go around the inner oracle, whose batch is the rollout.

  Args:
    oracle: turns a collected batch into gradients.
    collector: collects batches with the parameters of the update.
    key: PRNG key of environments and actions, or a whole number.

  Returns:
    An oracle. `bj.outputs` has `episodes`, `bj.counts` also has
    `steps/environment`.

  Raises:
    TypeError: without a key.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> collector = bj.rl.Collector(  # Collects the numbers 1, 2, 3, ...
    ...   init=lambda key: jnp.float32(0.0),
    ...   collect=lambda params, state: (state + 1, state + 1),
    ...   episodes=lambda state: {'last': state}, steps=1)
    >>> loss = lambda params, batch: (params - batch) ** 2 / 2
    >>> oracle = bj.rl.on_policy(bj.gradient(loss), collector, key=0)
    >>> params = jnp.float32(0.0)
    >>> gradient, state = oracle.update(None, oracle.init(params), params)
    >>> print(gradient, bj.outputs(state)['episodes']['last'])
    -1.0 1.0
  """
  key = _keys.as_key(key, 'on_policy')

  def init(params):
    return collector.init(key), oracle.init(params)

  def fn(params, batch, inner):
    del batch
    environments, oracle_state = inner
    rollout, environments = collector.collect(params, environments)
    gradients, oracle_state = oracle.update(rollout, oracle_state, params)
    outputs = {'episodes': collector.episodes(environments)}
    return (), gradients, (environments, oracle_state), outputs

  def initial_outputs(params):
    shapes = jax.eval_shape(lambda: collector.episodes(init(params)[0]))
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    return {'episodes': jax.tree.map(zeros, shapes)}

  collecting = base.oracle(
    fn,
    (),
    init,
    counts={'steps/environment': collector.steps},
    moves=oracle.moves,
    outputs=initial_outputs,
  )

  def init_fn(params):
    state = collecting.init(params)
    # Copies, since a buffer may be only once in a state.
    episodes = collector.episodes(state.inner[0])
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), episodes)
    return state._replace(outputs={'episodes': copies})

  return base.Oracle(init_fn, collecting.update, oracle.moves)
