"""Reinforcement learning: the actor-critic, and the cost of stale parameters.

CartPole has 256 environments and 20 steps per update; actor and critic are
perceptrons of 64 x 64 units, trained by Adam with clipped gradients.
Comparisons of an update of the actor-critic:

- PPO of purejaxrl with one epoch and one minibatch, so with as many environment
  steps and one gradient step;
- the same algorithm by hand, without the library;
- the same environments with random actions, without learning.

Comparisons of runs in a `lax.scan` with and without a delay: A3C-TD(0) on the
random MDP of its experiment, with i.i.d. samples and with chains, and the
gradient of a perceptron. 17 workers have 17 versions of the parameters; a
delayed update writes one snapshot and reads one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.benchmarks import environment, measure
from experiments.rl import environments, networks

BOUND_PEER, BOUND_HAND, BOUND_DELAY = 1.0, 1.05, 1.15
DISCOUNT, DECAY, ENTROPY, SCALE = 0.99, 0.95, 0.01, 0.1
CLIP, ACTOR_RATE, CRITIC_RATE = 0.5, 1e-3, 3e-3
WORKERS = 17


class Sizes(NamedTuple):
  """Sizes of an update.

  Attributes:
    env: name of a gymnax environment with discrete actions.
    environments: number of parallel environments.
    steps: steps of each environment in an update.
    updates: updates in a compiled run, if runs are compared.
  """

  env: str = 'CartPole-v1'
  environments: int = 256
  steps: int = 20
  updates: int = 50


def adam(rate: float) -> optax.GradientTransformation:
  """Makes the optimiser of a sequence."""
  return optax.chain(
    optax.clip_by_global_norm(CLIP), optax.adam(rate, eps=1e-5)
  )


def make_solver(sizes: Sizes):
  """Makes the agent and the solver of the library."""
  known = environments.make(sizes.env, discrete=True)
  agent = networks.agent(known.shape, known.environment.actions)
  oracle = bj.rl.actor_critic(
    agent.policy,
    agent.value,
    known.environment,
    collection=bj.rl.Collection(sizes.environments, sizes.steps),
    advantages=bj.rl.Advantages(DISCOUNT, DECAY, SCALE, normalise=True),
    entropy_bonus=ENTROPY,
    key=1,
  )
  solver = bj.descend(oracle, actor=adam(ACTOR_RATE), critic=adam(CRITIC_RATE))
  return agent, solver


def by_hand(sizes: Sizes):
  """Makes the same updates from jax, optax and gymnax.

  Returns:
    A step of a carry (actor, critic, optimiser states, environments), and a
    function from (actor, critic) to the first carry.
  """
  known = environments.make(sizes.env, discrete=True)
  env, count = known.environment, sizes.environments
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
    keys = jax.random.split(drawn, (sizes.steps, count + 1))
    worlds, trajectory = jax.lax.scan(
      act, (observation, state, total, last), keys
    )
    observations, actions, rewards, ended, cut, finals = trajectory

    def loss(actor, critic_now):
      flat = lambda x: x.reshape(-1, x.shape[-1])
      evaluate = lambda weights, at: jax.vmap(agent.value, (None, 0))(
        weights, flat(at)
      ).reshape(rewards.shape)
      values = evaluate(critic_now, observations)
      fixed = jax.lax.stop_gradient(values)
      ahead = jnp.where(ended, 0, evaluate(critic, finals))
      errors = SCALE * rewards + DISCOUNT * ahead - fixed

      def back(later, step):
        error, done = step
        advantages = error + DISCOUNT * DECAY * jnp.where(done, 0, later)
        return advantages, advantages

      zero = jnp.zeros_like(errors[0])
      advantages = jax.lax.scan(
        back, zero, (errors, ended | cut), reverse=True
      )[1]
      critic_loss = jnp.mean((values - fixed - advantages) ** 2) / 2
      logits = jax.vmap(agent.policy, (None, 0))(actor, flat(observations))
      logs = jax.nn.log_softmax(logits)
      chosen = jnp.take_along_axis(logs, actions.reshape(-1, 1), axis=1)
      advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
      actor_loss = -jnp.mean(chosen[:, 0] * advantages.ravel())
      entropy = -jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=-1))
      return actor_loss + critic_loss - ENTROPY * entropy

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


def random_steps(sizes: Sizes):
  """Makes steps of the same environments with random actions."""
  known = environments.make(sizes.env, discrete=True)
  env, count = known.environment, sizes.environments

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
    keys = jax.random.split(drawn, (sizes.steps, count + 1))
    (state, total), _ = jax.lax.scan(act, (state, total), keys)
    return key, state, total

  return step, start


class Case(NamedTuple):
  """A solver, from a wrapper of its oracle, with its start."""

  make: Callable[[Callable[[Any, int], Any], int], Any]
  params: Any
  batch: Any


def td_case(sampling: str) -> Case:
  """Makes A3C-TD(0) of the experiment, with the chains of its workers."""
  mdp, features = bj.rl.random_mdp(0), bj.rl.random_features(1)
  power = bj.solvers.power_schedule
  ball = lambda z: optax.projections.projection_l2_ball(z, 200.0)

  def make(wrap, workers):
    oracle = bj.rl.td_actor_critic(
      mdp, features, key=0, sampling=sampling, workers=workers
    )
    return bj.descend(
      wrap(oracle, workers),
      actor=optax.sgd(power(20.0, 0.6)),
      critic=bj.Sequence(optax.sgd(power(1.0, 0.4)), set=ball),
    )

  params = bj.sequences(
    actor=jnp.zeros(mdp.rewards.shape), critic=jnp.zeros(features.shape[1])
  )
  return Case(make, params, None)


def perceptron(hidden: int, batch_size: int) -> Case:
  """Makes a regression by a layer of hidden units."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  params = {
    'in': draw(keys[0], 64, hidden) / 8,
    'out': draw(keys[1], hidden, 10) / hidden,
  }

  def loss(params, batch):
    result = jnp.tanh(batch['x'] @ params['in']) @ params['out']
    return jnp.mean((result - batch['y']) ** 2)

  make = lambda wrap, workers: optax.chain(
    wrap(bj.gradient(loss), workers), optax.sgd(0.01)
  )
  rows = batch_size
  batch = {'x': draw(keys[2], rows, 64), 'y': draw(keys[3], rows, 10)}
  return Case(make, params, batch)


