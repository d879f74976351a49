"""Simulated detections to train, tune and score trackers on."""

import dataclasses
from typing import Annotated, Any, Literal

from experiments import harness
from experiments.tracking import detections, judging, scenes

# Data of the published numbers.
PUBLISHED = 'MOT17 test, public detections'
TRAINING, TUNING, TEST = 1_000, 2_000, 0  # First seeds of simulations.


@dataclasses.dataclass(frozen=True)
class Data:
  """Sequences, and their simulated detections.

  Attributes:
    sequences: sequences to train and tune on.
    held_out: sequence to test on; MOT17-09 is the paper's validation sequence.
    detector: standard, or hard with more misses, false detections and jitter.
    embedding: numbers in an appearance embedding; 0 for motion only.
    noise: noise of the embedding, in its norms.
    walk: steps of a person's mean embedding per frame, in its norms.
    mixing: share of the person in front in the embedding of a hidden one.
    correlation: shared by jitter and noise of two frames of a person.
    simulations: simulations of each training sequence.
    judged: simulations of the held-out sequence.
  """

  sequences: tuple[str, ...] = (
    *('MOT17-02', 'MOT17-04', 'MOT17-05', 'MOT17-10', 'MOT17-11'),
  )
  held_out: str = 'MOT17-09'
  detector: Literal['standard', 'hard'] = 'standard'
  embedding: Annotated[int, harness.Allowed(0)] = 0
  noise: float = 1.0
  walk: Annotated[float, harness.Allowed(0)] = 0.0
  mixing: Annotated[float, harness.Allowed(0, 1)] = 0.0
  correlation: Annotated[float, harness.Allowed(0, 0.999)] = 0.0
  simulations: int = 4
  judged: int = 10

  def check(self) -> None:
    """Raises SettingsError if a sequence is repeated or also held out."""
    names = self.sequences
    if len(set(names)) < len(names) or self.held_out in names:
      raise harness.SettingsError(
        f'sequences={",".join(names)} and held_out={self.held_out}: name each '
        'sequence once, and hold out one that is not trained on.'
      )

  def simulated_detector(self) -> detections.Detector:
    """The simulated detector."""
    known = {'standard': detections.STANDARD, 'hard': detections.HARD}
    return known[self.detector]._replace(
      embedding_size=self.embedding,
      noise=self.noise,
      walk=self.walk,
      mixing=self.mixing,
      correlation=self.correlation,
    )

  def tuning_trials(self, train_on: list[scenes.Scene]) -> list[judging.Trial]:
    """One simulation of each training sequence, to tune rules on."""
    return judging.trials(train_on, self.simulated_detector(), [TUNING])

  def test_trials(self, held_out: scenes.Scene) -> list[judging.Trial]:
    """The simulations of the held-out sequence."""
    seeds = range(TEST, TEST + self.judged)
    return judging.trials([held_out], self.simulated_detector(), seeds)


def read(
  options: harness.Options,
) -> tuple[list[scenes.Scene], scenes.Scene, Any]:
  """Reads the training scenes, the held-out scene, and the data's source."""
  data = options.settings.data
  made_up = options.data_dir is None
  if made_up:
    length = 60 if options.preset == 'smoke' else 400
    held_out, *train_on = [scenes.make_up(i, length=length) for i in range(3)]
  else:
    held_out, *train_on = [
      scenes.read(options.data_dir, name)
      for name in (data.held_out, *data.sequences)
    ]
  source = scenes.source([*train_on, held_out], made_up=made_up)
  return train_on, held_out, source
