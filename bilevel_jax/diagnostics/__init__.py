"""Diagnostics: what can be measured about a run."""

from bilevel_jax.diagnostics._bilevel import (
  HypergradientDistance,
  feasibility,
  hypergradient,
  hypergradient_distance,
  lower_minimiser,
  penalty_gap,
)
from bilevel_jax.diagnostics._multi_objective import (
  MultiGradientBias,
  conflict_cosines,
  multi_gradient_bias,
  objective_weights,
  pareto_stationarity,
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
  'MultiGradientBias',
  'auxiliaries',
  'check_finite',
  'conflict_cosines',
  'counts',
  'feasibility',
  'hypergradient',
  'hypergradient_distance',
  'lower_minimiser',
  'multi_gradient_bias',
  'nonfinite',
  'objective_weights',
  'pareto_stationarity',
  'penalty_gap',
  'values',
]
