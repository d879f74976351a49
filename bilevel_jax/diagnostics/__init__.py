"""Diagnostics: what can be measured about a run."""

from bilevel_jax.diagnostics._bilevel import (
  HypergradientDistance,
  feasibility,
  hypergradient,
  hypergradient_distance,
  lower_minimiser,
  penalty_gap,
)
from bilevel_jax.diagnostics._state import (
  auxiliaries,
  check_finite,
  counts,
  nonfinite,
  values,
)

__all__ = [
  'HypergradientDistance',
  'auxiliaries',
  'check_finite',
  'counts',
  'feasibility',
  'hypergradient',
  'hypergradient_distance',
  'lower_minimiser',
  'nonfinite',
  'penalty_gap',
  'values',
]
