"""Settings of `rlhf`, and the sizes that fit the kind of an environment."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments import harness
from experiments.rl import environments, games


class Method(NamedTuple):
  """What tells methods apart.

  Attributes:
    title: for tables.
    model: whether rewards are the model's, and not the true ones.
    second: whether there is a second policy, and with it the penalty.
    sense: whether labels are of the true rewards, and not drawn by a coin.
    constant: whether the model is fixed and gives every step a reward of 1.
  """

  title: str
  model: bool = True
  second: bool = False
  sense: bool = True
  constant: bool = False

  @property
  def learns_labels(self) -> bool:
    """Whether the rewards depend on the labels."""
    return self.model and not self.constant


METHODS = {
  'oracle': Method('A2C on the true reward', model=False),
  'drlhf': Method('DRLHF'),
  'pbrl': Method('PBRL', second=True),
  'control/random_labels': Method('DRLHF, random labels', sense=False),
  'control/constant_reward': Method('constant reward of 1', constant=True),
}


EPISODES = 32  # The last ones, whose mean return is recorded.


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """How environments are stepped.

  Attributes:
    environments: how many side by side; two policies have half of them each.
    steps: steps of each environment for an update of the policies.
    updates: updates of the policies in a reward epoch.
  """

  environments: int | None = None
  steps: int | None = None
  updates: int | None = None


@dataclasses.dataclass(frozen=True)
class Preferences:
  """Pairs of fragments; the numbers of the paper are Shen et al.'s, 2024.

  Attributes:
    fragment: steps of a fragment.
    pairs: new pairs in a reward epoch; 16 in the paper.
    start_pairs: pairs before the policy learns; 576 in the paper.
    buffer: pairs that are kept; 3,000 in the paper.
    held_out: untied pairs that are kept for the reward model's accuracy.
    temperature: temperature of made labels, in units of the true reward.
  """

  fragment: int = 25
  pairs: int | None = None
  start_pairs: int | None = None
  buffer: int | None = None
  held_out: int | None = None
  temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """How the reward model learns.

  Attributes:
    warm_up: steps before the policy learns; 500 in the paper.
    steps: steps in a reward epoch.
    batch: pairs of a step.
    rate: learning rate of Adam.
  """

  warm_up: int | None = None
  steps: int | None = None
  batch: int | None = None
  rate: float = 3e-4


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; what is None, or empty, fits the environment.

  What the paper does not say is ours.

  Attributes:
    suite: `gymnax`, compiled, or `atari`, stepped in Python.
    env: an environment of the suite; CartPole-v1 or Seaquest.
    sizes: the preset whose sizes stand in for what is None.
    methods: what is compared; none for all that go with the labels.
    labels: a file of labelled pairs to train on, in place of made labels.
    frames: steps of all policies of a method, the start's aside; an action of
      the Atari is one.
    rollouts: of the policies.
    preferences: what the reward model learns from.
    reward: how it learns.
    rates: learning rates of the actors' Adam, tried on seeds that are not
      reported; they fall linearly to 0.
    discount: discount of rewards.
    tau: weight of the policy's entropy, in units of the normalised reward.
    penalty: lambda, the weight of the penalty in the reward model.
    score: weight of the score function in the policy.
    records: number of records of a run; the last one is at the end.
    seeds: of weights, environments, actions and labels.
  """

  suite: Literal['gymnax', 'atari'] = 'gymnax'
  env: str | None = None
  sizes: Literal['quick', 'smoke', 'paper'] = 'quick'
  methods: Annotated[
    tuple[str, ...],
    harness.Allowed(empty=True),
    harness.Among(METHODS),
  ] = ()
  labels: str = ''
  frames: int | None = None
  rollouts: Rollouts = Rollouts()
  preferences: Preferences = Preferences()
  reward: RewardModel = RewardModel()
  rates: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()
  discount: Annotated[float, harness.Allowed(0, 0.9999)] = 0.99
  tau: float = 0.01
  penalty: Annotated[float, harness.Allowed(0)] = 0.1
  score: Annotated[float, harness.Allowed(0)] = 0.05
  records: int | None = None
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(sizes='smoke', seeds=2),
  'paper': Settings(sizes='paper', seeds=10),
}
# Flags of an earlier version.
RENAMED = {
  'rollout': 'rollouts.steps',
  'reward_steps': 'reward.steps',
  'reward_batch': 'reward.batch',
  'reward_rate': 'reward.rate',
}
_M = 1_000_000
# What stands in for None, by kind of environment and preset. The paper's: 16
# and 576 pairs, 3,000 kept, 500 steps of warm-up; it shows curves, so that the
# length of a run is ours. A step of the reward model on cells takes as long as
# 300 of the environment.
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


