"""Test inputs with other rounding, to find tolerances that are too tight.

With `BILEVEL_JAX_PERTURB=1` in the environment, `np.random.default_rng` scales
its real numbers by a few float32 spacings, and `reordered` reverses sums of a
problem. Tests and references get the same inputs, so their assertions still
hold, but every product and sum rounds differently, as on another processor. If
a test fails, its tolerance, or a threshold of the library, only fits the
rounding of one machine.
"""

import os

import numpy as np

ACTIVE = os.environ.get('BILEVEL_JAX_PERTURB') == '1'
# A few spacings of float32; in float64, all digits below the seventh change.
SCALE = 1 + 3 * 2.0**-23


class Generator(np.random.Generator):
  """Draws scaled real numbers; integers and probabilities do not change."""

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
  """Reverses an array along an axis whose order is irrelevant."""
  return np.flip(array, axis).copy() if ACTIVE else array


def install() -> None:
  """Replaces `np.random.default_rng`, before tests are imported."""
  plain = np.random.default_rng
  np.random.default_rng = lambda seed=None: Generator(plain(seed).bit_generator)
