"""RLHF where environments are compiled: all seeds of a method, one program."""

import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import checkpoints, comparison, files
from experiments.pbrl import feedback, labels, preferences, rlhf_settings
from experiments.pbrl import learner as learner_lib
from experiments.rl import environments, networks


class Parts(NamedTuple):
  """What a method is made of.

  Attributes:
    learner: the method.
    agent: networks of a policy and of its value.
    reward: network of the reward model: a reward for each action. The control
      of a constant reward has a network's weights, and ignores them.
    sampling: of pairs.
  """

  learner: learner_lib.Learner
  agent: networks.Agent
  reward: harness.Network
  sampling: learner_lib.Sampling


def parts_of(settings: rlhf_settings.Settings, name: str, rate: Any) -> Parts:
  """Makes a method from settings that are resolved.

  Args:
    settings: of the run.
    name: of the method.
    rate: of its actors.

  Returns:
    The parts.
  """
  method = feedback.METHODS[name]
  env = rlhf_settings.played(settings)
  agent = networks.agent(env.shape, env.actions)
  # The action picks the output: a network of observation and action.
  body = networks.body(env.shape)
  if env.kind == 'cells':
    body['hidden'] = (32,)
  reward = networks.network(env.shape, env.actions, **body)
  if method.constant:
    reward = reward._replace(apply=lambda x, observation: jnp.ones(env.actions))
  sampling = learner_lib.Sampling(
    length=settings.fragment,
    pairs=0 if settings.labels else settings.pairs,
    capacity=settings.buffer,
    held=settings.held_out,
    steps=settings.reward_steps,
    batch=settings.reward_batch,
    temperature=settings.temperature,
    dtype=jnp.dtype(env.dtype),
  )
  learner = learner_lib.make_learner(
    method,
    agent,
    reward.apply,
    rates=feedback.Rates(
      rate,
      settings.critic_rate * rate,
      settings.reward_rate,
      settings.clip,
      rlhf_settings.epochs_of(settings) * settings.updates,
    ),
    weights=feedback.Weights(
      settings.tau, settings.penalty, settings.score, settings.reward_scale
    ),
    sampling=sampling,
    advantages=bj.rl.Advantages(settings.discount, settings.decay),
  )
  return Parts(learner, agent, reward, sampling)


def file_buffer(settings: rlhf_settings.Settings) -> preferences.Buffer | None:
  """The pairs of the file of labels, the last that fit; None without one."""
  if not settings.labels:
    return None
  env = rlhf_settings.played(settings)
  pairs = labels.read(
    settings.labels,
    shape=env.shape,
    actions=env.actions,
    length=settings.fragment,
    dtype=env.dtype,
  )
  last = jax.tree.map(lambda x: jnp.asarray(x[-settings.buffer :]), pairs)
  return preferences.Buffer(last, jnp.int32(len(last.labels)))


def collector_of(
  settings: rlhf_settings.Settings, agent: networks.Agent, count: int
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
    steps=settings.rollout,
    window=settings.episodes,
  )


def keys_of(seed_key: jax.Array) -> list[jax.Array]:
  """Keys of the first policy, of the reward model, of the start, of the run."""
  return list(jax.random.split(seed_key, 4))


def start_of(
  settings: rlhf_settings.Settings,
  name: str,
  seed: jax.Array,
  given: preferences.Buffer | None,
) -> learner_lib.Start:
  """Pairs of the first policy, and a reward model that has seen them.

  Args:
    settings: of the run, resolved.
    name: of a method.
    seed: a seed.
    given: labelled pairs, or None to make labels.

  Returns:
    A `learner_lib.Start`.
  """
  learner, agent, reward, sampling = parts_of(settings, name, 0.0)
  keys = keys_of(jax.random.key(seed))
  collector = collector_of(settings, agent, settings.environments // 2)
  policy = agent.init(keys[0])
  env = rlhf_settings.played(settings)
  start = learner_lib.nothing(reward.init(keys[1]), sampling, env.shape)
  one, two, three = jax.random.split(keys[2], 3)

  def body(carry, key):
    start, state = carry
    rollout, state = collector.collect(policy, state)
    return (learner.add(start, key, rollout), state), None

  count = rlhf_settings.start_epochs_of(settings)
  carry = (start, collector.init(one))
  (start, _), _ = jax.lax.scan(body, carry, jax.random.split(two, count))
  if given is not None:
    start = start._replace(buffer=given, labels=given.count)
  return learner.warm_up(start, three, settings.warm_up)


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
  settings: rlhf_settings.Settings, name: str, context: harness.Context
) -> optax.GradientTransformationExtraArgs:
  """A method whose environments are in its state; an update is an epoch."""
  method = feedback.METHODS[name]
  learner, agent, _, _ = parts_of(settings, name, context.hyper['rate'])
  count = settings.environments // (2 if method.second else 1)
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
    if settings.updates > 1:
      carry, _ = jax.lax.scan(
        lambda carry, _: (update_of(carry, False), None),
        carry,
        length=settings.updates - 1,
      )
    after, state = update_of(carry, True)
    return jax.tree.map(jnp.subtract, after, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measure(settings, name, context, params, state):
  """The policy's return, and how the reward model orders what is held out."""
  del context
  parts = parts_of(settings, name, 0.0)
  known = {
    'return': bj.rl.mean_return(state.first.episodes, settings.episodes),
  }
  if feedback.METHODS[name].model:
    known['accuracy'] = preferences.accuracy(
      parts.reward.apply, params.upper, state.learner.held
    )
  if feedback.METHODS[name].second:
    known['second_return'] = bj.rl.mean_return(
      state.second.episodes, settings.episodes
    )
  return known


class Suite:
  """Trains methods; what they start from is made once for those that share it.

  Args:
    settings: of the run, resolved.
  """

  def __init__(self, settings: rlhf_settings.Settings):
    """Reads the file of labels, if there is one."""
    self._settings = settings
    self._given = file_buffer(settings)
    self._starts: dict[Any, Any] = {}

  def train(self, job: comparison.Job) -> harness.Trained:
    """Runs one job of a comparison."""
    settings, name = self._settings, job.method
    epochs = rlhf_settings.epochs_of(settings)

    def init(context):
      agent = parts_of(settings, name, 0.0).agent
      policy = agent.init(keys_of(context.seed_key)[0])
      upper = jax.tree.map(lambda x: jnp.array(x, copy=True), context.own.upper)
      return bj.BilevelParams(upper, policy)

    return harness.train(
      lambda context: make_solver(settings, name, context),
      init,
      steps=epochs,
      chunk=-(-epochs // settings.records),
      own=self._start(name, job.seeds, job.keywords['workdir']),
      evaluate=lambda *given: measure(settings, name, *given),
      **job.keywords,
    )

  def _start(self, name, seeds, workdir):
    method = feedback.METHODS[name]
    kind = (method.sense, seeds)
    if kind not in self._starts:
      self._starts[kind] = self._made(name, seeds, workdir)
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

  def _made(self, name, seeds, workdir):
    """What methods start from, read where a run that was killed has made it."""
    settings = self._settings
    make = jax.jit(
      jax.vmap(lambda seed: start_of(settings, name, seed, self._given))
    )
    numbers = jnp.asarray(seeds, jnp.uint32)
    if workdir is None:
      return make(numbers)
    sense = 'labelled' if feedback.METHODS[name].sense else 'coin'
    tag = zlib.crc32(repr(seeds).encode())
    folder = pathlib.Path(workdir) / 'starts' / f'{sense}-{tag:08x}'
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
