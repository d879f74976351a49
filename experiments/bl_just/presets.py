"""Settings and presets of `train`."""

import dataclasses
from typing import Annotated, Literal

import numpy as np

from experiments import harness
from experiments.bl_just import methods
from experiments.harness.study import comparison
from experiments.speech import corpora, feed, front_end, objectives


@dataclasses.dataclass(frozen=True)
class Network:
  """Settings of the recogniser.

  Attributes:
    encoder: kind of the encoder.
    width: width of the layers.
    depth: number of layers after the strided convolutions.
    strides: strides of the first convolutions.
    kernel: kernel size of the convolutions, in frames.
    heads: number of attention heads.
    dropout: dropout rate of the encoder.
    mels: number of mel bands.
    units: text units.
    vocab_size: number of word pieces, for --units=pieces.
  """

  encoder: Literal['conv', 'conv_lstm', 'conformer'] = 'conv'
  width: int = 96
  depth: Annotated[int, harness.Allowed(0)] = 6
  strides: tuple[int, ...] = (2, 2, 2)
  kernel: int = 5
  heads: int = 4
  dropout: Annotated[float, harness.Allowed(0, 0.9)] = 0.1
  mels: int = 40
  units: Literal['characters', 'words', 'pieces'] = 'words'
  vocab_size: int = 1_000


@dataclasses.dataclass(frozen=True)
class Grid:
  """Grid of the tuning; single values skip it.

  Attributes:
    rates: step sizes.
    penalties: largest penalties, for the joint methods.
    decays: weight decays, for the other methods; as many as penalties.
  """

  rates: tuple[float, ...] = (3e-3,)
  penalties: Annotated[tuple[float, ...], harness.Allowed(0)] = (0.3,)
  decays: Annotated[tuple[float, ...], harness.Allowed(0)] = (1e-2,)


@dataclasses.dataclass(frozen=True)
class Training:
  """Settings of the training.

  Attributes:
    steps: number of updates.
    batch_size: utterances per loss and update.
    buckets: number of length buckets.
    audio_rate: step size of updates on audio alone.
    exploration: schedule of `audio_rate` in the exploration of BL-JUST:
      'constant' as published, or 'decaying' with the joint updates.
    tuning_rate: step size of the final fine-tuning.
    clip: largest gradient norm of the encoder and of each head.
    chunk: updates between log entries.
    check_every: updates between evaluations on the validation set.
  """

  steps: int = 2_400
  batch_size: int = 8
  buckets: int = 2
  audio_rate: float = 1e-3
  exploration: Literal['constant', 'decaying'] = 'constant'
  tuning_rate: float = 3e-4
  clip: float = 5.0
  chunk: int = 100
  check_every: int = 600


