"""Images: digits in MNIST's format, wrong labels and small classifiers."""

from experiments.vision.classifiers import (
  accuracy,
  cross_entropy,
  make_classifier,
)
from experiments.vision.digits import (
  DigitPart,
  load_digits,
  pollute_labels,
)

__all__ = [
  'DigitPart',
  'accuracy',
  'cross_entropy',
  'load_digits',
  'make_classifier',
  'pollute_labels',
]
