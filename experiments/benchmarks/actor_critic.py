"""Environment steps a second of the actor-critic, and what it costs beside.

    python -m experiments.benchmarks.actor_critic

Expected: 0.96 of the steps a second of the same by hand, 0.07 of those of
random stepping, by processor time. Time: a minute on 2 cores.

CartPole, 256 environments, 20 steps an update, two perceptrons of 64 x 64, Adam
with clipped gradients. In turn with

1. the same algorithm by hand: one function from parameters, optimiser states
   and environments to the next, with nothing of the library in it. Bound: at
   least 0.95 of its steps a second.
2. the same environments with random actions, and nothing learnt.

Times are medians of paired ratios with their range, see `measure`.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure
from experiments.rl import environments, networks

BOUND = 0.95
DISCOUNT, DECAY, ENTROPY, SCALE = 0.99, 0.95, 0.01, 0.1
CLIP, ACTOR_RATE, CRITIC_RATE = 0.5, 1e-3, 3e-3


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: of gymnax, with discrete actions.
    environments: side by side.
    steps: of each in an update.
    rounds: pairs of timings of each comparison.
  """

  env: str = 'CartPole-v1'
  environments: int = 256
  steps: int = 20
  rounds: int = 7


PRESETS = {'paper': Settings()}


def adam(rate: float) -> optax.GradientTransformation:
  """The optimiser of a sequence."""
  return optax.chain(
    optax.clip_by_global_norm(CLIP), optax.adam(rate, eps=1e-5)
  )


def make_solver(settings: Settings):
  """The library's: agent and solver."""
  known = environments.make(settings.env, discrete=True)
  agent = networks.agent(known.shape, known.environment.actions)
  oracle = bj.rl.actor_critic(
    agent.policy,
    agent.value,
    known.environment,
    environments=settings.environments,
    steps=settings.steps,
    discount=DISCOUNT,
    decay=DECAY,
    entropy_bonus=ENTROPY,
    reward_scale=SCALE,
    normalise=True,
    key=1,
  )
  solver = bj.descend(oracle, actor=adam(ACTOR_RATE), critic=adam(CRITIC_RATE))
  return agent, solver


def step_of(solver: Any):
  """(params, state) -> the next, as a benchmark runs it."""

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  return step


def by_hand(settings: Settings):
  """The same updates from jax, optax and gymnax alone.

  Returns:
    A step on (actor, critic, their optimisers' states, environments), and
    the first of these from (actor, critic).
  """
  known = environments.make(settings.env, discrete=True)
  env, count = known.environment, settings.environments
  agent = networks.agent(known.shape, env.actions)
  optimisers = adam(ACTOR_RATE), adam(CRITIC_RATE)

  def start(actor, critic):
    key, drawn = jax.random.split(jax.random.key(1))
    observation, state = jax.vmap(env.reset)(jax.random.split(drawn, count))
    zero = jnp.zeros(count)
    worlds = (key, observation, state, zero, zero)
    moments = optimisers[0].init(actor), optimisers[1].init(critic)
    return actor, critic, moments, worlds

  def step(carry, batch):
    del batch
    actor, critic, moments, (key, observation, state, total, last) = carry

    def act(carry, keys):
      observation, state, total, last = carry
      logits = jax.vmap(agent.policy, (None, 0))(actor, observation)
      action = jax.random.categorical(keys[0], logits)
      after, state, reward, ended, cut, final = jax.vmap(env.step)(
        keys[1:], state, action
      )
      total = total + reward
      done = ended | cut
      last = jnp.where(done, total, last)
      carry = (after, state, jnp.where(done, 0, total), last)
      return carry, (observation, action, reward, ended, cut, final)

    key, drawn = jax.random.split(key)
    keys = jax.random.split(drawn, (settings.steps, count + 1))
    worlds, seen = jax.lax.scan(act, (observation, state, total, last), keys)
    observations, actions, rewards, ended, cut, finals = seen

    def loss(actor, critic_now):
      flat = lambda x: x.reshape(-1, x.shape[-1])
      of = lambda weights, at: jax.vmap(agent.value, (None, 0))(
        weights, flat(at)
      ).reshape(rewards.shape)
      values = of(critic_now, observations)
      fixed = jax.lax.stop_gradient(values)
      ahead = jnp.where(ended, 0, of(critic, finals))
      errors = SCALE * rewards + DISCOUNT * ahead - fixed

      def back(later, step):
        error, done = step
        found = error + DISCOUNT * DECAY * jnp.where(done, 0, later)
        return found, found

      zero = jnp.zeros_like(errors[0])
      found = jax.lax.scan(back, zero, (errors, ended | cut), reverse=True)[1]
      of_critic = jnp.mean((values - fixed - found) ** 2) / 2
      logits = jax.vmap(agent.policy, (None, 0))(actor, flat(observations))
      logs = jax.nn.log_softmax(logits)
      chosen = jnp.take_along_axis(logs, actions.reshape(-1, 1), axis=1)
      found = (found - found.mean()) / (found.std() + 1e-8)
      of_actor = -jnp.mean(chosen[:, 0] * found.ravel())
      entropy = -jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=-1))
      return of_actor + of_critic - ENTROPY * entropy

    slopes = jax.grad(loss, (0, 1))(actor, critic)
    moved, moments_after = [], []
    for weights, slope, optimiser, moment in zip(
      (actor, critic), slopes, optimisers, moments
    ):
      updates, moment = optimiser.update(slope, moment, weights)
      moved.append(optax.apply_updates(weights, updates))
      moments_after.append(moment)
    return (*moved, tuple(moments_after), (key, *worlds))

  return step, start