def delayed(case: Case, steps: int, workers: int) -> measure.Program:
  """Compiles a scan of updates, delayed if there are several workers."""
  wrap = lambda oracle, n: bj.evaluation.delayed(oracle, n) if n > 1 else oracle
  solver = case.make(wrap, workers)
  step = measure.solver_step(solver)

  def many(carry, batch):
    body = lambda carry, _: (step(carry, batch), None)
    return jax.lax.scan(body, carry, length=steps)[0]

  return measure.Program(
    many, (case.params, solver.init(case.params)), case.batch
  )


def actor_critic(sizes: Sizes) -> tuple[measure.Program, Any]:
  """Compiles an update of the library's actor-critic; also returns params."""
  agent, solver = make_solver(sizes)
  params = agent.init(jax.random.key(0))
  return measure.solver_program(solver, params), params


def _ppo(sizes, context):
  """Compares a run with one of purejaxrl."""
  context.peers.require('distrax', 'gymnax', 'flax')
  folder = str(environment.repository('purejaxrl'))
  agent, solver = make_solver(sizes)
  step = measure.solver_step(solver)

  @jax.jit
  def train(key):
    params = agent.init(key)
    body = lambda carry, _: (step(carry, None), None)
    first = (params, solver.init(params))
    return jax.lax.scan(body, first, length=sizes.updates)[0]

  def run(times):
    for seed in range(times):
      jax.block_until_ready(train(jax.random.key(seed)))

  arguments = sizes._asdict() | {'folder': folder}
  with context.peers.process('jax_steps', 'ppo', **arguments) as peer:
    return measure.compare(run, peer.run, context)


def _update(make, sizes, context):
  """Compares an update with the step of `make`."""
  measured, params = actor_critic(sizes)
  step, start = make(sizes)
  first = start(*params) if make is by_hand else start()
  return measure.compare(measured, measure.Program(step, first), context)


def _delay(name, steps, context):
  """Compares a run with delays with one without."""
  case = perceptron(128, 64) if name == 'perceptron' else td_case(name)
  late, fresh = (delayed(case, steps, n) for n in (WORKERS, 1))
  return measure.compare(late.run, fresh.run, context)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  sizes = Sizes(environments=8, steps=4, updates=2) if small else Sizes()
  steps = 20 if small else 1_000
  every = measure.Rows()
  size = f'{sizes.environments} environments'
  what = f'actor-critic, {size} / by hand'
  every.add('rl/by_hand', what, _update, by_hand, sizes, wall=BOUND_HAND)
  what = f'actor-critic, {size} / random actions'
  every.add('rl/random', what, _update, random_steps, sizes)
  what = f'actor-critic, {sizes.updates} updates, {size} / PPO of purejaxrl'
  every.add('rl/ppo/purejaxrl', what, _ppo, sizes, wall=BOUND_PEER)
  for name in ('iid', 'markov', 'perceptron'):
    what = f'{name}, {steps:,} updates, delay of {WORKERS - 1} / none'
    every.add(f'delay/{name}', what, _delay, name, steps, cpu=BOUND_DELAY)
  return every
