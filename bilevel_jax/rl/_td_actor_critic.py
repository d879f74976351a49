"""A softmax actor and a linear TD(0) critic on a finite decision process."""

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
  """Where samples come from: what the oracle keeps of its environment.

  Attributes:
    key: PRNG key of the next draw.
    worker: whose samples come next, an int32 scalar.
    visits: probabilities that states are drawn with, (states,); () with chains.
    states: where each worker's chains are, int32, (workers, samples); ()
      without chains.
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
  r"""The actor's and the critic's increments along sampled transitions.

  .. math::
    a \sim \pi_\theta(\cdot | s), \quad s' \sim P(\cdot | s, a), \quad
    \delta = r(s, a) + \gamma \phi(s')^\top \omega - \phi(s)^\top \omega, \\
    d^{actor} = -\delta \, \nabla_\theta \log \pi_\theta(a | s), \qquad
    d^{critic} = -\delta \, \phi(s)

  or the mean of several. The sign is that of a gradient. The state s is

  - `iid`: drawn from the discounted visits of the policy. They are kept in the
    oracle's state and follow the policy by one application of their fixed
    point an evaluation, which is exact where the policy stays, and behind by
    some :math:`1 / (1 - \gamma)` evaluations where it moves;
  - `markov`: where a chain is, which goes on to :math:`s'` with probability
    :math:`\gamma` and else to a new first state, so that it visits states as
    often. Each worker has chains of its own: `bj.evaluation.delayed` says by
    the extra argument `worker` whose turn it is.

  Args:
    mdp: the process.
    features: :math:`\phi`, (states, size).
    key: PRNG key, or a whole number; it is kept in the state.
    sampling: `iid` or `markov`.
    samples: transitions in an evaluation, each of a chain of its own.
    workers: how many have chains; others take those of the number modulo it.
    bootstrap_restarts: whether :math:`s'` in :math:`\delta` may be a restart,
      the next state of the chain, as it is published. It is biased: the critic
      then solves another equation than that of the values.
    logits: from the actor to logits (states, actions); by default it is a table
      of them.

  Returns:
    An oracle for the sequences `actor` and `critic`, (size,). Its batch is not
    looked at. `bj.values` gives `reward`, the mean reward of the samples, and
    `td_error`, their mean squared :math:`\delta`; `bj.counts` gives
    `samples/transitions`.

  Raises:
    ValueError: if `sampling` is unknown, a number is below 1, or the features
      have no row for each state; at the call, if the actor or the critic has a
      shape that does not fit.

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
  # Added up once: a draw is then a comparison with one row.
  first, after = (jnp.cumsum(p, -1) for p in (mdp.initial, mdp.transitions))

  def policy_of(params):
    table, pull = jax.vjp(logits, params.actor)
    if table.shape != (states, actions):
      raise ValueError(
        f'td_actor_critic: the actor gives logits of shape {table.shape}, but '
        f'the process has {states} states and {actions} actions: '
        'jnp.zeros((states, actions)), or pass `logits`.'
      )
    if jnp.shape(params.critic) != features.shape[1:]:
      raise ValueError(
        f'td_actor_critic: the critic has a number for each of '
        f'{features.shape[1]} features, got the shape '
        f'{jnp.shape(params.critic)}.'
      )
    return table, jax.nn.softmax(table.astype(mdp.rewards.dtype)), pull

  def init(params):
    own, draw = jax.random.split(_keys.as_key(key, 'td_actor_critic'))
    _, policy, _ = policy_of(params)
    chains = () if iid else _draw(draw, first, (workers, samples))
    visits = _values.state_visits(mdp, policy) if iid else ()
    return SamplerState(own, jnp.zeros([], jnp.int32), visits, chains)

  def fn(params, batch, inner):
    del batch
    table, policy, pull = policy_of(params)
    own, *keys = jax.random.split(inner.key, 6)
    visits, chains = inner.visits, inner.states
    if iid:
      taken = (visits[:, None] * policy).reshape(-1)
      moved = taken @ mdp.transitions.reshape(-1, states)
      visits = (1 - mdp.discount) * mdp.initial + mdp.discount * moved
      s = _draw(keys[0], jnp.cumsum(visits), (samples,))
    else:
      turn = inner.worker % workers
      s = chains[turn]
    a = _draw(keys[1], jnp.cumsum(policy, -1)[s], (samples,))
    to = _draw(keys[2], after[s, a], (samples,))
    onward = to
    if not iid or bootstrap_restarts:
      stays = jax.random.uniform(keys[3], (samples,)) < mdp.discount
      onward = jnp.where(stays, to, _draw(keys[4], first, (samples,)))
    if not iid:
      chains = chains.at[turn].set(onward)
    seen = onward if bootstrap_restarts else to
    rewards, critic = mdp.rewards[s, a], params.critic.astype(features.dtype)
    worth = features @ critic
    delta = rewards + mdp.discount * worth[seen] - worth[s]
    # Minus the mean increments, each state's score in its row.
    score = jax.nn.one_hot(a, actions, dtype=policy.dtype) - policy[s]
    along = -delta / samples
    rows = jnp.zeros_like(policy).at[s].add(along[:, None] * score)
    (actor,) = pull(rows.astype(table.dtype))
    gradients = {'actor': actor, 'critic': along @ features[s]}
    like = {'actor': params.actor, 'critic': params.critic}
    return (
      (rewards.mean(), jnp.mean(delta**2)),
      _sequences.only(params, **_trees.cast_like(gradients, like)),
      SamplerState(own, inner.worker, visits, chains),
    )

  made = base.oracle(
    fn,
    ('reward', 'td_error'),
    init,
    counts={'samples/transitions': samples},
    moves=('actor', 'critic'),
  )

  def update_fn(batch, state, params=None, *, worker=0, **extra_args):
    turn = jnp.asarray(worker, jnp.int32)
    told = state._replace(inner=state.inner._replace(worker=turn))
    return made.update(batch, told, params, **extra_args)

  return base.Oracle(made.init, update_fn, made.moves)


def _draw(
  key: chex.PRNGKey, sums: chex.Array, shape: tuple[int, ...]
) -> chex.Array:
  """Whole numbers by their cumulative probabilities, along the last axis.

  A number without probability is never drawn, whatever sums are rounded to.

  Args:
    key: of the draws.
    sums: cumulative weights, (numbers,) or (*shape, numbers).
    shape: of the draws.

  Returns:
    An int32 array of this shape.
  """
  height = jax.random.uniform(key, shape, sums.dtype) * sums[..., -1]
  return jnp.sum(sums <= height[..., None], axis=-1, dtype=jnp.int32)
