"""Test inputs that round differently, to show thresholds at the edge.

With `BILEVEL_JAX_PERTURB=1` in the environment, `np.random.default_rng` scales
its real numbers by a few float32 spacings and reverses their last axis. Tests
and references get the same inputs, so what they assert still holds; but every
product and sum rounds differently, as on another processor, and sums run over
permuted coordinates. A test that fails has a tolerance, or the library a
threshold, that fits the rounding of one machine.
"""

import numpy as np

# A few spacings of float32; in float64, all digits below the seventh change.
SCALE = 1 + 3 * 2.0**-23


def _reversed(drawn):
  return drawn[..., ::-1].copy() if np.ndim(drawn) else drawn


class Generator(np.random.Generator):
  """Draws perturbed real numbers; whole numbers and orders are as usual."""

  def normal(self, *args, **kwargs):
    """As `numpy.random.Generator.normal`."""
    return _reversed(SCALE * super().normal(*args, **kwargs))

  def standard_normal(self, *args, **kwargs):
    """As `numpy.random.Generator.standard_normal`."""
    return _reversed(SCALE * super().standard_normal(*args, **kwargs))

  def uniform(self, *args, **kwargs):
    """As `numpy.random.Generator.uniform`."""
    return _reversed(SCALE * super().uniform(*args, **kwargs))

  def dirichlet(self, *args, **kwargs):
    """As `numpy.random.Generator.dirichlet`; the sums stay one."""
    return _reversed(super().dirichlet(*args, **kwargs))


def install() -> None:
  """Replaces `np.random.default_rng`, before tests are imported."""
  plain = np.random.default_rng
  np.random.default_rng = lambda seed=None: Generator(plain(seed).bit_generator)
