"""Test inputs that round differently, to show thresholds at the edge.

With `BILEVEL_JAX_PERTURB=1` in the environment, `np.random.default_rng` scales
its real numbers by a few spacings of float32, and `reordered` reverses what a
problem sums over. Tests and references get the same inputs, so what they assert
still holds; but every product and sum rounds differently, as on another
processor. A test that fails has a tolerance, or the library a threshold, that
fits the rounding of one machine.
"""

import os

import numpy as np

ACTIVE = os.environ.get('BILEVEL_JAX_PERTURB') == '1'
# A few spacings of float32; in float64, all digits below the seventh change.
SCALE = 1 + 3 * 2.0**-23


class Generator(np.random.Generator):
  """Draws scaled real numbers; whole numbers and probabilities are as usual."""

  def normal(self, *args, **kwargs):
    """As `numpy.random.Generator.normal`."""
    return SCALE * super().normal(*args, **kwargs)

  def standard_normal(self, *args, **kwargs):
    """As `numpy.random.Generator.standard_normal`."""
    return SCALE * super().standard_normal(*args, **kwargs)

  def uniform(self, *args, **kwargs):
    """As `numpy.random.Generator.uniform`."""
    return SCALE * super().uniform(*args, **kwargs)


def reordered(array: np.ndarray, axis: int) -> np.ndarray:
  """The array, reversed along an axis whose order does not count."""
  return np.flip(array, axis).copy() if ACTIVE else array


def install() -> None:
  """Replaces `np.random.default_rng`, before tests are imported."""
  plain = np.random.default_rng
  np.random.default_rng = lambda seed=None: Generator(plain(seed).bit_generator)
