"""A dense-prediction toy: two heads that compete for a narrow trunk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.moco import problem as problems
from experiments.moco import tabular

SIDE, REACH = 7, 2  # Side of an image; pixels that a unit sees on each side.
WIDTH = 3  # Units of the trunk: each head needs two.
NOISE = 0.5  # Of the targets, whose variance without it is one.
TASKS = ('shade', 'edge')


def _windows(images: np.ndarray) -> np.ndarray:
  """Windows around the inner pixels, (images, pixels, window)."""
  size = 2 * REACH + 1
  windows = np.lib.stride_tricks.sliding_window_view(
    images, (size, size), axis=(1, 2)
  )
  return windows.reshape(len(images), -1, size * size)


def make_images(
  count: int = 2_500, seed: int = 0
) -> tuple[dict[str, Any], harness.Source]:
  """Draws images, a smooth shade plus white texture, and two maps of each.

  The first map is the mean of the window around a pixel. The second one is the
  absolute difference between the pixel and that mean.

  Args:
    count: number of images.
    seed: seed of the draw.

  Returns:
    The parts train, validation and test: windows (images, pixels, window) and
    targets (images, pixels, 2), standardised maps with noise. And their source.
  """
  rng = np.random.default_rng(seed)
  waves = rng.normal(size=(count, 2, 2))
  phase = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
  rows, columns = np.meshgrid(*(np.arange(SIDE),) * 2, indexing='ij')
  angle = 0.5 * (waves[:, :1, :1] * rows + waves[:, 1:, :1] * columns)
  images = np.sin(angle + phase) + 0.5 * rng.normal(size=(count, SIDE, SIDE))
  windows = _windows(images)
  mean = windows.mean(axis=-1)
  edge = np.abs(windows[..., windows.shape[-1] // 2] - mean)
  targets = np.stack([mean, edge], axis=-1)
  train, validation = int(0.6 * count), int(0.8 * count)
  spread = targets[:train].reshape(-1, 2)
  targets = (targets - spread.mean(axis=0)) / spread.std(axis=0)
  targets = targets + NOISE * rng.normal(size=targets.shape)
  parts = {}
  for part, chosen in (
    ('train', slice(train)),
    ('validation', slice(train, validation)),
    ('test', slice(validation, None)),
  ):
    parts[part] = tuple(
      jnp.asarray(x[chosen], jnp.float32) for x in (windows, targets)
    )
  words = f'{count:,} synthetic images with a map of shades and one of edges'
  return parts, harness.identify_source(
    words, (images,), otherwise='synthetic images'
  )


def make_problem(data: dict[str, Any]) -> problems.Problem:
  """Makes the two regressions per pixel; a batch counts images."""
  flat = lambda rows: jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
  settings = dataclasses.replace(tabular.PRESETS['quick'], hidden=WIDTH)
  pixels = {part: flat(rows) for part, rows in data.items()}
  problem = tabular.regression_problem('dense', pixels, settings)
  return problem._replace(
    tasks=TASKS,
    batch=lambda key, data, size: flat(tabular.draw_rows(key, data, size)),
    data={**pixels, 'train': data['train']},
  )
