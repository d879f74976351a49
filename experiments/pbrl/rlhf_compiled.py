"""RLHF in compiled environments: one program for all seeds of a method."""

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
from experiments.pbrl import labels, preferences, queries, rlhf_settings
from experiments.pbrl import learner as learner_lib
from experiments.pbrl.rlhf_settings import METHODS, Settings
from experiments.rl import environments, networks


class Parts(NamedTuple):
  """Learner and networks of a method.

  Attributes:
    learner: the method.
    agent: networks of a policy and its value.
    reward: network of the reward model, with a reward per action. The control
      with a constant reward ignores its weights.
  """

  learner: learner_lib.Learner
  agent: networks.Agent
  reward: harness.Network


def make_parts(settings: Settings, name: str, rate: Any = 0.0) -> Parts:
  """Makes a method from resolved settings.

  Args:
    settings: of the run.
    name: of the method.
    rate: step size of its actors.
  """
  method, env = METHODS[name], rlhf_settings.environment_spec(settings)
  agent = networks.agent(env.shape, env.actions)
  # One output per action.
  body = networks.body(env.shape)
  if env.kind == 'cells':
    body['hidden'] = (32,)
  reward = networks.network(env.shape, env.actions, **body)
  member = reward.apply
  if method.constant:
    constant = jnp.full(env.actions, float(method.constant))
    reward = reward._replace(apply=lambda x, observation: constant)
  if method.ensemble:
    reward = queries.as_ensemble(reward, settings.reward.members)
  dtype = jnp.dtype(env.dtype)
  learner = learner_lib.Learner(
    method, agent, reward.apply, settings, rate, dtype, member
  )
  return Parts(learner, agent, reward)


def file_buffer(settings: Settings) -> preferences.Buffer | None:
  """Reads the last pairs of the file of labels; None without a file."""
  if not settings.labels:
    return None
  env = rlhf_settings.environment_spec(settings)
  pairs = labels.read(
    settings.labels,
    shape=env.shape,
    actions=env.actions,
    length=settings.preferences.fragment,
    dtype=env.dtype,
  )
  capacity = settings.preferences.buffer
  last = jax.tree.map(lambda x: jnp.asarray(x[-capacity:]), pairs)
  return preferences.Buffer(last, jnp.int32(len(last.labels)))


def make_collector(
  settings: Settings, agent: networks.Agent, count: int
) -> bj.rl.Collector:
  """Makes a collector of rollouts under the policy of an agent."""
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


def split_key(seed_key: jax.Array) -> list[jax.Array]:
  """Keys of the first policy, the reward model, the start and the run."""
  return list(jax.random.split(seed_key, 4))


def start_method(name: str) -> str:
  """Finds the method whose start a method shares."""
  method = METHODS[name]
  if method.ensemble:
    return 'ensemble'
  return 'drlhf' if method.true_labels else 'control/random_labels'


def make_start(
  settings: Settings,
  name: str,
  seed: jax.Array,
  labelled: preferences.Buffer | None,
) -> learner_lib.Start:
  """Collects pairs of the first policy and warms up the reward model.

  Args:
    settings: of the run, resolved.
    name: of the method, a value of `start_method`.
    seed: the seed.
    labelled: labelled pairs from a file, or None for synthetic labels.

  Returns:
    A `learner_lib.Start`.
  """
  learner, agent, reward = make_parts(settings, name)
  keys = split_key(jax.random.key(seed))
  count = settings.rollouts.environments // 2
  collector = make_collector(settings, agent, count)
  policy = agent.init(keys[0])
  shape = rlhf_settings.environment_spec(settings).shape
  start = learner.empty_start(reward.init(keys[1]), shape)
  one, two, three = jax.random.split(keys[2], 3)

  def body(carry, key):
    start, state = carry
    rollout, state = collector.collect(policy, state)
    return (learner.add(start, key, rollout), state), None

  epochs = rlhf_settings.count_start_epochs(settings)
  carry = (start, collector.init(one))
  (start, _), _ = jax.lax.scan(body, carry, jax.random.split(two, epochs))
  if labelled is not None:
    labels = jnp.zeros(4, jnp.int32).at[0].set(labelled.count)
    start = start._replace(buffer=labelled, labels=labels)
  return learner.warm_up(start, three)


class State(NamedTuple):
  """State of a run.

  Attributes:
    learner: state of the learner.
    first: environments of the policy.
    second: environments of the second policy; () without one.
  """

  learner: learner_lib.State
  first: bj.rl.EnvironmentsState
  second: Any


