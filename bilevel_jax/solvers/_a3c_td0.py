"""Asynchronous advantage actor-critic with TD(0)."""

from typing import Any

import chex
import jax

from bilevel_jax import _checks, _keys, _sequences, descent, types
from bilevel_jax.evaluation import _delayed
from bilevel_jax.rl import _mdp, _td_actor_critic


def a3c_td0(
  mdp: _mdp.MDP,
  features: chex.Array,
  *,
  workers: int,
  actor: types.SequenceLike,
  critic: types.SequenceLike,
  key: Any,
  bound: int | None = None,
  service: str = 'round_robin',
  **oracle: Any,
) -> descent.Solver:
  r"""A3C-TD(0): N workers, one actor, one linear critic, stale parameters.

  .. math::
    \delta_k = r(s, a) + \gamma \phi(s')^\top \omega_{k - \tau_k}
      - \phi(s)^\top \omega_{k - \tau_k}, \qquad
    a \sim \pi_{\theta_{k - \tau_k}}(\cdot | s), \\
    \omega_{k+1} = \Pi_{\|\omega\| \le R} [
      \omega_k + \beta_k \, \delta_k \, \phi(s) ], \qquad
    \theta_{k+1} = \theta_k + \alpha_k \, \delta_k \,
      \nabla_\theta \log \pi_{\theta_{k - \tau_k}}(a | s)

  Each update is made by one worker. With decreasing steps, for instance
  `power_schedule(c, 0.6)` for the actor and `power_schedule(c, 0.4)` for the
  critic, delays have no effect in the limit: N workers need as many updates in
  total as one worker, and 1 / N of the samples each. With large constant steps,
  delays do harm.

  Args:
    mdp: the process, of `bj.rl.make_mdp`.
    features: :math:`\phi`, (states, size).
    workers: N, at least 1. For the service `round_robin` it may be traced if
      `bound` is set.
    actor: the optimiser or the `Sequence` of :math:`\theta`, logits (states,
      actions).
    critic: the optimiser or the `Sequence` of :math:`\omega`, (size,). The ball
      is the `set` of a record, for instance
      `optax.projections.projection_l2_ball`. Its radius is at least
      :math:`r_{\max} / \lambda`, with the largest reward and the smallest
      curvature of the critic's system, so that it contains
      :math:`\omega^*_\theta` for all policies.
    key: PRNG key of all samples, or a whole number.
    bound: the largest delay, as in `bj.evaluation.delayed`.
    service: the order of the workers, as in `bj.evaluation.delayed`.
    **oracle: further arguments of `bj.rl.td_actor_critic`, for instance
      `samples`, the number per worker and update.

  Returns:
    A solver for `bj.sequences(actor=..., critic=...)`. It needs no batch.

  Raises:
    ValueError: from `bj.evaluation.delayed` and `bj.rl.td_actor_critic`, and if
      a record has a `batch_at`.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> ball = lambda z: optax.projections.projection_l2_ball(z, 100.0)
    >>> mdp = bj.rl.random_mdp(0, states=6, actions=2, discount=0.8)
    >>> features = bj.rl.random_features(1, states=6, size=3)
    >>> solver = bj.solvers.a3c_td0(
    ...   mdp, features, workers=8, key=0,
    ...   actor=optax.sgd(bj.solvers.power_schedule(10.0, 0.6)),
    ...   critic=bj.Sequence(
    ...     optax.sgd(bj.solvers.power_schedule(1.0, 0.4)), set=ball
    ...   ),
    ... )
    >>> params = bj.sequences(actor=jnp.zeros((6, 2)), critic=jnp.zeros(3))
    >>> params, state = bj.testing.run(solver, params, 5_000)
    >>> best = bj.rl.optimal(mdp)
    >>> achieved = bj.rl.expected_return(mdp, jax.nn.softmax(params.actor))
    >>> print(achieved > 0.95 * mdp.initial @ best.values)
    True
    >>> print(bj.values(state)['delay'])
    7.0

  References:
    Shen, Zhang, Hong and Chen, `Towards Understanding Asynchronous Advantage
    Actor-Critic: Convergence and Linear Speedup
    <https://arxiv.org/abs/2012.15511>`_, 2023.
  """
  _sequences.refuse_batches(
    'a3c_td0', 'it draws its samples itself', actor=actor, critic=critic
  )
  sample_key, service_key = jax.random.split(_keys.as_key(key, 'a3c_td0'))
  chains = workers
  if isinstance(workers, jax.Array) and bound is not None:
    chains = bound + 1
  one = _td_actor_critic.td_actor_critic(
    mdp,
    features,
    key=sample_key,
    workers=_checks.whole_number('a3c_td0', 'workers', chains),
    **oracle,
  )
  delayed = _delayed.delayed(
    one, workers, bound=bound, service=service, key=service_key
  )
  return descent.descend(delayed, actor=actor, critic=critic)
