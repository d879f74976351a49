"""Linear critics: the fixed point of TD(0), and random features."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys
from bilevel_jax.rl import _mdp, _values


def random_features(
  key: Any, *, states: int = 100, size: int = 10, dtype: Any = jnp.float32
) -> chex.Array:
  """Uniform random features of states with norms of at most 1.

  Args:
    key: PRNG key, or a whole number.
    states: the number of states.
    size: the number of features per state.
    dtype: the dtype of the features.

  Returns:
    An array (states, size) of numbers in [0, 1] divided by the length of the
    longest row.

  Raises:
    ValueError: if a number is below 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> features = bj.rl.random_features(0, states=7, size=3)
    >>> print(features.shape, jnp.linalg.norm(features, axis=1).max().round(3))
    (7, 3) 1.0
  """
  _checks.whole_number('random_features', 'states', states)
  _checks.whole_number('random_features', 'features', size)
  draws = jax.random.uniform(
    _keys.as_key(key, 'random_features'), (states, size), dtype
  )
  return draws / jnp.linalg.norm(draws, axis=-1).max()


def td_system(
  mdp: _mdp.MDP,
  policy: chex.Array,
  features: chex.Array,
  *,
  weights: chex.Array | None = None,
  bootstrap_restarts: bool = False,
) -> tuple[chex.Array, chex.Array]:
  r"""The mean TD(0) increment of a linear critic, :math:`A \omega + b`.

  .. math::
    A = \sum_s \mu(s) \phi(s) \, [\gamma \, E \phi(s') - \phi(s)]^\top, \qquad
    b = \sum_s \mu(s) \phi(s) r_\pi(s)

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).
    features: :math:`\phi`, (states, size).
    weights: :math:`\mu`, (states,); by default the discounted visits of the
      policy.
    bootstrap_restarts: whether :math:`s'` is the next state of the chain that
      restarts from the initial distribution with probability
      :math:`1 - \gamma`, instead of that of the process.

  Returns:
    A, (size, size), and b, (size,).

  Raises:
    ValueError: if features or weights do not match the number of states.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.make_mdp(jnp.ones((1, 1, 1)), [[3.0]], discount=0.5)
    >>> print(bj.rl.td_system(mdp, jnp.ones((1, 1)), jnp.ones((1, 1))))
    (Array([[-0.5]], dtype=float32), Array([3.], dtype=float32))
  """
  if features.ndim != 2 or len(features) != len(mdp.initial):
    raise ValueError(
      f'features have a row for each of {len(mdp.initial)} states, got the '
      f'shape {features.shape}.'
    )
  moves, rewards = _values.reward_process(mdp, policy)
  if weights is None:
    weights = _values.state_visits(mdp, policy)
  if jnp.shape(weights) != mdp.initial.shape:
    raise ValueError(
      f'td_system: weights have the shape {mdp.initial.shape}, one for each '
      f'state, got {jnp.shape(weights)}.'
    )
  after = moves @ features
  if bootstrap_restarts:
    after = mdp.discount * after + (1 - mdp.discount) * mdp.initial @ features
  weighted = weights[:, None] * features
  return weighted.T @ (mdp.discount * after - features), weighted.T @ rewards


def td_fixed_point(
  mdp: _mdp.MDP,
  policy: chex.Array,
  features: chex.Array,
  *,
  weights: chex.Array | None = None,
  bootstrap_restarts: bool = False,
) -> chex.Array:
  r"""The fixed point of TD(0) for a linear critic.

  .. math::
    \omega^* = -A^{-1} b

  with A and b of `td_system`. For linearly dependent features there are many
  fixed points; TD(0) from zero converges to that of least norm.

  Args:
    mdp: the process.
    policy: probabilities, (states, actions).
    features: :math:`\phi`, (states, size).
    weights: :math:`\mu`, (states,); by default the discounted visits.
    bootstrap_restarts: the chain of :math:`s'`, as in `td_system`.

  Returns:
    :math:`\omega^*`, (size,).

  Raises:
    ValueError: if features or weights do not match the number of states.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> mdp = bj.rl.random_mdp(0, states=4, actions=2, discount=0.5)
    >>> policy = jnp.full((4, 2), 0.5)
    >>> table = bj.rl.td_fixed_point(mdp, policy, jnp.eye(4))
    >>> print(jnp.allclose(table, bj.rl.state_values(mdp, policy), rtol=1e-4))
    True
  """
  matrix, right = td_system(
    mdp,
    policy,
    features,
    weights=weights,
    bootstrap_restarts=bootstrap_restarts,
  )
  return -jnp.linalg.pinv(matrix) @ right
