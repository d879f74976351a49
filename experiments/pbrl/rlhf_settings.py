"""Settings of `rlhf`, with default sizes by kind of environment."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments import harness
from experiments.rl import environments, games


class Method(NamedTuple):
  """Differences between methods.

  Attributes:
    title: for tables.
    learned_reward: whether rewards come from the model, not the environment.
    second_policy: whether there is a second policy, and so a penalty.
    true_labels: whether labels follow the true rewards, or are random.
    constant: reward of each step from a fixed model, 1 or -1; 0 without one.
    ensemble: whether an ensemble of reward models chooses the pairs that are
      labelled.
  """

  title: str
  learned_reward: bool = True
  second_policy: bool = False
  true_labels: bool = True
  constant: int = 0
  ensemble: bool = False

  @property
  def learns_labels(self) -> bool:
    """Whether the rewards depend on the labels."""
    return self.learned_reward and not self.constant


METHODS = {
  'oracle': Method('A2C on the true reward', learned_reward=False),
  'drlhf': Method('DRLHF'),
  'pbrl': Method('PBRL', second_policy=True),
  'control/random_labels': Method('DRLHF, random labels', true_labels=False),
  'control/constant_reward': Method('constant reward of 1', constant=1),
  'control/negative_reward': Method('constant reward of -1', constant=-1),
  'ensemble': Method('DRLHF, queries by disagreement', ensemble=True),
}
# Methods of the presets with the published labels.
FORMER_METHODS = tuple(METHODS)[:5]


MEANINGS = {
  'oracle': 'actor-critic (A2C) on the true reward.',
  'drlhf': 'deep RL from human preferences, reward and policy in turn.',
  'pbrl': 'penalty-based bilevel RL, the method of the paper.',
  'control/random_labels': 'DRLHF with random labels.',
  'control/constant_reward': 'actor-critic on a reward of 1 per step.',
  'control/negative_reward': 'actor-critic on a reward of -1 per step.',
  'ensemble': 'DRLHF whose pairs are those that its models disagree on.',
}
EPISODES = 32  # Number of last episodes in the recorded mean return.


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Rollouts of the policies.

  Attributes:
    environments: number of parallel environments; two policies share them.
    steps: steps of each environment per update of the policies.
    updates: updates of the policies per reward epoch.
  """

  environments: int | None = None
  steps: int | None = None
  updates: int | None = None


