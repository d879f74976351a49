"""Simulated workers on a random Markov decision process, all runs at once."""

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import speedup

# The ball that the critic is projected on.
BALL = functools.partial(optax.projections.projection_l2_ball, scale=200.0)


@dataclasses.dataclass(frozen=True)
class Process:
  """The random Markov decision process, and features of its states.

  Attributes:
    states: the paper's 100.
    actions: in each state, the paper's 5.
    features: of a state, the paper's 10.
    discount: ours.
  """

  states: int = 100
  actions: int = 5
  features: int = 10
  discount: Annotated[float, harness.Allowed(0, 0.9999)] = 0.95


class Problem(NamedTuple):
  """A process, features of its states, and rewards of a step to compare with.

  Attributes:
    mdp: the process.
    features: (states, size).
    uniform: the mean reward of a step of the uniform policy.
    best: that of the best one.
  """

  mdp: bj.rl.MDP
  features: chex.Array
  uniform: float
  best: float

  def share(self, reward: np.ndarray) -> np.ndarray:
    """A reward of a step as a share of the way from uniform to best."""
    return (reward - self.uniform) / (self.best - self.uniform)


def make_problem(sizes: Process, seed: int) -> Problem:
  """Uniform random transitions, rewards and features."""
  one, two = jax.random.split(jax.random.key(seed))
  states, actions = sizes.states, sizes.actions
  mdp = bj.rl.random_mdp(
    one, states=states, actions=actions, discount=sizes.discount
  )
  features = bj.rl.random_features(two, size=sizes.features, states=states)
  step = lambda values: float((1 - mdp.discount) * mdp.initial @ values)
  plain = bj.rl.state_values(mdp, jnp.full((states, actions), 1 / actions))
  return Problem(
    mdp, features, step(plain), best=step(bj.rl.optimal(mdp).values)
  )


class BlockState(NamedTuple):
  """State of `blocks`.

  Attributes:
    inner: of the solver.
    values: what was measured over the last block, by name.
  """

  inner: Any
  values: dict[str, chex.Array]


def blocks(solver: Any, length: int) -> Any:
  """A solver whose update is a block of them.

  What goes round each update of a run, a look for numbers that are not finite
  for instance, then copies the snapshots of parameters once in a block.

  Args:
    solver: of A3C; it looks at no batch.
    length: updates in a block.

  Returns:
    A solver with the values `mean_reward`, `least_delay` and `most_delay`.
  """

  def init_fn(params):
    zero = jnp.zeros([])
    names = ('mean_reward', 'least_delay', 'most_delay')
    return BlockState(solver.init(params), dict.fromkeys(names, zero))

  def update_fn(batch, state, params=None, **extra_args):
    def body(carry, _):
      updates, inner = solver.update(batch, carry[1], carry[0], **extra_args)
      values = bj.values(inner)
      new = bj.apply_updates(carry[0], updates), inner
      return new, (values['reward'], values['delay'])

    (after, inner), (rewards, delays) = jax.lax.scan(
      body, (params, state.inner), length=length
    )
    values = {
      'mean_reward': rewards.mean(),
      'least_delay': delays.min(),
      'most_delay': delays.max(),
    }
    return optax.tree.sub(after, params), BlockState(inner, values)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Grid(NamedTuple):
  """What is run at once: every combination, and every seed.

  Attributes:
    workers: numbers of workers.
    actor: scales of the actor's steps.
    critic: scales of the critic's.
    exponents: of the actor's and of the critic's schedule.
  """

  workers: tuple[int, ...]
  actor: tuple[float, ...]
  critic: tuple[float, ...]
  exponents: tuple[float, float] = (0.6, 0.4)


