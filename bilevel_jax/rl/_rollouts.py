"""Environments in a state: stepped under a policy, their episodes measured."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys
from bilevel_jax.oracles import base


class Timestep(NamedTuple):
  """What an environment's step gives.

  Attributes:
    observation: of the state to go on from: after a reset, if the episode
      ended.
    state: to go on from, likewise.
    reward: of the step.
    terminated: whether the episode ended by itself, bool.
    truncated: whether a time limit cut it, bool.
    final_observation: of the state that the step led to, before any reset.
  """

  observation: Any
  state: Any
  reward: chex.Array
  terminated: chex.Array
  truncated: chex.Array
  final_observation: Any


class Environment(NamedTuple):
  """One environment, as pure functions. It resets itself.

  Attributes:
    reset: key -> (observation, state).
    step: (key, state, action) -> a `Timestep`, or a tuple of its fields.
    actions: the number of discrete actions, or the shape of a continuous one.
  """

  reset: Callable[[chex.PRNGKey], tuple[Any, Any]]
  step: Callable[[chex.PRNGKey, Any, chex.Array], Any]
  actions: int | tuple[int, ...]


class Rollout(NamedTuple):
  """Steps of several environments; all leaves are (steps, environments, ...).

  Attributes:
    observations: at which the policy chose.
    actions: what it chose.
    rewards: of these steps.
    terminated: bool.
    truncated: bool.
    next_observations: after each step, before any reset.
  """

  observations: Any
  actions: chex.Array
  rewards: chex.Array
  terminated: chex.Array
  truncated: chex.Array
  next_observations: Any


class Episodes(NamedTuple):
  """The episodes that were finished last, in a ring.

  Attributes:
    returns: undiscounted sums of rewards, float32 (window,).
    lengths: in steps, int32 (window,).
    finished: steps of each environment until then, int32 (window,); -1 where
      the ring has no episode yet.
    count: episodes so far, int32.
  """

  returns: chex.Array
  lengths: chex.Array
  finished: chex.Array
  count: chex.Array


class EnvironmentsState(NamedTuple):
  """Environments under way.

  Attributes:
    key: of what is drawn next.
    observation: (environments, ...).
    state: likewise.
    returns: of the episodes under way, float32 (environments,).
    lengths: likewise, int32.
    steps: that each environment has made, int32.
    episodes: the finished ones.
  """

  key: chex.PRNGKey
  observation: Any
  state: Any
  returns: chex.Array
  lengths: chex.Array
  steps: chex.Array
  episodes: Episodes


class Collector(NamedTuple):
  """Makes the batches of an oracle that learns from what it does.

  Attributes:
    init: key -> state.
    collect: (params, state) -> (batch, state).
    episodes: from the state to what `bj.outputs` shows as `episodes`.
    steps: of environments, for one batch.
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
  """Steps environments side by side, under a policy.

  They go on from one rollout to the next: an episode may span several.

  Args:
    environment: one of them.
    act: `(params, key, observations) -> actions`, of all at once.
    environments: how many.
    steps: of each, in a rollout.
    window: how many finished episodes are remembered.

  Returns:
    A `Collector` of `Rollout`.

  Raises:
    ValueError: if a number is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> def step(key, state, action):  # Four steps to the right, then anew.
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
    found = jax.vmap(environment.step)(keys, state, actions)
    return Timestep(*found)

  def init(key):
    own, start = jax.random.split(_keys.as_key(key, 'rollouts'))
    keys = jax.random.split(start, environments)
    observation, state = jax.vmap(environment.reset)(keys)
    # What a step gives may be of other dtypes, and never of weak ones.
    one = jnp.zeros((), int)
    if isinstance(environment.actions, tuple):
      one = jnp.zeros(environment.actions)
    actions = jnp.broadcast_to(one, (environments, *one.shape))
    after = jax.eval_shape(step_all, keys, state, actions)
    cast = lambda x, like: jax.lax.convert_element_type(x, like.dtype)
    none = jnp.zeros(environments, jnp.int32)
    return EnvironmentsState(
      key=own,
      observation=jax.tree.map(cast, observation, after.observation),
      state=jax.tree.map(cast, state, after.state),
      returns=jnp.zeros(environments, jnp.float32),
      lengths=none,
      steps=jnp.zeros([], jnp.int32),
      episodes=Episodes(
        returns=jnp.zeros(window, jnp.float32),
        lengths=jnp.zeros(window, jnp.int32),
        finished=jnp.full(window, -1, jnp.int32),
        count=jnp.zeros([], jnp.int32),
      ),
    )

  def collect(params, before):
    # All keys at once: one call of the generator in place of many.
    key, drawn = jax.random.split(before.key)
    keys = jax.random.split(drawn, (steps, environments + 1))

    def step(carry, keys):
      observation, state, returns, lengths = carry
      actions = act(params, keys[0], observation)
      after = step_all(keys[1:], state, actions)
      ends = jnp.logical_or(after.terminated, after.truncated)
      returns = returns + after.reward.astype(returns.dtype)
      lengths = lengths + 1
      made = Rollout(
        observation,
        actions,
        after.reward,
        after.terminated,
        after.truncated,
        after.final_observation,
      )
      going = (jnp.where(ends, 0, returns), jnp.where(ends, 0, lengths))
      carry = (after.observation, after.state, *going)
      return carry, (made, ends, returns, lengths)

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
      episodes=_remember(before.episodes, before.steps, *ended),
    )

  return Collector(
    init, collect, lambda state: state.episodes, steps * environments
  )


def _remember(
  known: Episodes,
  before: chex.Array,
  ends: chex.Array,
  returns: chex.Array,
  lengths: chex.Array,
) -> Episodes:
  """The ring with the episodes of a rollout, those that still fit."""
  window = len(known.returns)
  steps, environments = ends.shape
  times = before + 1 + jnp.repeat(jnp.arange(steps), environments)
  place = jnp.cumsum(ends.ravel(), dtype=jnp.int32)
  total = place[-1]
  kept = ends.ravel() & (place > total - window)
  slot = jnp.where(kept, (known.count + place - 1) % window, window)
  put = lambda ring, new: ring.at[slot].set(
    new.ravel().astype(ring.dtype), mode='drop'
  )
  return Episodes(
    put(known.returns, returns),
    put(known.lengths, lengths),
    put(known.finished, times),
    known.count + total,
  )


def mean_return(episodes: Episodes, last: int = 100) -> chex.Array:
  """The mean return of the episodes that were finished last.

  Args:
    episodes: of `bj.outputs(state)['episodes']`; leading axes, of workers for
      instance, are taken together.
    last: how many episodes.

  Returns:
    The mean return, of fewer episodes where there are fewer; NaN of none.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> three = jnp.arange(3)
    >>> episodes = bj.rl.Episodes(jnp.array([1.0, 2.0, 4.0]), three, three, 3)
    >>> print(bj.rl.mean_return(episodes, last=2))
    3.0
  """
  finished, returns = episodes.finished.ravel(), episodes.returns.ravel()
  latest, at = jax.lax.top_k(finished, min(last, finished.size))
  known = latest >= 0
  total = jnp.sum(jnp.where(known, returns[at], 0))
  return total / jnp.where(known.any(), known.sum(), jnp.nan)


def on_policy(
  oracle: base.Oracle, collector: Collector, *, key: Any
) -> base.Oracle:
  """An oracle that collects its own batches: environments are in its state.

  So they are checkpointed, mapped over seeds and split over devices like all
  else. The batch that the solver is given is left unused. Wrappers that take
  means of parts of a batch go round the oracle within, which sees the rollout.

  Args:
    oracle: turns what is collected into gradients.
    collector: collects under the parameters of the update.
    key: of the environments and of actions; a key or a whole number.

  Returns:
    An oracle. `bj.outputs` gives `episodes`, `bj.counts` also
    `steps/environment`.

  Raises:
    TypeError: without a key.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> collector = bj.rl.Collector(  # Numbers that nothing acts upon.
    ...   init=lambda key: jnp.float32(0.0),
    ...   collect=lambda params, state: (state + 1, state + 1),
    ...   episodes=lambda state: {'seen': state}, steps=1)
    >>> loss = lambda params, batch: (params - batch) ** 2 / 2
    >>> oracle = bj.rl.on_policy(bj.gradient(loss), collector, key=0)
    >>> params = jnp.float32(0.0)
    >>> gradient, state = oracle.update(None, oracle.init(params), params)
    >>> print(gradient, bj.outputs(state)['episodes']['seen'])
    -1.0 1.0
  """
  key = _keys.as_key(key, 'on_policy')

  def init(params):
    return collector.init(key), oracle.init(params)

  def fn(params, batch, inner):
    del batch
    environments, within = inner
    rollout, environments = collector.collect(params, environments)
    gradients, within = oracle.update(rollout, within, params)
    shown = {'episodes': collector.episodes(environments)}
    return (), gradients, (environments, within), shown

  def announced(params):
    shapes = jax.eval_shape(lambda: collector.episodes(init(params)[0]))
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    return {'episodes': jax.tree.map(zeros, shapes)}

  made = base.oracle(
    fn,
    (),
    init,
    counts={'steps/environment': collector.steps},
    moves=oracle.moves,
    outputs=announced,
  )

  def init_fn(params):
    # Environments are reset once; copies, as a buffer is in a state once.
    state = made.init(params)
    none_yet = collector.episodes(state.inner[0])
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), none_yet)
    return state._replace(outputs={'episodes': copies})

  return base.Oracle(init_fn, made.update, oracle.moves)
