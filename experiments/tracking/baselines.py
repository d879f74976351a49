"""Classical affinities for the tracker: overlap, and a likelihood."""

import numpy as np

from experiments.tracking import motion, tracker


def _no_memory(initial, confidence, embedding):
  del confidence, embedding
  return (), np.zeros(len(initial.gap))


def _keep_memory(memory, updates):
  del updates
  return memory


def overlap(noise: motion.Noise, *, min_overlap: float = 0.3) -> tracker.Model:
  """Overlap with the Kalman filter's prediction, minus `min_overlap`."""

  def affinity(candidates, memory):
    del memory
    overlaps = candidates.overlap()
    return overlaps - min_overlap, overlaps

  return tracker.Model(noise, affinity, _no_memory, _keep_memory)


def likelihood(
  noise: motion.Noise,
  *,
  match_score: float = 10.0,
  gap_decay: float = 0.5,
  confidence_weight: float = 1.0,
  cosine_weight: float = 0.0,
) -> tracker.Model:
  """A hand-made score: likelihood of the innovation, confidence, and gap.

      match_score - |innovation|^2 / 2
        - sum of log (deviation / deviation of a measurement)
        - gap_decay log(1 + gap) + confidence_weight confidence
        + cosine_weight (cosine of the embeddings)

  Args:
    noise: of the filter.
    match_score: constant of each match.
    gap_decay: cost of a gap.
    confidence_weight: of the detection's confidence.
    cosine_weight: of the embeddings' cosine, if there are embeddings.

  Returns:
    A model.
  """

  def affinity(candidates, memory):
    del memory
    predicted, frame = candidates.predicted, candidates.frame
    track, detection = candidates.track, candidates.detection
    cost = np.sum(np.log(candidates.deviation / noise.measured), -1)
    cost = cost + gap_decay * np.log1p(predicted.gap)
    scores = match_score - 0.5 * np.sum(candidates.innovation**2, -1)
    scores = scores - cost[track]
    scores += confidence_weight * frame.confidence[detection]
    if cosine_weight and frame.embedding.shape[1]:
      mean = predicted.embedding_sum
      mean = mean / (np.linalg.norm(mean, axis=1)[:, None] + 1e-6)
      cosine = np.sum(mean[track] * frame.embedding[detection], axis=1)
      scores += cosine_weight * cosine
    return scores, scores

  return tracker.Model(noise, affinity, _no_memory, _keep_memory)
