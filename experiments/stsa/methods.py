"""The stochastic bilevel methods that are compared, and the control."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import bilevel_jax as bj

INNER, TERMS = 10, 10
SERIES = 0.3  # Step of the Neumann series.
# Of VRBO: moves of y in an update, and updates between two fresh estimates.
VRBO_STEPS, VRBO_PERIOD = 3, 3
# Of PZOBO: one is too noisy a response of a hundred numbers.
DIRECTIONS = 4


class Making(NamedTuple):
  """What a method is made of.

  Attributes:
    problem: the losses; `batch['upper']` and `batch['lower']` are the numbers
      of the fixed batches that they see, drawn apart: the product of an upper
      and a lower term would else be biased.
    upper: step size of the upper variable, a schedule.
    lower: step size of the lower variable, a schedule.
    series: step of the Neumann series.
    batches: how many fixed batches the upper and the lower loss have.
    curvature: the least of the lower loss.
    progress: count -> share of the run that is done, for penalties that rise
      and memories that shorten.
  """

  problem: bj.BilevelProblem
  upper: Callable[[Any], Any]
  lower: Callable[[Any], Any]
  series: float
  batches: tuple[int, int]
  curvature: float
  progress: Callable[[Any], Any]


def draws_at(first: int):
  """The batch of inner step t, from the drawn numbers `first` and on."""
  pick = lambda batch, name, t: batch[f'{name}_more'][first + t]
  return lambda batch, t: (
    batch | {n: pick(batch, n, t) for n in ('upper', 'lower')}
  )


_inner, _linear = draws_at(0), draws_at(INNER)
DRAWS = INNER + TERMS


def _sgd(making):
  return {'upper': optax.sgd(making.upper), 'lower': optax.sgd(making.lower)}


def _series(making):
  return {
    'terms': TERMS,
    'step_size': making.series,
    'linear_batch': _linear,
    **_sgd(making),
  }


def _loop(optimiser, steps=INNER):
  return bj.Sequence(optimiser, steps=steps, batch_at=_inner)


def _looped(given):
  return given | {'lower': _loop(given['lower'])}


def _decay(making, power=2 / 3):
  # As steps that fall with the power 1/3 ask: here with the share done.
  return lambda count: jnp.minimum(1.0, (1.0 + count) ** -power)


def _direct(making):
  """The lower gradient, and the upper one as if y did not depend on x."""
  problem = making.problem
  above = lambda p, b: problem.upper(p.upper, p.lower, b)
  return bj.descend(
    bj.lower_gradient(problem),
    bj.gradient(above, name='upper', of='upper'),
    **_sgd(making),
  )


def _penalty(making, last=100.0):
  return lambda count: 1 + (last - 1) * making.progress(count)


def _vrbo(making):
  given = _series(making)
  return bj.solvers.vrbo(
    making.problem,
    period=VRBO_PERIOD,
    # A batch is one fixed batch, the first estimate's like all others.
    large_batch=lambda batch: _inner(batch, 0),
    **given | {'lower': _loop(given['lower'], VRBO_STEPS)},
  )


METHODS: dict[str, Callable[[Making], Any]] = {
  'control/direct': _direct,
  'soba': lambda m: bj.soba(m.problem, **_sgd(m)),
  'ma_soba': lambda m: bj.solvers.ma_soba(m.problem, averaging=0.1, **_sgd(m)),
  'saba': lambda m: bj.saba(
    m.problem,
    parts=m.batches,
    index=lambda b: jnp.stack([b['upper'], b['lower']]),
    **_sgd(m),
  ),
  'bsa': lambda m: bj.solvers.bsa(m.problem, key=0, **_looped(_series(m))),
  'ttsa': lambda m: bj.solvers.ttsa(m.problem, key=0, **_series(m)),
  'stocbio': lambda m: bj.solvers.stocbio(m.problem, **_looped(_series(m))),
  'alset': lambda m: bj.solvers.alset(m.problem, **_series(m)),
  'amigo': lambda m: bj.solvers.amigo(m.problem, **_looped(_series(m))),
  'sustain': lambda m: bj.solvers.sustain(
    m.problem, decay=_decay(m), key=0, **_series(m)
  ),
  'mrbo': lambda m: bj.solvers.mrbo(m.problem, decay=_decay(m), **_series(m)),
  'vrbo': _vrbo,
  'stable': lambda m: bj.solvers.stable(
    m.problem, decay=_decay(m), least_curvature=m.curvature, **_sgd(m)
  ),
  'pzobo': lambda m: bj.solvers.pzobo(
    m.problem,
    smoothing=0.1,
    directions=DIRECTIONS,
    key=0,
    **_looped(_sgd(m)),
  ),
  'f2sa': lambda m: bj.f2sa(m.problem, penalty=_penalty(m), **_looped(_sgd(m))),
  'meha': lambda m: bj.meha(
    m.problem, penalty=_penalty(m, 30.0), proximity=10.0, **_sgd(m)
  ),
}


# A whole Hessian of more numbers than this is not written down.
LARGEST_HESSIAN = 1_000


def affordable(name: str, size: int) -> bool:
  """Whether a method can run with so many numbers in the lower variable."""
  return name != 'stable' or size <= LARGEST_HESSIAN


def calls_of(counts: dict[str, Any], size: int) -> Any:
  """Calls on a batch: a gradient or a product is one, a Hessian `size`."""
  weight = lambda name: size if name.startswith('hessians') else 1
  return sum(weight(name) * count for name, count in counts.items())


def expected_calls(name: str, size: int) -> float:
  """Calls of one step; of a random series, on average."""
  middle = 1 + (TERMS - 1) / 2
  return {
    'control/direct': 2,
    'soba': 3,
    'ma_soba': 3,
    'saba': 3,
    'bsa': INNER + 1 + middle,
    'ttsa': 2 + middle,
    'stocbio': INNER + 1 + TERMS + 1,
    'alset': 1 + 1 + TERMS + 1,
    'amigo': INNER + 1 + TERMS + 1,
    'sustain': 2 * (2 + middle),
    'mrbo': 2 * (2 + TERMS + 1),
    # Twice in each move but the fresh one of a period.
    'vrbo': (2 * VRBO_STEPS - 1 / VRBO_PERIOD) * (2 + TERMS + 1),
    'stable': 2 + 2 * size,
    'pzobo': 1 + (1 + DIRECTIONS) * INNER,
    'f2sa': 3 * (INNER + 1),
    'meha': 4,
  }[name]


def without_correction(making: Making) -> Any:
  """SUSTAIN whose estimates are the fresh ones, at the same calls and steps."""
  return bj.solvers.sustain(making.problem, decay=1.0, key=0, **_series(making))
