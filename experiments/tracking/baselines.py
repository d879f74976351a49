"""Classical affinities, for the same tracker: overlap, and a likelihood."""

import numpy as np

from experiments.tracking import motion, tracker


def _nothing(begun, sure, looks):
  del sure, looks
  return (), np.zeros(len(begun.gap))


def _kept(memory, given):
  del given
  return memory


def overlap(noise: motion.Noise, *, least: float = 0.3) -> tracker.Model:
  """The overlap with a Kalman filter's prediction, above a least one."""

  def affinity(near, memory):
    del memory
    found = near.overlap()
    return found - least, found

  return tracker.Model(noise, affinity, _nothing, _kept)


def likelihood(
  noise: motion.Noise,
  *,
  worth: float = 10.0,
  fading: float = 0.5,
  sure: float = 1.0,
  cosine: float = 0.0,
) -> tracker.Model:
  """A hand-made score: likelihood of the innovation, confidence, and gap.

      worth - |innovation|^2 / 2
        - sum of log (deviation / deviation of a measurement)
        - fading log(1 + gap) + sure * confidence + cosine * cosine of looks

  Args:
    noise: of the filter.
    worth: of a match in itself.
    fading: cost of a gap.
    sure: weight of the confidence.
    cosine: weight of the looks, if there are any.

  Returns:
    A model.
  """
  weigh = sure

  def affinity(near, memory):
    del memory
    moved, looks = near.moved, near.frame.looks
    wide = np.sum(np.log(near.deviation / noise.measured), -1)
    lost = wide + fading * np.log1p(moved.gap)
    found = worth - 0.5 * np.sum(near.off**2, -1) - lost[near.one]
    found += weigh * near.frame.sure[near.two]
    if cosine and looks.shape[1]:
      look = moved.look / (np.linalg.norm(moved.look, axis=1)[:, None] + 1e-6)
      found += cosine * np.sum(look[near.one] * looks[near.two], axis=1)
    return found, found

  return tracker.Model(noise, affinity, _nothing, _kept)
