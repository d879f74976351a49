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
from bilevel_jax.diagnostics._suggest import (
  Diagnosis,
  Suggestion,
  diagnose,
  suggest,
)

__all__ = [
  'Diagnosis',
  'HypergradientDistance',
  'Suggestion',
  'auxiliaries',
  'check_finite',
  'counts',
  'diagnose',
  'feasibility',
  'hypergradient',
  'hypergradient_distance',
  'lower_minimiser',
  'nonfinite',
  'penalty_gap',
  'suggest',
  'values',
]
