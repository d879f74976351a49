"""Advantage actor-critic: losses, gradients, and an on-policy oracle."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _checks, _keys
from bilevel_jax.oracles import base
from bilevel_jax.rl import _distributions, _returns, _rollouts

VALUES = ('actor', 'critic', 'entropy')


class ActorCriticParams(NamedTuple):
  """The two sequences of an actor-critic method.

  Attributes:
    actor: the weights of the policy, any pytree of arrays.
    critic: the weights of the value, any pytree of arrays.
  """

  actor: Any
  critic: Any


class Advantages(NamedTuple):
  """How advantages are computed from rewards.

  Attributes:
    discount: the discount in [0, 1].
    decay: the decay of generalised advantages; 0 for temporal differences.
    reward_scale: factor on rewards, in the losses only.
    normalise: whether the actor's advantages have mean 0 and deviation 1.
  """

  discount: chex.Numeric
  decay: chex.Numeric = 0.95
  reward_scale: chex.Numeric = 1.0
  normalise: bool = False


def actor_critic_losses(
  outputs: Any,
  values: chex.Array,
  next_values: chex.Array,
  rollout: _rollouts.Rollout,
  *,
  distribution: _distributions.Distribution,
  advantages: Advantages,
) -> tuple[chex.Array, chex.Array, chex.Array]:
  r"""The actor loss, the critic loss and the mean entropy of the policy.

  .. math::
    -\overline{A_t \log \pi(a_t | s_t)}, \qquad
    \tfrac{1}{2} \overline{(V(s_t) - [V(s_t) + A_t])^2}, \qquad
    \overline{H(\pi(\cdot | s_t))}

  Advantages and the critic's targets, in brackets, are constant in derivatives.

  Args:
    outputs: outputs of the policy at the rollout's observations,
      (steps, environments, ...).
    values: values of the critic there, (steps, environments).
    next_values: values of the observations after each step,
      (steps, environments).
    rollout: the transitions.
    distribution: distribution of the actions.
    advantages: how advantages are computed.

  Returns:
    Three scalars, to be added with weights, for instance if actor and critic
    share a trunk.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> zeros, no, at = jnp.zeros([2, 1]), jnp.zeros([2, 1], bool), None
    >>> rollout = bj.rl.Rollout(at, zeros.astype(int), zeros + 1, no, no, at)
    >>> losses = bj.rl.actor_critic_losses(
    ...   jnp.zeros([2, 1, 4]), zeros, zeros, rollout,
    ...   distribution=bj.rl.categorical(),
    ...   advantages=bj.rl.Advantages(discount=0.5, decay=1.0))
    >>> print(*(f'{x:.2f}' for x in losses))  # The actor loss: log(4) 2.5 / 2
    1.73 0.81 1.39
  """
  scaled = advantages.reward_scale * rollout.rewards
  constant = jax.lax.stop_gradient
  estimates = _returns.generalised_advantages(
    scaled,
    constant(values),
    constant(next_values),
    rollout.terminated,
    rollout.truncated,
    discount=advantages.discount,
    decay=advantages.decay,
  )
  critic = jnp.mean((values - constant(values + estimates)) ** 2) / 2
  if advantages.normalise:
    estimates = (estimates - estimates.mean()) / (estimates.std() + 1e-8)
  logs = distribution.log_prob(outputs, rollout.actions)
  actor = -jnp.mean(logs * estimates.astype(logs.dtype))
  return actor, critic, jnp.mean(distribution.entropy(outputs))


def actor_critic_gradient(
  policy: Callable[[Any, Any], Any],
  value: Callable[[Any, Any], chex.Array],
  *,
  distribution: _distributions.Distribution,
  advantages: Advantages,
  entropy_bonus: chex.Numeric = 0.0,
) -> base.Oracle:
  r"""The gradients of an actor and its critic on a rollout.

  .. math::
    d^\theta = -\overline{A_t \nabla \log \pi_\theta(a_t | s_t)} -
    \beta \overline{\nabla H(\pi_\theta(\cdot | s_t))}, \qquad
    d^\omega = -\overline{A_t \nabla V_\omega(s_t)}

  Args:
    policy: (actor, observation) -> outputs, for one observation.
    value: (critic, observation) -> scalar, for one observation.
    distribution: distribution of actions for the policy's outputs.
    advantages: how advantages are computed.
    entropy_bonus: :math:`\beta \ge 0`.

  Returns:
    An oracle for the sequences `actor` and `critic` whose batch is a
    `Rollout`. It measures `actor`, `critic` and `entropy`.

  Raises:
    ValueError: if a number is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.rl.actor_critic_gradient(
    ...   lambda actor, at: actor, lambda critic, at: critic,
    ...   distribution=bj.rl.categorical(),
    ...   advantages=bj.rl.Advantages(discount=0.9, decay=0.0))
    >>> no, at = jnp.zeros([1, 1], bool), jnp.zeros([1, 1, 1])
    >>> rollout = bj.rl.Rollout(
    ...   at, jnp.zeros([1, 1], int), jnp.ones([1, 1]), ~no, no, at)
    >>> params = bj.rl.ActorCriticParams(jnp.zeros(2), jnp.float32(0.0))
    >>> print(*oracle.update(rollout, oracle.init(params), params)[0])
    [-0.5  0.5] -1.0
  """
  name = 'actor_critic_gradient'
  _checks.within(name, 'entropy_bonus', entropy_bonus, 0)
  _checks.within(name, 'discount', advantages.discount, 0, 1)
  _checks.within(name, 'decay', advantages.decay, 0, 1)

  def fn(params, rollout, inner):
    lead = rollout.rewards.shape
    flat = lambda tree: jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[len(lead) :]), tree
    )

    def apply_all(apply, weights, observations):
      outputs = jax.vmap(apply, (None, 0))(weights, flat(observations))
      return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), outputs)

    def loss(weights):
      actor, critic = weights
      losses = actor_critic_losses(
        apply_all(policy, actor, rollout.observations),
        apply_all(value, critic, rollout.observations),
        apply_all(value, params.critic, rollout.next_observations),
        rollout,
        distribution=distribution,
        advantages=advantages,
      )
      # Without shared parameters, one backward pass gives both gradients.
      return losses[0] + losses[1] - entropy_bonus * losses[2], losses

    weights = params.actor, params.critic
    (actor, critic), losses = jax.grad(loss, has_aux=True)(weights)
    return losses, base.gradients(params, actor=actor, critic=critic), inner

  return base.oracle(
    fn,
    VALUES,
    counts={'gradients/actor': 1, 'gradients/critic': 1},
    moves=('actor', 'critic'),
    # Normalised advantages depend on the whole batch.
    linear=not advantages.normalise,
  )


@_checks.regrouped('advantages', Advantages)
@_checks.regrouped('collection', _rollouts.Collection)
def actor_critic(
  policy: Callable[[Any, Any], Any],
  value: Callable[[Any, Any], chex.Array],
  environment: _rollouts.Environment,
  *,
  collection: _rollouts.Collection,
  advantages: Advantages,
  key: Any,
  entropy_bonus: chex.Numeric = 0.0,
) -> base.Oracle:
  r"""Advantage actor-critic with environments in the oracle's state.

  Each update steps all environments under the current policy and returns the
  gradients of the actor and the critic on these steps: see
  `actor_critic_gradient`. With `decay=0` and `steps=1` these are TD(0) and its
  policy gradient.

  Args:
    policy: (actor, observation) -> logits, or (mean, log deviation) for
      continuous actions; for one observation.
    value: (critic, observation) -> scalar, for one observation.
    environment: one environment; actions are drawn from a softmax, or from a
      normal distribution.
    collection: the number of environments and of their steps in an update.
    advantages: the discount, and how rewards are used.
    key: PRNG key of environments and actions, or a whole number.
    entropy_bonus: weight of the policy's entropy, at least 0.

  Returns:
    An oracle for the sequences `actor` and `critic`; the batch is None.
    `bj.values` has `actor`, `critic` and `entropy`, `bj.outputs` the finished
    `episodes` (see `mean_return`), `bj.counts` also `steps/environment`.

  Raises:
    ValueError: if a number is out of range.
    TypeError: without a key; at init, if the policy does not fit the actions,
      or the value is not a scalar.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> def step(key, state, action):  # Two arms; the second pays.
    ...   return 0.0, 0.0, action * 1.0, jnp.array(True), jnp.array(False), 0.0
    >>> bandit = bj.rl.Environment(lambda key: (0.0, 0.0), step, actions=2)
    >>> oracle = bj.rl.actor_critic(
    ...   lambda actor, at: actor, lambda critic, at: critic, bandit,
    ...   collection=bj.rl.Collection(environments=8, steps=4),
    ...   advantages=bj.rl.Advantages(discount=0.9), key=0)
    >>> solver = bj.descend(oracle, actor=optax.sgd(0.5), critic=optax.sgd(0.5))
    >>> params = bj.rl.ActorCriticParams(jnp.zeros(2), jnp.float32(0.0))
    >>> state, update = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(100):
    ...   updates, state = update(None, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(jax.nn.softmax(params.actor)[1] > 0.9, params.critic > 0.9)
    True True

  References:
    Shen, Zhang, Hong and Chen, `Towards Understanding Asynchronous Advantage
    Actor-critic: Convergence and Linear Speedup
    <https://arxiv.org/abs/2012.15511>`_, 2020.
  """
  key = _keys.as_key(key, 'actor_critic')
  distribution = _distributions.action_distribution(environment.actions)
  batched = jax.vmap(policy, (None, 0))

  def act(params, key, observations):
    return distribution.sample(key, batched(params.actor, observations))

  oracle = actor_critic_gradient(
    policy,
    value,
    distribution=distribution,
    advantages=advantages,
    entropy_bonus=entropy_bonus,
  )
  collector = _rollouts.rollouts(environment, act, **collection._asdict())
  on_policy = _rollouts.on_policy(oracle, collector, key=key)

  def init(params):
    _require_fit(policy, value, environment, params)
    return on_policy.init(params)

  return base.Oracle(init, on_policy.update, oracle.moves)


def _require_fit(policy, value, environment, params) -> None:
  """Raises TypeError if policy or value do not fit the environment."""
  if not {'actor', 'critic'} <= set(getattr(params, '_fields', ())):
    return  # The oracle raises the error.
  observation, _ = jax.eval_shape(environment.reset, jax.random.key(0))
  outputs = jax.eval_shape(policy, params.actor, observation)
  _distributions.require_outputs(outputs, environment.actions)
  shape = jax.eval_shape(value, params.critic, observation).shape
  if shape:
    raise TypeError(
      f'the value of one observation is a scalar, got shape {shape}: return '
      'its entry, [0] for instance.'
    )
