"""Stochastic bilevel methods of the comparison, and the control."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import bilevel_jax as bj

INNER, TERMS = 10, 10
SERIES = 0.3  # Step size of the Neumann series.
VRBO_STEPS, VRBO_PERIOD = 3, 3  # Lower steps; updates between fresh estimates.
DIRECTIONS = 4  # Of PZOBO; a single one is too noisy in 100 dimensions.


class Arguments(NamedTuple):
  """Arguments of all methods.

  Attributes:
    problem: the losses; `batch['upper']` and `batch['lower']` are indices of
      fixed batches, drawn independently to avoid bias in products of upper and
      lower terms.
    upper: schedule of the upper step size.
    lower: schedule of the lower step size.
    series: step size of the Neumann series.
    batches: numbers of fixed batches of the upper and the lower loss.
    curvature: smallest curvature of the lower loss.
    progress: count -> completed fraction of the run, for rising penalties.
  """

  problem: bj.BilevelProblem
  upper: Callable[[Any], Any]
  lower: Callable[[Any], Any]
  series: float
  batches: tuple[int, int]
  curvature: float
  progress: Callable[[Any], Any]


def inner_batch(first: int):
  """Selects the batch of inner step t, from the index `first` up."""
  pick = lambda batch, name, t: batch[f'{name}_more'][first + t]
  return lambda batch, t: (
    batch | {n: pick(batch, n, t) for n in ('upper', 'lower')}
  )


_inner, _linear = inner_batch(0), inner_batch(INNER)
DRAWS = INNER + TERMS


def _sgd(args):
  return {'upper': optax.sgd(args.upper), 'lower': optax.sgd(args.lower)}


def _series(args):
  return {
    'terms': TERMS,
    'step_size': args.series,
    'linear_batch': _linear,
    **_sgd(args),
  }


def _loop(optimiser, steps=INNER):
  return bj.Sequence(optimiser, steps=steps, batch_at=_inner)


def _looped(settings):
  return settings | {'lower': _loop(settings['lower'])}


def _decay(power=2 / 3):
  # The decay for step sizes k^-1/3.
  return lambda count: jnp.minimum(1.0, (1.0 + count) ** -power)


def _direct(args):
  """The control: gradient steps on both levels without the implicit term."""
  problem = args.problem
  above = lambda p, b: problem.upper(p.upper, p.lower, b)
  return bj.descend(
    bj.lower_gradient(problem),
    bj.gradient(above, name='upper', of='upper'),
    **_sgd(args),
  )


def _penalty(args, last=100.0):
  return lambda count: 1 + (last - 1) * args.progress(count)


def _vrbo(args):
  settings = _series(args)
  return bj.solvers.vrbo(
    args.problem,
    period=VRBO_PERIOD,
    # Large batches are fixed batches too.
    large_batch=lambda batch: _inner(batch, 0),
    **settings | {'lower': _loop(settings['lower'], VRBO_STEPS)},
  )


MEANINGS = {
  'control/direct': 'control: the upper gradient without the implicit term.',
}
METHODS: dict[str, Callable[[Arguments], Any]] = {
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
    m.problem, decay=_decay(), key=0, **_series(m)
  ),
  'mrbo': lambda m: bj.solvers.mrbo(m.problem, decay=_decay(), **_series(m)),
  'vrbo': _vrbo,
  'stable': lambda m: bj.solvers.stable(
    m.problem, decay=_decay(), least_curvature=m.curvature, **_sgd(m)
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


# Largest dimension for methods with a full Hessian.
LARGEST_HESSIAN = 1_000


def affordable(name: str, size: int) -> bool:
  """Whether a method can run with a lower variable of this dimension."""
  return name != 'stable' or size <= LARGEST_HESSIAN


def count_calls(counts: dict[str, Any], size: int) -> Any:
  """Calls from `bj.counts`: gradients and products are 1, Hessians `size`."""
  weight = lambda name: size if name.startswith('hessians') else 1
  return sum(weight(name) * count for name, count in counts.items())


def expected_calls(name: str, size: int) -> float:
  """Expected calls per step."""
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
    # Two evaluations per lower step, except for fresh estimates.
    'vrbo': (2 * VRBO_STEPS - 1 / VRBO_PERIOD) * (2 + TERMS + 1),
    'stable': 2 + 2 * size,
    'pzobo': 1 + (1 + DIRECTIONS) * INNER,
    'f2sa': 3 * (INNER + 1),
    'meha': 4,
  }[name]


def without_correction(args: Arguments) -> Any:
  """SUSTAIN without its correction, at equal calls and steps."""
  return bj.solvers.sustain(args.problem, decay=1.0, key=0, **_series(args))
