"""Simulated workers on a random Markov decision process."""

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

# The critic is projected onto this ball.
BALL = functools.partial(optax.projections.projection_l2_ball, scale=200.0)


@dataclasses.dataclass(frozen=True)
class Process:
  """The random Markov decision process, and features of its states.

  Attributes:
    states: number of states; 100 in the paper.
    actions: number of actions; 5 in the paper.
    features: number of features; 10 in the paper.
    discount: discount of rewards; not published.
  """

  states: Annotated[int, harness.Allowed(1, 10_000)] = 100
  actions: Annotated[int, harness.Allowed(1, 10_000)] = 5
  features: Annotated[int, harness.Allowed(1, 10_000)] = 10
  discount: Annotated[float, harness.Allowed(0, 0.9999)] = 0.95


class Problem(NamedTuple):
  """A process, features of its states, and reference rewards.

  Attributes:
    mdp: the process.
    features: (states, size).
    uniform: mean reward per step of the uniform policy.
    best: mean reward per step of the optimal policy.
  """

  mdp: bj.rl.MDP
  features: chex.Array
  uniform: float
  best: float

  def share(self, reward: np.ndarray) -> np.ndarray:
    """Rescales rewards per step: 0 is the uniform, 1 the optimal policy."""
    return (reward - self.uniform) / (self.best - self.uniform)


def make_problem(sizes: Process, seed: int) -> Problem:
  """Draws uniform random transitions, rewards and features."""
  harness.require_memory(
    4 * sizes.states * (sizes.actions * sizes.states + sizes.features),
    'transitions of process.states, process.actions and process.features',
  )
  mdp_key, feature_key = jax.random.split(jax.random.key(seed))
  states, actions = sizes.states, sizes.actions
  mdp = bj.rl.random_mdp(
    mdp_key, states=states, actions=actions, discount=sizes.discount
  )
  features = bj.rl.random_features(
    feature_key, size=sizes.features, states=states
  )
  step = lambda values: float((1 - mdp.discount) * mdp.initial @ values)
  uniform = bj.rl.state_values(mdp, jnp.full((states, actions), 1 / actions))
  return Problem(
    mdp, features, step(uniform), best=step(bj.rl.optimal(mdp).values)
  )


class BlockState(NamedTuple):
  """State of `blocks`.

  Attributes:
    inner: state of the solver.
    values: metrics of the last block, by name.
  """

  inner: Any
  values: dict[str, chex.Array]


def blocks(solver: Any, length: int, mean: str = 'reward') -> Any:
  """Combines a block of updates into one.

  The run then copies the parameter snapshots once per block only, for example
  for its check for non-finite numbers.

  Args:
    solver: a solver with delays, which ignores its batch.
    length: updates per block.
    mean: value of the solver to average over a block.

  Returns:
    A solver with the values `mean_reward` (or of another `mean`), `min_delay`
    and `max_delay`.
  """

  def init_fn(params):
    zero = jnp.zeros([])
    names = (f'mean_{mean}', 'min_delay', 'max_delay')
    return BlockState(solver.init(params), dict.fromkeys(names, zero))

  def update_fn(batch, state, params=None, **extra_args):
    def body(carry, _):
      updates, inner = solver.update(batch, carry[1], carry[0], **extra_args)
      values = bj.values(inner)
      new = bj.apply_updates(carry[0], updates), inner
      return new, (values[mean], values['delay'])

    (after, inner), (numbers, delays) = jax.lax.scan(
      body, (params, state.inner), length=length
    )
    values = {
      f'mean_{mean}': numbers.mean(),
      'min_delay': delays.min(),
      'max_delay': delays.max(),
    }
    return optax.tree.sub(after, params), BlockState(inner, values)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Grid(NamedTuple):
  """Grid whose combinations run in parallel.

  Attributes:
    workers: numbers of workers.
    actor: scales of the actor's step sizes.
    critic: scales of the critic's step sizes.
    exponents: exponents of the actor's and the critic's schedules.
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
    average: running average of relative rewards, see `Problem.share`.
    policy: relative exact reward of the policy.
    critic: distance of the critic to its fixed point over the initial one.
    delay_error: largest deviation of the delay from N - 1 after the first N - 1
      updates, a number.
  """

  workers: tuple[int, ...]
  steps: np.ndarray
  average: np.ndarray
  policy: np.ndarray
  critic: np.ndarray
  delay_error: float


def evaluate(context: harness.Context, params: Any, state: Any):
  """Computes the policy's exact reward per step, and the critic's error."""
  del state
  mdp, features = context.data
  policy = jax.nn.softmax(params.actor)
  visits = bj.rl.visits(mdp, policy)
  fixed_point = bj.rl.td_fixed_point(
    mdp, policy, features, weights=visits.sum(axis=1)
  )
  return {
    'exact_reward': jnp.sum(visits * mdp.rewards),
    'critic_error': jnp.linalg.norm(params.critic - fixed_point),
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
      # Settings that no single run depends on.
      settings=harness.run_settings(
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
  """Largest deviation of delays from N - 1, without the first N - 1 updates."""
  worst = 0.0
  for i, number in enumerate(workers):
    full = begins >= number - 1
    for name in ('min_delay', 'max_delay'):
      delays = history[f'loss/{name}'][1:][full, i]
      worst = max(worst, float(np.abs(delays - (number - 1)).max(initial=0)))
  return worst


def fall(critic: np.ndarray) -> np.ndarray:
  """Mean relative error of the critic over the last quarter."""
  return critic[-(len(critic) // 4) :].mean(axis=0)
