"""PBRL: penalty methods for a lower Markov decision process."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import optax

from bilevel_jax import _checks, _sequences, descent, oracles, rl, types


class PolicyGap(NamedTuple):
  r"""The penalty of `pbrl` and the gradient that it gives.

  Attributes:
    form: 'value' or 'bellman'. The value penalty weights states by the visits
      of the policy, so that it neglects states without visits. The Bellman
      penalty weights states by `weights`. Visits sum to
      :math:`1 / (1 - \gamma)` and weights to 1, so that the Bellman penalty
      needs a larger weight by that factor, and more if `weights` is spread over
      states that are rarely visited.
    weights: weights :math:`\rho` of the Bellman penalty, (states,), all
      positive; by default the process's initial probabilities.
    natural: whether y moves along the natural gradient for these weights, the
      advantage, instead of the plain gradient, which vanishes with the
      probability of an action.
    rescale: whether to multiply the gradient by :math:`c_k`.
  """

  form: Literal['value', 'bellman'] = 'value'
  weights: Any = None
  natural: bool = True
  rescale: bool = True


@_checks.regrouped('gap', PolicyGap)
def pbrl(
  loss: types.Loss,
  process: Callable[[Any], rl.MDP],
  *,
  temperature: chex.Numeric,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
  gap: PolicyGap | None = None,
) -> descent.Solver:
  r"""PBRL: a leader, and a follower that is optimal in the leader's process.

  .. math::
    \min_x f(x, y) \quad \text{where} \quad
    y \in \arg\max_{y'} V^{\pi_{y'}}_{M_\tau(x)}(\rho)

  with softmax policies and :math:`\tau` times the entropy in the reward. With
  logits w that follow the optimal policy of the process,

  .. math::
    w_{k+1} &= (1 - \eta) w_k + \eta \, Q^{\pi_{w_k}}_{M_\tau(x_k)} / \tau
      \quad \text{(T times)} \\
    (x, y)_{k+1} &= \Pi [ (x, y)_k - \alpha c_k \nabla ( f + \lambda_k p_k
      )(x_k, y_k) ], \qquad c_k = \min(1 / \lambda_k, 1)

  where p is the value penalty, :math:`V^{\pi_w} - V^{\pi_y}`, or the Bellman
  penalty of `bj.rl.bellman_gap`; w is constant in the derivative. It is V-PBGD
  with the lower loss :math:`- V` and policy mirror descent for its inner steps.
  With one inner step it is a single loop.

  Args:
    loss: :math:`f(x, y, batch)`, where y is the follower's logits.
    process: from x to an `MDP`; rewards, transitions or both may depend on x.
    temperature: :math:`\tau > 0`, reward per nat of entropy.
    penalty: :math:`\lambda_k \ge 0`, a constant or a schedule. With an
      increasing one the leader can move the follower before the penalty keeps
      the follower near its optimum.
    upper: how x moves, an optax optimiser or a `Sequence`.
    lower: how y, logits (states, actions), moves, an optax optimiser or a
      `Sequence`.
    value: how w moves; by default one step of soft policy iteration, that is
      :math:`\eta = 1`. It starts at y.
    gap: the form of the penalty and of its gradient.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `gap`, and
    `bj.auxiliaries` the logits w as `value`.

  Raises:
    ValueError: if the temperature is not positive, the penalty is negative, the
      form is unknown or `value` has a `batch_at`; at init, if transitions are
      not probabilities, the logits have another shape than the rewards, or a
      weight of the Bellman penalty is zero.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> def process(x):  # One state; the leader pays x for the second action.
    ...   rewards = jnp.stack([1.0, x])[None]
    ...   return bj.rl.make_mdp(jnp.ones((1, 2, 1)), rewards, discount=0.0)
    >>> def loss(x, y, batch):  # Prefers the second action and low payments.
    ...   return jax.nn.softmax(y)[0, 1] * (x - 3)
    >>> solver = bj.solvers.pbrl(
    ...   loss, process, temperature=0.2, penalty=30.0,
    ...   upper=optax.sgd(0.5), lower=optax.sgd(1.0))
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.zeros((1, 2)))
    >>> params, _ = bj.testing.run(solver, params, 500)
    >>> print(f"{params.upper:.1f} {jax.nn.softmax(params.lower)[0, 1]:.1f}")
    1.4 0.9

  References:
    Shen, Yang and Chen, `Principled Penalty-based Methods for Bilevel
    Reinforcement Learning and RLHF <https://arxiv.org/abs/2402.06886>`_, 2024.
  """
  form, weights, natural, rescale = gap or PolicyGap()
  if form not in ('value', 'bellman'):
    raise ValueError(f"pbrl: the form is 'value' or 'bellman', got {form!r}.")
  _sequences.refuse_batches(
    'pbrl', 'its steps use the process, without a batch', value=value
  )
  below = rl.follower_loss(process, temperature=temperature)
  problem = types.BilevelProblem(loss, below)
  shared: dict[str, Any] = {'penalty': penalty, 'rescale': rescale}
  if form == 'value':
    oracle = oracles.value_gap(problem, **shared)
  else:
    oracle = rl.bellman_gap(
      problem, process, temperature=temperature, weights=weights, **shared
    )

  def state_weights(params):
    mdp = process(params.upper)
    if form == 'value':
      policy = jax.nn.softmax(params.lower)
      return rl.state_visits(mdp, policy) / (1 - mdp.discount)
    return mdp.initial if weights is None else weights

  if natural:
    oracle = rl.natural(oracle, state_weights)
  low = types.as_sequence(lower, 'lower')
  default = types.Sequence(optax.sgd(1.0)) if value is None else value
  return descent.descend(
    rl.policy_mirror_descent(process, temperature=temperature),
    oracle,
    upper=upper,
    lower=low,
    value=types.value_sequence(default, low, set=None),
  )