@dataclasses.dataclass(frozen=True)
class Preferences:
  """Pairs of fragments; the paper is Shen, Yang and Chen, 2024.

  Attributes:
    fragment: steps of a fragment.
    pairs: new pairs per reward epoch; 16 in the paper.
    start_pairs: pairs before the policy learns; 576 in the paper.
    buffer: capacity of the buffer of pairs; 3,000 in the paper.
    held_out: untied pairs that measure the reward model's accuracy.
    temperature: noise of synthetic labels, in units of the true reward.
    ties: labels of pairs with equal returns, `drawn` as 0 or 1, or `half`.
    candidates: pairs among which an ensemble chooses each labelled one.
  """

  fragment: int = 25
  pairs: int | None = None
  start_pairs: int | None = None
  buffer: int | None = None
  held_out: int | None = None
  temperature: float = 1.0
  ties: Literal['drawn', 'half'] = 'drawn'
  candidates: int = 8


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """Learning of the reward model.

  Attributes:
    warm_up: steps before the policy learns; 500 in the paper.
    steps: steps per reward epoch.
    batch: pairs per step.
    rate: step size of Adam.
    members: number of reward models of an ensemble.
  """

  warm_up: int | None = None
  steps: int | None = None
  batch: int | None = None
  rate: float = 3e-4
  members: int = 3


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of the terms of both losses.

  Attributes:
    tau: weight of the policy's entropy, in units of the normalised reward.
    penalty: lambda, the weight of the penalty in the reward model.
    score: weight of the score function in the policy.
    multiplier: lambda of both terms, in units of the normalised reward; 0 for
      the separate weights `penalty` and `score`.
    nonnegative: whether the reward model has no penalty in epochs in which the
      policy is better than the second one.
  """

  tau: float = 0.01
  penalty: Annotated[float, harness.Allowed(0)] = 0.1
  score: Annotated[float, harness.Allowed(0)] = 0.05
  multiplier: Annotated[float, harness.Allowed(0)] = 0.0
  nonnegative: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; None or empty means the default of the environment.

  Values without the word paper are ours.

  Attributes:
    suite: `gymnax`, compiled, or `atari`, stepped in Python.
    env: name of the environment; CartPole-v1 or Seaquest by default.
    sizes: preset of the default sizes.
    methods: methods that are compared; empty for all that fit the labels.
    labels: file of labelled pairs to train on, instead of synthetic labels.
    frames: steps of all policies of a method after the start; an action in an
      Atari game counts as one.
    rollouts: of the policies.
    preferences: pairs of fragments.
    reward: learning of the reward model.
    rates: step sizes of the actors' Adam, tried on unreported seeds; they fall
      linearly to 0.
    discount: discount of rewards.
    weights: of the terms of the losses.
    normalised_advantages: whether advantages have mean 0 and deviation 1.
    records: number of records of a run; the last one is at its end.
    seeds: of weights, environments, actions and labels.
  """

  suite: Literal['gymnax', 'atari'] = 'gymnax'
  env: str | None = None
  sizes: Literal['quick', 'smoke', 'paper'] = 'quick'
  methods: Annotated[
    tuple[str, ...],
    harness.Allowed(empty=True),
    harness.Among(METHODS, MEANINGS),
  ] = ()
  labels: str = ''
  frames: int | None = None
  rollouts: Rollouts = Rollouts()
  preferences: Preferences = Preferences()
  reward: RewardModel = RewardModel()
  rates: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()
  discount: Annotated[float, harness.Allowed(0, 0.9999)] = 0.99
  weights: Weights = Weights()
  normalised_advantages: bool = False
  records: int | None = None
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(sizes='smoke', seeds=2),
  'paper': Settings(sizes='paper', seeds=10),
  # On games that a constant reward does not solve.
  'informative': Settings(
    methods=tuple(METHODS),
    frames=1_000_000,
    preferences=Preferences(temperature=0.3, ties='half'),
    rates=(1e-3, 2e-3, 4e-3),
    weights=Weights(nonnegative=True),
    normalised_advantages=True,
    records=40,
  ),
}
# Former flags.
RENAMED = {
  'rollout': 'rollouts.steps',
  'reward_steps': 'reward.steps',
  'reward_batch': 'reward.batch',
  'reward_rate': 'reward.rate',
}
_M = 1_000_000
# Defaults by kind of environment and preset; the length of a run is ours. On
# cells a step of the reward model takes as long as 300 environment steps.
_NAMES = (
  *('rollouts.environments', 'rollouts.steps', 'rollouts.updates'),
  *('preferences.start_pairs', 'preferences.pairs', 'preferences.buffer'),
  *('preferences.held_out', 'reward.warm_up', 'reward.steps', 'reward.batch'),
  *('frames', 'records'),
)
_SIZES = {
  ('vector', 'smoke'): (8, 50, 1, 16, 8, 48, 32, 5, 2, 8, 6_400, 4),
  ('vector', 'quick'): (32, 50, 1, 576, 16, 3000, 256, 500, 8, 64, 320_000, 20),
  ('vector', 'paper'): (32, 50, 1, 576, 16, 3000, 256, 500, 8, 64, 3 * _M, 100),
  ('cells', 'smoke'): (8, 50, 1, 16, 8, 48, 32, 5, 2, 8, 1_600, 4),
  ('cells', 'quick'): (16, 25, 4, 576, 16, 3000, 256, 500, 4, 16, 80_000, 20),
  ('cells', 'paper'): (16, 25, 4, 576, 16, 3000, 256, 500, 4, 64, 10 * _M, 100),
  ('pixels', 'smoke'): (4, 25, 1, 16, 8, 48, 32, 5, 2, 8, 400, 2),
  ('pixels', 'quick'): (4, 25, 2, 32, 8, 64, 16, 20, 4, 8, 1_600, 8),
  ('pixels', 'paper'): (
    16,
    25,
    8,
    576,
    16,
    3000,
    256,
    500,
    8,
    64,
    10 * _M,
    100,
  ),
}


