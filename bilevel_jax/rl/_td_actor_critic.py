"""Sampled actor-critic with a softmax actor and a linear TD(0) critic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys, _sequences, _trees
from bilevel_jax.oracles import base
from bilevel_jax.rl import _mdp, _values

SAMPLINGS = ('iid', 'markov')


class SamplerState(NamedTuple):
  """The state of the sampled environment.

  Attributes:
    key: PRNG key of the next draw.
    worker: the worker of the next samples, an int32 scalar.
    visits: sampling probabilities of states, (states,); () with chains.
    states: current states of each worker's chains, int32, (workers, samples);
      () without chains.
  """

  key: chex.PRNGKey
  worker: chex.Array
  visits: Any
  states: Any


def td_actor_critic(
  mdp: _mdp.MDP,
  features: chex.Array,
  *,
  key: Any,
  sampling: str = 'markov',
  samples: int = 1,
  workers: int = 1,
  bootstrap_restarts: bool = False,
  logits: Callable[[Any], chex.Array] = lambda actor: actor,
) -> base.Oracle:
  r"""The actor and critic increments of sampled transitions.

  .. math::
    a \sim \pi_\theta(\cdot | s), \quad s' \sim P(\cdot | s, a), \quad
    \delta = r(s, a) + \gamma \phi(s')^\top \omega - \phi(s)^\top \omega, \\
    d^{actor} = -\delta \, \nabla_\theta \log \pi_\theta(a | s), \qquad
    d^{critic} = -\delta \, \phi(s)

  or the mean of several, with the sign of a gradient. The state s is

  - `iid`: drawn from the discounted visits of the policy. The oracle's state
    has these visits and applies their fixed-point map once per evaluation,
    which is exact for a constant policy and lags by about
    :math:`1 / (1 - \gamma)` evaluations behind a changing one;
  - `markov`: the state of a chain that continues to :math:`s'` with probability
    :math:`\gamma` and otherwise restarts, so that it visits states with the
    same frequencies. Each worker has its own chains: `bj.evaluation.delayed`
    passes the number of the worker as the extra argument `worker`.

  Args:
    mdp: the process.
    features: :math:`\phi`, (states, size).
    key: PRNG key, or a whole number.
    sampling: `iid` or `markov`.
    samples: transitions per evaluation, each from its own chain.
    workers: the number of workers with chains; worker numbers are taken modulo
      it.
    bootstrap_restarts: whether :math:`s'` in :math:`\delta` is the next state
      of the chain, restarts included, as in the paper. This is biased: the
      critic then does not solve the equation of the values.
    logits: maps the actor to logits (states, actions); by default the actor is
      the table of logits.

  Returns:
    An oracle for the sequences `actor` and `critic`, (size,), which ignores the
    batch. `bj.values` has `reward`, the mean reward of the samples, and
    `td_error`, their mean squared :math:`\delta`; `bj.counts` has
    `samples/transitions`.

  Raises:
    ValueError: if `sampling` is unknown, a number is below 1, or the features
      do not match the states; at the call, if the actor or the critic has the
      wrong shape.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> mdp = bj.rl.random_mdp(0, states=6, actions=2, discount=0.8)
    >>> features = bj.rl.random_features(1, states=6, size=3)
    >>> oracle = bj.rl.td_actor_critic(mdp, features, key=0, samples=64)
    >>> solver = bj.descend(oracle, actor=optax.sgd(1.0), critic=optax.sgd(0.3))
    >>> params = bj.sequences(actor=jnp.zeros((6, 2)), critic=jnp.zeros(3))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> values = [bj.rl.expected_return(mdp, jax.nn.softmax(z))
    ...           for z in (jnp.zeros((6, 2)), params.actor)]
    >>> print(values[1] > 1.1 * values[0], bj.counts(state))
    True {'samples/transitions': 12800}

  References:
    Shen, Zhang, Hong and Chen, `Towards Understanding Asynchronous Advantage
    Actor-Critic: Convergence and Linear Speedup
    <https://arxiv.org/abs/2012.15511>`_, 2023.
  """
  if sampling not in SAMPLINGS:
    raise ValueError(
      f'td_actor_critic: sampling is one of {", ".join(SAMPLINGS)}, got '
      f'{sampling!r}.'
    )
  _checks.whole_number('td_actor_critic', 'samples', samples)
  _checks.whole_number('td_actor_critic', 'workers', workers)
  _keys.as_key(key, 'td_actor_critic')
  states, actions = mdp.rewards.shape
  if features.ndim != 2 or len(features) != states:
    raise ValueError(
      f'td_actor_critic: features have a row for each of {states} states, got '
      f'the shape {features.shape}.'
    )
  iid = sampling == 'iid'
  # Cumulative sums, so that a draw is a comparison with one row.
  first, after = (jnp.cumsum(p, -1) for p in (mdp.initial, mdp.transitions))

  def evaluate_policy(params):
    table, pull = jax.vjp(logits, params.actor)
    if table.shape != (states, actions):
      raise ValueError(
        f'td_actor_critic: the actor gives logits of shape {table.shape}, but '
        f'the process has {states} states and {actions} actions: start at '
        'jnp.zeros((states, actions)), or pass `logits`.'
      )
    if jnp.shape(params.critic) != features.shape[1:]:
      raise ValueError(
        f'td_actor_critic: the critic has a weight for each of '
        f'{features.shape[1]} features, got the shape '
        f'{jnp.shape(params.critic)}.'
      )
    return table, jax.nn.softmax(table.astype(mdp.rewards.dtype)), pull

  def init(params):
    next_key, draw = jax.random.split(_keys.as_key(key, 'td_actor_critic'))
    _, policy, _ = evaluate_policy(params)
    chains = () if iid else _draw(draw, first, (workers, samples))
    visits = _values.state_visits(mdp, policy) if iid else ()
    return SamplerState(next_key, jnp.zeros([], jnp.int32), visits, chains)

  def fn(params, batch, inner):
    del batch
    table, policy, pull = evaluate_policy(params)
    next_key, *keys = jax.random.split(inner.key, 6)
    visits, chains = inner.visits, inner.states
    if iid:
      pairs = (visits[:, None] * policy).reshape(-1)
      moved = pairs @ mdp.transitions.reshape(-1, states)
      visits = (1 - mdp.discount) * mdp.initial + mdp.discount * moved
      s = _draw(keys[0], jnp.cumsum(visits), (samples,))
    else:
      worker = inner.worker % workers
      s = chains[worker]
    a = _draw(keys[1], jnp.cumsum(policy, -1)[s], (samples,))
    next_states = _draw(keys[2], after[s, a], (samples,))
    chain_states = next_states
    if not iid or bootstrap_restarts:
      continues = jax.random.uniform(keys[3], (samples,)) < mdp.discount
      restarts = _draw(keys[4], first, (samples,))
      chain_states = jnp.where(continues, next_states, restarts)
    if not iid:
      chains = chains.at[worker].set(chain_states)
    target = chain_states if bootstrap_restarts else next_states
    rewards, critic = mdp.rewards[s, a], params.critic.astype(features.dtype)
    values = features @ critic
    delta = rewards + mdp.discount * values[target] - values[s]
    # Minus the mean increments, with the score of each state in its row.
    score = jax.nn.one_hot(a, actions, dtype=policy.dtype) - policy[s]
    scale = -delta / samples
    rows = jnp.zeros_like(policy).at[s].add(scale[:, None] * score)
    (actor,) = pull(rows.astype(table.dtype))
    gradients = {'actor': actor, 'critic': scale @ features[s]}
    like = {'actor': params.actor, 'critic': params.critic}
    return (
      (rewards.mean(), jnp.mean(delta**2)),
      _sequences.only(params, **_trees.cast_like(gradients, like)),
      SamplerState(next_key, inner.worker, visits, chains),
    )

  sampled = base.oracle(
    fn,
    ('reward', 'td_error'),
    init,
    counts={'samples/transitions': samples},
    moves=('actor', 'critic'),
  )

  def update_fn(batch, state, params=None, *, worker=0, **extra_args):
    inner = state.inner._replace(worker=jnp.asarray(worker, jnp.int32))
    state = state._replace(inner=inner)
    return sampled.update(batch, state, params, **extra_args)

  return base.Oracle(sampled.init, update_fn, sampled.moves)


def _draw(
  key: chex.PRNGKey, sums: chex.Array, shape: tuple[int, ...]
) -> chex.Array:
  """Draws integers by their cumulative probabilities along the last axis.

  An integer of probability zero is never drawn, in spite of rounding.

  Args:
    key: PRNG key of the draws.
    sums: cumulative weights, (numbers,) or (*shape, numbers).
    shape: the shape of the draws.

  Returns:
    An int32 array of this shape.
  """
  height = jax.random.uniform(key, shape, sums.dtype) * sums[..., -1]
  return jnp.sum(sums <= height[..., None], axis=-1, dtype=jnp.int32)