def make_solver(
  settings: Settings, name: str, context: harness.Context
) -> optax.GradientTransformationExtraArgs:
  """Makes a solver whose updates are reward epochs in its environments."""
  method, updates = METHODS[name], settings.rollouts.updates
  learner, agent, _ = make_parts(settings, name, context.hyper['rate'])
  count = settings.rollouts.environments // (2 if method.second_policy else 1)
  collector = make_collector(settings, agent, count)

  def init_fn(params):
    one, two, three = jax.random.split(split_key(context.seed_key)[3], 3)
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), context.own)
    return State(
      learner.init(params, three, copies),
      collector.init(one),
      collector.init(two) if method.second_policy else (),
    )

  def collect(params, state):
    rollout, first = collector.collect(params.lower, state.first)
    rollouts, second = {'lower': rollout}, ()
    if method.second_policy:
      rollouts['value'], second = collector.collect(
        learner.second_policy(state.learner), state.second
      )
    return rollouts, state._replace(first=first, second=second)

  def update_once(carry, reward_epoch):
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
        lambda carry, _: (update_once(carry, False), None),
        carry,
        length=updates - 1,
      )
    after, state = update_once(carry, True)
    return jax.tree.map(jnp.subtract, after, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measure(settings, name, context, params, state):
  """Measures returns, and the reward model's accuracy on held-out pairs."""
  del context
  mean = lambda one: bj.rl.mean_return(one.episodes, rlhf_settings.EPISODES)
  measures = {'return': mean(state.first)}
  if METHODS[name].learned_reward:
    measures['accuracy'] = preferences.accuracy(
      make_parts(settings, name).reward.apply,
      params.upper,
      state.learner.held_out,
    )
  if METHODS[name].second_policy:
    measures['second_return'] = mean(state.second)
  return measures


def run(
  options: harness.Options, settings: Settings
) -> dict[str, comparison.Outcome]:
  """Runs all methods on an environment of gymnax."""
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'methods', 'rates', 'sizes'),
    score=lambda trained: trained.history['return'].mean(axis=0),
    tuning_seeds=comparison.tuning_seeds(2),
  )
  train = Suite(settings).train
  return comparison.compare(
    rules, settings.methods, train, {'rate': settings.rates}
  )


class Suite:
  """Trains methods, which share their starts.

  Args:
    settings: of the run, resolved.
  """

  def __init__(self, settings: Settings):
    """Reads the file of labels, if any."""
    self._settings = settings
    self._labelled = file_buffer(settings)
    self._starts: dict[Any, Any] = {}

  def train(self, job: comparison.Job) -> harness.Trained:
    """Runs one job of a comparison."""
    settings, name = self._settings, job.method
    epochs = rlhf_settings.count_epochs(settings)

    def init(context):
      agent = make_parts(settings, name).agent
      policy = agent.init(split_key(context.seed_key)[0])
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
    kind = (start_method(name), seeds)
    if kind not in self._starts:
      self._starts[kind] = self._load_or_make(*kind, workdir)
    start = self._starts[kind]
    if method.learned_reward:
      return start
    # The true rewards need no pairs: buffers of size 1 save memory.
    first = lambda ring: jax.tree.map(lambda x: x[:, :1], ring)
    return start._replace(
      buffer=start.buffer._replace(pairs=first(start.buffer.pairs)),
      held_out=start.held_out._replace(pairs=first(start.held_out.pairs)),
      labels=jnp.zeros_like(start.labels),
    )

  def _load_or_make(self, name, seeds, workdir):
    """Reads the starts that a killed run has saved, or makes them."""
    settings = self._settings
    make = jax.jit(
      jax.vmap(lambda seed: make_start(settings, name, seed, self._labelled))
    )
    numbers = jnp.asarray(seeds, jnp.uint32)
    if workdir is None:
      return make(numbers)
    folders = {'drlhf': 'true', 'control/random_labels': 'random'}
    tag = zlib.crc32(repr(seeds).encode())
    folder = (
      pathlib.Path(workdir) / 'starts' / f'{folders.get(name, name)}-{tag:08x}'
    )
    identity = harness.run_settings(
      settings, 'methods', 'rates', 'sizes', 'frames'
    )
    files.make_folder(folder)
    checkpoints.check_settings(folder / 'settings.json', identity)
    saved = checkpoints.Checkpoints(folder / 'checkpoints')
    try:
      restored = saved.restore(jax.eval_shape(make, numbers))
      if restored is not None:
        return restored.tree
      start = make(numbers)
      saved.save(0, start, {})
      return start
    finally:
      saved.close()
