"""Markov games of two players, and the process that each of them faces."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys
from bilevel_jax.rl import _mdp, _values


class MarkovGame(NamedTuple):
  """A Markov game of two players, finite and discounted.

  `make_game` makes one with checks. Fields may be traced and differentiated.

  Attributes:
    transitions: probabilities of the next state, (states, actions of the first
      player, actions of the second, states).
    rewards: a table for each reward there is, (rewards, states, actions,
      actions): of a leader and of a follower, for instance.
    discount: in [0, 1), a scalar.
    initial: probabilities of the first state, (states,).
  """

  transitions: chex.Array
  rewards: chex.Array
  discount: chex.Numeric
  initial: chex.Array


def make_game(
  transitions: Any, rewards: Any, *, discount: Any, initial: Any = None
) -> MarkovGame:
  r"""A Markov game of two players, checked.

  Args:
    transitions: (states, actions, actions, states).
    rewards: (rewards, states, actions, actions).
    discount: :math:`\gamma` in [0, 1).
    initial: (states,); by default all states alike.

  Returns:
    A `MarkovGame`. What is traced is checked for its shape alone.

  Raises:
    ValueError: as `make_mdp`, of the process of both players at once.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> rewards = jnp.array([[[[1.0, -1.0], [-1.0, 1.0]]]])
    >>> game = bj.rl.make_game(jnp.ones((1, 2, 2, 1)), rewards, discount=0.9)
    >>> print(game.rewards.shape)
    (1, 1, 2, 2)
  """
  moves, gains = jnp.asarray(transitions), jnp.asarray(rewards)
  if moves.ndim != 4 or gains.ndim != 4 or gains.shape[1:] != moves.shape[:3]:
    raise ValueError(
      'make_game: transitions have the shape (states, actions, actions, '
      'states) and rewards (rewards, states, actions, actions), got '
      f'{moves.shape} and {gains.shape}.'
    )
  states, one, two, after = moves.shape
  flat = [
    _mdp.make_mdp(
      moves.reshape(states, one * two, after),
      each.reshape(states, one * two),
      discount=discount,
      initial=initial,
    )
    for each in gains
  ]
  return MarkovGame(
    flat[0].transitions.reshape(moves.shape),
    jnp.stack([mdp.rewards.reshape(gains.shape[1:]) for mdp in flat]),
    flat[0].discount,
    flat[0].initial,
  )


def random_game(
  key: Any,
  *,
  states: int = 100,
  actions: tuple[int, int] = (5, 5),
  rewards: int = 2,
  discount: float = 0.9,
  dtype: Any = jnp.float32,
) -> MarkovGame:
  """A dense random game: uniform weights and rewards in [0, 1].

  Args:
    key: PRNG key, or a whole number.
    states: how many.
    actions: of the first and of the second player, in each state.
    rewards: how many tables.
    discount: in [0, 1).
    dtype: of its fields.

  Returns:
    A `MarkovGame` whose rows of transitions are uniform weights divided by
    their sum; the first state is uniform.

  Raises:
    ValueError: if a number is below 1 or the discount is outside [0, 1).

  Example:
    >>> import bilevel_jax as bj
    >>> game = bj.rl.random_game(0, states=3, actions=(2, 4))
    >>> print(game.transitions.shape, game.rewards.shape)
    (3, 2, 4, 3) (2, 3, 2, 4)
  """
  for what, number in (
    ('states', states),
    ('actions', min(actions)),
    ('rewards', rewards),
  ):
    _checks.whole_number('random_game', what, number)
  one, two = jax.random.split(_keys.as_key(key, 'random_game'))
  weights = jax.random.uniform(one, (states, *actions, states), dtype)
  return make_game(
    weights / weights.sum(-1, keepdims=True),
    jax.random.uniform(two, (rewards, states, *actions), dtype),
    discount=jnp.asarray(discount, dtype),
  )


def faced_by(
  game: MarkovGame, policy: chex.Array, rewards: chex.Array, *, player: int
) -> _mdp.MDP:
  """The process that one player faces while the other's policy stays.

  Args:
    game: the game.
    policy: the other player's probabilities, (states, actions of that player).
    rewards: the table that the player collects, (states, actions, actions).
    player: 0 or 1, whose process it is.

  Returns:
    An `MDP`, whose rewards and transitions depend on the policy.

  Raises:
    ValueError: if the player is neither, or for another shape.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> game = bj.rl.random_game(0, states=3, actions=(2, 4))
    >>> leader = jnp.full((3, 2), 0.5)
    >>> mdp = bj.rl.faced_by(game, leader, game.rewards[1], player=1)
    >>> print(mdp.transitions.shape, mdp.rewards.shape)
    (3, 4, 3) (3, 4)
  """
  if player not in (0, 1):
    raise ValueError(f'faced_by: the player is 0 or 1, got {player!r}.')
  shape = game.transitions.shape[:3]
  if jnp.shape(rewards) != shape:
    raise ValueError(
      f'faced_by: rewards are one table of the game, of shape {shape}, got '
      f'{jnp.shape(rewards)}.'
    )
  theirs = shape[0], shape[2 - player]
  if jnp.shape(policy) != theirs:
    raise ValueError(
      f'faced_by: player {player} faces a policy of player {1 - player}, of '
      f'shape {theirs}, got {jnp.shape(policy)}.'
    )
  states, _, second, after = game.transitions.shape
  # Products in whose backward pass the transitions are not transposed either:
  # they are far larger than all else here, and a pass over them is what counts.
  if player == 0:
    moves = (policy[:, None, None] @ game.transitions)[:, :, 0]
    gains = jnp.einsum('sb,sab->sa', policy, rewards)
  else:
    flat = game.transitions.reshape(states, -1, second * after)
    moves = (policy[:, None] @ flat).reshape(states, second, after)
    gains = jnp.einsum('sa,sab->sb', policy, rewards)
  return _mdp.MDP(moves, gains, game.discount, game.initial)


def zero_sum_responses(
  game: MarkovGame,
  costs: chex.Array,
  policies: tuple[chex.Array, chex.Array],
  *,
  temperature: chex.Numeric,
) -> tuple[_mdp.MDP, _mdp.MDP]:
  r"""What each player of a regularised zero-sum game faces.

  The first player minimises and the second maximises

  .. math::
    J(a, b) = E \sum_t \gamma^t [ c(s_t, a_t, b_t) - \tau H(a(s_t))
      + \tau H(b(s_t)) ]

  Args:
    game: transitions, discount and first state.
    costs: c, (states, actions, actions).
    policies: of both players, probabilities (states, actions).
    temperature: :math:`\tau`.

  Returns:
    Two processes with the other player's entropy in their rewards: the best
    policies with temperature :math:`\tau` are the best responses, and their
    regularised returns are :math:`- \min_{a'} J(a', b)` and :math:`\max_{b'}
    J(a, b')`.

  Raises:
    ValueError: for a negative temperature, or as `faced_by`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> game = bj.rl.random_game(0, states=3, actions=(2, 4))
    >>> both = jnp.full((3, 2), 0.5), jnp.full((3, 4), 0.25)
    >>> faced = bj.rl.zero_sum_responses(
    ...   game, game.rewards[0], both, temperature=0.1
    ... )
    >>> one, two = (
    ...   bj.rl.expected_return(m, p, 0.1) for m, p in zip(faced, both)
    ... )
    >>> print(bool(abs(one + two) < 1e-5))
    True
  """
  _checks.within('zero_sum_responses', 'the temperature', temperature, 0)
  a, b = policies
  earned = lambda policy: temperature * _values.entropy(policy)[:, None]
  one = faced_by(game, b, -costs, player=0)
  two = faced_by(game, a, costs, player=1)
  return (
    one._replace(rewards=one.rewards - earned(b)),
    two._replace(rewards=two.rewards - earned(a)),
  )