def sizes_of(kind: str, preset: str, methods: Sequence[str]) -> dict[str, Any]:
  """What stands in for None, or for nothing, by name of the setting.

  Args:
    kind: of environment: vector, cells or pixels.
    preset: smoke, quick or paper.
    methods: that go with the labels.
  """
  if preset == 'smoke':
    methods = ('drlhf', 'pbrl')
  elif (kind, preset) == ('pixels', 'quick'):
    methods = [name for name in methods if name != 'control/random_labels']
  rate = 1e-4 if kind == 'pixels' and preset != 'smoke' else 2e-3
  sizes = dict(zip(_NAMES, _SIZES[kind, preset], strict=True))
  return sizes | {'methods': tuple(methods), 'rates': (rate,)}


class Played(NamedTuple):
  """What the methods have to know of an environment.

  Attributes:
    kind: of its sizes.
    shape: of an observation.
    actions: their number.
    dtype: that observations are kept in.
  """

  kind: str
  shape: tuple[int, ...]
  actions: int
  dtype: Any


def played(settings: Settings) -> Played:
  """Looks at the environment of settings whose `env` is known.

  Raises:
    SettingsError: if it is unknown, or has continuous actions.
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
  return Played(kind, shape, actions, dtype)


def resolve(settings: Settings) -> Settings:
  """Settings with all sizes, checked against each other.

  Raises:
    SettingsError: for settings that no run can have.
  """
  if settings.env is None:
    env = 'CartPole-v1' if settings.suite == 'gymnax' else 'Seaquest'
    settings = dataclasses.replace(settings, env=env)
  # What draws labels of its own does not go with a file of labels.
  every = METHODS.items()
  fits = [name for name, m in every if m.sense or not settings.labels]
  sizes = sizes_of(played(settings).kind, settings.sizes, fits)
  known = harness.settings_of(settings)
  settings = harness.replaced(
    settings, {n: v for n, v in sizes.items() if known[n] in (None, ())}
  )
  values = harness.settings_of(settings)
  rollout, pairs = settings.rollouts, settings.preferences

  def need(fine, name, reason):
    if not fine:
      raise harness.SettingsError(f'--{name}={values[name]}: {reason}.')

  need(
    set(settings.methods) <= set(fits),
    'methods',
    'one draws labels of its own, and --labels gives them: take some of '
    f'{", ".join(fits)}',
  )
  need(
    pairs.fragment <= rollout.steps,
    'preferences.fragment',
    f'a fragment is a part of a rollout, which has {rollout.steps} steps: take '
    'a longer --rollouts.steps',
  )
  need(
    rollout.environments >= 4 and rollout.environments % 2 == 0,
    'rollouts.environments',
    'an even number, at least 4, as two policies share them, and each holds '
    'some out',
  )
  need(
    pairs.buffer >= pairs.pairs,
    'preferences.buffer',
    f'it has to hold the {pairs.pairs} pairs of a reward epoch',
  )
  need(
    settings.reward.steps <= rollout.steps,
    'reward.steps',
    f'at most the steps of a rollout, {rollout.steps}, as each sees another '
    'part of it',
  )
  need(
    settings.suite == 'gymnax' or len(settings.rates) == 1,
    'rates',
    'one rate with --suite=atari',
  )
  return settings


def epochs_of(settings: Settings) -> int:
  """Reward epochs of a run."""
  environments, steps, updates = vars(settings.rollouts).values()
  return max(1, settings.frames // (environments * steps * updates))


def start_epochs_of(settings: Settings) -> int:
  """Rollouts of the first policy, for the pairs at the start."""
  return -(-settings.preferences.start_pairs // settings.preferences.pairs)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  resolve(settings)
