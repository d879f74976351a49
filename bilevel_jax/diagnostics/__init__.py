"""Diagnostics: settings before a run, measurements during and after it."""

from bilevel_jax.diagnostics._bilevel import (
  HypergradientDistance,
  feasibility,
  hypergradient,
  hypergradient_distance,
  lower_minimiser,
  penalty_gap,
)
from bilevel_jax.diagnostics._diagnose import diagnose
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
from bilevel_jax.diagnostics._suggest import suggest
from bilevel_jax.diagnostics._suggestion import Suggestion
from bilevel_jax.diagnostics._verdicts import Diagnosis
from bilevel_jax.diagnostics._walk import WalkSettings

__all__ = [
  'Diagnosis',
  'HypergradientDistance',
  'MultiGradientBias',
  'Suggestion',
  'WalkSettings',
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
