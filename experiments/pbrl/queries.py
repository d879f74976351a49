r"""Queries by disagreement of an ensemble of reward models.

.. math::
  u = \operatorname{Var}_m \, \sigma(R_m(\text{second}) - R_m(\text{first}))

Paper: Christiano et al., Deep Reinforcement Learning from Human Preferences,
2017. The members have their own initial weights and their own batches; the
reward of a step is the mean of theirs.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from experiments import harness
from experiments.pbrl import preferences


def as_ensemble(member: harness.Network, count: int) -> harness.Network:
  """Makes a network with the mean output of several.

  Args:
    member: network of a member.
    count: number of members, a leading axis of the weights.
  """
  apply = jax.vmap(member.apply, (0, None))
  return member._replace(
    init=lambda key: jax.vmap(member.init)(jax.random.split(key, count)),
    apply=lambda weights, observation: apply(weights, observation).mean(axis=0),
  )


def ensemble_margins(
  member: Callable[[Any, Any], chex.Array],
  weights: Any,
  pairs: preferences.Pairs,
  *,
  own: bool = False,
) -> chex.Array:
  """Margins of each member, (members, ...).

  Args:
    member: (weights, observation) -> a reward per action.
    weights: of all members.
    pairs: of fragments.
    own: whether pairs have a leading axis of members, each with its own pairs.
  """
  margins = lambda x, pairs: preferences.margins(member, x, pairs)
  return jax.vmap(margins, (0, 0 if own else None))(weights, pairs)


def disagreement(margins: chex.Array) -> chex.Array:
  """Variance over members of the predicted preference, (pairs,).

  Args:
    margins: (members, pairs).
  """
  return jnp.var(jax.nn.sigmoid(margins), axis=0)


def select_disagreed(
  member: Callable[[Any, Any], chex.Array],
  weights: Any,
  candidates: preferences.Fragments,
  count: int,
) -> preferences.Fragments:
  """Selects the pairs on which the members disagree most.

  Args:
    member: (weights, observation) -> a reward per action.
    weights: of all members.
    candidates: fragments (candidates, 2, ...).
    count: number of selected pairs.

  Returns:
    Fragments (count, 2, ...).
  """
  first, second = preferences.as_sides(candidates)
  pairs = preferences.Pairs(first, second, jnp.zeros(len(first.returns)))
  score = disagreement(ensemble_margins(member, weights, pairs))
  _, index = jax.lax.top_k(score, count)
  return jax.tree.map(lambda x: x[index], candidates)