def random_steps(settings: Settings):
  """The same environments under random actions."""
  known = environments.make(settings.env, discrete=True)
  env, count = known.environment, settings.environments

  def start():
    key, drawn = jax.random.split(jax.random.key(1))
    _, state = jax.vmap(env.reset)(jax.random.split(drawn, count))
    return key, state, jnp.zeros([])

  def step(carry, batch):
    del batch
    key, state, total = carry

    def act(carry, keys):
      state, total = carry
      actions = jax.random.randint(keys[0], (count,), 0, env.actions)
      _, state, reward, *_ = jax.vmap(env.step)(keys[1:], state, actions)
      return (state, total + reward.sum()), None

    key, drawn = jax.random.split(key)
    keys = jax.random.split(drawn, (settings.steps, count + 1))
    (state, total), _ = jax.lax.scan(act, (state, total), keys)
    return key, state, total

  return step, start


def main(options: harness.Options) -> None:
  """Runs the comparisons, prints them and writes them down."""
  start = time.perf_counter()
  settings = options.settings
  agent, solver = make_solver(settings)
  params = agent.init(jax.random.key(0))
  ours = measure.Program(step_of(solver), (params, solver.init(params)), None)
  hand_step, hand_start = by_hand(settings)
  hand = measure.Program(hand_step, hand_start(*params), None)
  random_step, random_start = random_steps(settings)
  bare = measure.Program(random_step, random_start(), None)
  an_update = settings.environments * settings.steps
  metrics, rows = {}, []
  for name, other in (('by_hand', hand), ('random', bare)):
    found = measure.time_ratio(
      other.run, ours.run, rounds=settings.rounds, seconds=0.5
    )
    # The time of the other over ours: our steps a second over its.
    metrics[f'{name}/ratio'] = found.wall
    metrics[f'{name}/ratio_cpu'] = found.cpu
    metrics[f'{name}/steps_per_second'] = an_update / found.seconds
    metrics['steps_per_second'] = an_update / found.base_seconds
    verdict = ''
    if name == 'by_hand':
      # As times, of which less is better.
      bounds = (1 / x for x in (found.wall, found.high, found.low, BOUND))
      verdict = f'>= {BOUND}: {measure.judge(*bounds)}'
    rows.append(
      {
        'compared': f'actor-critic / {name.replace("_", " ")}',
        'steps/s (range)': str(found),
        'CPU': f'{found.cpu:.3f}',
        'million steps/s': f'{an_update / found.base_seconds / 1e6:.3f} / '
        f'{an_update / found.seconds / 1e6:.3f}',
        'bound': verdict,
      }
    )
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='actor_critic')


if __name__ == '__main__':
  harness.run(STUDY)
