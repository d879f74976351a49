"""Diagnostics: what can be measured about a run."""

from bilevel_jax.diagnostics._bilevel import (
  HypergradientDistance,
  feasibility,
  hypergradient,
  hypergradient_distance,
  lower_minimiser,
  penalty_gap,
)
from bilevel_jax.diagnostics._diagnose import Diagnosis, diagnose
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
  evaluated,
  nonfinite,
  outputs,
  values,
)
from bilevel_jax.diagnostics._suggest import Suggestion, suggest

__all__ = [
  'Diagnosis',
  'HypergradientDistance',
  'MultiGradientBias',
  'Suggestion',
  'auxiliaries',
  'check_finite',
  'conflict_cosines',
  'counts',
  'diagnose',
  'evaluated',
  'feasibility',
  'hypergradient',
  'hypergradient_distance',
  'lower_minimiser',
  'multi_gradient_bias',
  'nonfinite',
  'objective_weights',
  'outputs',
  'pareto_stationarity',
  'penalty_gap',
  'suggest',
  'values',
]
