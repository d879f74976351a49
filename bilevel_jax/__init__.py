"""Nested, multi-objective and coupled optimisation, as optax transformations.

A solver is `optax.chain(oracle, link, ...)`: where optax's `update` takes
gradients, a solver's takes a batch.
"""

from bilevel_jax._sequences import apply_updates
from bilevel_jax.aggregators import (
  DynamicBarrierState,
  ScaleByPenaltyState,
  dynamic_barrier,
  scale_by_penalty,
)
from bilevel_jax.combinators import (
  AuxiliaryState,
  RepeatDrawnState,
  alternate,
  auxiliary,
  per_sequence,
  repeat,
  repeat_drawn,
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
  ProxLinearState,
  gradient,
  gradient_norm,
  oracle,
  prox_linear,
  unrolled,
  value_gap,
)
from bilevel_jax.projections import Projection, ProjectState, check_set, project
from bilevel_jax.solvers import (
  bome,
  f2sa,
  g_pbgd,
  prox_linear_pbgd,
  rhg,
  t_rhg,
  v_pbgd,
  v_pbsgd,
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
  'AuxiliaryState',
  'BilevelParams',
  'BilevelProblem',
  'DynamicBarrierState',
  'HypergradientDistance',
  'Jacobian',
  'Loss',
  'OracleState',
  'ProjectState',
  'Projection',
  'ProxLinearState',
  'RepeatDrawnState',
  'ScalarOrSchedule',
  'ScaleByPenaltyState',
  'StormState',
  'accumulate',
  'alternate',
  'apply_updates',
  'auxiliaries',
  'auxiliary',
  'bome',
  'check_finite',
  'check_set',
  'counts',
  'dynamic_barrier',
  'f2sa',
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
  'prox_linear',
  'prox_linear_pbgd',
  'repeat',
  'repeat_drawn',
  'rhg',
  'scale_by_penalty',
  'sequences',
  'split_batch',
  'storm',
  't_rhg',
  'unrolled',
  'v_pbgd',
  'v_pbsgd',
  'value_gap',
  'values',
]
