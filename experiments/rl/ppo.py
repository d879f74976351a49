r"""Proximal policy optimisation on rollouts.

.. math::
  \rho_t = \frac{\pi_\theta(a_t | s_t)}{\pi_{old}(a_t | s_t)}, \quad
  -\overline{\min(\rho_t A_t, clip(\rho_t, 1 - c, 1 + c) A_t)} +
  \frac{w}{2} \overline{\max((V_t - R_t)^2, (\bar V_t - R_t)^2)} -
  \beta \overline{H_t}

with the old value moved by at most c as :math:`\bar V_t`. Each rollout is used
for several epochs of minibatches. One epoch of one minibatch is the advantage
actor-critic. Schulman et al., 2017; details as in purejaxrl.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.rl import networks, recurrent

VALUES = ('actor', 'critic', 'entropy', 'kl', 'clipped')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the update; the defaults are those of purejaxrl.

  Attributes:
    epochs: passes over a rollout.
    minibatches: gradient steps of a pass.
    clip: largest change of a ratio of probabilities, and of a value.
    value_weight: weight of the critic's loss.
    discount: discount of rewards.
    decay: lambda of generalised advantages.
    normalise: whether advantages of a minibatch have mean 0 and deviation 1.
  """

  epochs: Annotated[int, harness.Allowed(1)] = 4
  minibatches: Annotated[int, harness.Allowed(1)] = 4
  clip: Annotated[float, harness.Allowed(0)] = 0.2
  value_weight: Annotated[float, harness.Allowed(0)] = 0.5
  discount: Annotated[float, harness.Allowed(0, 1)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  normalise: bool = True


class Sample(NamedTuple):
  """Steps with the old policy's numbers; leaves are (steps, rows, ...).

  Attributes:
    observations: the policy's inputs.
    actions: actions.
    ends: whether the step ended an episode.
    log_probs: log-probabilities of the actions by the old policy.
    values: values by the old critic.
    advantages: generalised advantages.
    memory: before the first step, leaves (rows, ...); () without a memory.
  """

  observations: Any
  actions: chex.Array
  ends: chex.Array
  log_probs: chex.Array
  values: chex.Array
  advantages: chex.Array
  memory: Any


class State(NamedTuple):
  """State of the solver.

  Attributes:
    key: of the next minibatches.
    optimiser: state of the optimiser.
    metrics: measured values and counts.
  """

  key: chex.PRNGKey
  optimiser: Any
  metrics: bj.oracles.OracleState


def clipped_losses(
  outputs: Any,
  values: chex.Array,
  sample: Sample,
  *,
  distribution: bj.rl.Distribution,
  clip: chex.Numeric,
  normalise: bool,
) -> chex.Array:
  """Computes the losses of a minibatch.

  Args:
    outputs: of the policy, (steps, rows, ...).
    values: of the critic, (steps, rows).
    sample: the minibatch.
    distribution: of the actions.
    clip: c.
    normalise: whether to normalise advantages.

  Returns:
    By `VALUES`, (5,): the losses of actor and critic, the entropy, an estimate
    of the divergence from the old policy, and the share of clipped ratios.
  """
  constant = jax.lax.stop_gradient
  advantages = constant(sample.advantages)
  targets = advantages + sample.values
  if normalise:
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
  logs = distribution.log_prob(outputs, sample.actions) - sample.log_probs
  ratio = jnp.exp(logs)
  near = jnp.clip(ratio, 1 - clip, 1 + clip)
  actor = -jnp.minimum(ratio * advantages, near * advantages).mean()
  moved = sample.values + jnp.clip(values - sample.values, -clip, clip)
  errors = jnp.maximum((values - targets) ** 2, (moved - targets) ** 2)
  return jnp.stack(
    [
      actor,
      errors.mean() / 2,
      distribution.entropy(outputs).mean(),
      # An estimate with less variance than -log, and at least 0.
      constant((ratio - 1 - logs).mean()),
      constant((jnp.abs(ratio - 1) > clip).mean(dtype=ratio.dtype)),
    ]
  )


def apply_all(
  apply: Callable[[Any, Any], Any], weights: Any, observations: Any
) -> Any:
  """Applies a network over the two leading axes of observations."""
  lead = jax.tree.leaves(observations)[0].shape[:2]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observations)
  outputs = jax.vmap(apply, (None, 0))(weights, flat)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), outputs)


