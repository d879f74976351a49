"""RLHF where environments are compiled: all seeds of a method, one program."""

import functools
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import checkpoints, files
from experiments.harness.study import comparison
from experiments.pbrl import labels, preferences, rlhf_settings
from experiments.pbrl import learner as learner_lib
from experiments.pbrl.rlhf_settings import METHODS, Settings
from experiments.rl import environments, networks


class Parts(NamedTuple):
  """What a method is made of.

  Attributes:
    learner: the method.
    agent: networks of a policy and of its value.
    reward: network of the reward model: a reward for each action. The control
      of a constant reward has a network's weights, and ignores them.
  """

  learner: learner_lib.Learner
  agent: networks.Agent
  reward: harness.Network


def parts_of(settings: Settings, name: str, rate: Any = 0.0) -> Parts:
  """Makes a method from settings that are resolved.

  Args:
    settings: of the run.
    name: of the method.
    rate: of its actors.
  """
  method, env = METHODS[name], rlhf_settings.played(settings)
  agent = networks.agent(env.shape, env.actions)
  # The action picks the output: a network of observation and action.
  body = networks.body(env.shape)
  if env.kind == 'cells':
    body['hidden'] = (32,)
  reward = networks.network(env.shape, env.actions, **body)
  if method.constant:
    reward = reward._replace(apply=lambda x, observation: jnp.ones(env.actions))
  dtype = jnp.dtype(env.dtype)
  learner = learner_lib.Learner(
    method, agent, reward.apply, settings, rate, dtype
  )
  return Parts(learner, agent, reward)


def file_buffer(settings: Settings) -> preferences.Buffer | None:
  """The pairs of the file of labels, the last that fit; None without one."""
  if not settings.labels:
    return None
  env = rlhf_settings.played(settings)
  pairs = labels.read(
    settings.labels,
    shape=env.shape,
    actions=env.actions,
    length=settings.preferences.fragment,
    dtype=env.dtype,
  )
  room = settings.preferences.buffer
  last = jax.tree.map(lambda x: jnp.asarray(x[-room:]), pairs)
  return preferences.Buffer(last, jnp.int32(len(last.labels)))


def collector_of(
  settings: Settings, agent: networks.Agent, count: int
) -> bj.rl.Collector:
  """Steps environments under the policy of an actor and its critic."""
  known = environments.make(settings.env, discrete=True)

  def act(at, key, observations):
    logits = jax.vmap(agent.policy, (None, 0))(at.actor, observations)
    return jax.random.categorical(key, logits)

  return bj.rl.rollouts(
    known.environment,
    act,
    environments=count,
    steps=settings.rollouts.steps,
    window=rlhf_settings.EPISODES,
  )


def keys_of(seed_key: jax.Array) -> list[jax.Array]:
  """Keys of the first policy, of the reward model, of the start, of the run."""
  return list(jax.random.split(seed_key, 4))


def start_of(
  settings: Settings,
  sense: bool,
  seed: jax.Array,
  given: preferences.Buffer | None,
) -> learner_lib.Start:
  """Pairs of the first policy, and a reward model that has seen them.

  Args:
    settings: of the run, resolved.
    sense: whether labels are of the true rewards.
    seed: a seed.
    given: labelled pairs, or None to make labels.

  Returns:
    A `learner_lib.Start`.
  """
  name = 'drlhf' if sense else 'control/random_labels'
  learner, agent, reward = parts_of(settings, name)
  keys = keys_of(jax.random.key(seed))
  count = settings.rollouts.environments // 2
  collector = collector_of(settings, agent, count)
  policy = agent.init(keys[0])
  shape = rlhf_settings.played(settings).shape
  start = learner.nothing(reward.init(keys[1]), shape)
  one, two, three = jax.random.split(keys[2], 3)

  def body(carry, key):
    start, state = carry
    rollout, state = collector.collect(policy, state)
    return (learner.add(start, key, rollout), state), None

  epochs = rlhf_settings.start_epochs_of(settings)
  carry = (start, collector.init(one))
  (start, _), _ = jax.lax.scan(body, carry, jax.random.split(two, epochs))
  if given is not None:
    start = start._replace(buffer=given, labels=given.count)
  return learner.warm_up(start, three)


class State(NamedTuple):
  """State of a run.

  Attributes:
    learner: of the method.
    first: environments of the policy.
    second: environments of the second one; () without.
  """

  learner: learner_lib.State
  first: bj.rl.EnvironmentsState
  second: Any


