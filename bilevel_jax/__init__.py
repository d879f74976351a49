"""Nested, multi-objective and coupled optimisation, as optax transformations.

A solver is `optax.chain(oracle, link, ...)`: where optax's `update` takes
gradients, a solver's takes a batch.
"""

from bilevel_jax._sequences import apply_updates
from bilevel_jax.aggregators import ScaleByPenaltyState, scale_by_penalty
from bilevel_jax.combinators import (
  AuxiliaryState,
  alternate,
  auxiliary,
  per_sequence,
  repeat,
)
from bilevel_jax.diagnostics import (
  HypergradientDistance,
  auxiliaries,
  check_finite,
  counts,
  feasibility,
  hypergradient,
  hypergradient_distance,
  lower_minimiser,
  nonfinite,
  penalty_gap,
  values,
)
from bilevel_jax.evaluation import (
  StormState,
  accumulate,
  mean_over,
  split_batch,
  storm,
)
from bilevel_jax.oracles import (
  OracleState,
  gradient,
  gradient_norm,
  oracle,
  value_gap,
)
from bilevel_jax.projections import (
  Projection,
  ProjectState,
  check_set,
  project,
)
from bilevel_jax.solvers import g_pbgd, v_pbgd
from bilevel_jax.types import (
  BilevelParams,
  BilevelProblem,
  Jacobian,
  Loss,
  ScalarOrSchedule,
  sequences,
)

__version__ = '0.1.0'

__all__ = [
  'AuxiliaryState',
  'BilevelParams',
  'BilevelProblem',
  'HypergradientDistance',
  'Jacobian',
  'Loss',
  'OracleState',
  'ProjectState',
  'Projection',
  'ScalarOrSchedule',
  'ScaleByPenaltyState',
  'StormState',
  'accumulate',
  'alternate',
  'apply_updates',
  'auxiliaries',
  'auxiliary',
  'check_finite',
  'check_set',
  'counts',
  'feasibility',
  'g_pbgd',
  'gradient',
  'gradient_norm',
  'hypergradient',
  'hypergradient_distance',
  'lower_minimiser',
  'mean_over',
  'nonfinite',
  'oracle',
  'penalty_gap',
  'per_sequence',
  'project',
  'repeat',
  'scale_by_penalty',
  'sequences',
  'split_batch',
  'storm',
  'v_pbgd',
  'value_gap',
  'values',
]
