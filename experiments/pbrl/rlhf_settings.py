"""Settings of `rlhf`, and the sizes that fit the kind of an environment."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

from experiments import harness
from experiments.pbrl import feedback
from experiments.rl import environments, games


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; what is None, or empty, fits the environment.

  The numbers of pairs, of the warm-up and of the buffer are those of Shen, Yang
  and Chen, 2024; what they do not say is ours.

  Attributes:
    suite: `gymnax`, compiled, or `atari`, stepped in Python.
    env: an environment of the suite; CartPole-v1 or Seaquest.
    sizes: the preset whose sizes stand in for what is None.
    methods: of `feedback.METHODS`; none for all that go with the labels.
    labels: a file of labelled pairs to train on, in place of made labels.
    frames: steps of all policies of a method, the start's aside; an action of
      the Atari is one.
    environments: side by side; two policies have half of them each.
    rollout: steps of each for an update of the policies.
    updates: of the policies in a reward epoch.
    fragment: steps of a fragment.
    pairs: new ones in a reward epoch; 16 in the paper.
    start_pairs: before the policy learns; 576 in the paper.
    warm_up: steps of the reward model on them; 500 in the paper.
    buffer: pairs that are kept; 3,000 in the paper.
    held_out: untied pairs that are kept for the reward model's accuracy.
    reward_steps: of the reward model in an epoch.
    reward_batch: pairs of such a step.
    reward_rate: of Adam, for the reward model.
    rates: of Adam, for actors, tried on seeds that are not reported; falls
      linearly to 0.
    critic_rate: of critics, in multiples of the actors'.
    clip: largest norm of a gradient, of an actor and of a critic.
    discount: of rewards.
    decay: of generalised advantages.
    tau: weight of the policy's entropy, in units of the normalised reward.
    penalty: lambda of the penalty, in the reward model.
    score: of the score function, in the policy.
    reward_scale: mean absolute value of normalised rewards.
    temperature: of made labels, in units of the true reward.
    records: in a run; the last one is at the end.
    episodes: of which the last ones count.
    seeds: of weights, environments, actions and labels.
  """

  suite: Literal['gymnax', 'atari'] = 'gymnax'
  env: str | None = None
  sizes: Literal['quick', 'smoke', 'paper'] = 'quick'
  methods: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  labels: str = ''
  frames: int | None = None
  environments: int | None = None
  rollout: int | None = None
  updates: int | None = None
  fragment: int = 25
  pairs: int | None = None
  start_pairs: int | None = None
  warm_up: int | None = None
  buffer: int | None = None
  held_out: int | None = None
  reward_steps: int | None = None
  reward_batch: int | None = None
  reward_rate: float | None = None
  rates: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()
  critic_rate: float = 3.0
  clip: float = 0.5
  discount: Annotated[float, harness.Allowed(0, 0.9999)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  tau: float | None = None
  penalty: Annotated[float, harness.Allowed(0)] = 0.1
  score: Annotated[float, harness.Allowed(0)] = 0.05
  reward_scale: float = 0.1
  temperature: float = 1.0
  records: int | None = None
  episodes: int | None = None
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(sizes='smoke', seeds=2),
  'paper': Settings(sizes='paper', seeds=10),
}

_PUBLISHED: dict[str, Any] = {
  'pairs': 16,
  'start_pairs': 576,
  'warm_up': 500,
  'buffer': 3_000,
  'held_out': 256,
  'reward_batch': 64,
  'reward_rate': 3e-4,
}
_SMOKE: dict[str, Any] = {
  'methods': ('drlhf', 'pbrl'),
  'environments': 8,
  'rollout': 50,
  'updates': 1,
  'pairs': 8,
  'start_pairs': 16,
  'warm_up': 5,
  'buffer': 48,
  'held_out': 32,
  'reward_batch': 8,
  'reward_steps': 2,
  'reward_rate': 3e-4,
  'rates': (2e-3,),
  'tau': 0.01,
  'records': 4,
  'episodes': 32,
}
_VECTOR: dict[str, Any] = _PUBLISHED | {
  'frames': 320_000,
  'environments': 32,
  'rollout': 50,
  'updates': 1,
  'reward_steps': 8,
  'rates': (2e-3,),
  'tau': 0.01,
  'records': 20,
  'episodes': 32,
}
# A step of the reward model on cells takes as long as 300 of the environment.
_CELLS: dict[str, Any] = _VECTOR | {
  'frames': 80_000,
  'environments': 16,
  'rollout': 25,
  'updates': 4,
  'reward_batch': 16,
  'reward_steps': 4,
}
_PIXELS: dict[str, Any] = _PUBLISHED | {
  'environments': 16,
  'rollout': 25,
  'updates': 8,
  'reward_steps': 8,
  'rates': (1e-4,),
  'tau': 0.01,
  'records': 100,
  'episodes': 32,
}

