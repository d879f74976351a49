"""Falling steps: those that a theorem is about, and controls that must fail."""

from collections.abc import Sequence
from typing import NamedTuple

# c, k_0 of the steps c / (k + k_0).
SCALE, OFFSET = 2.0, 20.0


class Case(NamedTuple):
  """A problem with falling steps.

  Attributes:
    name: of the run, and of its slope.
    title: in a plot.
    inner: number of inner sequences.
    main: scale, exponent and offset of the main sequence's step.
    others: likewise, of the inner ones.
    fast: whether the rate 1 / k is claimed, so that its conditions must hold.
    errors: whose slopes are reported, the first of them in a plot.
  """

  name: str
  title: str
  inner: int
  main: tuple[float, float, float]
  others: tuple[float, float, float]
  fast: bool = False
  errors: tuple[str, ...] = ('sum',)


def cases(inner: Sequence[int]) -> list[Case]:
  """All runs with falling steps, controls last.

  Args:
    inner: numbers of inner sequences, strongly monotone.

  Returns:
    The cases.
  """
  single = (SCALE, 1.0, OFFSET)
  slow = lambda exponent: (1.0, exponent, OFFSET)
  small, constant = (0.3, 1.0, OFFSET), (0.1, 0.0, OFFSET)
  two_timescale = Case(
    *('two_timescale', 'two timescales', 3, single, slow(2 / 3)),
    errors=('sum', 'main', 'inner'),
  )
  ttsa = Case(
    *('ttsa', 'TTSA, main sequence', 1, slow(0.6), slow(0.4)),
    errors=('main', 'inner'),
  )
  return [
    *(
      Case(monotone(n), f'N = {n}', n, single, single, fast=True) for n in inner
    ),
    two_timescale,
    ttsa,
    *(
      Case(f'control/{name}', f'control: {title}', 1, steps, steps)
      for name, title, steps in (
        ('small_c', 'c = 0.3', small),
        ('two_thirds', 'all steps k^-2/3', slow(2 / 3)),
        ('constant_step', 'constant step', constant),
      )
    ),
  ]


def monotone(inner: int) -> str:
  """The name of the strongly monotone case with N inner sequences."""
  return f'strongly_monotone/inner={inner}'
