"""Finite Markov decision processes."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks, _keys


class MDP(NamedTuple):
  """A Markov decision process with finitely many states and actions.

  `make_mdp` creates one with checks. Fields may be traced and differentiated;
  `mdp._replace(rewards=...)` changes the rewards.

  Attributes:
    transitions: probabilities of the next state, (states, actions, states).
    rewards: mean rewards, (states, actions).
    discount: the discount in [0, 1), a scalar.
    initial: probabilities of the first state, (states,).
  """

  transitions: chex.Array
  rewards: chex.Array
  discount: chex.Numeric
  initial: chex.Array


def make_mdp(
  transitions: Any, rewards: Any, *, discount: Any, initial: Any = None
) -> MDP:
  r"""Creates a Markov decision process, with checks.

  Args:
    transitions: probabilities of the next state, (states, actions, states).
    rewards: rewards by state and action, (states, actions), or also by next
      state, (states, actions, states), which are averaged.
    discount: :math:`\gamma` in [0, 1).
    initial: probabilities of the first state, (states,); uniform by default.

  Returns:
    An `MDP` in the dtype of transitions and rewards. Only the shapes of traced
    arrays are checked.

  Raises:
    ValueError: for a wrong shape, invalid probabilities (the message names the
      first invalid row), a discount outside [0, 1), or rewards that are not
      finite.

  Example:
    >>> import bilevel_jax as bj
    >>> stay_or_go = [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    >>> mdp = bj.rl.make_mdp(stay_or_go, [[0, 1], [2, 0]], discount=0.5)
    >>> print(mdp.transitions.shape, mdp.initial)
    (2, 2, 2) [0.5 0.5]
  """
  arrays = [jnp.asarray(x) for x in (transitions, rewards, discount)]
  if initial is not None:
    arrays.append(jnp.asarray(initial))
  # Integers become floats; the discount does not affect the dtype.
  floats = [
    x.dtype for x in arrays[:2] if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  dtype = jnp.result_type(jnp.float32, *floats)
  moves, gains, gamma = (x.astype(dtype) for x in arrays[:3])
  if moves.ndim != 3 or moves.shape[0] != moves.shape[2] or not moves.size:
    raise ValueError(
      'make_mdp: transitions have the shape (states, actions, states), got '
      f'{moves.shape}.'
    )
  states, actions, _ = moves.shape
  if gains.shape not in ((states, actions), moves.shape):
    raise ValueError(
      f'make_mdp: for transitions of shape {moves.shape} rewards have the '
      f'shape {(states, actions)} or {moves.shape}, got {gains.shape}.'
    )
  first = (
    jnp.full(states, 1 / states, dtype)
    if initial is None
    else arrays[3].astype(dtype)
  )
  if first.shape != (states,):
    raise ValueError(
      f'make_mdp: initial has the shape {(states,)}, a probability for each '
      f'state, got {first.shape}.'
    )
  if gamma.shape:
    raise ValueError(
      f'make_mdp: the discount is a scalar, got the shape {gamma.shape}.'
    )
  _require_probabilities('transitions', moves)
  _require_probabilities('initial', first)
  _require_finite(gains)
  _checks.within('make_mdp', 'the discount', gamma, 0)
  if not isinstance(gamma, jax.core.Tracer) and float(gamma) >= 1:
    raise ValueError(
      f'make_mdp: the discount is in [0, 1), got {gamma}: undiscounted values '
      'may be infinite; pass a discount near 1, 0.99 for instance.'
    )
  if gains.ndim == 3:
    gains = jnp.sum(moves * gains, axis=-1)
  return MDP(moves, gains, gamma, first)


def _require_probabilities(name: str, rows: Any) -> None:
  if isinstance(rows, jax.core.Tracer):
    return
  rows = np.asarray(rows, np.float64)
  invalid = ~np.all(rows >= 0, axis=-1) | ~(np.abs(rows.sum(-1) - 1) < 1e-4)
  if np.any(invalid):
    at = tuple(int(i) for i in np.argwhere(invalid)[0]) if invalid.ndim else ()
    where = f'{name}[{", ".join(map(str, at))}]' if at else name
    raise ValueError(
      f'make_mdp: {where} is not a probability distribution (smallest entry '
      f'{rows[at].min():.3g}, sum {rows[at].sum():.6g}): divide nonnegative '
      'weights by their sum over the last axis.'
    )


def _require_finite(rewards: Any) -> None:
  if isinstance(rewards, jax.core.Tracer):
    return
  invalid = ~np.isfinite(np.asarray(rewards))
  if np.any(invalid):
    at = [int(i) for i in np.argwhere(invalid)[0]]
    raise ValueError(f'make_mdp: the reward at {at} is not finite.')


def random_mdp(
  key: Any,
  *,
  states: int = 100,
  actions: int = 5,
  discount: float = 0.95,
  dtype: Any = jnp.float32,
) -> MDP:
  """A dense random process: uniform weights and rewards in [0, 1].

  Args:
    key: PRNG key, or a whole number.
    states: the number of states.
    actions: the number of actions.
    discount: the discount in [0, 1).
    dtype: the dtype of its fields.

  Returns:
    An `MDP` whose rows of transitions are uniform weights divided by their
    sum; the first state is uniform.

  Raises:
    ValueError: if a number is below 1 or the discount is outside [0, 1).

  Example:
    >>> import bilevel_jax as bj
    >>> mdp = bj.rl.random_mdp(0, states=4, actions=2)
    >>> print(mdp.transitions.sum(-1).round(3)[0], mdp.rewards.shape)
    [1. 1.] (4, 2)
  """
  _checks.whole_number('random_mdp', 'states', states)
  _checks.whole_number('random_mdp', 'actions', actions)
  one, two = jax.random.split(_keys.as_key(key, 'random_mdp'))
  weights = jax.random.uniform(one, (states, actions, states), dtype)
  return make_mdp(
    weights / weights.sum(-1, keepdims=True),
    jax.random.uniform(two, (states, actions), dtype),
    discount=jnp.asarray(discount, dtype),
  )