# By kind of environment, then by preset.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
  'vector': {
    'smoke': _SMOKE | {'frames': 6_400},
    'quick': _VECTOR,
    'paper': _VECTOR | {'frames': 3_000_000, 'records': 100},
  },
  'cells': {
    'smoke': _SMOKE | {'frames': 1_600},
    'quick': _CELLS,
    'paper': _CELLS
    | {'frames': 10_000_000, 'reward_batch': 64, 'records': 100},
  },
  'pixels': {
    'smoke': _SMOKE
    | {'frames': 400, 'environments': 4, 'rollout': 25, 'records': 2},
    'quick': _PIXELS
    | {
      'methods': ('oracle', 'drlhf', 'pbrl', 'control/constant_reward'),
      'frames': 1_600,
      'environments': 4,
      'updates': 2,
      'pairs': 8,
      'start_pairs': 32,
      'warm_up': 20,
      'buffer': 64,
      'held_out': 16,
      'reward_batch': 8,
      'reward_steps': 4,
      'records': 8,
    },
    # Shen, Yang and Chen show curves; the length of a run is ours.
    'paper': _PIXELS | {'frames': 10_000_000},
  },
}


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
    game = games.make(settings.env, _Middle())
    if len(game.shape) < 3:
      return Played('vector', game.shape, game.actions, 'float32')
    return Played('pixels', game.shape, game.actions, 'uint8')
  known = environments.make(settings.env, discrete=True)
  actions = known.environment.actions
  if len(known.shape) < 3:
    return Played('vector', known.shape, actions, 'float32')
  # The cells of MinAtar are on or off.
  cells = str(settings.env).endswith('-MinAtar')
  return Played('cells', known.shape, actions, 'bool' if cells else 'float32')


class _Middle:
  """A generator of random numbers for a game that is only looked at."""

  def integers(self, high):
    return high // 2


def resolve(settings: Settings) -> Settings:
  """Settings with all sizes, checked against each other.

  Raises:
    SettingsError: for settings that no run can have.
  """
  if settings.env is None:
    env = 'CartPole-v1' if settings.suite == 'gymnax' else 'Seaquest'
    settings = dataclasses.replace(settings, env=env)
  sizes = SIZES[played(settings).kind][settings.sizes]
  unset = {n: v for n, v in sizes.items() if getattr(settings, n) in (None, ())}
  settings = dataclasses.replace(settings, **unset)
  fits = [n for n, m in feedback.METHODS.items() if _fits(settings, m)]
  methods = settings.methods or tuple(fits)
  for name in methods:
    if name not in feedback.METHODS:
      known = ', '.join(feedback.METHODS)
      raise harness.SettingsError(f'unknown method {name!r}; known: {known}.')
    if name not in fits:
      raise harness.SettingsError(
        f'{name} draws labels of its own, and --labels gives them: take one '
        f'of {", ".join(fits)}.'
      )
  settings = dataclasses.replace(settings, methods=methods)
  if settings.fragment > settings.rollout:
    raise harness.SettingsError(
      f'--fragment={settings.fragment}: a fragment is a part of a rollout, '
      f'which has {settings.rollout} steps: take a longer --rollout.'
    )
  if settings.environments < 4 or settings.environments % 2:
    raise harness.SettingsError(
      f'--environments={settings.environments}: an even number, at least 4, as '
      'two policies share them, and each holds some out.'
    )
  if settings.buffer < settings.pairs:
    raise harness.SettingsError(
      f'--buffer={settings.buffer}: it has to hold the {settings.pairs} pairs '
      'of a reward epoch.'
    )
  if settings.reward_steps > settings.rollout:
    raise harness.SettingsError(
      f'--reward_steps={settings.reward_steps}: at most the steps of a '
      f'rollout, {settings.rollout}, as each sees another part of it.'
    )
  if settings.suite == 'atari' and len(settings.rates) > 1:
    raise harness.SettingsError('--rates: one rate with --suite=atari.')
  return settings


def _fits(settings, method):
  """Whether a method goes with the labels, and with the suite by default."""
  return method.sense or not settings.labels


def epochs_of(settings: Settings) -> int:
  """Reward epochs of a run."""
  each = settings.environments * settings.rollout * settings.updates
  return max(1, settings.frames // each)


def start_epochs_of(settings: Settings) -> int:
  """Rollouts of the first policy, for the pairs at the start."""
  return -(-settings.start_pairs // settings.pairs)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  resolve(settings)
