"""Ground truth to learn from: MOT17 sequences, or made-up walks."""

from typing import NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.tracking import mot_files


class Scene(NamedTuple):
  """A sequence with its truth."""

  truth: mot_files.Boxes
  info: mot_files.Info


def read(data_dir: files.Path | None, name: str) -> Scene:
  """Reads a sequence of MOTChallenge by its name; see `mot_files`."""
  folder = mot_files.find_sequence(data_dir, name)
  truth = mot_files.read_truth(folder)
  return Scene(truth, mot_files.read_info(folder, truth))


def source(scenes: list[Scene], *, made_up: bool) -> harness.Source:
  """Describes the trajectories, whose detections are simulated."""
  names = ', '.join(scene.info.name for scene in scenes)
  kind = 'made-up walks' if made_up else f'trajectories of {names}'
  return harness.identify_source(
    f'{kind}; detections are simulated',
    [scene.truth.boxes for scene in scenes],
    otherwise='made-up walks' if made_up else 'simulated detections',
  )


def make_up(
  seed: int, *, length: int = 200, people: int = 12, name: str = ''
) -> Scene:
  """Simulates people who walk through a picture and occlude each other.

  Each person enters at a side and walks with a drifting velocity; lower feet
  mean a taller box. Visibility is the share of a box that no nearer box covers,
  on a grid of points. A person who leaves is replaced by a new identity.

  Args:
    seed: of the walks.
    length: frames.
    people: per frame.
    name: of the sequence.

  Returns:
    A `Scene` of 960 x 540 pixels.
  """
  rng = np.random.default_rng([seed, 7])
  width, high = 960, 540
  at = np.c_[rng.uniform(0, width, people), rng.uniform(260, 500, people)]
  speed = np.c_[rng.normal(0, 3, people), rng.normal(0, 0.6, people)]
  ids = np.arange(1, people + 1)
  share = rng.uniform(0.9, 1.1, people)
  rows = []
  grid = np.stack(np.meshgrid(np.arange(6), np.arange(12)), -1) + 0.5
  grid /= (6, 12)
  for frame in range(1, length + 1):
    speed += rng.normal(size=speed.shape) * (0.15, 0.04)
    at += speed
    gone = (np.abs(at[:, 0] - width / 2) > width / 2) | (
      np.abs(at[:, 1] - 380) > 140
    )
    count = int(gone.sum())
    side = rng.random(count) < 0.5
    at[gone] = np.c_[np.where(side, 0, width), rng.uniform(260, 500, count)]
    pace = np.where(side, 1, -1) * rng.uniform(1.5, 5, count)
    speed[gone] = np.c_[pace, rng.normal(0, 0.4, count)]
    ids[gone] = ids.max() + 1 + np.arange(count)
    tall = share * (60 + 0.35 * (at[:, 1] - 260))
    size = np.c_[0.4 * tall, tall]
    boxes = np.c_[at - size * (0.5, 1.0), size]
    points = boxes[:, None, None, :2] + grid * size[:, None, None]
    visible = np.ones(points.shape[:3], bool)
    for i in range(people):
      inside = (points >= boxes[i, :2]) & (points <= boxes[i, :2] + size[i])
      hides = at[i, 1] > at[:, 1]
      visible &= ~(inside.all(-1) & hides[:, None, None])
    rows.append(np.c_[np.full(people, frame), ids, boxes, visible.mean((1, 2))])
  table = np.concatenate(rows)
  truth = mot_files.make(
    table[:, 0], table[:, 2:6], ids=table[:, 1], visibilities=table[:, 6]
  )
  info = mot_files.Info(name or f'walks-{seed}', length, width, high, 25.0)
  return Scene(truth, info)
