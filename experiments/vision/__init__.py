"""Images: `digits` in MNIST's format with wrong labels, and `classifiers`."""

from experiments.vision.digits import (
  SIDE,
  DigitPart,
  load_digits,
  pollute_labels,
)

__all__ = ['SIDE', 'DigitPart', 'load_digits', 'pollute_labels']
