"""Markov games of two players, and the process that each player faces."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys
from bilevel_jax.rl import _mdp, _values


class MarkovGame(NamedTuple):
  """A finite discounted Markov game of two players.

  `make_game` creates one with checks. Fields may be traced and differentiated.

  Attributes:
    transitions: probabilities of the next state, (states, actions of the first
      player, actions of the second, states).
    rewards: tables of one or more rewards, (rewards, states, actions, actions),
      those of a leader and a follower for instance.
    discount: the discount in [0, 1), a scalar.
    initial: probabilities of the first state, (states,).
  """

  transitions: chex.Array
  rewards: chex.Array
  discount: chex.Numeric
  initial: chex.Array


def make_game(
  transitions: Any, rewards: Any, *, discount: Any, initial: Any = None
) -> MarkovGame:
  r"""Creates a Markov game of two players, with checks.

  Args:
    transitions: (states, actions, actions, states).
    rewards: (rewards, states, actions, actions).
    discount: :math:`\gamma` in [0, 1).
    initial: (states,); uniform by default.

  Returns:
    A `MarkovGame`. Only the shapes of traced arrays are checked.

  Raises:
    ValueError: as in `make_mdp`, for the process of joint actions.

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
    states: the number of states.
    actions: the numbers of actions of the two players.
    rewards: the number of reward tables.
    discount: the discount in [0, 1).
    dtype: the dtype of its fields.

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


def induced_mdp(
  game: MarkovGame, policy: chex.Array, rewards: chex.Array, *, player: int
) -> _mdp.MDP:
  """The process of one player for a constant policy of the other player.

  Args:
    game: the game.
    policy: the other player's probabilities, (states, actions of that player).
    rewards: the player's reward table, (states, actions, actions).
    player: the player of the process, 0 or 1.

  Returns:
    An `MDP`, whose rewards and transitions depend on the policy.

  Raises:
    ValueError: if the player is not 0 or 1, or a shape does not match.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> game = bj.rl.random_game(0, states=3, actions=(2, 4))
    >>> leader = jnp.full((3, 2), 0.5)
    >>> mdp = bj.rl.induced_mdp(game, leader, game.rewards[1], player=1)
    >>> print(mdp.transitions.shape, mdp.rewards.shape)
    (3, 4, 3) (3, 4)
  """
  if player not in (0, 1):
    raise ValueError(f'induced_mdp: the player is 0 or 1, got {player!r}.')
  shape = game.transitions.shape[:3]
  if jnp.shape(rewards) != shape:
    raise ValueError(
      f'induced_mdp: rewards are one table of the game, of shape {shape}, got '
      f'{jnp.shape(rewards)}.'
    )
  expected = shape[0], shape[2 - player]
  if jnp.shape(policy) != expected:
    raise ValueError(
      f'induced_mdp: player {player} faces a policy of player {1 - player}, of '
      f'shape {expected}, got {jnp.shape(policy)}.'
    )
  states, _, second, after = game.transitions.shape
  # These products need no transposed copy of the transitions, also in the
  # backward pass. Passes over the transitions dominate the time.
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
  r"""The processes of the two players of a regularised zero-sum game.

  The first player minimises and the second player maximises

  .. math::
    J(a, b) = E \sum_t \gamma^t [ c(s_t, a_t, b_t) - \tau H(a(s_t))
      + \tau H(b(s_t)) ]

  Args:
    game: transitions, discount and initial state.
    costs: c, (states, actions, actions).
    policies: probabilities of both players, (states, actions).
    temperature: :math:`\tau`.

  Returns:
    Two processes with the other player's entropy in their rewards: their best
    policies with temperature :math:`\tau` are the best responses, with the
    regularised returns :math:`- \min_{a'} J(a', b)` and :math:`\max_{b'} J(a,
    b')`.

  Raises:
    ValueError: for a negative temperature, or as in `induced_mdp`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> game = bj.rl.random_game(0, states=3, actions=(2, 4))
    >>> both = jnp.full((3, 2), 0.5), jnp.full((3, 4), 0.25)
    >>> mdps = bj.rl.zero_sum_responses(
    ...   game, game.rewards[0], both, temperature=0.1
    ... )
    >>> one, two = (
    ...   bj.rl.expected_return(m, p, 0.1) for m, p in zip(mdps, both)
    ... )
    >>> print(bool(abs(one + two) < 1e-5))
    True
  """
  _checks.within('zero_sum_responses', 'the temperature', temperature, 0)
  a, b = policies
  bonus = lambda policy: temperature * _values.entropy(policy)[:, None]
  one = induced_mdp(game, b, -costs, player=0)
  two = induced_mdp(game, a, costs, player=1)
  return (
    one._replace(rewards=one.rewards - bonus(b)),
    two._replace(rewards=two.rewards - bonus(a)),
  )