def make_sample(
  agent: networks.Agent,
  params: bj.rl.ActorCriticParams,
  rollout: bj.rl.Rollout,
  *,
  distribution: bj.rl.Distribution,
  settings: Settings,
) -> Sample:
  """Adds the numbers of the policy that has collected a rollout."""
  outputs = apply_all(agent.policy, params.actor, rollout.observations)
  values = apply_all(agent.value, params.critic, rollout.observations)
  advantages = bj.rl.generalised_advantages(
    rollout.rewards,
    values,
    apply_all(agent.value, params.critic, rollout.next_observations),
    rollout.terminated,
    rollout.truncated,
    discount=settings.discount,
    decay=settings.decay,
  )
  observations, memory = rollout.observations, ()
  if isinstance(observations, recurrent.Seen):
    observations, memories = observations
    memory = jax.tree.map(lambda x: x[0], memories)
  return Sample(
    observations,
    rollout.actions,
    rollout.terminated | rollout.truncated,
    distribution.log_prob(outputs, rollout.actions),
    values,
    advantages,
    memory,
  )


def solver(
  agent: networks.Agent | recurrent.Recurrent,
  actions: int | tuple[int, ...],
  optimiser: optax.GradientTransformation,
  settings: Settings,
  *,
  key: Any,
  entropy: chex.Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Makes a solver whose batch is a rollout of its policy.

  It has the interface of `bj.descend(bj.rl.actor_critic_gradient(...))`, so it
  can replace that wherever a policy learns from rollouts, with any rewards.

  Args:
    agent: networks. A recurrent one learns through the steps of a rollout;
      minibatches are then groups of environments.
    actions: of the environment.
    optimiser: of actor and critic together.
    settings: of the update.
    key: PRNG key of the minibatches.
    entropy: weight of the entropy.

  Returns:
    A solver for `bj.rl.ActorCriticParams` and a `bj.rl.Rollout`. `bj.values`
    has the means of `VALUES` over the minibatches.

  Raises:
    SettingsError: if minibatches do not divide a rollout.
  """
  family = bj.rl.action_distribution(actions)
  remembers = isinstance(agent, recurrent.Recurrent)
  single = agent.agent if remembers else agent

  def forward(params, sample):
    if remembers:
      return agent.unroll(
        params, sample.observations, sample.memory, sample.ends
      )
    return (
      apply_all(single.policy, params.actor, sample.observations),
      apply_all(single.value, params.critic, sample.observations),
    )

  def loss(params, sample):
    outputs, values = forward(params, sample)
    losses = clipped_losses(
      outputs,
      values,
      sample,
      distribution=family,
      clip=settings.clip,
      normalise=settings.normalise,
    )
    total = losses[0] + settings.value_weight * losses[1]
    return total - entropy * losses[2], losses

  def step(carry, sample):
    params, moments = carry
    slopes, losses = jax.grad(loss, has_aux=True)(params, sample)
    updates, moments = optimiser.update(slopes, moments, params)
    return (optax.apply_updates(params, updates), moments), losses

  def init_fn(params):
    return State(
      jnp.array(key, copy=True),
      optimiser.init(params),
      _metrics(jnp.zeros(len(VALUES)), jnp.int32(0)),
    )

  def update_fn(rollout, state, params=None, **extra_args):
    del extra_args
    sample = make_sample(
      single, params, rollout, distribution=family, settings=settings
    )
    if not remembers:  # Steps without a memory are rows of their own.
      merge = lambda x: x.reshape(1, -1, *x.shape[2:])
      sample = jax.tree.map(merge, sample)
    rows = sample.ends.shape[1]
    if rows % settings.minibatches:
      raise harness.SettingsError(
        f'{settings.minibatches} minibatches do not divide a rollout of {rows} '
        f'{"environments" if remembers else "steps"}: take a divisor.'
      )
    new_key, drawn = jax.random.split(state.key)

    def epoch(carry, key):
      order = jax.random.permutation(key, rows)
      parts = order.reshape(settings.minibatches, -1)

      def minibatch(carry, part):
        return step(carry, take(sample, part))

      return jax.lax.scan(minibatch, carry, parts)

    keys = jax.random.split(drawn, settings.epochs)
    (after, moments), losses = jax.lax.scan(
      epoch, (params, state.optimiser), keys
    )
    done = (
      state.metrics.counts.array[0] + settings.epochs * settings.minibatches
    )
    metrics = _metrics(losses.mean(axis=(0, 1)), done)
    updates = jax.tree.map(jnp.subtract, after, params)
    return updates, State(new_key, moments, metrics)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def take(sample: Sample, rows: chex.Array) -> Sample:
  """Takes rows, with their memories."""
  part = jax.tree.map(lambda x: x[:, rows], sample._replace(memory=()))
  memory = jax.tree.map(lambda x: x[rows], sample.memory)
  return part._replace(memory=memory)


def _metrics(values: chex.Array, steps: chex.Array) -> bj.oracles.OracleState:
  return bj.oracles.OracleState(
    bj.types.named(VALUES, values),
    bj.types.named(('gradients/actor',), steps[None]),
  )
