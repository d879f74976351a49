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
from bilevel_jax.evaluation import accumulate, mean_over, split_batch
from bilevel_jax.linear_solvers import (
  LinearSolver,
  conjugate_gradient,
  dense_solve,
  gmres,
  neumann,
  nystrom,
  random_neumann,
)
from bilevel_jax.oracles import (
  ImplicitState,
  OracleState,
  gradient,
  gradient_norm,
  implicit,
  oracle,
  value_gap,
)
from bilevel_jax.projections import (
  AffineFactors,
  AffineSet,
  LazyProjectionState,
  Projection,
  ProjectState,
  affine_factors,
  affine_operator_set,
  affine_set,
  check_set,
  consensus_set,
  lazy_projection,
  project,
)
from bilevel_jax.solvers import (
  EAipodPlan,
  aid_bilevel,
  aipod,
  e_aipod,
  e_aipod_plan,
  g_pbgd,
  v_pbgd,
)
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
  'AffineFactors',
  'AffineSet',
  'AuxiliaryState',
  'BilevelParams',
  'BilevelProblem',
  'EAipodPlan',
  'HypergradientDistance',
  'ImplicitState',
  'Jacobian',
  'LazyProjectionState',
  'LinearSolver',
  'Loss',
  'OracleState',
  'ProjectState',
  'Projection',
  'ScalarOrSchedule',
  'ScaleByPenaltyState',
  'accumulate',
  'affine_factors',
  'affine_operator_set',
  'affine_set',
  'aid_bilevel',
  'aipod',
  'alternate',
  'apply_updates',
  'auxiliaries',
  'auxiliary',
  'check_finite',
  'check_set',
  'conjugate_gradient',
  'consensus_set',
  'counts',
  'dense_solve',
  'e_aipod',
  'e_aipod_plan',
  'feasibility',
  'g_pbgd',
  'gmres',
  'gradient',
  'gradient_norm',
  'hypergradient',
  'hypergradient_distance',
  'implicit',
  'lazy_projection',
  'lower_minimiser',
  'mean_over',
  'neumann',
  'nonfinite',
  'nystrom',
  'oracle',
  'penalty_gap',
  'per_sequence',
  'project',
  'random_neumann',
  'repeat',
  'scale_by_penalty',
  'sequences',
  'split_batch',
  'v_pbgd',
  'value_gap',
  'values',
]