def make_solver(
  settings: Settings, name: str, context: harness.Context
) -> optax.GradientTransformationExtraArgs:
  """A method whose environments are in its state; an update is an epoch."""
  method, updates = METHODS[name], settings.rollouts.updates
  learner, agent, _ = parts_of(settings, name, context.hyper['rate'])
  count = settings.rollouts.environments // (2 if method.second else 1)
  collector = collector_of(settings, agent, count)

  def init_fn(params):
    one, two, three = jax.random.split(keys_of(context.seed_key)[3], 3)
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), context.own)
    return State(
      learner.init(params, three, copies),
      collector.init(one),
      collector.init(two) if method.second else (),
    )

  def collect(params, state):
    rollout, first = collector.collect(params.lower, state.first)
    rollouts, second = {'lower': rollout}, ()
    if method.second:
      rollouts['value'], second = collector.collect(
        learner.second(state.learner), state.second
      )
    return rollouts, state._replace(first=first, second=second)

  def update_of(carry, reward_epoch):
    params, state = carry
    rollouts, state = collect(params, state)
    params, after = learner.step(
      params, state.learner, rollouts, reward_epoch=reward_epoch
    )
    return params, state._replace(learner=after)

  def update_fn(batch, state, params=None, **extra_args):
    del batch, extra_args
    carry = (params, state)
    if updates > 1:
      carry, _ = jax.lax.scan(
        lambda carry, _: (update_of(carry, False), None),
        carry,
        length=updates - 1,
      )
    after, state = update_of(carry, True)
    return jax.tree.map(jnp.subtract, after, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measure(settings, name, context, params, state):
  """The policy's return, and how the reward model orders what is held out."""
  del context
  mean = lambda one: bj.rl.mean_return(one.episodes, rlhf_settings.EPISODES)
  known = {'return': mean(state.first)}
  if METHODS[name].model:
    known['accuracy'] = preferences.accuracy(
      parts_of(settings, name).reward.apply, params.upper, state.learner.held
    )
  if METHODS[name].second:
    known['second_return'] = mean(state.second)
  return known


def run(
  options: harness.Options, settings: Settings
) -> dict[str, comparison.Outcome]:
  """Runs all methods on an environment of gymnax."""
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(settings, 'methods', 'rates', 'sizes'),
    score=lambda trained: trained.history['return'][-5:].mean(axis=0),
    tuning_seeds=comparison.tuning_seeds(2),
  )
  train = Suite(settings).train
  return comparison.compare(
    rules, settings.methods, train, {'rate': settings.rates}
  )


class Suite:
  """Trains methods; what they start from is made once for those that share it.

  Args:
    settings: of the run, resolved.
  """

  def __init__(self, settings: Settings):
    """Reads the file of labels, if there is one."""
    self._settings = settings
    self._given = file_buffer(settings)
    self._starts: dict[Any, Any] = {}

  def train(self, job: comparison.Job) -> harness.Trained:
    """Runs one job of a comparison."""
    settings, name = self._settings, job.method
    epochs = rlhf_settings.epochs_of(settings)

    def init(context):
      agent = parts_of(settings, name).agent
      policy = agent.init(keys_of(context.seed_key)[0])
      upper = jax.tree.map(lambda x: jnp.array(x, copy=True), context.own.upper)
      return bj.BilevelParams(upper, policy)

    return harness.train(
      lambda context: make_solver(settings, name, context),
      harness.Task(
        init,
        own=self._start(name, job.seeds, job.options.workdir),
        hyper=job.hyper,
      ),
      job.training(epochs, chunk=-(-epochs // settings.records)),
      harness.Measure(functools.partial(measure, settings, name)),
    )

  def _start(self, name, seeds, workdir):
    method = METHODS[name]
    kind = (method.sense, seeds)
    if kind not in self._starts:
      self._starts[kind] = self._made(*kind, workdir)
    start = self._starts[kind]
    if method.model:
      return start
    # The true rewards need no pairs: one in their place.
    first = lambda ring: jax.tree.map(lambda x: x[:, :1], ring)
    return start._replace(
      buffer=start.buffer._replace(pairs=first(start.buffer.pairs)),
      held=start.held._replace(pairs=first(start.held.pairs)),
      labels=jnp.zeros_like(start.labels),
    )

  def _made(self, sense, seeds, workdir):
    """What methods start from, read where a run that was killed has made it."""
    settings = self._settings
    make = jax.jit(
      jax.vmap(lambda seed: start_of(settings, sense, seed, self._given))
    )
    numbers = jnp.asarray(seeds, jnp.uint32)
    if workdir is None:
      return make(numbers)
    labels = 'true' if sense else 'random'
    tag = zlib.crc32(repr(seeds).encode())
    folder = pathlib.Path(workdir) / 'starts' / f'{labels}-{tag:08x}'
    kept = harness.settings_of(settings, 'methods', 'rates', 'sizes', 'frames')
    files.make_folder(folder)
    checkpoints.check_settings(folder / 'settings.json', kept)
    saved = checkpoints.Checkpoints(folder / 'checkpoints')
    try:
      found = saved.restore(jax.eval_shape(make, numbers))
      if found is not None:
        return found.tree
      start = make(numbers)
      saved.save(0, start, {})
      return start
    finally:
      saved.close()