def default_sizes(
  kind: str, preset: str, methods: Sequence[str]
) -> dict[str, Any]:
  """Defaults of empty settings, by name.

  Args:
    kind: of environment: vector, cells or pixels.
    preset: smoke, quick or paper.
    methods: methods that fit the labels.
  """
  methods = [name for name in methods if name in FORMER_METHODS]
  if preset == 'smoke':
    methods = ('drlhf', 'pbrl')
  elif (kind, preset) == ('pixels', 'quick'):
    methods = [name for name in methods if name != 'control/random_labels']
  rate = 1e-4 if kind == 'pixels' and preset != 'smoke' else 2e-3
  sizes = dict(zip(_NAMES, _SIZES[kind, preset], strict=True))
  return sizes | {'methods': tuple(methods), 'rates': (rate,)}


class EnvironmentSpec(NamedTuple):
  """Sizes of an environment.

  Attributes:
    kind: of its default sizes: vector, cells or pixels.
    shape: of an observation.
    actions: number of actions.
    dtype: of stored observations.
  """

  kind: str
  shape: tuple[int, ...]
  actions: int
  dtype: Any


def environment_spec(settings: Settings) -> EnvironmentSpec:
  """Finds the sizes of the environment `env`.

  Raises:
    SettingsError: if it is unknown, or if its actions are continuous.
  """
  if settings.suite == 'atari':
    game = games.make(settings.env, np.random.default_rng(0))
    shape, actions, kind, dtype = game.shape, game.actions, 'pixels', 'uint8'
  else:
    known = environments.make(settings.env, discrete=True)
    shape, actions, kind = known.shape, known.environment.actions, 'cells'
    # The cells of MinAtar are on or off.
    dtype = 'bool' if str(settings.env).endswith('-MinAtar') else 'float32'
  if len(shape) < 3:
    kind, dtype = 'vector', 'float32'
  return EnvironmentSpec(kind, shape, actions, dtype)


def resolve(settings: Settings) -> Settings:
  """Fills in all sizes and checks the settings.

  Raises:
    SettingsError: for settings that contradict each other.
  """
  if settings.env is None:
    env = 'CartPole-v1' if settings.suite == 'gymnax' else 'Seaquest'
    settings = dataclasses.replace(settings, env=env)
  # Random labels do not fit a file of labels.
  fits = [n for n, m in METHODS.items() if m.true_labels or not settings.labels]
  sizes = default_sizes(environment_spec(settings).kind, settings.sizes, fits)
  values = harness.run_settings(settings)
  settings = harness.replaced(
    settings, {n: v for n, v in sizes.items() if values[n] in (None, ())}
  )
  values = harness.run_settings(settings)
  rollout, pairs = settings.rollouts, settings.preferences

  def need(valid, name, reason):
    if not valid:
      raise harness.SettingsError(f'--{name}={values[name]}: {reason}.')

  need(
    set(settings.methods) <= set(fits),
    'methods',
    f'random labels do not go with --labels: take some of {", ".join(fits)}',
  )
  need(
    pairs.fragment <= rollout.steps,
    'preferences.fragment',
    f'a fragment is longer than a rollout of {rollout.steps} steps; raise '
    '--rollouts.steps',
  )
  need(
    rollout.environments >= 4 and rollout.environments % 2 == 0,
    'rollouts.environments',
    'has to be an even number, at least 4: two policies share the '
    'environments, and each reserves some for held-out pairs',
  )
  need(
    pairs.buffer >= pairs.pairs,
    'preferences.buffer',
    f'is smaller than the {pairs.pairs} pairs of a reward epoch',
  )
  need(
    settings.reward.steps <= rollout.steps,
    'reward.steps',
    f'has to be at most the {rollout.steps} steps of a rollout, as each step '
    'reads a different part of it',
  )
  need(
    settings.suite == 'gymnax' or len(settings.rates) == 1,
    'rates',
    'takes one rate with --suite=atari',
  )
  return settings


def count_epochs(settings: Settings) -> int:
  """Number of reward epochs of a run."""
  environments, steps, updates = vars(settings.rollouts).values()
  return max(1, settings.frames // (environments * steps * updates))


def count_start_epochs(settings: Settings) -> int:
  """Number of rollouts of the first policy, for the pairs at the start."""
  return -(-settings.preferences.start_pairs // settings.preferences.pairs)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  resolve(settings)
