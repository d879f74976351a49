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

  An update is one worker's. With steps that fall, such as
  `power_schedule(c, 0.6)` for the actor and `power_schedule(c, 0.4)` for the
  critic, the delays do no harm in the long run: N workers need as many updates
  together as one alone, and so 1 / N as many samples each. With large constant
  steps they do.

  Args:
    mdp: the process, of `bj.rl.make_mdp`.
    features: :math:`\phi`, (states, size).
    workers: N, at least 1; in turn, it may be traced, if `bound` is given.
    actor: the optimiser or the `Sequence` of :math:`\theta`, logits (states,
      actions).
    critic: that of :math:`\omega`, (size,); the ball is the `set` of a record,
      `optax.projections.projection_l2_ball` for instance. It has to hold
      :math:`\omega^*_\theta` of all policies: :math:`r_{\max} / \lambda`, with
      the largest reward and the least curvature of the critic's system.
    key: PRNG key, or a whole number, of all samples.
    bound: the largest delay, as in `bj.evaluation.delayed`.
    service: whose turn it is, likewise.
    **oracle: further arguments of `bj.rl.td_actor_critic`, `samples` of each
      worker in an update for instance.

  Returns:
    A solver for `bj.sequences(actor=..., critic=...)`. It looks at no batch.

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
    >>> @jax.jit
    ... def run(params, state):
    ...   def body(carry, _):
    ...     updates, state = solver.update(None, carry[1], carry[0])
    ...     return (bj.apply_updates(carry[0], updates), state), None
    ...   return jax.lax.scan(body, (params, state), length=5_000)[0]
    >>> params, state = run(params, solver.init(params))
    >>> best = bj.rl.optimal(mdp)
    >>> worth = bj.rl.expected_return(mdp, jax.nn.softmax(params.actor))
    >>> print(worth > 0.95 * mdp.initial @ best.values)
    True
    >>> print(bj.values(state)['delay'])
    7.0

  References:
    Shen, Zhang, Hong and Chen, `Towards Understanding Asynchronous Advantage
    Actor-Critic: Convergence and Linear Speedup
    <https://arxiv.org/abs/2012.15511>`_, 2023.
  """
  _sequences.refuse_batches(
    'a3c_td0', 'the samples are drawn in its state', actor=actor, critic=critic
  )
  of_samples, of_turns = jax.random.split(_keys.as_key(key, 'a3c_td0'))
  chains = workers
  if isinstance(workers, jax.Array) and bound is not None:
    chains = bound + 1
  one = _td_actor_critic.td_actor_critic(
    mdp,
    features,
    key=of_samples,
    workers=_checks.whole('a3c_td0', 'workers', chains),
    **oracle,
  )
  late = _delayed.delayed(
    one,
    workers,
    bound=bound,
    service=service,
    key=of_turns,
  )
  return descent.descend(late, actor=actor, critic=critic)