_KNOWN = harness.Among(methods.TITLES, methods.MEANINGS)
_DATA, _SHARES = corpora.Data(), methods.Shares()
_SSL, _MASKS = objectives.Ssl(), front_end.Masks()
Shares = methods.Shares  # `Settings` has a field `methods`.


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper's are in the preset `paper`.

  Attributes:
    methods: methods to compare.
    converged: largest training error of a converged run.
    seeds: number of training seeds.
    data: the data.
    network: the recogniser.
    ssl: the self-supervised loss.
    masks: SpecAugment.
    training: the training.
    shares: phases of a run.
    grid: grid of the tuning.
  """

  methods: Annotated[tuple[str, ...], _KNOWN] = (
    *('supervised', 'supervised_longer', 'pretrain', 'bl_just'),
  )
  converged: float = 0.02
  seeds: int = 5
  data: corpora.Data = _DATA
  network: Network = Network()
  ssl: objectives.Ssl = _SSL
  masks: front_end.Masks = _MASKS
  training: Training = Training()
  shares: Shares = _SHARES
  grid: Grid = Grid()

  def plan(self, method: str) -> np.ndarray:
    """Makes the plan of a method."""
    return methods.plan(method, self.training.steps, self.shares)

  def axes(self, method: str) -> comparison.Grid:
    """Returns the grid of a method: step sizes, and penalties or decays."""
    joint = feed.STEPS.index(('ctc', 'ssl'))
    if np.any(self.plan(method) == joint):
      return {'rate': self.grid.rates, 'penalty': self.grid.penalties}
    return {'rate': self.grid.rates, 'decay': self.grid.decays}


_AN4 = Settings(
  methods=('supervised', 'bl_just'),
  seeds=1,
  data=corpora.Data('an4', labelled=(1.0,)),
  network=Network(
    width=128, depth=7, strides=(2, 2), dropout=0.15, units='characters'
  ),
  masks=front_end.Masks(max_time_mask=30),
  training=Training(8_000, buckets=3, chunk=200, check_every=2_000),
  grid=Grid(rates=(2e-3,)),
)
PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('supervised', 'bl_just'),
    seeds=2,
    data=corpora.Data('made_up', strings=24, test_strings=8, labelled=(0.5,)),
    network=Network(width=16, depth=0, strides=(2, 2), mels=16),
    training=Training(20, 4, 1, chunk=10, check_every=20),
  ),
  # Few transcripts, all methods tuned; seven hours of a core.
  'few': Settings(
    methods=tuple(n for n in methods.TITLES if n != 'no_tuning'),
    seeds=10,
    data=corpora.Data(labelled=(0.05, 0.1)),
    training=Training(exploration='decaying'),
    grid=Grid((1e-3, 3e-3, 1e-2), (0.1, 0.3, 1.0), (1e-3, 1e-2, 1e-1)),
  ),
  # A recogniser of digits, for transcription.
  'digits': Settings(
    methods=('supervised',),
    seeds=1,
    data=corpora.Data(held_speaker='theo', labelled=(1.0,)),
  ),
  'an4_full': _AN4,
  # All methods by the fraction with texts; a night of one core.
  'an4_grid': dataclasses.replace(
    _AN4,
    methods=tuple(methods.TITLES),
    seeds=3,
    data=corpora.Data('an4', labelled=(0.1, 0.25, 0.5)),
    training=Training(3_000, buckets=6, chunk=200, check_every=1_000),
  ),
  # 100 hours with texts: 200 epochs with batches of 64.
  'paper': Settings(
    methods=('supervised', 'pretrain', 'joint', 'bl_just'),
    seeds=1,
    data=corpora.Data('librispeech', labelled=(1.0,)),
    network=Network(
      'conformer', width=512, depth=8, heads=8, mels=80, units='pieces'
    ),
    ssl=objectives.Ssl('contrastive', codebook_size=8_192),
    masks=front_end.Masks(max_time_mask=30, max_freq_mask=25),
    training=Training(90_000, 64, 4, chunk=500, check_every=10_000),
    grid=Grid(rates=(5e-4,), penalties=(1.0,)),
  ),
  # A folder of the user.
  'user': Settings(
    methods=('bl_just',),
    seeds=1,
    data=corpora.Data('folder', labelled=(1.0,)),
    network=Network(
      'conv_lstm', width=256, depth=3, strides=(2, 2), units='characters'
    ),
    training=Training(10_000, buckets=3),
    grid=Grid(rates=(1e-3,)),
  ),
}
# Flags of an earlier version.
RENAMED = {
  'pieces': 'network.vocab_size',
  'task': 'ssl.ssl_loss',
  'hidden': 'ssl.mask_prob',
  'span': 'ssl.mask_length',
  'ahead': 'ssl.prediction_steps',
  'codes': 'ssl.codebook_size',
  'time_stripes': 'masks.time_masks',
  'longest_stripe': 'masks.max_time_mask',
  'band_stripes': 'masks.freq_masks',
  'widest_stripe': 'masks.max_freq_mask',
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  settings.data.check()
  names, grid, shares = settings.methods, settings.grid, settings.shares
  if len(set(names)) < len(names):
    raise harness.SettingsError(f'methods={",".join(names)} has a duplicate.')
  if len(grid.penalties) != len(grid.decays):
    raise harness.SettingsError(
      f'{len(grid.penalties)} penalties and {len(grid.decays)} decays: give as '
      'many of both, since all methods need grids of equal size.'
    )
  if shares.exploring + shares.tuning >= 1 or shares.pretraining >= 1:
    raise harness.SettingsError(
      'exploring + tuning and pretraining have to be below 1.'
    )
