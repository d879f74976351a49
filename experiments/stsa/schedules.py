"""Decaying step sizes of the theorems, and of failing controls."""

from collections.abc import Sequence
from typing import NamedTuple

# c and k_0 of the step size c / (k + k_0).
SCALE, OFFSET = 2.0, 20.0


class Case(NamedTuple):
  """A problem with decaying step sizes.

  Attributes:
    name: name of the run and of its slope.
    title: label in plots.
    inner: number of inner sequences.
    main: scale, exponent and offset of the main step size.
    others: scale, exponent and offset of the inner step sizes.
    fast: whether the rate 1 / k is claimed and its conditions are checked.
    errors: errors whose slopes are reported; the first one is plotted.
  """

  name: str
  title: str
  inner: int
  main: tuple[float, float, float]
  others: tuple[float, float, float]
  fast: bool = False
  errors: tuple[str, ...] = ('sum',)


def cases(inner: Sequence[int]) -> list[Case]:
  """Lists all cases with decaying step sizes, controls last.

  Args:
    inner: numbers of strongly monotone inner sequences.

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
