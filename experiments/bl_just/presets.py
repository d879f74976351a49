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
  """The recogniser.

  Attributes:
    encoder: its kind.
    width: of its layers.
    depth: layers after the strided ones.
    strides: of the first convolutions.
    kernel: frames that a convolution sees.
    heads: of attention.
    dropout: of the encoder.
    mels: bands of the front end.
    units: of texts.
    vocab_size: how many units, where they are learnt.
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
class Ssl:
  """The loss of audio alone.

  Attributes:
    ssl_loss: its kind.
    mask_prob: probability that a masked span begins at an encoded frame.
    mask_length: encoded frames of a masked span.
    negatives: frames from which the right one is told apart.
    prediction_steps: encoded frames that are predicted.
    codebook_size: of the random quantiser.
  """

  ssl_loss: Literal['cpc', 'contrastive', 'best_rq'] = 'best_rq'
  mask_prob: Annotated[float, harness.Allowed(0, 1)] = 0.15
  mask_length: int = 3
  negatives: int = 20
  prediction_steps: int = 3
  codebook_size: int = 256

  def task(self) -> objectives.Task:
    """For the recogniser."""
    return objectives.Task(
      self.ssl_loss,
      probability=self.mask_prob,
      span=self.mask_length,
      negatives=self.negatives,
      ahead=self.prediction_steps,
      codes=self.codebook_size,
    )


@dataclasses.dataclass(frozen=True)
class Masks:
  """SpecAugment, before the loss of transcripts.

  Attributes:
    time_masks: masks of frames.
    max_time_mask: frames of one, at most.
    freq_masks: masks of bands.
    max_freq_mask: bands of one, at most.
  """

  time_masks: Annotated[int, harness.Allowed(0)] = 2
  max_time_mask: int = 20
  freq_masks: Annotated[int, harness.Allowed(0)] = 2
  max_freq_mask: int = 8

  def augmentation(self) -> front_end.Augmentation:
    """For the recogniser."""
    return front_end.Augmentation(*dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Grid:
  """What tuning tries, one value for none.

  Attributes:
    rates: step sizes.
    penalties: largest penalties, by methods that have one.
    decays: of the weights, tried by the others, as many.
  """

  rates: tuple[float, ...] = (3e-3,)
  penalties: Annotated[tuple[float, ...], harness.Allowed(0)] = (0.3,)
  decays: Annotated[tuple[float, ...], harness.Allowed(0)] = (1e-2,)


@dataclasses.dataclass(frozen=True)
class Training:
  """Updates of each method.

  Attributes:
    steps: updates.
    batch_size: utterances of a loss in an update.
    buckets: lengths that batches are padded to.
    audio_rate: step size of updates on audio alone.
    tuning_rate: step size of the final fine-tuning.
    clip: the largest norm of a gradient.
    chunk: updates between two records.
    check_every: updates between two measurements of the validation part.
  """

  steps: int = 2_400
  batch_size: int = 8
  buckets: int = 2
  audio_rate: float = 1e-3
  tuning_rate: float = 3e-4
  clip: float = 5.0
  chunk: int = 100
  check_every: int = 600


_KNOWN = harness.Among(methods.TITLES)
_DATA, _SHARES = corpora.Data(), methods.Shares()
Shares = methods.Shares


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper's are in the preset `paper`.

  Attributes:
    methods: which are compared.
    converged: training error up to which a run is called converged.
    seeds: of training.
    data: what is read.
    network: the recogniser.
    ssl: the loss of audio alone.
    masks: SpecAugment.
    training: updates of each method.
    shares: parts of a run.
    grid: what tuning tries.
  """

  methods: Annotated[tuple[str, ...], _KNOWN] = (
    *('supervised', 'supervised_longer', 'pretrain', 'bl_just'),
  )
  converged: float = 0.02
  seeds: int = 5
  data: corpora.Data = _DATA
  network: Network = Network()
  ssl: Ssl = Ssl()
  masks: Masks = Masks()
  training: Training = Training()
  shares: Shares = _SHARES
  grid: Grid = Grid()

  def plan(self, method: str) -> np.ndarray:
    """Kinds of the updates of a method."""
    return methods.plan(method, self.training.steps, self.shares)

  def axes(self, method: str) -> comparison.Grid:
    """What is tried: step sizes, and penalties or decays of the weights."""
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
  masks=Masks(max_time_mask=30),
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
  # A recogniser of digits to transcribe with.
  'digits': Settings(
    methods=('supervised',),
    seeds=1,
    data=corpora.Data(held_speaker='theo', labelled=(1.0,)),
  ),
  'an4_full': _AN4,
  # All methods, by the share that has texts; a night of one core.
  'an4_grid': dataclasses.replace(
    _AN4,
    methods=tuple(methods.TITLES),
    seeds=3,
    data=corpora.Data('an4', labelled=(0.1, 0.25, 0.5)),
    training=Training(3_000, buckets=6, chunk=200, check_every=1_000),
  ),
  # 100 hours with texts; batches of 64, 200 epochs in all.
  'paper': Settings(
    methods=('supervised', 'pretrain', 'joint', 'bl_just'),
    seeds=1,
    data=corpora.Data('librispeech', labelled=(1.0,)),
    network=Network(
      'conformer', width=512, depth=8, heads=8, mels=80, units='pieces'
    ),
    ssl=Ssl('contrastive', codebook_size=8_192),
    masks=Masks(max_time_mask=30, max_freq_mask=25),
    training=Training(90_000, 64, 4, chunk=500, check_every=10_000),
    grid=Grid(rates=(5e-4,), penalties=(1.0,)),
  ),
  # A folder of one's own.
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
  """Raises SettingsError for settings that no run can have."""
  settings.data.check()
  names, grid, shares = settings.methods, settings.grid, settings.shares
  if len(set(names)) < len(names):
    raise harness.SettingsError(
      f'methods={",".join(names)} has one of them twice.'
    )
  if len(grid.penalties) != len(grid.decays):
    raise harness.SettingsError(
      f'{len(grid.penalties)} penalties and {len(grid.decays)} decays: methods '
      'are tried at equal numbers of points, give as many of both.'
    )
  if shares.exploring + shares.tuning >= 1 or shares.pretraining >= 1:
    raise harness.SettingsError(
      'exploring and tuning together, and pretraining, are shares below 1.'
    )