class Curves(NamedTuple):
  """Records of all runs of a grid; arrays (records, *grid, seeds).

  Attributes:
    workers: numbers of workers of the grid.
    steps: updates at each record, (records,).
    average: the running average of rewards, as a share of the way from the
      uniform to the best policy.
    policy: the same of the policies themselves, by exact returns.
    critic: the distance of the critic to its fixed point, over its start's.
    delay_error: how far the delay was from N - 1, at most, once the first N - 1
      updates are made; a number.
  """

  workers: tuple[int, ...]
  steps: np.ndarray
  average: np.ndarray
  policy: np.ndarray
  critic: np.ndarray
  delay_error: float


def evaluate(context: harness.Context, params: Any, state: Any):
  """The policy's exact reward of a step, and the critic's error."""
  del state
  mdp, features = context.data
  policy = jax.nn.softmax(params.actor)
  visits = bj.rl.visits(mdp, policy)
  root = bj.rl.td_fixed_point(mdp, policy, features, weights=visits.sum(axis=1))
  return {
    'exact_reward': jnp.sum(visits * mdp.rewards),
    'critic_error': jnp.linalg.norm(params.critic - root),
  }


def run(
  options: harness.Options,
  name: str,
  problem: Problem,
  grid: Grid,
  sampling: str,
  seeds: Any,
) -> Curves:
  """Runs a grid as one program."""
  settings = options.settings
  members, hyper = harness.members(
    seeds, workers=grid.workers, actor=grid.actor, critic=grid.critic
  )
  first, second = (bj.solvers.power_schedule(1.0, p) for p in grid.exponents)

  def solver(context):
    mdp, features = context.data
    hyper = context.hyper
    one = bj.solvers.a3c_td0(
      mdp,
      features,
      workers=hyper['workers'],
      bound=max(grid.workers) - 1,
      actor=optax.sgd(lambda k: hyper['actor'] * first(k)),
      critic=bj.Sequence(
        optax.sgd(lambda k: hyper['critic'] * second(k)), set=BALL
      ),
      sampling=sampling,
      key=context.seed_key,
    )
    return blocks(one, settings.block)

  def init(context):
    mdp, features = context.data
    return bj.sequences(
      actor=jnp.zeros(mdp.rewards.shape), critic=jnp.zeros(features.shape[1])
    )

  trained = harness.train(
    solver,
    harness.Task(
      init,
      data=(problem.mdp, problem.features),
      shard=False,
      hyper=hyper,
    ),
    harness.Training.from_options(
      options,
      steps=settings.steps // settings.block,
      chunk=1,
      seeds=members,
      name=name,
      # Of no single run: what all are compared by.
      settings=harness.settings_of(
        settings, 'workers', 'share', 'window', 'tuning'
      ),
    ),
    harness.Measure(evaluate, record_start=True),
  )
  shape = *map(len, (grid.workers, grid.actor, grid.critic)), len(seeds)
  history = {
    key: np.asarray(values, np.float64).reshape(-1, *shape)
    for key, values in trained.history.items()
  }
  window = settings.window // settings.block
  rewards = history['loss/mean_reward'][1:]
  error = history['critic_error']
  steps = settings.block * np.asarray(trained.steps[1:])
  return Curves(
    grid.workers,
    steps,
    problem.share(speedup.running_average(rewards, window)),
    problem.share(history['exact_reward'][1:]),
    error[1:] / error[:1],
    _delay_error(history, steps - settings.block, grid.workers),
  )


def _delay_error(history, begins, workers) -> float:
  """How far delays were from N - 1, in blocks that begin after the start."""
  worst = 0.0
  for i, number in enumerate(workers):
    late = begins >= number - 1
    for name in ('least_delay', 'most_delay'):
      delays = history[f'loss/{name}'][1:][late, i]
      worst = max(worst, float(np.abs(delays - (number - 1)).max(initial=0)))
  return worst


def fall(critic: np.ndarray) -> np.ndarray:
  """The mean error of the critic over the last quarter, over its start's."""
  return critic[-(len(critic) // 4) :].mean(axis=0)
