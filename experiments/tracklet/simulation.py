"""What trackers are trained, tuned and judged on: simulated detections."""

import dataclasses
from typing import Annotated, Any, Literal

from experiments import harness
from experiments.tracking import detections, judging, scenes

# What the published numbers are of.
PUBLISHED = 'MOT17 test, public detections'
TRAINING, TUNING, HELD = 1_000, 2_000, 0  # Seeds of simulations.


@dataclasses.dataclass(frozen=True)
class Data:
  """Sequences, and the detections that are simulated of them.

  Attributes:
    sequences: to train and to tune on.
    held_out: to judge on; MOT17-09 is the paper's for validation.
    detector: standard, or hard: more misses, false boxes and jitter.
    embedding: numbers of an identity feature; 0 for motion alone.
    noise: of those, about its norm.
    simulations: of the training sequences.
    judged: simulations of the sequence that is held out.
  """

  sequences: tuple[str, ...] = (
    *('MOT17-02', 'MOT17-04', 'MOT17-05', 'MOT17-10', 'MOT17-11'),
  )
  held_out: str = 'MOT17-09'
  detector: Literal['standard', 'hard'] = 'standard'
  embedding: Annotated[int, harness.Allowed(0)] = 0
  noise: float = 1.0
  simulations: int = 4
  judged: int = 10

  def check(self) -> None:
    """Raises SettingsError for sequences that do not go together."""
    names = self.sequences
    if len(set(names)) < len(names) or self.held_out in names:
      raise harness.SettingsError(
        f'sequences={",".join(names)} and held_out={self.held_out}: name each '
        'sequence once, and judge on one that is not trained on.'
      )

  def simulated_detector(self) -> detections.Detector:
    """The simulated detector."""
    known = {'standard': detections.STANDARD, 'hard': detections.HARD}
    return known[self.detector]._replace(looks=self.embedding, noise=self.noise)

  def tuning_trials(self, train_on: list[scenes.Scene]) -> list[judging.Trial]:
    """The simulation on which rules of trackers are tuned."""
    return judging.trials(train_on, self.simulated_detector(), [TUNING])

  def held_trials(self, held_out: scenes.Scene) -> list[judging.Trial]:
    """The simulations on which trackers are judged."""
    seeds = range(HELD, HELD + self.judged)
    return judging.trials([held_out], self.simulated_detector(), seeds)


def read(
  options: harness.Options,
) -> tuple[list[scenes.Scene], scenes.Scene, Any]:
  """The training scenes, the one that is held out, and what the data are."""
  data = options.settings.data
  made_up = options.data_dir is None
  if made_up:
    long = 60 if options.preset == 'smoke' else 400
    held_out, *train_on = [scenes.make_up(i, length=long) for i in range(3)]
  else:
    held_out, *train_on = [
      scenes.read(options.data_dir, name)
      for name in (data.held_out, *data.sequences)
    ]
  source = scenes.source([*train_on, held_out], made_up=made_up)
  return train_on, held_out, source
