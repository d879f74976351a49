"""Falling steps: those that a theorem is about, and controls that must fail."""

from collections.abc import Sequence
from typing import NamedTuple

# c, k_0 of the steps c / (k + k_0).
SCALE, OFFSET = 2.0, 20.0


class Case(NamedTuple):
  """A problem with falling steps.

  Attributes:
    name: of the run.
    metric: the stable name of its slope.
    inner: number of inner sequences.
    main: scale, exponent and offset of the main sequence's step.
    others: likewise, of the inner ones.
    fast: whether the rate 1 / k is claimed, so that its conditions must hold.
    error: whose slope it is.
  """

  name: str
  metric: str
  inner: int
  main: tuple[float, float, float]
  others: tuple[float, float, float]
  fast: bool
  error: str = 'sum'


def cases(inner: Sequence[int]) -> list[Case]:
  """All runs with falling steps, controls last.

  Args:
    inner: numbers of inner sequences, strongly monotone.

  Returns:
    The cases.
  """
  single = (SCALE, 1.0, OFFSET)
  found = [
    Case(
      f'monotone_{n}', f'slope/strongly_monotone/n{n}', n, single, single, True
    )
    for n in inner
  ]
  slow = lambda exponent: (1.0, exponent, OFFSET)
  small, constant = (0.3, 1.0, OFFSET), (0.1, 0.0, OFFSET)
  others = (
    ('two_timescale', 'slope/two_timescale', 3, single, slow(2 / 3)),
    ('ttsa', 'slope/ttsa_main', 1, slow(0.6), slow(0.4)),
    ('small_c', 'control/small_c', 1, small, small),
    ('two_thirds', 'control/two_thirds', 1, slow(2 / 3), slow(2 / 3)),
    ('constant_step', 'control/constant_step', 1, constant, constant),
  )
  for case in others:
    error = 'main' if case[0] == 'ttsa' else 'sum'
    found.append(Case(*case, fast=False, error=error))
  return found


TITLES = {
  'two_timescale': 'two timescales',
  'ttsa': 'TTSA, main sequence',
  'small_c': 'control: c = 0.3',
  'two_thirds': 'control: all steps k^-2/3',
  'constant_step': 'control: constant step',
}
